"""Padded batches, for what is computed of single tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..tokenizing import Ids


def padded(ids: Sequence[Ids], types: Sequence[Ids], device: torch.device) -> dict[str, Tensor]:
    """Texts as the inputs of a transformers model, (batch, seqlen) each."""
    parts = {"input_ids": ids, "token_type_ids": types}
    inputs = {
        name: pad_sequence([torch.from_numpy(each) for each in part], batch_first=True) for name, part in parts.items()
    }
    lengths = torch.tensor([len(each) for each in ids])
    inputs["attention_mask"] = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def groups_of(lengths: Sequence[int], max_tokens: int, max_texts: int) -> Iterator[list[int]]:
    """Texts of similar lengths that are computed at once, by their indices.

    Args:
        lengths: of the texts.
        max_tokens: of a group, padding included, unless a text alone has more.
        max_texts: of a group.
    """
    group: list[int] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        if group and (len(group) == max_texts or (len(group) + 1) * lengths[row] > max_tokens):
            yield group
            group = []
        group.append(row)
    if group:
        yield group
