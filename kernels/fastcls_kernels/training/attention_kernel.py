"""The kernels of attention that can be trained, and their launchers:

    s_ij = q_i · k_j · scale + b_(j - i);    p_i = softmax(s_i);    out_i = Σ_j drop(p_ij) v_j.

Beside the output the forward pass keeps two numbers for a row and head: the softmax's maximum and the inverse of its
sum. (Of one number, the logarithm of both, float32 would keep less.) The backward pass makes p again, tile by tile, as
flash-attention does (Dao, 2023), and with δ_i = grad_i · out_i takes

    g_ij = p_ij (drop(grad_i · v_j) - δ_i),
    grad_q_i = scale Σ_j g_ij k_j,    grad_k_j = scale Σ_i g_ij q_i,    grad_v_j = Σ_i drop(p_ij) grad_i.

A program computes the rows of one tile and one head: of queries for the output, δ and grad_q, of keys for grad_k and
grad_v. So no two programs add to one number, and every run gives the same. A tile holds rows of one sequence and reads
that sequence's rows alone: what overflows in a text stays there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..attention.kernel import NO_WINDOW, load_rows
from ..layout import PackedLayout
from ..runtime.backend import device_guard
from ..runtime.tile_tables import arch_of
from ..runtime.triton import jit, tl
from .attention_bias_kernel import launch_bias_gradient
from .attention_tiles import (
    Scoring,
    load_tile,
    options_of,
    pairs_of,
    positions_of,
    scores_of,
    store_tile,
    strides_of,
    tile_for,
    tile_of,
    weights_and_flow,
)
from .dropout import Dropout, kept_numbers


@jit(do_not_specialize=["total_tokens", "seed", "threshold"])
def _attention_forward_kernel(
    q_ptr,  # (total_tokens, nheads, headdim)
    k_ptr,  # (total_tokens, nheads_k, headdim)
    v_ptr,  # (total_tokens, nheads_k, headdim)
    out_ptr,  # (total_tokens, nheads, headdim)
    statistics_ptr,  # (2, nheads, total_tokens)
    bias_ptr,  # (nheads, 2 * REACH + 1), or None
    positions_ptr,  # (total_tokens,), or None where a row's place is its position
    bound_start_ptr,  # (total_tokens,): each query's first key, or None for its sequence's
    bound_end_ptr,  # (total_tokens,), or None
    tiles_ptr,  # (num_tiles, 4)
    total_tokens, seed, threshold, factor, scale_log2, log2_e,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, REACH: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    offs_m, in_tile, key_start, key_end, first_key, last_key, sequence_start = tile_of(
        tiles_ptr + tl.program_id(0) * 4, bound_start_ptr, bound_end_ptr, total_tokens, BLOCK_M
    )
    k_ptr += head // GROUP * stride_kh
    v_ptr += head // GROUP * stride_vh
    if bias_ptr is not None:
        bias_ptr += head * (2 * REACH + 1) + REACH
    position = positions_of(positions_ptr, offs_m, total_tokens)
    dropout_row = offs_m.to(tl.int32) * tl.num_programs(1) + tl.program_id(1)

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
        # [BLOCK_M, BLOCK_N]
        offset = positions_of(positions_ptr, offs_n, last_key)[None, :] - position[:, None]
        own = pairs_of(offs_n, key_start, key_end, last_key, bound_start_ptr)
        scores = scores_of(q, k, bias_ptr, offset, own, scale_log2, log2_e, REACH)
        # new_max is at least -1e30, so a masked score weighs exp2(-inf) = 0 and never meets inf - inf.
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        weights = tl.exp2(scores - new_max[:, None])
        rescale = tl.exp2(row_max - new_max)
        row_max = new_max
        # A row's sum is of all its weights, those that are dropped included.
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
    tl.store(statistics_ptr + tl.num_programs(1) * total_tokens, inverse, mask=in_tile)


@jit(do_not_specialize=["total_tokens", "seed", "threshold"])
def _attention_query_gradient_kernel(
    grad_ptr,  # (total_tokens, nheads, headdim)
    q_ptr,  # (total_tokens, nheads, headdim)
    k_ptr,  # (total_tokens, nheads_k, headdim)
    v_ptr,  # (total_tokens, nheads_k, headdim)
    out_ptr,  # (total_tokens, nheads, headdim)
    statistics_ptr,  # (2, nheads, total_tokens)
    delta_ptr,  # (nheads, total_tokens)
    grad_q_ptr,  # (total_tokens, nheads, headdim)
    bias_ptr,  # (nheads, 2 * REACH + 1), or None
    positions_ptr,  # (total_tokens,), or None where a row's place is its position
    bound_start_ptr,  # (total_tokens,): each query's first key, or None for its sequence's
    bound_end_ptr,  # (total_tokens,), or None
    tiles_ptr,  # (num_tiles, 4)
    total_tokens, seed, threshold, factor, scale, scale_log2, log2_e,
    stride_gt, stride_gh, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh,
    stride_dqt, stride_dqh,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, REACH: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    offs_m, in_tile, key_start, key_end, first_key, last_key, sequence_start = tile_of(
        tiles_ptr + tl.program_id(0) * 4, bound_start_ptr, bound_end_ptr, total_tokens, BLOCK_M
    )
    k_ptr += head // GROUP * stride_kh
    v_ptr += head // GROUP * stride_vh
    if bias_ptr is not None:
        bias_ptr += head * (2 * REACH + 1) + REACH
    position = positions_of(positions_ptr, offs_m, total_tokens)
    dropout_row = offs_m.to(tl.int32) * tl.num_programs(1) + tl.program_id(1)

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
    inverse = tl.load(statistics_ptr + tl.num_programs(1) * total_tokens, mask=in_tile, other=0.0)
    for start_n in tl.range(first_key, last_key, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        # [BLOCK_N, BLOCK_D]
        k = load_rows(k_ptr, None, start_n, last_key, 0, stride_kt, HEAD_DIM, BLOCK_D, BLOCK_N, TMA=False)
        v = load_rows(v_ptr, None, start_n, last_key, 0, stride_vt, HEAD_DIM, BLOCK_D, BLOCK_N, TMA=False)
        # [BLOCK_M, BLOCK_N]
        offset = positions_of(positions_ptr, offs_n, last_key)[None, :] - position[:, None]
        own = pairs_of(offs_n, key_start, key_end, last_key, bound_start_ptr)
        scores = scores_of(q, k, bias_ptr, offset, own, scale_log2, log2_e, REACH)
        _, flow = weights_and_flow(
            scores, row_max[:, None], inverse[:, None], delta[:, None], grad, v, dropout_row[:, None],
            (offs_n - sequence_start)[None, :], seed, threshold, factor, HAS_DROPOUT,
        )  # fmt: skip
        acc = tl.dot(flow.to(k.dtype), k, acc, input_precision="ieee")
    store_tile(grad_q_ptr + head * stride_dqh, acc * scale, offs_m, in_tile, stride_dqt, HEAD_DIM, BLOCK_D)


@jit(do_not_specialize=["total_tokens", "seed", "threshold"])
def _attention_key_gradient_kernel(
    grad_ptr,  # (total_tokens, nheads, headdim)
    q_ptr,  # (total_tokens, nheads, headdim)
    k_ptr,  # (total_tokens, nheads_k, headdim)
    v_ptr,  # (total_tokens, nheads_k, headdim)
    statistics_ptr,  # (2, nheads, total_tokens)
    delta_ptr,  # (nheads, total_tokens)
    grad_k_ptr,  # (total_tokens, nheads_k, headdim)
    grad_v_ptr,  # (total_tokens, nheads_k, headdim)
    bias_ptr,  # (nheads, 2 * REACH + 1), or None
    positions_ptr,  # (total_tokens,), or None where a row's place is its position
    bound_start_ptr,  # (total_tokens,): each key's first query, or None for its sequence's
    bound_end_ptr,  # (total_tokens,), or None
    tiles_ptr,  # (num_tiles, 4)
    total_tokens, seed, threshold, factor, scale, scale_log2, log2_e,
    stride_gt, stride_gh, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    stride_dkt, stride_dkh, stride_dvt, stride_dvh,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, REACH: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    key_head = tl.program_id(1).to(tl.int64)
    offs_m, in_tile, query_start, query_end, first_query, last_query, sequence_start = tile_of(
        tiles_ptr + tl.program_id(0) * 4, bound_start_ptr, bound_end_ptr, total_tokens, BLOCK_M
    )
    position = positions_of(positions_ptr, offs_m, total_tokens)
    dropout_column = offs_m.to(tl.int32) - sequence_start

    # [BLOCK_M, BLOCK_D]
    k = load_tile(k_ptr + key_head * stride_kh, offs_m, in_tile, stride_kt, HEAD_DIM, BLOCK_D)
    v = load_tile(v_ptr + key_head * stride_vh, offs_m, in_tile, stride_vt, HEAD_DIM, BLOCK_D)
    grad_k = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    grad_v = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    for member in range(GROUP):
        head = key_head * GROUP + member
        line = head * total_tokens
        table_ptr = bias_ptr
        if bias_ptr is not None:
            table_ptr = bias_ptr + (head * (2 * REACH + 1) + REACH)
        for start_n in tl.range(first_query, last_query, BLOCK_N):
            offs_n = start_n + tl.arange(0, BLOCK_N)
            in_rows = offs_n < last_query
            # [BLOCK_N, BLOCK_D]
            q = load_rows(
                q_ptr + head * stride_qh, None, start_n, last_query, 0, stride_qt, HEAD_DIM, BLOCK_D, BLOCK_N, TMA=False
            )
            grad = load_rows(
                grad_ptr + head * stride_gh, None, start_n, last_query, 0, stride_gt, HEAD_DIM, BLOCK_D, BLOCK_N,
                TMA=False,
            )  # fmt: skip
            # [BLOCK_N]
            row_max = tl.load(statistics_ptr + line + offs_n, mask=in_rows, other=0.0)
            inverse = tl.load(
                statistics_ptr + tl.num_programs(1) * GROUP * total_tokens + line + offs_n, mask=in_rows, other=0.0
            )
            delta = tl.load(delta_ptr + line + offs_n, mask=in_rows, other=0.0)
            dropout_row = (offs_n * tl.num_programs(1) + tl.program_id(1)) * GROUP + member
            # [BLOCK_M, BLOCK_N]
            offset = position[:, None] - positions_of(positions_ptr, offs_n, last_query)[None, :]
            own = pairs_of(offs_n, query_start, query_end, last_query, bound_start_ptr)
            scores = scores_of(k, q, table_ptr, offset, own, scale_log2, log2_e, REACH)
            weights, flow = weights_and_flow(
                scores, row_max[None, :], inverse[None, :], delta[None, :], v, grad, dropout_row[None, :],
                dropout_column[:, None], seed, threshold, factor, HAS_DROPOUT,
            )  # fmt: skip
            grad_v = tl.dot(weights.to(grad.dtype), grad, grad_v, input_precision="ieee")
            grad_k = tl.dot(flow.to(q.dtype), q, grad_k, input_precision="ieee")
    store_tile(grad_k_ptr + key_head * stride_dkh, grad_k * scale, offs_m, in_tile, stride_dkt, HEAD_DIM, BLOCK_D)
    store_tile(grad_v_ptr + key_head * stride_dvh, grad_v * factor, offs_m, in_tile, stride_dvt, HEAD_DIM, BLOCK_D)


def launch_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PackedLayout,
    scale: float,
    window_size: tuple[int, int] = NO_WINDOW,
    bias: Tensor | None = None,
    dropout: Dropout | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention as `attention_varlen` defines it, of probabilities behind dropout, and what its gradients need.

    Args:
        q, k, v, layout, scale, window_size, bias: as `attention_varlen` has checked them.
        dropout: what drops probabilities, or None. Of packed row i, head h and the key that is the jth row of its
            sequence the dropout's row is ``i * nheads + h`` and its column j.

    Returns:
        (total_tokens, nheads, headdim) in q's dtype, contiguous, 0 in rows that belong to no sequence; and (2, nheads,
        total_tokens) float32: the largest score of each row, times log2 e, and the inverse of the sum that its softmax
        divides by, of exponentials relative to that score.
    """
    total_tokens, num_heads, head_dim = q.shape
    scoring = Scoring(layout, scale, window_size, bias, dropout)
    out = q.new_empty(total_tokens, num_heads, head_dim)
    statistics = q.new_empty(2, num_heads, total_tokens, dtype=torch.float32)
    if out.numel() == 0:
        return out, statistics
    tile = tile_for(arch_of(q.device), q.dtype, head_dim)
    tiles = layout.sequence_tiles(tile.BLOCK_M)
    with device_guard(q):
        _attention_forward_kernel[(tiles.shape[0], num_heads)](
            q_ptr=q,
            k_ptr=k,
            v_ptr=v,
            out_ptr=out,
            statistics_ptr=statistics,
            tiles_ptr=tiles,
            **scoring.arguments(),
            **strides_of(q=q, k=k, v=v, o=out),
            **options_of(tile, q, k),
        )
    return out, statistics


def launch_attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    statistics: Tensor,
    layout: PackedLayout,
    scale: float,
    window_size: tuple[int, int] = NO_WINDOW,
    bias: Tensor | None = None,
    dropout: Dropout | None = None,
    *,
    into: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The gradients of `launch_attention_forward`, the same numbers in every run.

    Args:
        grad_out: the output's, (total_tokens, nheads, headdim), in its dtype and with a contiguous last dimension.
        q, k, v, layout, scale, window_size, bias, dropout: as the forward pass had them.
        out, statistics: what it returned.
        into: tensors of the shapes and dtype of q, k and v, with contiguous last dimensions, in which their gradients
            are stored, None for new ones.

    Returns:
        The gradients of q, k and v, which are 0 in rows that belong to no sequence, and that of the bias, float32, or
        None without one.
    """
    scoring = Scoring(layout, scale, window_size, bias, dropout)
    grad_q, grad_k, grad_v = into or (tensor.new_empty(tensor.shape) for tensor in (q, k, v))
    if q.numel() == 0:
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        return grad_q, grad_k, grad_v, grad_bias
    deltas = statistics.new_empty(statistics.shape[1:])
    rows = {"grad_ptr": grad_out, "q_ptr": q, "k_ptr": k, "v_ptr": v}
    given = {**rows, "statistics_ptr": statistics, "delta_ptr": deltas}
    strides = strides_of(g=grad_out, q=q, k=k, v=v)
    tile = tile_for(arch_of(q.device), q.dtype, q.shape[2])
    tiles = layout.sequence_tiles(tile.BLOCK_M)
    with device_guard(q):
        _attention_query_gradient_kernel[(tiles.shape[0], q.shape[1])](
            **given,
            out_ptr=out,
            grad_q_ptr=grad_q,
            tiles_ptr=tiles,
            scale=scale,
            **scoring.arguments(),
            **strides,
            **strides_of(o=out, dq=grad_q),
            **options_of(tile, q, k),
        )
        _attention_key_gradient_kernel[(tiles.shape[0], k.shape[1])](
            **given,
            grad_k_ptr=grad_k,
            grad_v_ptr=grad_v,
            tiles_ptr=tiles,
            scale=scale,
            **scoring.arguments(of_keys=True),
            **strides,
            **strides_of(dk=grad_k, dv=grad_v),
            **options_of(tile, q, k),
        )
    return grad_q, grad_k, grad_v, None if bias is None else launch_bias_gradient(q, k, given, strides, scoring)
