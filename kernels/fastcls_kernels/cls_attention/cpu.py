"""Attention of few query rows in plain PyTorch: neighbouring spans of tokens of one length are one product."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ..attention.cpu import attend_batch, is_finite_all
from ..layout import PackedLayout
from ..runtime.invariance import choices
from .splits import RowBounds

T = TypeVar("T")
# The most numbers that a step makes over row_bounds: 32 MiB of float32.
MAX_NUMBERS = 1 << 23


class Windows(NamedTuple):
    """Neighbouring spans of tokens of one length, each read by the same number of query rows."""

    rows: slice | Tensor
    num_windows: int
    start_token: int
    length: int

    def queries(self, rows: Tensor) -> Tensor:
        """(num_windows, rows of each, ...) of a tensor that has a row for each query."""
        return rows[self.rows].view(self.num_windows, -1, *rows.shape[1:])

    def batch(self, tokens: Tensor) -> Tensor:
        """(num_windows, length, ...) of a packed tensor, a view."""
        end_token = self.start_token + self.num_windows * self.length
        return tokens[self.start_token : end_token].view(self.num_windows, self.length, *tokens.shape[1:])


def windows_of(layout: PackedLayout, row_bounds: RowBounds | None, num_heads: int, width: int) -> Iterator[Windows]:
    """All query rows and the tokens that each reads, except rows that read none."""
    if row_bounds is None:
        for run in layout.runs:
            rows = slice(run.first_sequence, run.first_sequence + run.num_sequences)
            yield Windows(rows, run.num_sequences, run.start_token, run.length)
        return
    # Rows of one span share its tokens, wherever they stand.
    rows_of: dict[tuple[int, int], list[int]] = {}
    for row, span in enumerate(zip(*(bound.tolist() for bound in row_bounds), strict=True)):
        rows_of.setdefault(span, []).append(row)
    parts = [
        (start, end - start, part)
        for (start, end), same in sorted(rows_of.items())
        if start < end
        for part in _batched(same, num_heads * (end - start))
    ]

    def place(numbered: tuple[int, tuple[int, int, list[int]]]) -> tuple[int, int, int]:
        number, (start, length, part) = numbered
        # Spans that each begin where the one before ends have the same place.
        return length, len(part), start - number * length

    for (length, num_rows, _), alike in itertools.groupby(enumerate(parts), place):
        spans = [span for _, span in alike]
        together = len(spans) if choices().joined_texts else 1
        for batch in _batched(spans, length * (width + num_heads * num_rows), together):
            indices = [row for _, _, part in batch for row in part]
            neighbours = slice(indices[0], indices[0] + len(indices))
            in_order = indices == list(range(neighbours.start, neighbours.stop))
            places = neighbours if in_order else torch.tensor(indices, device=row_bounds[0].device)
            yield Windows(places, len(batch), batch[0][0], length)


def _batched(items: list[T], numbers_each: int, at_most: int | None = None) -> Iterator[list[T]]:
    """Parts of ``items`` of at most MAX_NUMBERS numbers and ``at_most`` items, but of one item at least."""
    step = min(max(1, MAX_NUMBERS // numbers_each), at_most or len(items))
    for first in range(0, len(items), step):
        yield items[first : first + step]


def cls_attention_windows(
    query: Tensor,
    hidden_states: Tensor,
    layout: PackedLayout,
    scale: float,
    keys: Tensor | None,
    bias: Tensor | None,
    row_bounds: RowBounds | None,
) -> Tensor:
    """The sums, (num_rows, nheads, width), of arguments that `cls_attention` has checked."""
    # Products are computed in the wider of the two dtypes, as in the kernel: rounding the queries would cost most.
    dtype = torch.promote_types(query.dtype, hidden_states.dtype)
    num_rows, num_heads, _ = query.shape
    width = hidden_states.shape[1]
    out = query.new_zeros(num_rows, num_heads, width)
    for windows in windows_of(layout, row_bounds, num_heads, width):
        # [num_windows, length, width]
        tokens = windows.batch(hidden_states).to(dtype)
        # [num_windows, rows, nheads, width or key_dim]
        queries = windows.queries(query).to(dtype)
        if keys is None:
            scores = queries.flatten(1, 2) @ tokens.transpose(1, 2)
        else:
            # [num_windows, rows, nheads_k, nheads // nheads_k, key_dim]
            queries = queries.unflatten(2, (keys.shape[1], -1))
            # One window at a time: a product over windows and heads at once would copy the keys first.
            pairs = zip(queries, windows.batch(keys).to(dtype), strict=True)
            products = [q.transpose(0, 1).flatten(1, 2) @ k.permute(1, 2, 0) for q, k in pairs]
            # [num_windows, nheads_k, rows, nheads // nheads_k, length]
            scores = torch.stack(products).unflatten(2, (queries.shape[1], -1))
            scores = scores.transpose(1, 2).flatten(1, 3)
        # [num_windows, rows * nheads, length]
        scores *= scale
        if bias is not None:
            # [num_windows, 1, nheads, length]
            biases = windows.batch(bias).transpose(1, 2).unsqueeze(1)
            scores = (scores.unflatten(1, (-1, num_heads)) + biases).flatten(1, 2)
        summed = scores.softmax(-1).to(dtype) @ tokens
        out[windows.rows] = summed.view(-1, num_heads, width).to(out.dtype)
    return out


def cls_attention_kv_windows(
    query: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PackedLayout,
    scale: float,
    bias: Tensor | None,
    row_bounds: RowBounds | None,
) -> Tensor:
    """The result, (num_rows, nheads, headdim), of arguments that `cls_attention_kv` has checked."""
    out = query.new_zeros(query.shape)
    # With few rows a CPU is faster if it makes float32 of 16-bit keys and values first.
    dtype = torch.promote_types(query.dtype, torch.float32)
    for windows in windows_of(layout, row_bounds, query.shape[1], query.shape[1] * query.shape[2]):
        # [num_windows, nheads or nheads_k, rows or length, headdim]
        queries, keys, values = (
            tensor.to(dtype).transpose(1, 2) for tensor in (windows.queries(query), windows.batch(k), windows.batch(v))
        )
        # [num_windows, nheads, 1, length]
        biases = None if bias is None else windows.batch(bias).transpose(1, 2).unsqueeze(2)
        is_finite = None if biases is None else is_finite_all(queries, keys, biases)
        attended = attend_batch(queries, keys, values, scale, biases, is_finite=is_finite)
        out[windows.rows] = attended.transpose(1, 2).flatten(0, 1).to(out.dtype)
    return out
