"""DeBERTa's attention over packed sequences, where distance has a say of its own:

    out_i = Σ_j softmax_j(scale · (q_i · k_j + q_i · K_b + k_j · Q_b)) v_j,    b = bucket(p_i - p_j), j in i's sequence.

K and Q, the keys and queries of positions, have one row a bucket; p_i is a token's position in its own text.

The products of all tokens with positions are made first, with one column a distance rather than one a bucket. Then what
pairs of tokens need lies side by side: the keys' distances from query i in row i of its product, and those of the
queries from key j in row j of the other. More columns than buckets, but nothing is looked up a pair.

On a GPU these products are the library's, and one kernel reads from them. It takes a tile of BLOCK_M packed rows and
one head; every row carries the bounds [start, end) of its own sequence and is masked to them, so that short sequences
share a tile, and no length reaches the compiler.

On a CPU they are made run by run, (n, 2 n - 1) for a sequence of n tokens, and read as views: (i, j) is column
n - 1 + j - i, the distances falling, of row i, and column n - 1 + i - j, the distances rising, of row j.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .._tracing import traceable
from ..attention import LOG2_E, check_keys_values, load_rows
from ..layout import PackedLayout, Run
from ..linear import linear_per_head
from ..runtime.backend import device_guard, runs_triton
from ..runtime.checks import check_device, check_last_dim_contiguous, check_tensor
from ..runtime.invariance import is_batch_invariant
from ..runtime.tile_tables import DisentangledTile, arch_of, disentangled_tile, unsqueezed
from ..runtime.triton import cdiv, head_block, jit, tl

# Numbers in a product with positions that a CPU's caches hold from one step to the next.
CACHED = 1 << 18


@dataclass(frozen=True, eq=False)
class Buckets:
    """Which row of the position tables a distance takes: ``table[clamp(distance, -reach, reach) + reach]``.

    Args:
        table: (2 * reach + 1,), int32, contiguous, on the device where it is used.
        rows: the same numbers on the host, in rising order: how many rows a table must have is then known without
            waiting for the device.

    Raises:
        TypeError: ``table`` is no int32 tensor.
        ValueError: a shape that does not fit, or ``rows`` that fall or begin below 0. That ``table`` holds ``rows`` is
            checked where it lies on the CPU; on a GPU that would stall the device, so there it is trusted.
    """

    table: Tensor
    rows: tuple[int, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.table, Tensor) or self.table.dtype != torch.int32:
            raise TypeError(f"table must be a torch.int32 tensor, got {getattr(self.table, 'dtype', type(self.table))}")
        if len(self.rows) % 2 == 0:
            raise ValueError(f"rows must be 2 * reach + 1 numbers, got {len(self.rows)}")
        if self.table.shape != (len(self.rows),) or not self.table.is_contiguous():
            raise ValueError(
                f"table must be contiguous, of shape ({len(self.rows)},) like rows, "
                f"got shape {tuple(self.table.shape)} with strides {self.table.stride()}"
            )
        if self.rows[0] < 0 or any(row > after for row, after in itertools.pairwise(self.rows)):
            raise ValueError(f"rows must rise from 0 or more, got {self.rows[0]} to {self.rows[-1]}")
        if self.table.device.type == "cpu" and tuple(self.table.tolist()) != self.rows:
            raise ValueError("table must hold the numbers of rows")

    @property
    def reach(self) -> int:
        return len(self.rows) // 2

    def first(self, count: int, reach: int) -> Tensor:
        """The rows of ``count`` distances from -reach, which is in reach, on."""
        rows = self.table[self.reach - reach :][:count]
        missing = count - rows.shape[0]
        return torch.cat((rows, rows[-1:].expand(missing))) if missing else rows

    def of(self, distances: Tensor) -> Tensor:
        """The row of each distance."""
        return self.table[distances.clamp(-self.reach, self.reach).long() + self.reach]


@jit()
def _attend_tile(
    q,
    k_ptr,
    v_ptr,
    of_query_ptr,
    of_key_ptr,
    positions_ptr,
    query_row,
    position,
    row_start,
    row_end,
    first_key,
    last_key,
    reach,
    num_columns,
    scale_log2,
    stride_kt,
    stride_vt,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ISOLATE: tl.constexpr,
):
    # [BLOCK_M, BLOCK_D]
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    # [BLOCK_M]
    row_max = tl.full([BLOCK_M], -1e30, dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    # The rare pass must not cost the common one registers, so it is not pipelined.
    for start_n in tl.range(first_key, last_key, BLOCK_N, num_stages=1 if ISOLATE else None):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        # [BLOCK_N, BLOCK_D]
        k = load_rows(k_ptr, None, start_n, last_key, 0, stride_kt, HEAD_DIM, BLOCK_D, BLOCK_N, TMA=False)
        v = load_rows(v_ptr, None, start_n, last_key, 0, stride_vt, HEAD_DIM, BLOCK_D, BLOCK_N, TMA=False)
        # [BLOCK_N]
        key_row = tl.minimum(tl.arange(0, BLOCK_N), last_key - 1 - start_n)
        key_position = tl.load(positions_ptr + start_n + key_row)
        # Distance comes first: added to the product, it would have the compiler take the softmax twice.
        # [BLOCK_M, BLOCK_N]
        scores = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        # Not masked to the own sequence, which would cost registers: what others bring, NaN or not, is dropped below.
        if of_query_ptr is not None:
            column = tl.minimum(tl.maximum(position[:, None] - key_position[None, :], -reach), reach)
            scores += tl.load(of_query_ptr + (query_row[:, None] * num_columns + column)).to(tl.float32)
        if of_key_ptr is not None:
            # [BLOCK_N, BLOCK_M]: in a key's row neighbouring queries are neighbours in memory.
            column = tl.minimum(tl.maximum(position[None, :] - key_position[:, None], -reach), reach)
            tile_ptr = of_key_ptr + tl.cast(start_n, tl.int64) * num_columns
            scores += tl.trans(tl.load(tile_ptr + (key_row[:, None] * num_columns + column))).to(tl.float32)
        scores = tl.dot(q, tl.trans(k), scores, input_precision="ieee") * scale_log2
        if ISOLATE:
            # v - v is 0, or NaN where v is not finite: that goes to the scores of its own sequence's rows alone.
            defect = (v - v).to(tl.float32)
            v = tl.where(defect == 0.0, v, 0.0)
            scores += tl.sum(defect, 1)[None, :]
        own = (offs_n[None, :] >= row_start[:, None]) & (offs_n[None, :] < row_end[:, None])
        # new_max is at least -1e30, so a masked score weighs exp2(-inf) = 0 and never meets inf - inf.
        scores = tl.where(own, scores, -float("inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        weights = tl.exp2(scores - new_max[:, None])
        rescale = tl.exp2(row_max - new_max)
        row_sum = row_sum * rescale + tl.sum(weights, 1)
        row_max = new_max
        acc = tl.dot(weights.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")
    return acc, row_sum


@jit(do_not_specialize=["total_tokens", "num_columns", "reach"])
def _disentangled_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    of_query_ptr,
    of_key_ptr,
    positions_ptr,
    out_ptr,
    row_start_ptr,
    row_end_ptr,
    tiles_ptr,
    total_tokens,
    num_columns,
    reach,
    scale_log2,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_ot,
    stride_oh,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    if tiles_ptr is not None:
        tiles_ptr += tl.program_id(0) * 4
        first_row = tl.load(tiles_ptr).to(tl.int64)
        last_row = tl.load(tiles_ptr + 1)
    else:
        first_row = tl.program_id(0).to(tl.int64) * BLOCK_M
        last_row = total_tokens
    offs_m = first_row + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    in_tile = offs_m < last_row
    in_head = offs_d < HEAD_DIM
    k_ptr += head * stride_kh
    v_ptr += head * stride_vh
    # The products are (nheads, total_tokens, num_columns); column ``reach`` is distance 0.
    if of_query_ptr is not None:
        of_query_ptr += (head * total_tokens + first_row) * num_columns + reach
    if of_key_ptr is not None:
        of_key_ptr += head * total_tokens * num_columns + reach
    query_row = tl.minimum(tl.arange(0, BLOCK_M), (total_tokens - 1 - first_row).to(tl.int32))

    # A row that belongs to no sequence has start = end = 0; it must not widen the span of keys that the tile reads.
    row_start = tl.load(row_start_ptr + offs_m, mask=in_tile, other=0)
    row_end = tl.load(row_end_ptr + offs_m, mask=in_tile, other=0)
    position = tl.load(positions_ptr + offs_m, mask=in_tile, other=0)
    first_key = tl.min(tl.where(row_end > row_start, row_start, total_tokens))
    last_key = tl.max(row_end)

    # [BLOCK_M, BLOCK_D]
    q = tl.load(
        q_ptr + offs_m[:, None] * stride_qt + head * stride_qh + offs_d[None, :],
        mask=in_tile[:, None] & in_head[None, :],
        other=0.0,
    )
    acc, row_sum = _attend_tile(
        q, k_ptr, v_ptr, of_query_ptr, of_key_ptr, positions_ptr, query_row, position, row_start, row_end, first_key,
        last_key, reach, num_columns, scale_log2, stride_kt, stride_vt, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N,
        ISOLATE=False,
    )  # fmt: skip
    # A value that is not finite (a text that overflowed) spoils every row of the tile, since 0 * inf is NaN. Such
    # tiles are rare and are computed once more, so that it reaches the rows of its own sequence only.
    if tl.max(tl.max(tl.where(acc == acc, 0, 1), 1)) > 0:
        acc, row_sum = _attend_tile(
            q, k_ptr, v_ptr, of_query_ptr, of_key_ptr, positions_ptr, query_row, position, row_start, row_end,
            first_key, last_key, reach, num_columns, scale_log2, stride_kt, stride_vt, HEAD_DIM, BLOCK_D, BLOCK_M, 16,
            ISOLATE=True,
        )  # fmt: skip

    acc = acc / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]
    tl.store(
        out_ptr + offs_m[:, None] * stride_ot + head * stride_oh + offs_d[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=in_tile[:, None] & in_head[None, :],
    )


def _choose_tile(q: Tensor) -> DisentangledTile:
    return disentangled_tile(arch_of(q.device), q.dtype, q.shape[2])


def _launch_disentangled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_key: Tensor | None,
    pos_query: Tensor | None,
    buckets: Buckets,
    layout: PackedLayout,
    scale: float,
    tile: DisentangledTile,
) -> Tensor:
    total_tokens, num_heads, head_dim = q.shape
    out = q.new_empty(total_tokens, num_heads, head_dim)
    if out.numel() == 0:
        return out
    # What lies between two positions that are given is known on the device alone.
    reach = buckets.reach if layout.positions is not None else min(buckets.reach, max(layout.max_seqlen - 1, 0))
    # The library stores products of other widths than multiples of 16 in small pieces.
    num_columns = cdiv(2 * reach + 1, 16) * 16
    rows = buckets.first(num_columns, reach)
    row_start, row_end = layout.row_bounds
    # Where a sequence begins in a tile that it shares is where its sums begin.
    tiles = layout.sequence_tiles(tile.BLOCK_M) if is_batch_invariant() else None
    num_tiles = cdiv(total_tokens, tile.BLOCK_M) if tiles is None else tiles.shape[0]
    with device_guard(q):
        _disentangled_attention_kernel[(num_tiles, num_heads)](
            q_ptr=q,
            k_ptr=k,
            v_ptr=v,
            of_query_ptr=None if pos_key is None else _products(q, pos_key, rows),
            of_key_ptr=None if pos_query is None else _products(k, pos_query, rows),
            positions_ptr=layout.token_positions,
            out_ptr=out,
            row_start_ptr=row_start,
            row_end_ptr=row_end,
            tiles_ptr=tiles,
            total_tokens=total_tokens,
            num_columns=num_columns,
            reach=reach,
            scale_log2=scale * LOG2_E,
            stride_qt=q.stride(0),
            stride_qh=q.stride(1),
            stride_kt=k.stride(0),
            stride_kh=k.stride(1),
            stride_vt=v.stride(0),
            stride_vh=v.stride(1),
            stride_ot=out.stride(0),
            stride_oh=out.stride(1),
            HEAD_DIM=head_dim,
            BLOCK_D=head_block(head_dim),
            BLOCK_M=tile.BLOCK_M,
            BLOCK_N=tile.BLOCK_N,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            enable_fp_fusion=True,
            **(unsqueezed(arch_of(q.device)) if q.dtype == torch.float32 else {}),
        )
    return out


def _products(tokens: Tensor, table: Tensor, rows: Tensor) -> Tensor:
    """(nheads, total_tokens, num_columns), contiguous: every token with rows of a table, one a distance."""
    return linear_per_head(tokens, table.index_select(0, rows).permute(1, 2, 0)).transpose(0, 1).contiguous()


def _attention_runs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_key: Tensor | None,
    pos_query: Tensor | None,
    buckets: Buckets,
    layout: PackedLayout,
    scale: float,
) -> Tensor:
    out = q.new_empty(q.shape)
    longest = max((run.length for run in layout.runs), default=1)
    # Sums of 16-bit numbers are float32 until the end, as on a GPU.
    dtype = torch.promote_types(q.dtype, torch.float32)

    def table(rows: Tensor | None, order: Tensor | None = None) -> Tensor | None:
        """[nheads, headdim, buckets], or distances in an order."""
        if rows is None:
            return None
        return (rows if order is None else rows.index_select(0, order)).permute(1, 2, 0).to(dtype)

    rising = buckets.of(torch.arange(1 - longest, longest, device=q.device))
    by_distance = (table(pos_key, rising.flip(0)), table(pos_query, rising))
    by_bucket = (None, None) if layout.positions is None else (table(pos_key), table(pos_query))
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
            if is_batch_invariant():
                # How far apart its rows lie is the longest sequence's matter.
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
    """Sequences and heads of a run whose products with ``width`` position rows stay in the caches."""
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
    """Attention inside each sequence, in the shape of its inputs: (nheads, num_sequences, length, headdim).

    The tables are (nheads, headdim, columns): one a distance as `_of_pairs` wants them, or, with ``places``, a bucket.
    """
    shape = queries.shape
    # Both products see the same rows, copied no more than once.
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
    """From (nheads, num_sequences, length, columns) what each pair of tokens needs, (..., length, length).

    Entry (i, j) is column ``places[..., i, j]`` of row i; without ``places`` column length - 1 + j - i, as a view.
    """
    if places is not None:
        return product.gather(3, places.expand(product.shape[0], -1, -1, -1))
    *batch, length, columns = product.shape
    *strides, _, _ = product.stride()
    return product.as_strided((*batch, length, length), (*strides, columns - 1, 1), length - 1)


@traceable
def disentangled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_key: Tensor | None,
    pos_query: Tensor | None,
    buckets: Buckets,
    cu_seqlens: Tensor,
    max_seqlen: int,
    softmax_scale: float,
    *,
    layout: PackedLayout | None = None,
) -> Tensor:
    """Bidirectional attention inside each of many packed sequences, to what tokens are and how far apart they stand.

    Args:
        q, k, v: (total_tokens, nheads, headdim), float32, float16 or bfloat16, head sizes from 4 to 128. Any strides
            with a contiguous last dimension: views of one fused projection are taken as they are.
        pos_key, pos_query: (num_buckets, nheads, headdim) in q's dtype, contiguous in the last dimension: what queries
            and what keys are multiplied with. Either may be None, and its term is left out.
        buckets: the row of the tables for each distance between two tokens.
        cu_seqlens: (num_sequences + 1,), int32: sequence i is rows ``cu_seqlens[i]:cu_seqlens[i + 1]``. Zero-length
            sequences are allowed. Rows from ``cu_seqlens[-1]`` on belong to no sequence.
        max_seqlen: the longest sequence, in tokens, or any bound above it. On a GPU it decides, up to the buckets'
            reach, how many distances the products have: total_tokens * nheads * 2 * max_seqlen numbers each.
        softmax_scale: factor on the sum of the three terms.
        layout: ``PackedLayout(cu_seqlens, max_seqlen, total_tokens)``, for callers that use one packing many times.
            Where it has positions, distances are between them, not between rows.

    Returns:
        (total_tokens, nheads, headdim), contiguous, in q's dtype; zero in rows that belong to no sequence.

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape, stride, device, head size or length that does not fit. ``cu_seqlens`` is checked by
            value where it lies on the CPU; on a GPU that would stall the device, so there it is trusted.

    Accumulates and takes the softmax in float32. Source: He et al., "DeBERTa: Decoding-enhanced BERT with Disentangled
    Attention" (2021), and the log buckets of its second version.
    """
    shape = "(total_tokens, nheads, headdim)"
    check_tensor("q", q, shape)
    check_keys_values(q, k, v, shape)
    _check_positions(q, pos_key, pos_query, buckets)
    layout = PackedLayout.of(q, cu_seqlens, max_seqlen, layout)
    if not runs_triton(q):
        return _attention_runs(q, k, v, pos_key, pos_query, buckets, layout, softmax_scale)
    tile = _choose_tile(q)
    return _launch_disentangled_attention(q, k, v, pos_key, pos_query, buckets, layout, softmax_scale, tile)


def _check_positions(q: Tensor, pos_key: Tensor | None, pos_query: Tensor | None, buckets: Buckets) -> None:
    tables = [(name, table) for name, table in (("pos_key", pos_key), ("pos_query", pos_query)) if table is not None]
    if not tables:
        raise ValueError("one of pos_key and pos_query must be a tensor, got None for both")
    if not isinstance(buckets, Buckets):
        raise TypeError(f"buckets must be a Buckets, got {type(buckets).__name__}")
    for name, table in tables:
        check_tensor(name, table, "(num_buckets, nheads, headdim)", like=q)
        if table.shape[1:] != q.shape[1:] or table.shape[0] <= buckets.rows[-1]:
            raise ValueError(
                f"{name} must have shape (num_buckets, {q.shape[1]}, {q.shape[2]}) with a row for each of the buckets "
                f"0 to {buckets.rows[-1]}, got {tuple(table.shape)}"
            )
        check_last_dim_contiguous(name, table)
    if len({table.shape[0] for _, table in tables}) > 1:
        raise ValueError(f"pos_query must have pos_key's {tables[0][1].shape[0]} rows, got {tables[1][1].shape[0]}")
    check_device("buckets.table", buckets.table, q)
