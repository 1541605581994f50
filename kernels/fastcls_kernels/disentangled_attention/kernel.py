"""The kernel of disentangled attention, its tile and its launcher.

The products of tokens with positions are the library's; the kernel reads from them. A program computes one head of a
tile of BLOCK_M packed rows: each row is masked to the bounds [start, end) of its own sequence, so that short sequences
share a tile, and lengths never reach the compiler.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..attention.kernel import LOG2_E, isolated, load_rows, softmax_step, strides_of
from ..layout import PackedLayout
from ..linear import linear_per_head_unchecked
from ..runtime.backend import device_guard
from ..runtime.invariance import choices
from ..runtime.tile_tables import DisentangledTile, arch_of, disentangled_tile, unsqueezed
from ..runtime.triton import cdiv, head_block, jit, tl
from .buckets import DistanceTables


@jit()
def _attend_tile(
    q,  # [BLOCK_M, BLOCK_D]
    k_ptr,  # (total_tokens, headdim)
    v_ptr,  # (total_tokens, headdim)
    of_query_ptr,  # (total_tokens, num_columns), from distance 0 of the tile's first row on, or None
    of_key_ptr,  # (total_tokens, num_columns), from distance 0 of row 0 on, or None
    positions_ptr,  # (total_tokens,)
    query_row,  # [BLOCK_M], in the tile
    position,  # [BLOCK_M]
    row_start,  # [BLOCK_M]
    row_end,  # [BLOCK_M]
    first_key, last_key, reach, num_columns, scale_log2, stride_kt, stride_vt,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ISOLATE: tl.constexpr,
):  # fmt: skip
    """The weighted sums of values, [BLOCK_M, BLOCK_D], and the sums of the weights, [BLOCK_M], of a tile's rows."""
    # [BLOCK_M, BLOCK_D]
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    # [BLOCK_M]
    row_max = tl.full([BLOCK_M], -1e30, dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    # The isolating pass is rare and must take no registers from the common one, so it is not pipelined.
    for start_n in tl.range(first_key, last_key, BLOCK_N, num_stages=1 if ISOLATE else None):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        # [BLOCK_N, BLOCK_D]
        k = load_rows(k_ptr, None, start_n, last_key, 0, stride_kt, HEAD_DIM, BLOCK_D, BLOCK_N, TMA=False)
        v = load_rows(v_ptr, None, start_n, last_key, 0, stride_vt, HEAD_DIM, BLOCK_D, BLOCK_N, TMA=False)
        # [BLOCK_N]
        key_row = tl.minimum(tl.arange(0, BLOCK_N), last_key - 1 - start_n)
        key_position = tl.load(positions_ptr + start_n + key_row)
        # Distances first: added to the product of q and k, they would make the compiler compute the softmax twice.
        # [BLOCK_M, BLOCK_N]
        scores = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        # A mask to the own sequence would take registers: other sequences' numbers, NaN or not, are dropped below.
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
            v, defects = isolated(v)
            scores += defects[None, :]
        own = (offs_n[None, :] >= row_start[:, None]) & (offs_n[None, :] < row_end[:, None])
        scores = tl.where(own, scores, -float("inf"))
        acc, row_max, row_sum = softmax_step(scores, v, acc, row_max, row_sum)
    return acc, row_sum


@jit(do_not_specialize=["total_tokens", "num_columns", "reach"])
def _disentangled_attention_kernel(
    q_ptr,  # (total_tokens, nheads, headdim)
    k_ptr,  # (total_tokens, nheads, headdim)
    v_ptr,  # (total_tokens, nheads, headdim)
    of_query_ptr,  # (nheads, total_tokens, num_columns), or None
    of_key_ptr,  # (nheads, total_tokens, num_columns), or None
    positions_ptr,  # (total_tokens,)
    out_ptr,  # (total_tokens, nheads, headdim)
    row_start_ptr,  # (total_tokens,)
    row_end_ptr,  # (total_tokens,)
    tiles_ptr,  # (num_tiles, 4), or None where sequences share tiles
    total_tokens, num_columns, reach, scale_log2,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
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
    # Column ``reach`` is distance 0.
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
    # As in `attention_varlen`: a value that is not finite must reach the rows of its own sequence alone.
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


def choose_tile(q: Tensor) -> DisentangledTile:
    """The tile for q, (total_tokens, nheads, headdim)."""
    return disentangled_tile(arch_of(q.device), q.dtype, q.shape[2])


def launch_disentangled_attention(
    q: Tensor, k: Tensor, v: Tensor, tables: DistanceTables, layout: PackedLayout, scale: float, tile: DisentangledTile
) -> Tensor:
    """Attention of q, k and v, (total_tokens, nheads, headdim), in that shape."""
    total_tokens, num_heads, head_dim = q.shape
    out = q.new_empty(total_tokens, num_heads, head_dim)
    if out.numel() == 0:
        return out
    pos_key, pos_query, buckets = tables
    # Only the device knows how far apart given positions are.
    reach = buckets.reach if layout.positions is not None else min(buckets.reach, max(layout.max_seqlen - 1, 0))
    # A multiple of 16: the library stores products of other widths in small pieces.
    num_columns = cdiv(2 * reach + 1, 16) * 16
    rows = buckets.first(num_columns, reach)
    row_start, row_end = layout.row_bounds
    # In a tile of its own, a sequence's sums begin with its first key, whatever stands before it.
    tiles = None if choices().shared_tiles else layout.sequence_tiles(tile.BLOCK_M)
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
            **strides_of(q, k, v, out),
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
    """(nheads, total_tokens, num_columns), contiguous: every token's products with the table's row of each distance."""
    return linear_per_head_unchecked(tokens, table.index_select(0, rows).permute(1, 2, 0)).transpose(0, 1).contiguous()
