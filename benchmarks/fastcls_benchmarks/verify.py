"""The answer is checked before it is timed: a fast wrong answer is worth nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .providers import EAGER, Forward, Model, Provider, baseline_of, own_copy
from .workloads import Batch


class Verdict(NamedTuple):
    """Whether a provider may be timed; if not, ``reason`` says why."""

    passed: bool
    difference: float | None
    reason: str = ""


class Reference:
    """The logits of the transformers model in float32 by its baseline, and how far from them a provider may be.

    In float32 the bound is the provider's own, for logits of about 1, which random weights give over the labels and
    over the vocabulary. In 16 bits it is twice the difference that transformers eager makes in the same dtype on the
    same batches: a provider need not be more exact than the usual way, and may not be cruder.
    """

    def __init__(self, model: Model, batches: Sequence[Batch]) -> None:
        self.batches = batches
        single = model if model.dtype == torch.float32 else own_copy(model).float()
        exact = baseline_of(type(single)).load(single).forward
        self.logits = [exact(batch).cpu() for batch in batches]
        self.eager_difference: float | None = None
        if model.dtype != torch.float32:
            self.eager_difference = self._difference(EAGER.load(model).forward)

    def bound(self, provider: Provider) -> float:
        return provider.bound if self.eager_difference is None else 2 * self.eager_difference

    def check(self, provider: Provider, forward: Forward) -> Verdict:
        """Runs every batch, which also warms the provider up."""
        try:
            difference = self._difference(forward)
        except ValueError as error:
            return Verdict(False, None, str(error))
        bound = self.bound(provider)
        if difference > bound:
            return Verdict(False, difference, f"logits differ by {difference:.1e}, more than {bound:.0e}")
        return Verdict(True, difference)

    @torch.inference_mode()
    def _difference(self, forward: Forward) -> float:
        return max(
            _largest_difference(forward(batch).float().cpu(), logits)
            for batch, logits in zip(self.batches, self.logits, strict=True)
        )


def _largest_difference(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape:
        raise ValueError(f"logits have shape {tuple(found.shape)} and not {tuple(expected.shape)}")
    if not bool(found.isfinite().all()):
        raise ValueError("logits are not all finite")
    return float((found - expected).abs().max())
