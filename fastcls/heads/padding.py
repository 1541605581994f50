"""Does a head read the rows of padding? There a transformers encoder computes something, and a fast one gives zeros."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


class PaddingProbe:
    """Computes a module twice more at its first padded batch in eval mode, and compares the two answers.

    Between the two, other numbers stand in the rows of padding. An answer that differs depends on them. Only answers
    at padding itself may: those of shape (batch, seqlen, ...) or (batch * seqlen, ...).
    """

    def __init__(self) -> None:
        self._masks: list[Tensor] = []
        self._fills = False
        self._is_done = False

    def rows(self, states: Tensor, attention_mask: Tensor | None) -> Tensor:
        """The rows that an encoder gives a head, (batch, seqlen, hidden_size), where padding may be filled."""
        if self._is_done or attention_mask is None:
            return states
        kept = attention_mask != 0
        if not states.numel() or bool(kept.all()):
            return states
        kept = kept.to(states.device)
        self._masks.append(kept)
        if not self._fills:
            return states
        # Larger than all others, so that a maximum sees it too.
        return torch.where(kept[..., None], states, 2 * states.abs().amax((0, 1)) + 1)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], _output: object) -> None:
        """A forward hook.

        Raises:
            ValueError: the answer depends on the rows of padding.
        """
        masks, self._masks = self._masks, []
        # In training mode batch norms would count the batch again.
        if not masks or any(each.training for each in module.modules()):
            return
        answers: list[list[Any]] = []
        devices = {mask.device for mask in masks if mask.is_cuda}
        try:
            with torch.no_grad(), torch.random.fork_rng(devices):
                for self._fills in (False, True):
                    torch.manual_seed(0)
                    answers.append(tree_leaves(module.forward(*args, **kwargs)))
        finally:
            self._fills, self._masks = False, []
        if len(answers[0]) != len(answers[1]) or not all(map(_same, *answers, [masks] * len(answers[0]))):
            raise ValueError(
                "the head must leave padding out by the attention mask: its answer depends on the rows of padding, "
                "where fastcls gives zeros and computes nothing. Mask them, as a mean over kept tokens does, or give "
                "optimize_encoder check_padding=False if only answers at padding depend on them"
            )
        self._is_done = True


def _same(one: object, other: object, masks: Iterable[Tensor]) -> bool:
    """Whether two answers agree, outside of padding."""
    if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
        return not isinstance(one, (bool, int, float, str)) or one == other
    if one.shape != other.shape:
        return False
    for kept in masks:
        if one.shape[:2] == kept.shape:
            one, other = one[kept], other[kept]
            break
        if one.shape[:1] == (kept.numel(),):
            one, other = one[kept.flatten()], other[kept.flatten()]
            break
    return torch.equal(one.nan_to_num(), other.nan_to_num()) if one.is_floating_point() else torch.equal(one, other)
