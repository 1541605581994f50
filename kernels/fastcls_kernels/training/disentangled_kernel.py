"""The kernels of disentangled attention that can be trained, and their launchers; `disentangled.py` has the formula.

They are those of `attention_kernel.py`, and read the terms of positions from the products of tokens with one column
for each distance. Backward, the gradients of scores g_ij are written to matrices of the same columns: row i holds those
of query i, another matrix's row j those of key j. All but the outermost columns take one pair at most, since positions
rise within a text, and a program sums those of its own rows: nothing is added to memory. Products of these matrices are

    grad_q_i += scale Σ_c g_ic K_c,    grad_K_c = scale Σ_i g_ic q_i,

the same for keys, and each bucket of the tables sums the columns that are its own, which are neighbours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..attention.kernel import load_rows
from ..disentangled_attention.buckets import DistanceTables
from ..layout import PackedLayout
from ..runtime.backend import device_guard
from ..runtime.triton import jit, tl
from .attention_tiles import load_tile, store_tile, strides_of, tile_of, weights_and_flow
from .disentangled_tables_kernel import launch_row_gradient, launch_table_gradient
from .disentangled_tiles import Columns, keep_ends, keep_flow, options_of, row_in_tile, scores_of, within
from .dropout import Dropout, kept_numbers


@jit(do_not_specialize=["total_tokens", "num_columns", "reach", "first_head", "num_heads", "seed", "threshold"])
def _disentangled_forward_kernel(
    q_ptr,  # (total_tokens, nheads, headdim)
    k_ptr,  # (total_tokens, nheads, headdim)
    v_ptr,  # (total_tokens, nheads, headdim)
    of_query_ptr,  # (nheads, total_tokens, num_columns), or None
    of_key_ptr,  # (nheads, total_tokens, num_columns), or None
    positions_ptr,  # (total_tokens,)
    out_ptr,  # (total_tokens, nheads, headdim)
    statistics_ptr,  # (2, nheads, total_tokens)
    tiles_ptr,  # (num_tiles, 4)
    total_tokens, num_columns, reach, first_head, num_heads, seed, threshold, factor, scale_log2,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh,
    HAS_DROPOUT: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    tiles_ptr += tl.program_id(0) * 4
    offs_m, in_tile, _, _, first_key, last_key, sequence_start = tile_of(tiles_ptr, None, None, total_tokens, BLOCK_M)
    query_row = row_in_tile(offs_m, tiles_ptr)
    position = tl.load(positions_ptr + offs_m, mask=in_tile, other=0)
    dropout_row = offs_m.to(tl.int32) * num_heads + first_head + tl.program_id(1)
    k_ptr += head * stride_kh
    v_ptr += head * stride_vh
    # Column ``reach`` is distance 0.
    if of_query_ptr is not None:
        of_query_ptr += (head * total_tokens + tl.load(tiles_ptr)) * num_columns + reach
    if of_key_ptr is not None:
        of_key_ptr += head * total_tokens * num_columns + reach

    # [BLOCK_M, BLOCK_D]
    q = load_tile(q_ptr + head * stride_qh, offs_m, in_tile, stride_qt, HEAD_DIM, BLOCK_D)
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    # [BLOCK_M]
    row_max = tl.full([BLOCK_M], -1e30, dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    for start_n in tl.range(first_key, last_key, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        # [BLOCK_N, BLOCK_D]
        k = load_rows(k_ptr, None, start_n, last_key, 0, stride_kt, HEAD_DIM, BLOCK_D, BLOCK_N, TMA=False)
        v = load_rows(v_ptr, None, start_n, last_key, 0, stride_vt, HEAD_DIM, BLOCK_D, BLOCK_N, TMA=False)
        # [BLOCK_N]
        key_row = tl.minimum(tl.arange(0, BLOCK_N), last_key - 1 - start_n)
        key_position = tl.load(positions_ptr + start_n + key_row)
        tile_of_key_ptr = of_key_ptr
        if of_key_ptr is not None:
            tile_of_key_ptr = of_key_ptr + tl.cast(start_n, tl.int64) * num_columns
        # [BLOCK_M, BLOCK_N]
        scores = scores_of(
            q, k, of_query_ptr, tile_of_key_ptr, query_row, key_row,
            within(position[:, None] - key_position[None, :], reach),
            within(position[None, :] - key_position[:, None], reach), (offs_n < last_key)[None, :], num_columns,
            scale_log2,
        )  # fmt: skip
        # new_max is at least -1e30, so a masked score weighs exp2(-inf) = 0 and never meets inf - inf.
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        weights = tl.exp2(scores - new_max[:, None])
        rescale = tl.exp2(row_max - new_max)
        row_max = new_max
        row_sum = row_sum * rescale + tl.sum(weights, 1)
        if HAS_DROPOUT:
            kept = kept_numbers(seed, threshold, dropout_row[:, None], (offs_n - sequence_start)[None, :])
            weights = tl.where(kept, weights, 0.0)
        acc = tl.dot(weights.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")

    # A row that belongs to no sequence has no sum.
    inverse = tl.where(row_sum == 0.0, 0.0, 1.0 / tl.where(row_sum == 0.0, 1.0, row_sum))
    acc = acc * (factor * inverse)[:, None]
    store_tile(out_ptr + head * stride_oh, acc, offs_m, in_tile, stride_ot, HEAD_DIM, BLOCK_D)
    statistics_ptr += head * total_tokens + offs_m
    tl.store(statistics_ptr, row_max, mask=in_tile)
    tl.store(statistics_ptr + tl.cast(num_heads, tl.int64) * total_tokens, inverse, mask=in_tile)


@jit(do_not_specialize=["total_tokens", "num_columns", "reach", "first_head", "num_heads", "seed", "threshold"])
def _disentangled_query_gradient_kernel(
    grad_ptr,  # (total_tokens, nheads, headdim)
    q_ptr,  # (total_tokens, nheads, headdim)
    k_ptr,  # (total_tokens, nheads, headdim)
    v_ptr,  # (total_tokens, nheads, headdim)
    out_ptr,  # (total_tokens, nheads, headdim)
    of_query_ptr,  # (nheads, total_tokens, num_columns), or None
    of_key_ptr,  # (nheads, total_tokens, num_columns), or None
    positions_ptr,  # (total_tokens,)
    statistics_ptr,  # (2, nheads, total_tokens)
    delta_ptr,  # (nheads, total_tokens)
    flow_ptr,  # (nheads, total_tokens, num_columns), zero, or None
    grad_q_ptr,  # (total_tokens, nheads, headdim)
    tiles_ptr,  # (num_tiles, 4)
    total_tokens, num_columns, reach, first_head, num_heads, seed, threshold, factor, scale_log2,
    stride_gt, stride_gh, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh,
    stride_dqt, stride_dqh,
    HAS_DROPOUT: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    tiles_ptr += tl.program_id(0) * 4
    offs_m, in_tile, _, _, first_key, last_key, sequence_start = tile_of(tiles_ptr, None, None, total_tokens, BLOCK_M)
    query_row = row_in_tile(offs_m, tiles_ptr)
    position = tl.load(positions_ptr + offs_m, mask=in_tile, other=0)
    dropout_row = offs_m.to(tl.int32) * num_heads + first_head + tl.program_id(1)
    k_ptr += head * stride_kh
    v_ptr += head * stride_vh
    own_column = (head * total_tokens + tl.load(tiles_ptr)) * num_columns + reach
    if of_query_ptr is not None:
        of_query_ptr += own_column
    if of_key_ptr is not None:
        of_key_ptr += head * total_tokens * num_columns + reach
    if flow_ptr is not None:
        flow_ptr += own_column

    # [BLOCK_M, BLOCK_D]
    grad = load_tile(grad_ptr + head * stride_gh, offs_m, in_tile, stride_gt, HEAD_DIM, BLOCK_D)
    out = load_tile(out_ptr + head * stride_oh, offs_m, in_tile, stride_ot, HEAD_DIM, BLOCK_D)
    q = load_tile(q_ptr + head * stride_qh, offs_m, in_tile, stride_qt, HEAD_DIM, BLOCK_D)
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    # [BLOCK_M]
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + head * total_tokens + offs_m, delta, mask=in_tile)
    statistics_ptr += head * total_tokens + offs_m
    row_max = tl.load(statistics_ptr, mask=in_tile, other=0.0)
    inverse = tl.load(statistics_ptr + tl.cast(num_heads, tl.int64) * total_tokens, mask=in_tile, other=0.0)
    below = tl.zeros([BLOCK_M], dtype=tl.float32)
    above = tl.zeros([BLOCK_M], dtype=tl.float32)
    for start_n in tl.range(first_key, last_key, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        # [BLOCK_N, BLOCK_D]
        k = load_rows(k_ptr, None, start_n, last_key, 0, stride_kt, HEAD_DIM, BLOCK_D, BLOCK_N, TMA=False)
        v = load_rows(v_ptr, None, start_n, last_key, 0, stride_vt, HEAD_DIM, BLOCK_D, BLOCK_N, TMA=False)
        # [BLOCK_N]
        key_row = tl.minimum(tl.arange(0, BLOCK_N), last_key - 1 - start_n)
        key_position = tl.load(positions_ptr + start_n + key_row)
        tile_of_key_ptr = of_key_ptr
        if of_key_ptr is not None:
            tile_of_key_ptr = of_key_ptr + tl.cast(start_n, tl.int64) * num_columns
        # [BLOCK_M, BLOCK_N]
        distance = within(position[:, None] - key_position[None, :], reach)
        own = (offs_n < last_key)[None, :]
        scores = scores_of(
            q, k, of_query_ptr, tile_of_key_ptr, query_row, key_row, distance,
            within(position[None, :] - key_position[:, None], reach), own, num_columns, scale_log2,
        )  # fmt: skip
        # Not into _, which the loop would carry in two types.
        flow = weights_and_flow(
            scores, row_max[:, None], inverse[:, None], delta[:, None], grad, v, dropout_row[:, None],
            (offs_n - sequence_start)[None, :], seed, threshold, factor, HAS_DROPOUT,
        )[1]  # fmt: skip
        acc = tl.dot(flow.to(k.dtype), k, acc, input_precision="ieee")
        if flow_ptr is not None:
            pairs = in_tile[:, None] & own
            below, above = keep_flow(flow_ptr, flow, query_row, distance, pairs, below, above, num_columns, reach)
    if flow_ptr is not None:
        keep_ends(flow_ptr, query_row, in_tile, below, above, num_columns, reach)
    store_tile(grad_q_ptr + head * stride_dqh, acc, offs_m, in_tile, stride_dqt, HEAD_DIM, BLOCK_D)


@jit(do_not_specialize=["total_tokens", "num_columns", "reach", "first_head", "num_heads", "seed", "threshold"])
def _disentangled_key_gradient_kernel(
    grad_ptr,  # (total_tokens, nheads, headdim)
    q_ptr,  # (total_tokens, nheads, headdim)
    k_ptr,  # (total_tokens, nheads, headdim)
    v_ptr,  # (total_tokens, nheads, headdim)
    of_query_ptr,  # (nheads, total_tokens, num_columns), or None
    of_key_ptr,  # (nheads, total_tokens, num_columns), or None
    positions_ptr,  # (total_tokens,)
    statistics_ptr,  # (2, nheads, total_tokens)
    delta_ptr,  # (nheads, total_tokens)
    flow_ptr,  # (nheads, total_tokens, num_columns), zero, or None
    grad_k_ptr,  # (total_tokens, nheads, headdim)
    grad_v_ptr,  # (total_tokens, nheads, headdim)
    tiles_ptr,  # (num_tiles, 4)
    total_tokens, num_columns, reach, first_head, num_heads, seed, threshold, factor, scale_log2,
    stride_gt, stride_gh, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    stride_dkt, stride_dkh, stride_dvt, stride_dvh,
    HAS_DROPOUT: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    tiles_ptr += tl.program_id(0) * 4
    offs_n, in_tile, _, _, first_query, last_query, sequence_start = tile_of(
        tiles_ptr, None, None, total_tokens, BLOCK_N
    )
    key_row = row_in_tile(offs_n, tiles_ptr)
    position = tl.load(positions_ptr + offs_n, mask=in_tile, other=0)
    dropout_column = offs_n.to(tl.int32) - sequence_start
    q_ptr += head * stride_qh
    grad_ptr += head * stride_gh
    own_column = (head * total_tokens + tl.load(tiles_ptr)) * num_columns + reach
    if of_query_ptr is not None:
        of_query_ptr += head * total_tokens * num_columns + reach
    if of_key_ptr is not None:
        of_key_ptr += own_column
    if flow_ptr is not None:
        flow_ptr += own_column

    # [BLOCK_N, BLOCK_D]
    k = load_tile(k_ptr + head * stride_kh, offs_n, in_tile, stride_kt, HEAD_DIM, BLOCK_D)
    v = load_tile(v_ptr + head * stride_vh, offs_n, in_tile, stride_vt, HEAD_DIM, BLOCK_D)
    grad_k = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    grad_v = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    # [BLOCK_N]
    below = tl.zeros([BLOCK_N], dtype=tl.float32)
    above = tl.zeros([BLOCK_N], dtype=tl.float32)
    for start_m in tl.range(first_query, last_query, BLOCK_M):
        offs_m = start_m + tl.arange(0, BLOCK_M)
        in_rows = offs_m < last_query
        # [BLOCK_M, BLOCK_D]
        q = load_rows(q_ptr, None, start_m, last_query, 0, stride_qt, HEAD_DIM, BLOCK_D, BLOCK_M, TMA=False)
        grad = load_rows(grad_ptr, None, start_m, last_query, 0, stride_gt, HEAD_DIM, BLOCK_D, BLOCK_M, TMA=False)
        # [BLOCK_M]
        row_max = tl.load(statistics_ptr + head * total_tokens + offs_m, mask=in_rows, other=0.0)
        inverse = tl.load(statistics_ptr + (head + num_heads) * total_tokens + offs_m, mask=in_rows, other=0.0)
        delta = tl.load(delta_ptr + head * total_tokens + offs_m, mask=in_rows, other=0.0)
        dropout_row = offs_m * num_heads + first_head + tl.program_id(1)
        query_row = tl.minimum(tl.arange(0, BLOCK_M), last_query - 1 - start_m)
        query_position = tl.load(positions_ptr + start_m + query_row)
        tile_of_query_ptr = of_query_ptr
        if of_query_ptr is not None:
            tile_of_query_ptr = of_query_ptr + tl.cast(start_m, tl.int64) * num_columns
        # [BLOCK_N, BLOCK_M]
        distance = within(query_position[None, :] - position[:, None], reach)
        own = in_rows[None, :]
        scores = scores_of(
            k, q, of_key_ptr, tile_of_query_ptr, key_row, query_row, distance,
            within(query_position[:, None] - position[None, :], reach), own, num_columns, scale_log2,
        )  # fmt: skip
        weights, flow = weights_and_flow(
            scores, row_max[None, :], inverse[None, :], delta[None, :], v, grad, dropout_row[None, :],
            dropout_column[:, None], seed, threshold, factor, HAS_DROPOUT,
        )  # fmt: skip
        grad_v = tl.dot(weights.to(grad.dtype), grad, grad_v, input_precision="ieee")
        grad_k = tl.dot(flow.to(q.dtype), q, grad_k, input_precision="ieee")
        if flow_ptr is not None:
            pairs = in_tile[:, None] & own
            below, above = keep_flow(flow_ptr, flow, key_row, distance, pairs, below, above, num_columns, reach)
    if flow_ptr is not None:
        keep_ends(flow_ptr, key_row, in_tile, below, above, num_columns, reach)
    store_tile(grad_k_ptr + head * stride_dkh, grad_k, offs_n, in_tile, stride_dkt, HEAD_DIM, BLOCK_D)
    store_tile(grad_v_ptr + head * stride_dvh, grad_v * factor, offs_n, in_tile, stride_dvt, HEAD_DIM, BLOCK_D)


def launch_disentangled_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: DistanceTables,
    layout: PackedLayout,
    scale: float,
    dropout: Dropout | None,
) -> tuple[Tensor, Tensor]:
    """Attention as `disentangled_attention` defines it, of probabilities behind dropout, and what its gradients need.

    Args:
        q, k, v, tables, layout, scale: as `disentangled_attention` has checked them.
        dropout: what drops probabilities, or None. Of packed row i, head h and the key that is the jth row of its
            sequence the dropout's row is ``i * nheads + h`` and its column j.

    Returns:
        (total_tokens, nheads, headdim) in q's dtype, contiguous, 0 in rows that belong to no sequence; and (2, nheads,
        total_tokens) float32: the largest score of each row, times log2 e, and the inverse of the sum that its softmax
        divides by.
    """
    out = q.new_empty(q.shape)
    statistics = q.new_empty(2, q.shape[1], q.shape[0], dtype=torch.float32)
    if out.numel() == 0:
        return out, statistics
    columns = Columns.of(tables, layout)
    tile, options = options_of(q)
    tiles = layout.sequence_tiles(tile.BLOCK_M)
    for heads in columns.turns(q):
        parts = {"q": q[:, heads], "k": k[:, heads], "v": v[:, heads], "o": out[:, heads]}
        with device_guard(q):
            _disentangled_forward_kernel[(tiles.shape[0], heads.stop - heads.start)](
                q_ptr=parts["q"],
                k_ptr=parts["k"],
                v_ptr=parts["v"],
                out_ptr=parts["o"],
                statistics_ptr=statistics[:, heads],
                tiles_ptr=tiles,
                **columns.arguments(q, k, layout, scale, dropout, heads),
                **strides_of(**parts),
                **options,
            )
    return out, statistics


def launch_disentangled_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    statistics: Tensor,
    tables: DistanceTables,
    layout: PackedLayout,
    scale: float,
    dropout: Dropout | None,
    *,
    into: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """The gradients of `launch_disentangled_forward`, the same numbers in every run.

    Args:
        grad_out: the output's, (total_tokens, nheads, headdim), in its dtype and with a contiguous last dimension.
        q, k, v, tables, layout, scale, dropout: as the forward pass had them.
        out, statistics: what it returned.
        into: tensors of the shapes and dtype of q, k and v, with contiguous last dimensions, in which their gradients
            are stored, None for new ones.

    Returns:
        The gradients of q, k and v, which are 0 in rows that belong to no sequence; and those of the tables' keys and
        queries, (num_buckets, nheads, headdim) float32, None where they are.
    """
    grad_q, grad_k, grad_v = into or (tensor.new_empty(tensor.shape) for tensor in (q, k, v))
    grad_tables = [
        None if table is None else q.new_zeros(table.shape, dtype=torch.float32)
        for table in (tables.keys, tables.queries)
    ]
    if q.numel() == 0:
        return grad_q, grad_k, grad_v, grad_tables[0], grad_tables[1]
    columns = Columns.of(tables, layout)
    tile, options = options_of(q)
    query_tiles, key_tiles = layout.sequence_tiles(tile.BLOCK_M), layout.sequence_tiles(tile.BLOCK_N)
    deltas = torch.empty_like(statistics[0])
    for heads in columns.turns(q):
        count = heads.stop - heads.start
        parts = {"g": grad_out[:, heads], "q": q[:, heads], "k": k[:, heads], "v": v[:, heads]}
        # Before the terms of positions, and before the scale.
        given_q, given_k = (q.new_empty(q.shape[0], count, q.shape[2], dtype=torch.float32) for _ in range(2))
        flows = [None if table is None else q.new_zeros(count, q.shape[0], table.shape[0]) for table in columns.tables]
        given = {
            "grad_ptr": parts["g"],
            "q_ptr": parts["q"],
            "k_ptr": parts["k"],
            "v_ptr": parts["v"],
            "statistics_ptr": statistics[:, heads],
            "delta_ptr": deltas[heads],
            **columns.arguments(q, k, layout, scale, dropout, heads),
            **strides_of(**parts),
            **options,
        }
        with device_guard(q):
            _disentangled_query_gradient_kernel[(query_tiles.shape[0], count)](
                out_ptr=out[:, heads],
                flow_ptr=flows[0],
                grad_q_ptr=given_q,
                tiles_ptr=query_tiles,
                **strides_of(o=out[:, heads], dq=given_q),
                **given,
            )
            _disentangled_key_gradient_kernel[(key_tiles.shape[0], count)](
                flow_ptr=flows[1],
                grad_k_ptr=given_k,
                grad_v_ptr=grad_v[:, heads],
                tiles_ptr=key_tiles,
                **strides_of(dk=given_k, dv=grad_v[:, heads]),
                **given,
            )
        sides = zip((given_q, given_k), (q, k), (grad_q, grad_k), flows, columns.tables, grad_tables, strict=True)
        for summed, rows, grad, flow, table, grad_table in sides:
            if flow is None or table is None or grad_table is None:
                grad[:, heads] = summed * scale
                continue
            launch_row_gradient(summed, flow, table[:, heads], scale, grad[:, heads])
            launch_table_gradient(flow, rows[:, heads], layout.cu_seqlens, columns.buckets, scale, grad_table[:, heads])
    return grad_q, grad_k, grad_v, grad_tables[0], grad_tables[1]
