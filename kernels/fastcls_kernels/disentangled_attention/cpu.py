"""Disentangled attention in plain PyTorch, run by run.

A sequence of n tokens has products of (n, 2 n - 1), which are read as views: pair (i, j) is column n - 1 + j - i of the
queries' row i, in which distances fall, and column n - 1 + i - j of the keys' row j, in which they rise.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..layout import PackedLayout, Run
from ..runtime.invariance import choices
from .buckets import DistanceTables

# Numbers in a product with positions that a CPU's caches hold from one step to the next.
CACHED = 1 << 18


def disentangled_attention_runs(
    q: Tensor, k: Tensor, v: Tensor, tables: DistanceTables, layout: PackedLayout, scale: float
) -> Tensor:
    """Attention of q, k and v, (total_tokens, nheads, headdim), in that shape."""
    out = q.new_empty(q.shape)
    longest = max((run.length for run in layout.runs), default=1)
    # 16-bit numbers are summed in float32 and rounded at the end, as on a GPU.
    dtype = torch.promote_types(q.dtype, torch.float32)

    def table(rows: Tensor | None, order: Tensor | None = None) -> Tensor | None:
        """(nheads, headdim, num_buckets), or with ``order`` its buckets as columns."""
        if rows is None:
            return None
        return (rows if order is None else rows.index_select(0, order)).permute(1, 2, 0).to(dtype)

    buckets = tables.buckets
    rising = buckets.of(torch.arange(1 - longest, longest, device=q.device))
    by_distance = (table(tables.keys, rising.flip(0)), table(tables.queries, rising))
    by_bucket = (None, None) if layout.positions is None else (table(tables.keys), table(tables.queries))
    end_token = 0
    for run in layout.runs:
        positions = layout.positions if layout.has_gaps(run) else None
        key_table, query_table = by_distance if positions is None else by_bucket
        columns = slice(longest - run.length, longest + run.length - 1) if positions is None else slice(None)
        width = 2 * run.length - 1 if positions is None else len(buckets.rows)
        for sequences, heads in _chunks(run, q.shape[1], width):
            # [nheads, num_sequences, length, headdim]
            queries, keys, values = (
                run.batch(tensor)[sequences, :, heads].permute(2, 0, 1, 3).to(dtype) for tensor in (q, k, v)
            )
            by_key, by_query = (
                None if table is None else table[heads, :, columns] for table in (key_table, query_table)
            )
            if not choices().joined_texts:
                # The longest sequence decides how far apart a table's rows lie, and the library may go by that.
                by_key, by_query = (None if table is None else table.contiguous() for table in (by_key, by_query))
            places = None
            if positions is not None:
                place = run.batch(positions)[sequences]
                # [num_sequences, length, length]
                places = buckets.of(place[:, :, None] - place[:, None, :]).long()
            attended = _attend(queries, keys, values, by_key, by_query, places, scale)
            run.batch(out)[sequences, :, heads].copy_(attended.permute(1, 2, 0, 3))
        end_token = run.end_token
    out[end_token:] = 0
    return out


def _chunks(run: Run, num_heads: int, width: int) -> Iterator[tuple[slice, slice]]:
    """Sequences and heads of a run whose products with ``width`` rows of positions stay in the caches."""
    pairs = max(1, CACHED // (run.length * width))
    heads, sequences = min(pairs, num_heads), max(1, pairs // num_heads)
    for first in range(0, run.num_sequences, sequences):
        for head in range(0, num_heads, heads):
            yield slice(first, first + sequences), slice(head, head + heads)


def _attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    key_table: Tensor | None,
    query_table: Tensor | None,
    places: Tensor | None,
    scale: float,
) -> Tensor:
    """Attention inside each sequence, in its inputs' shape: (nheads, num_sequences, length, headdim).

    The tables are (nheads, headdim, columns), a column for each distance, in the order of `_of_pairs`, or with
    ``places`` for each bucket.
    """
    shape = queries.shape
    # Both products take the same rows, which are copied once at most.
    queries, keys, values = (tensor.flatten(0, 1) for tensor in (queries, keys, values))
    terms = []
    if key_table is not None:
        product = torch.bmm(queries.view(shape[0], -1, shape[3]), key_table)
        terms.append(_of_pairs(product.view(*shape[:3], -1), places))
    if query_table is not None:
        product = torch.bmm(keys.view(shape[0], -1, shape[3]), query_table)
        mirrored = None if places is None else places.transpose(1, 2)
        terms.append(_of_pairs(product.view(*shape[:3], -1), mirrored).transpose(2, 3))
    scores = sum(terms[1:], terms[0]).contiguous().flatten(0, 1)
    scores.baddbmm_(queries, keys.transpose(1, 2), beta=scale, alpha=scale)
    return torch.bmm(scores.softmax(-1), values).view(shape)


def _of_pairs(product: Tensor, places: Tensor | None) -> Tensor:
    """Each pair's number out of (nheads, num_sequences, length, columns): (nheads, num_sequences, length, length).

    Entry (i, j) is column ``places[..., i, j]`` of row i; without ``places`` column length - 1 + j - i, as a view.
    """
    if places is not None:
        return product.gather(3, places.expand(product.shape[0], -1, -1, -1))
    *batch, length, columns = product.shape
    *strides, _, _ = product.stride()
    return product.as_strided((*batch, length, length), (*strides, columns - 1, 1), length - 1)
