"""Groups of packed sequences of like lengths, padded within one operation alone, and blocks of their scores."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..attention.cpu import row_blocks
from ..attention.kernel import NO_WINDOW
from ..layout import PackedLayout

# A group's scores in float32: beyond, they leave the cache.
_SCORES = 1 << 20
# Rows that a sequence is filled up by: a short one's calls cost more than its rows.
_FILL_ROWS, _FILL_PART = 4, 8


class Block(NamedTuple):
    """Some rows of a group's sequences, and the rows that hold all their keys."""

    rows: slice
    keys: slice


class Group:
    """Neighbouring sequences of a packing, each filled up to the longest.

    Args:
        lengths: of the sequences, at least 1 each.
        start: the first one's first packed row.
        device: of the packing.
    """

    def __init__(self, lengths: list[int], start: int, device: torch.device) -> None:
        self.num_sequences = len(lengths)
        self.length = max(lengths)
        self.start = start
        self.lengths = torch.tensor(lengths, device=device)
        starts = start + self.lengths.cumsum(0) - self.lengths
        self.first_rows = starts.int()
        self.end = start + sum(lengths)
        self.is_even = min(lengths) == self.length
        if not self.is_even:
            places = torch.arange(self.length, device=device)
            self.is_padding = places >= self.lengths[:, None]
            # Padding reads its sequence's last row, whose numbers are masked, or which gets no gradient.
            self.index = (starts[:, None] + torch.minimum(places, self.lengths[:, None] - 1)).flatten()
            self.places = (~self.is_padding).flatten().nonzero().squeeze(1)
            self.padding_terms = torch.zeros(self.num_sequences, 1, 1, self.length, device=device).masked_fill_(
                self.is_padding[:, None, None], -float("inf")
            )

    def gather(self, rows: Tensor, num_heads: int | None = None, *, empties: bool = False) -> Tensor:
        """(num_sequences * nheads, length, headdim), contiguous, of packed (total_tokens, heads, headdim).

        Args:
            rows: the packed rows.
            num_heads: how many heads there are to be, each of those that ``rows`` has repeated.
            empties: whether padding is zero; otherwise it is its sequence's last row.
        """
        found = rows[self.start : self.end] if self.is_even else rows.index_select(0, self.index)
        batch = found.view(self.num_sequences, self.length, *rows.shape[1:])
        if empties and not self.is_even:
            batch = batch.masked_fill_(self.is_padding[..., None, None], 0.0)
        batch = batch.transpose(1, 2)
        if num_heads is not None and num_heads != rows.shape[1]:
            batch = batch.repeat_interleave(num_heads // rows.shape[1], 1)
        return batch.reshape(-1, self.length, rows.shape[2])

    def scatter(self, batch: Tensor, out: Tensor) -> None:
        """Writes what has the shape that `gather` gives to its packed rows; repeated heads are summed."""
        num_heads = out.shape[1]
        heads = batch.view(self.num_sequences, num_heads, -1, *batch.shape[1:])
        heads = heads.sum(2) if heads.shape[2] > 1 else heads.squeeze(2)
        rows = heads.transpose(1, 2)
        target = out[self.start : self.end]
        if self.is_even:
            target.view(self.num_sequences, self.length, *out.shape[1:]).copy_(rows) if target.is_contiguous() else (
                target.copy_(rows.reshape(target.shape))
            )
        else:
            target.copy_(rows.reshape(-1, *out.shape[1:]).index_select(0, self.places))

    def offsets(self, block: Block, layout: PackedLayout) -> Tensor:
        """Position of key minus position of row, (1 or num_sequences, rows, keys) int64."""
        if layout.positions is None and self.is_even:
            positions = torch.arange(self.length, device=self.lengths.device)[None]
        elif layout.positions is None:
            positions = self.index.view(self.num_sequences, -1) - self.first_rows[:, None]
        else:
            rows = slice(self.start, self.end) if self.is_even else self.index
            positions = layout.positions[rows].view(self.num_sequences, -1).long()
        return positions[:, None, block.keys] - positions[:, block.rows, None]

    def terms_of_first(self, window: tuple[int, int], layout: PackedLayout) -> Tensor | None:
        """`terms` of each sequence's first row, of a shape that broadcasts to (num_sequences, nheads, length)."""
        found = self.terms(Block(slice(0, 1), slice(0, self.length)), None, window, layout)
        return None if found is None else found[:, :, 0]

    def terms(self, block: Block, bias: Tensor | None, window: tuple[int, int], layout: PackedLayout) -> Tensor | None:
        """What is added to scores, of a shape that broadcasts to (num_sequences, nheads, rows, keys), or None."""
        found = None if self.is_even else self.padding_terms[..., block.keys]
        left, right = window
        # With holes a position may lie farther away than the row does.
        sees_all = layout.positions is None and all(limit < 0 or limit >= self.length for limit in window)
        if bias is None and (window == NO_WINDOW or sees_all):
            return found
        offsets = self.offsets(block, layout)
        if bias is not None:
            reach = bias.shape[1] // 2
            by_offset = bias[:, offsets.clamp(-reach, reach) + reach].transpose(0, 1)
            found = by_offset if found is None else found + by_offset
        outside = torch.zeros_like(offsets, dtype=torch.bool)
        if left >= 0:
            outside |= offsets < -left
        if right >= 0:
            outside |= offsets > right
        if found is None:
            found = torch.zeros(1, 1, 1, 1, device=offsets.device)
        return found.masked_fill(outside[:, None], -float("inf"))


def blocks_of(group: Group, window: tuple[int, int]) -> Iterator[Block]:
    """Blocks of a group's rows that leave out the keys beyond their windows."""
    for rows, keys in row_blocks(group.length, window):
        yield Block(rows, keys)


def groups_of(layout: PackedLayout, num_heads: int) -> list[Group]:
    """The groups of a packing's sequences, made once for each number of heads."""
    made: dict[int, list[Group]] = layout.__dict__.setdefault("_groups", {})
    if num_heads not in made:
        made[num_heads] = list(_groups(layout, num_heads))
    return made[num_heads]


def _groups(layout: PackedLayout, num_heads: int) -> Iterator[Group]:
    lengths: list[int] = []
    start = 0
    for length in layout.cu_seqlens.diff().tolist():
        if not length:
            continue
        joined = [*lengths, length]
        longest, shortest = max(joined), min(joined)
        fits = longest - shortest <= _FILL_ROWS + shortest // _FILL_PART
        if lengths and not (fits and len(joined) * num_heads * longest**2 <= _SCORES):
            yield Group(lengths, start, layout.cu_seqlens.device)
            start += sum(lengths)
            joined = [length]
        lengths = joined
    if lengths:
        yield Group(lengths, start, layout.cu_seqlens.device)
