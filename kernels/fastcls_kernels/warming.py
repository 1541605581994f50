"""The shapes that bring every kernel to the compiler once, so that no later one does."""

from __future__ import annotations

import torch

from .runtime.tile_tables import arch_of, limits_of
from .runtime.triton import cdiv

# A pass of more is nothing that lengths of texts lead to.
_MAX_SEQUENCES = 4096


def warming_shapes(device: torch.device, max_seqlen: int, max_tokens: int) -> list[list[int]]:
    """Packings, each a list of lengths, that make each choice of a chip's tables at least once.

    Choices are made operation by operation, from the number of tokens, of sequences, or their mean length. So it takes
    packings with each number that the tables know, and with one beyond, but not all combinations.

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
