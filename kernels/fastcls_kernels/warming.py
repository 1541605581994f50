"""Shapes that compile every kernel once, so that no later call compiles one."""

from __future__ import annotations

import torch

from .runtime.tile_tables import arch_of, limits_of
from .runtime.triton import cdiv

# Passes of more sequences do not occur.
_MAX_SEQUENCES = 4096


def warming_shapes(device: torch.device, max_seqlen: int, max_tokens: int) -> list[list[int]]:
    """Packings, each a list of lengths, that make each choice of a chip's tables at least once.

    Each operation chooses by the number of tokens or sequences, or by their mean length. So each number in the tables
    needs a packing, and so does a number beyond them, but not every combination.

    Args:
        device: the GPU.
        max_seqlen: the longest sequence that there can be.
        max_tokens: the most tokens that are computed at once.
    """
    rows = limits_of(arch_of(device), "rows")
    means = limits_of(arch_of(device), "mean_seqlen")
    packings: list[list[int]] = []
    for count in (*rows, max(rows, default=0) + 1):
        if count <= max_tokens:
            packings.append(_shared_out(count, cdiv(count, max_seqlen)))
        if count <= _MAX_SEQUENCES:
            packings.append([1] * count)
    packings.extend([mean] for mean in (*means, max(means, default=0) + 1) if mean <= max_seqlen)
    # Long enough to be split among programs.
    packings.append([max_seqlen])
    return packings


def _shared_out(tokens: int, sequences: int) -> list[int]:
    each, rest = divmod(tokens, sequences)
    return [each + 1] * rest + [each] * (sequences - rest)
