"""Few query rows over many tokens: the attention of a last layer of which only some rows, such as [CLS], are read.

`cls_attention` is the streaming pass over the layer's *input*. With the key projection absorbed into the query,
score_j = q̃_h · x_j, and with the value projection applied after the sum,

    out_h = Σ_j softmax_j(q̃_h · x_j · scale + bias_jh) x_j,

so keys and values are never made and x is read once for all heads (the derivation is in kernels/README.md). Where keys
depend on positions they cannot be absorbed: then they are made and read beside x, score_j = q_h · k_jh, and values are
still not. All heads' scores are one product with the queries as a block-diagonal matrix.

A program takes one query row (or one split of a long one's tokens), a group of BLOCK_H heads and up to four chunks of
BLOCK_W columns; a second kernel merges the splits. The layer norm that ends the layer before may run inside, so that
its result is never stored. A row's tokens are those of its sequence, or any span: one kernel takes both.

`cls_attention_kv` is the same over keys and values that exist already.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from .._tracing import traceable
from ..attention import LOG2_E, attend_batch, is_finite_all
from ..layer_norm import AddNorm, add_layer_norm, check_add_norm
from ..layout import PackedLayout
from ..runtime.backend import device_guard, multiprocessor_count, runs_triton
from ..runtime.checks import check_device, check_head_dim, check_last_dim_contiguous, check_tensor
from ..runtime.invariance import is_batch_invariant
from ..runtime.split_precision import as_pair, pair_dot
from ..runtime.tile_tables import arch_of, cls_tile, unsqueezed
from ..runtime.triton import cdiv, jit, next_power_of_2, tl

# For each query row the first of the tokens that it reads, and the end of them.
RowBounds = tuple[Tensor, Tensor]
T = TypeVar("T")
# What one step of the PyTorch path may make over row_bounds, in numbers: 32 MiB of float32.
MAX_NUMBERS = 1 << 23


@jit()
def _load_query_chunk(
    q_ptr,
    chunk,
    in_heads,
    offs_h,
    stride_qh,
    scale_log2,
    WIDTH: tl.constexpr,
    BLOCK_W: tl.constexpr,
    DTYPE: tl.constexpr,
):
    offs_w = chunk * BLOCK_W + tl.arange(0, BLOCK_W)
    # [BLOCK_H, BLOCK_W]
    query = tl.load(
        q_ptr + offs_h.to(tl.int64)[:, None] * stride_qh + offs_w[None, :],
        mask=in_heads[:, None] & (offs_w[None, :] < WIDTH),
        other=0.0,
    ).to(tl.float32)
    # Scaled before it is split: absorbed queries are the largest numbers of the layer, and float16 ends at 65,504.
    return as_pair(query * scale_log2, DTYPE)


@jit()
def _load_token_chunk(x_ptr, chunk, offs_t, in_split, stride_xt, width, BLOCK_W: tl.constexpr):
    offs_w = chunk * BLOCK_W + tl.arange(0, BLOCK_W)
    # [BLOCK_N, BLOCK_W]
    return tl.load(
        x_ptr + offs_t[:, None] * stride_xt + offs_w[None, :],
        mask=in_split[:, None] & (offs_w[None, :] < width),
        other=0.0,
    )


@jit()
def _add_key_scores(
    scores, q_ptr, key_ptr, chunk, offs_t, in_split, scale_log2, stride_kt, num_columns, KEY_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, PAIR: tl.constexpr,
):  # fmt: skip
    """``scores`` and what a chunk of the keys' columns adds, by one product: each head's query in its own columns."""
    offs_k = chunk * BLOCK_K + tl.arange(0, BLOCK_K)
    # [BLOCK_K]
    query = tl.load(q_ptr + offs_k, mask=offs_k < num_columns, other=0.0).to(tl.float32)
    own = tl.arange(0, BLOCK_H)[:, None] == (offs_k // KEY_DIM)[None, :]
    # [BLOCK_H, BLOCK_K]
    high, low = as_pair(tl.where(own, query[None, :] * scale_log2, 0.0), key_ptr.dtype.element_ty)
    # [BLOCK_N, BLOCK_K]
    k = _load_token_chunk(key_ptr, chunk, offs_t, in_split, stride_kt, num_columns, BLOCK_K)
    return pair_dot(high, low, tl.trans(k), scores, PAIR)


@jit()
def _load_summed_chunk(
    x_ptr, residual_ptr, bias_ptr, chunk, offs_t, in_split, stride_xt, stride_rt, WIDTH: tl.constexpr,
    BLOCK_W: tl.constexpr,
):  # fmt: skip
    """What the layer norm is taken of, in float32, zero outside; and the sum of each row."""
    offs_w = chunk * BLOCK_W + tl.arange(0, BLOCK_W)
    # [BLOCK_N, BLOCK_W]
    summed = _load_token_chunk(x_ptr, chunk, offs_t, in_split, stride_xt, WIDTH, BLOCK_W).to(tl.float32)
    summed += _load_token_chunk(residual_ptr, chunk, offs_t, in_split, stride_rt, WIDTH, BLOCK_W).to(tl.float32)
    summed += tl.load(bias_ptr + offs_w, mask=offs_w < WIDTH, other=0.0).to(tl.float32)[None, :]
    return summed, tl.sum(summed, 1)


@jit()
def _centre_chunk(summed, mean, chunk, WIDTH: tl.constexpr, BLOCK_W: tl.constexpr):
    """The chunk less each row's mean; and the sum of its squares."""
    offs_w = chunk * BLOCK_W + tl.arange(0, BLOCK_W)
    centred = tl.where(offs_w[None, :] < WIDTH, summed - mean[:, None], 0.0)
    return centred, tl.sum(centred * centred, 1)


@jit()
def _scale_chunk(centred, norm_scale, weight_ptr, norm_bias_ptr, chunk, WIDTH: tl.constexpr, BLOCK_W: tl.constexpr):
    """The chunk of the normalised rows, in the norm's dtype; zero beyond the width, as weight and bias are there."""
    offs_w = chunk * BLOCK_W + tl.arange(0, BLOCK_W)
    weight = tl.load(weight_ptr + offs_w, mask=offs_w < WIDTH, other=0.0)
    norm_bias = tl.load(norm_bias_ptr + offs_w, mask=offs_w < WIDTH, other=0.0)
    normalised = centred * norm_scale[:, None] * weight.to(tl.float32)[None, :] + norm_bias.to(tl.float32)[None, :]
    return normalised.to(weight.dtype)


@jit()
def _store_output_chunk(out_ptr, acc, chunk, in_heads, offs_h, WIDTH: tl.constexpr, BLOCK_W: tl.constexpr):
    offs_w = chunk * BLOCK_W + tl.arange(0, BLOCK_W)
    tl.store(
        out_ptr + offs_h[:, None] * WIDTH + offs_w[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=in_heads[:, None] & (offs_w[None, :] < WIDTH),
    )


@jit(do_not_specialize=["num_splits"], do_not_specialize_on_alignment=["start_ptr", "end_ptr"])
def _cls_attention_kernel(
    q_ptr,
    x_ptr,
    key_ptr,
    score_bias_ptr,
    out_ptr,
    lse_ptr,
    start_ptr,
    end_ptr,
    residual_ptr,
    bias_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    num_splits,
    scale_log2,
    eps,
    stride_qb,
    stride_qh,
    stride_xt,
    stride_kt,
    stride_rt,
    NUM_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    KEY_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
    CHUNKS: tl.constexpr,
    COLUMN_GROUPS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    KEY_CHUNKS: tl.constexpr,
    UNROLL_KEYS: tl.constexpr,
    PAIR: tl.constexpr,
    NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    LOG2_E: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    head_group = tl.program_id(2) // COLUMN_GROUPS
    column_group = tl.program_id(2) % COLUMN_GROUPS
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty

    start = tl.load(start_ptr + row)
    end = tl.load(end_ptr + row)
    tokens_per_split = tl.cdiv(tl.cdiv(end - start, num_splits), BLOCK_N) * BLOCK_N
    split_start = start + split * tokens_per_split
    split_end = tl.minimum(split_start + tokens_per_split, end)

    offs_h = head_group * BLOCK_H + tl.arange(0, BLOCK_H)
    in_heads = offs_h < NUM_HEADS
    q_ptr += row * stride_qb
    chunk0 = column_group * CHUNKS
    # The columns of keys from this group's first head to the last head.
    key_columns = NUM_HEADS * KEY_DIM
    if KEY_CHUNKS > 0 and NUM_HEADS > BLOCK_H:
        q_ptr += head_group * BLOCK_H * KEY_DIM
        key_ptr += head_group * BLOCK_H * KEY_DIM
        key_columns -= head_group * BLOCK_H * KEY_DIM

    # [BLOCK_H]
    row_max = tl.full([BLOCK_H], -1e30, dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_H], dtype=tl.float32)
    # [BLOCK_H, BLOCK_W] each
    acc0 = tl.zeros([BLOCK_H, BLOCK_W], dtype=tl.float32)
    acc1 = acc0
    acc2 = acc0
    acc3 = acc0

    # One column group: the query stays on chip, and each tile of x serves both products.
    if COLUMN_GROUPS == 1 and KEY_CHUNKS == 0:
        q0, r0 = _load_query_chunk(q_ptr, 0, in_heads, offs_h, stride_qh, scale_log2, WIDTH, BLOCK_W, DTYPE)
        if CHUNKS > 1:
            q1, r1 = _load_query_chunk(q_ptr, 1, in_heads, offs_h, stride_qh, scale_log2, WIDTH, BLOCK_W, DTYPE)
        if CHUNKS > 2:
            q2, r2 = _load_query_chunk(q_ptr, 2, in_heads, offs_h, stride_qh, scale_log2, WIDTH, BLOCK_W, DTYPE)
        if CHUNKS > 3:
            q3, r3 = _load_query_chunk(q_ptr, 3, in_heads, offs_h, stride_qh, scale_log2, WIDTH, BLOCK_W, DTYPE)

    for tile_start in range(split_start, split_end, BLOCK_N):
        offs_t = tile_start + tl.arange(0, BLOCK_N)
        in_split = offs_t < split_end
        offs_t = offs_t.to(tl.int64)
        if HAS_BIAS:
            # The tile's place is one 64-bit number; offsets within it are the same in every step. Loaded here and not
            # where it is added, which takes more registers.
            offs_b = tl.arange(0, BLOCK_N)[None, :] * NUM_HEADS + offs_h[:, None]
            # [BLOCK_H, BLOCK_N]
            score_bias = tl.load(
                score_bias_ptr + tl.cast(tile_start, tl.int64) * NUM_HEADS + offs_b,
                mask=in_heads[:, None] & in_split[None, :],
                other=0.0,
            )
        # [BLOCK_N, BLOCK_W] each
        if NORM:
            x0, total = _load_summed_chunk(
                x_ptr, residual_ptr, bias_ptr, chunk0, offs_t, in_split, stride_xt, stride_rt, WIDTH, BLOCK_W
            )
            if CHUNKS > 1:
                x1, t1 = _load_summed_chunk(
                    x_ptr, residual_ptr, bias_ptr, chunk0 + 1, offs_t, in_split, stride_xt, stride_rt, WIDTH, BLOCK_W
                )
                total += t1
            if CHUNKS > 2:
                x2, t2 = _load_summed_chunk(
                    x_ptr, residual_ptr, bias_ptr, chunk0 + 2, offs_t, in_split, stride_xt, stride_rt, WIDTH, BLOCK_W
                )
                total += t2
            if CHUNKS > 3:
                x3, t3 = _load_summed_chunk(
                    x_ptr, residual_ptr, bias_ptr, chunk0 + 3, offs_t, in_split, stride_xt, stride_rt, WIDTH, BLOCK_W
                )
                total += t3
            mean = total / WIDTH
            x0, squares = _centre_chunk(x0, mean, chunk0, WIDTH, BLOCK_W)
            if CHUNKS > 1:
                x1, t1 = _centre_chunk(x1, mean, chunk0 + 1, WIDTH, BLOCK_W)
                squares += t1
            if CHUNKS > 2:
                x2, t2 = _centre_chunk(x2, mean, chunk0 + 2, WIDTH, BLOCK_W)
                squares += t2
            if CHUNKS > 3:
                x3, t3 = _centre_chunk(x3, mean, chunk0 + 3, WIDTH, BLOCK_W)
                squares += t3
            norm_scale = tl.rsqrt(squares / WIDTH + eps)
            x0 = _scale_chunk(x0, norm_scale, norm_weight_ptr, norm_bias_ptr, chunk0, WIDTH, BLOCK_W)
            if CHUNKS > 1:
                x1 = _scale_chunk(x1, norm_scale, norm_weight_ptr, norm_bias_ptr, chunk0 + 1, WIDTH, BLOCK_W)
            if CHUNKS > 2:
                x2 = _scale_chunk(x2, norm_scale, norm_weight_ptr, norm_bias_ptr, chunk0 + 2, WIDTH, BLOCK_W)
            if CHUNKS > 3:
                x3 = _scale_chunk(x3, norm_scale, norm_weight_ptr, norm_bias_ptr, chunk0 + 3, WIDTH, BLOCK_W)
        else:
            x0 = _load_token_chunk(x_ptr, chunk0, offs_t, in_split, stride_xt, WIDTH, BLOCK_W)
            if CHUNKS > 1:
                x1 = _load_token_chunk(x_ptr, chunk0 + 1, offs_t, in_split, stride_xt, WIDTH, BLOCK_W)
            if CHUNKS > 2:
                x2 = _load_token_chunk(x_ptr, chunk0 + 2, offs_t, in_split, stride_xt, WIDTH, BLOCK_W)
            if CHUNKS > 3:
                x3 = _load_token_chunk(x_ptr, chunk0 + 3, offs_t, in_split, stride_xt, WIDTH, BLOCK_W)

        # [BLOCK_H, BLOCK_N]
        scores = tl.zeros([BLOCK_H, BLOCK_N], dtype=tl.float32)
        if UNROLL_KEYS:
            # Unrolled, the queries stay on chip, too, and the next step's keys are fetched beside its x.
            for chunk in tl.static_range(KEY_CHUNKS):
                scores = _add_key_scores(
                    scores, q_ptr, key_ptr, chunk, offs_t, in_split, scale_log2, stride_kt, key_columns, KEY_DIM,
                    BLOCK_H, BLOCK_K, PAIR,
                )  # fmt: skip
        elif KEY_CHUNKS > 0:
            for chunk in range(KEY_CHUNKS):
                scores = _add_key_scores(
                    scores, q_ptr, key_ptr, chunk, offs_t, in_split, scale_log2, stride_kt, key_columns, KEY_DIM,
                    BLOCK_H, BLOCK_K, PAIR,
                )  # fmt: skip
        elif COLUMN_GROUPS == 1:
            scores = pair_dot(q0, r0, tl.trans(x0), scores, PAIR)
            if CHUNKS > 1:
                scores = pair_dot(q1, r1, tl.trans(x1), scores, PAIR)
            if CHUNKS > 2:
                scores = pair_dot(q2, r2, tl.trans(x2), scores, PAIR)
            if CHUNKS > 3:
                scores = pair_dot(q3, r3, tl.trans(x3), scores, PAIR)
        else:
            for chunk in range((WIDTH + BLOCK_W - 1) // BLOCK_W):
                query, rest = _load_query_chunk(
                    q_ptr, chunk, in_heads, offs_h, stride_qh, scale_log2, WIDTH, BLOCK_W, DTYPE
                )
                x = _load_token_chunk(x_ptr, chunk, offs_t, in_split, stride_xt, WIDTH, BLOCK_W)
                scores = pair_dot(query, rest, tl.trans(x), scores, PAIR)

        if HAS_BIAS:
            scores += score_bias * LOG2_E
        scores = tl.where(in_split[None, :], scores, -1e30)
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        weights = tl.where(in_split[None, :], tl.exp2(scores - new_max[:, None]), 0.0)
        rescale = tl.exp2(row_max - new_max)
        row_sum = row_sum * rescale + tl.sum(weights, 1)
        row_max = new_max
        high, low = as_pair(weights, DTYPE)
        acc0 = pair_dot(high, low, x0, acc0 * rescale[:, None], PAIR)
        if CHUNKS > 1:
            acc1 = pair_dot(high, low, x1, acc1 * rescale[:, None], PAIR)
        if CHUNKS > 2:
            acc2 = pair_dot(high, low, x2, acc2 * rescale[:, None], PAIR)
        if CHUNKS > 3:
            acc3 = pair_dot(high, low, x3, acc3 * rescale[:, None], PAIR)

    divisor = tl.where(row_sum > 0.0, row_sum, 1.0)
    out_row = row * num_splits + split
    out_ptr += out_row * NUM_HEADS * WIDTH
    _store_output_chunk(out_ptr, acc0 / divisor[:, None], chunk0, in_heads, offs_h, WIDTH, BLOCK_W)
    if CHUNKS > 1:
        _store_output_chunk(out_ptr, acc1 / divisor[:, None], chunk0 + 1, in_heads, offs_h, WIDTH, BLOCK_W)
    if CHUNKS > 2:
        _store_output_chunk(out_ptr, acc2 / divisor[:, None], chunk0 + 2, in_heads, offs_h, WIDTH, BLOCK_W)
    if CHUNKS > 3:
        _store_output_chunk(out_ptr, acc3 / divisor[:, None], chunk0 + 3, in_heads, offs_h, WIDTH, BLOCK_W)
    # An empty split keeps -1e30 and so weighs nothing beside any other. The first group of columns alone stores it.
    # Blocks are compared, since triton 3.9's interpreter refuses a mask that is cut by a condition on the group.
    is_stored = offs_h + column_group * NUM_HEADS < NUM_HEADS
    tl.store(lse_ptr + out_row * NUM_HEADS + offs_h, row_max + tl.log2(divisor), mask=is_stored)


@jit(do_not_specialize=["num_splits"], do_not_specialize_on_alignment=["start_ptr", "end_ptr"])
def _cls_attention_kv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    score_bias_ptr,
    out_ptr,
    lse_ptr,
    start_ptr,
    end_ptr,
    num_splits,
    scale_log2,
    stride_qb,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    LOG2_E: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    head = tl.program_id(2).to(tl.int64)

    start = tl.load(start_ptr + row)
    end = tl.load(end_ptr + row)
    tokens_per_split = tl.cdiv(tl.cdiv(end - start, num_splits), BLOCK_N) * BLOCK_N
    split_start = start + split * tokens_per_split
    split_end = tl.minimum(split_start + tokens_per_split, end)

    offs_d = tl.arange(0, BLOCK_D)
    in_head = offs_d < HEAD_DIM
    # [BLOCK_D]
    query = tl.load(q_ptr + row * stride_qb + head * stride_qh + offs_d, mask=in_head, other=0.0).to(tl.float32)
    query *= scale_log2
    # Each of the BLOCK_N lanes keeps a softmax of its own; they meet after the loop.
    # [BLOCK_N]
    lane_max = tl.full([BLOCK_N], -1e30, dtype=tl.float32)
    lane_sum = tl.zeros([BLOCK_N], dtype=tl.float32)
    # [BLOCK_N, BLOCK_D]
    acc = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)

    for tile_start in range(split_start, split_end, BLOCK_N):
        offs_t = tile_start + tl.arange(0, BLOCK_N)
        in_split = offs_t < split_end
        mask = in_split[:, None] & in_head[None, :]
        offs_t = offs_t.to(tl.int64)
        # [BLOCK_N, BLOCK_D]
        k = tl.load(k_ptr + offs_t[:, None] * stride_kt + head * stride_kh + offs_d[None, :], mask=mask, other=0.0)
        v = tl.load(v_ptr + offs_t[:, None] * stride_vt + head * stride_vh + offs_d[None, :], mask=mask, other=0.0)
        # [BLOCK_N]
        scores = tl.sum(k.to(tl.float32) * query[None, :], 1)
        if HAS_BIAS:
            scores += tl.load(score_bias_ptr + offs_t * NUM_HEADS + head, mask=in_split, other=0.0) * LOG2_E
        scores = tl.where(in_split, scores, -1e30)
        new_max = tl.maximum(lane_max, scores)
        weights = tl.where(in_split, tl.exp2(scores - new_max), 0.0)
        rescale = tl.exp2(lane_max - new_max)
        lane_sum = lane_sum * rescale + weights
        lane_max = new_max
        acc = acc * rescale[:, None] + weights[:, None] * v.to(tl.float32)

    row_max = tl.max(lane_max)
    lane_weight = tl.exp2(lane_max - row_max)
    row_sum = tl.sum(lane_sum * lane_weight)
    divisor = tl.where(row_sum > 0.0, row_sum, 1.0)
    # [BLOCK_D]
    out = tl.sum(acc * lane_weight[:, None], 0) / divisor
    out_row = (row * num_splits + split) * NUM_HEADS + head
    tl.store(out_ptr + out_row * HEAD_DIM + offs_d, out.to(out_ptr.dtype.element_ty), mask=in_head)
    tl.store(lse_ptr + out_row, row_max + tl.log2(divisor))


@jit(do_not_specialize=["num_splits"])
def _merge_splits_kernel(
    partial_ptr, lse_ptr, out_ptr, num_splits, NUM_HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_W: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    query_row = row // NUM_HEADS
    head = row % NUM_HEADS
    offs_w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    in_width = offs_w < WIDTH
    # [BLOCK_W]
    acc = tl.zeros([BLOCK_W], dtype=tl.float32)
    total = 0.0
    largest = -1e30
    for split in range(num_splits):
        partial_row = (query_row * num_splits + split) * NUM_HEADS + head
        lse = tl.load(lse_ptr + partial_row)
        new_largest = tl.maximum(largest, lse)
        rescale = tl.exp2(largest - new_largest)
        weight = tl.exp2(lse - new_largest)
        partial = tl.load(partial_ptr + partial_row * WIDTH + offs_w, mask=in_width, other=0.0)
        acc = acc * rescale + weight * partial
        total = total * rescale + weight
        largest = new_largest
    tl.store(out_ptr + row * WIDTH + offs_w, (acc / total).to(out_ptr.dtype.element_ty), mask=in_width)


class _Partials:
    """Where a pass writes: the output itself with one split, else float32 partial results and their log-sums."""

    def __init__(self, out: Tensor, num_splits: int) -> None:
        num_rows, num_heads, width = out.shape
        self.out = out
        self.num_splits = num_splits
        self.lse = out.new_empty(num_rows, num_splits, num_heads, dtype=torch.float32)
        self.target = (
            out if num_splits == 1 else out.new_empty(num_rows, num_splits, num_heads, width, dtype=torch.float32)
        )

    def merge(self) -> Tensor:
        if self.num_splits > 1:
            num_rows, num_heads, width = self.out.shape
            block_w = min(1024, next_power_of_2(width))
            _merge_splits_kernel[(num_rows * num_heads, cdiv(width, block_w))](
                partial_ptr=self.target,
                lse_ptr=self.lse,
                out_ptr=self.out,
                num_splits=self.num_splits,
                NUM_HEADS=num_heads,
                WIDTH=width,
                BLOCK_W=block_w,
                num_warps=4,
                enable_fp_fusion=True,
            )
        return self.out


def default_num_splits(device: torch.device, num_programs: int, max_seqlen: int) -> int:
    """Splits a sequence so that ``num_programs`` (without splits) fill the chip twice, at least 128 tokens each."""
    if is_batch_invariant():
        return 1
    wanted = 2 * multiprocessor_count(device)
    if num_programs >= wanted:
        return 1
    return max(1, min(cdiv(max_seqlen, 128), cdiv(wanted, num_programs)))


def _bounds_of(layout: PackedLayout, row_bounds: RowBounds | None) -> RowBounds:
    return (layout.cu_seqlens[:-1], layout.cu_seqlens[1:]) if row_bounds is None else row_bounds


def _launch_cls_attention(
    query: Tensor,
    hidden_states: Tensor,
    layout: PackedLayout,
    scale: float,
    num_splits: int | None,
    norm: AddNorm | None,
    keys: Tensor | None = None,
    bias: Tensor | None = None,
    row_bounds: RowBounds | None = None,
) -> Tensor:
    num_rows, num_heads, query_dim = query.shape
    width = hidden_states.shape[1]
    out = query.new_empty(num_rows, num_heads, width)
    if out.numel() == 0:
        return out
    tile = cls_tile(arch_of(query.device), hidden_states.dtype, width)
    # Keys and bias take room beside x: half the tokens a step, if there are many.
    block_n = tile.BLOCK_N if keys is None and bias is None else max(16, tile.BLOCK_N // 2)
    # Where there are few already, there is no room to fetch all of the next step's keys ahead either.
    unroll_keys = keys is not None and block_n < tile.BLOCK_N
    block_k = tile.BLOCK_W if unroll_keys else max(16, tile.BLOCK_W // 2)
    if keys is not None:
        # One product takes all heads, so these must be neighbours.
        query, keys = query.flatten(1), keys.flatten(1)
    column_groups = cdiv(width, tile.BLOCK_W * tile.CHUNKS)
    programs = cdiv(num_heads, tile.BLOCK_H) * column_groups
    if num_splits is None:
        num_splits = default_num_splits(query.device, num_rows * programs, layout.max_seqlen)
    starts, ends = _bounds_of(layout, row_bounds)
    partials = _Partials(out, num_splits)
    with device_guard(query):
        _cls_attention_kernel[(num_rows, num_splits, programs)](
            q_ptr=query,
            x_ptr=hidden_states,
            key_ptr=keys,
            score_bias_ptr=bias,
            out_ptr=partials.target,
            lse_ptr=partials.lse,
            start_ptr=starts,
            end_ptr=ends,
            residual_ptr=None if norm is None else norm.residual,
            bias_ptr=None if norm is None else norm.bias,
            norm_weight_ptr=None if norm is None else norm.weight,
            norm_bias_ptr=None if norm is None else norm.norm_bias,
            num_splits=num_splits,
            scale_log2=scale * LOG2_E,
            eps=0.0 if norm is None else norm.eps,
            stride_qb=query.stride(0),
            stride_qh=query.stride(1),
            stride_xt=hidden_states.stride(0),
            stride_kt=0 if keys is None else keys.stride(0),
            stride_rt=0 if norm is None else norm.residual.stride(0),
            NUM_HEADS=num_heads,
            WIDTH=width,
            KEY_DIM=query_dim,
            BLOCK_H=tile.BLOCK_H,
            BLOCK_N=block_n,
            BLOCK_W=tile.BLOCK_W,
            CHUNKS=tile.CHUNKS,
            COLUMN_GROUPS=column_groups,
            BLOCK_K=block_k,
            KEY_CHUNKS=0 if keys is None else cdiv(min(num_heads, tile.BLOCK_H) * query_dim, block_k),
            UNROLL_KEYS=unroll_keys,
            PAIR=hidden_states.dtype != torch.float32,
            NORM=norm is not None,
            HAS_BIAS=bias is not None,
            LOG2_E=LOG2_E,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            enable_fp_fusion=True,
            **unsqueezed(arch_of(query.device)),
        )
        return partials.merge()


def _launch_cls_attention_kv(
    query: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PackedLayout,
    scale: float,
    num_splits: int | None,
    bias: Tensor | None = None,
    row_bounds: RowBounds | None = None,
) -> Tensor:
    num_rows, num_heads, head_dim = query.shape
    out = query.new_empty(query.shape)
    if out.numel() == 0:
        return out
    if num_splits is None:
        num_splits = default_num_splits(query.device, num_rows * num_heads, layout.max_seqlen)
    starts, ends = _bounds_of(layout, row_bounds)
    partials = _Partials(out, num_splits)
    with device_guard(query):
        _cls_attention_kv_kernel[(num_rows, num_splits, num_heads)](
            q_ptr=query,
            k_ptr=k,
            v_ptr=v,
            score_bias_ptr=bias,
            out_ptr=partials.target,
            lse_ptr=partials.lse,
            start_ptr=starts,
            end_ptr=ends,
            num_splits=num_splits,
            scale_log2=scale * LOG2_E,
            stride_qb=query.stride(0),
            stride_qh=query.stride(1),
            stride_kt=k.stride(0),
            stride_kh=k.stride(1),
            stride_vt=v.stride(0),
            stride_vh=v.stride(1),
            NUM_HEADS=num_heads,
            HEAD_DIM=head_dim,
            BLOCK_D=next_power_of_2(head_dim),
            BLOCK_N=32,
            HAS_BIAS=bias is not None,
            LOG2_E=LOG2_E,
            num_warps=4,
            enable_fp_fusion=True,
            **unsqueezed(arch_of(query.device)),
        )
        return partials.merge()


class _Windows(NamedTuple):
    """Neighbouring spans of tokens of one length, with as many query rows each: one product on the PyTorch path."""

    rows: slice | Tensor
    num_windows: int
    start_token: int
    length: int

    def queries(self, rows: Tensor) -> Tensor:
        """(num_windows, rows of each, ...) of a tensor that has one row a query."""
        return rows[self.rows].view(self.num_windows, -1, *rows.shape[1:])

    def batch(self, tokens: Tensor) -> Tensor:
        """(num_windows, length, ...) of a packed tensor, a view."""
        end_token = self.start_token + self.num_windows * self.length
        return tokens[self.start_token : end_token].view(self.num_windows, self.length, *tokens.shape[1:])


def _windows_of(layout: PackedLayout, row_bounds: RowBounds | None, num_heads: int, width: int) -> Iterator[_Windows]:
    """All query rows and the tokens that each reads, but for rows that read none."""
    if row_bounds is None:
        for run in layout.runs:
            rows = slice(run.first_sequence, run.first_sequence + run.num_sequences)
            yield _Windows(rows, run.num_sequences, run.start_token, run.length)
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
        # The same for spans of which each begins where the last one ends.
        return length, len(part), start - number * length

    for (length, num_rows, _), alike in itertools.groupby(enumerate(parts), place):
        spans = [span for _, span in alike]
        together = 1 if is_batch_invariant() else len(spans)
        for batch in _batched(spans, length * (width + num_heads * num_rows), together):
            indices = [row for _, _, part in batch for row in part]
            neighbours = slice(indices[0], indices[0] + len(indices))
            in_order = indices == list(range(neighbours.start, neighbours.stop))
            places = neighbours if in_order else torch.tensor(indices, device=row_bounds[0].device)
            yield _Windows(places, len(batch), batch[0][0], length)


def _batched(items: list[T], numbers_each: int, at_most: int | None = None) -> Iterator[list[T]]:
    """Parts of ``items`` that take MAX_NUMBERS, or one item each where that is more, and ``at_most`` so many."""
    step = min(max(1, MAX_NUMBERS // numbers_each), at_most or len(items))
    for first in range(0, len(items), step):
        yield items[first : first + step]


def _cls_attention_windows(
    query: Tensor,
    hidden_states: Tensor,
    layout: PackedLayout,
    scale: float,
    keys: Tensor | None,
    bias: Tensor | None,
    row_bounds: RowBounds | None,
) -> Tensor:
    # The products run in the wider of the two dtypes, as the kernel's do: the queries are the sensitive side.
    dtype = torch.promote_types(query.dtype, hidden_states.dtype)
    num_rows, num_heads, _ = query.shape
    width = hidden_states.shape[1]
    out = query.new_zeros(num_rows, num_heads, width)
    for windows in _windows_of(layout, row_bounds, num_heads, width):
        # [num_windows, length, width]
        tokens = windows.batch(hidden_states).to(dtype)
        # [num_windows, rows, nheads, width or key_dim]
        queries = windows.queries(query).to(dtype)
        if keys is None:
            scores = queries.flatten(1, 2) @ tokens.transpose(1, 2)
        else:
            # One window at a time: a product batched over windows and heads would copy the keys first.
            pairs = zip(queries, windows.batch(keys).to(dtype), strict=True)
            scores = torch.stack([q.transpose(0, 1) @ k.permute(1, 2, 0) for q, k in pairs]).transpose(1, 2)
            scores = scores.flatten(1, 2)
        # [num_windows, rows * nheads, length]
        scores *= scale
        if bias is not None:
            # [num_windows, 1, nheads, length]
            biases = windows.batch(bias).transpose(1, 2).unsqueeze(1)
            scores = (scores.unflatten(1, (-1, num_heads)) + biases).flatten(1, 2)
        summed = scores.softmax(-1).to(dtype) @ tokens
        out[windows.rows] = summed.view(-1, num_heads, width).to(out.dtype)
    return out


def _cls_attention_kv_windows(
    query: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PackedLayout,
    scale: float,
    bias: Tensor | None,
    row_bounds: RowBounds | None,
) -> Tensor:
    out = query.new_zeros(query.shape)
    # For few rows a CPU is faster where it makes float32 of 16-bit keys and values first.
    dtype = torch.promote_types(query.dtype, torch.float32)
    for windows in _windows_of(layout, row_bounds, query.shape[1], query.shape[1] * query.shape[2]):
        # [num_windows, nheads, rows or length, headdim]
        queries, keys, values = (
            tensor.to(dtype).transpose(1, 2) for tensor in (windows.queries(query), windows.batch(k), windows.batch(v))
        )
        # [num_windows, nheads, 1, length]
        biases = None if bias is None else windows.batch(bias).transpose(1, 2).unsqueeze(2)
        is_finite = None if biases is None else is_finite_all(queries, keys, biases)
        attended = attend_batch(queries, keys, values, scale, biases, is_finite=is_finite)
        out[windows.rows] = attended.transpose(1, 2).flatten(0, 1).to(out.dtype)
    return out


@traceable
def cls_attention(
    query: Tensor,
    hidden_states: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    softmax_scale: float,
    *,
    num_splits: int | None = None,
    layout: PackedLayout | None = None,
    norm: AddNorm | None = None,
    keys: Tensor | None = None,
    bias: Tensor | None = None,
    row_bounds: RowBounds | None = None,
) -> Tensor:
    """Attention of few rows' queries over the layer's input, without values and, where they are absorbed, without keys.

    Args:
        query: (num_rows, nheads, width), 1 to 64 heads: the rows' queries times the key projection, in hidden_states'
            dtype or in float32, which keeps what rounding them would lose. Row i is of sequence i, where row_bounds
            do not say otherwise. With keys the queries themselves, (num_rows, nheads, key_dim).
        hidden_states: (total_tokens, width), float32, float16 or bfloat16, contiguous last dimension, a width from 16
            to 4,096 (multiples of 16 are fastest): the input of the layer.
        cu_seqlens: (num_sequences + 1,), int32: sequence i is rows ``cu_seqlens[i]:cu_seqlens[i + 1]``.
        max_seqlen: the longest sequence, in tokens, or any bound above it.
        softmax_scale: factor on the scores, usually ``headdim ** -0.5``: the width does not tell the head size.
        num_splits: programs that share one sequence on a GPU; None chooses by the chip and the batch.
        layout: ``PackedLayout(cu_seqlens, max_seqlen, total_tokens)``, for callers that use one packing many times.
        norm: a layer norm that hidden_states still have before them, taken inside; see `takes_norm`. With keys it is
            taken before.
        keys: (total_tokens, nheads, key_dim) in hidden_states' dtype, for a layer whose keys depend on positions: any
            strides with a contiguous last dimension, head sizes from 4 to 128. Copied where heads are not neighbours.
        bias: (total_tokens, nheads), float32 (float64 beside such hidden_states), contiguous: added to the scaled
            score of each token and head. -inf leaves a token out; of the tokens that a row reads, one must be finite.
        row_bounds: (starts, ends), two contiguous int32 tensors (num_rows,): row i reads rows ``starts[i]:ends[i]`` of
            hidden_states, at most max_seqlen. In any order, and they may overlap; neighbours that read the same
            tokens find them in the cache. Checked by value on the CPU alone, as cu_seqlens are.

    Returns:
        (num_rows, nheads, width) in query's dtype: the weighted sums of rows, to which the value projection is still
        to be applied. Zero for a row that reads no token.

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape, stride, device, width, head count or length that does not fit.

    Queries and weights enter 16-bit products as a pair of numbers (high part and remainder), and sums are float32.
    """
    check_tensor("hidden_states", hidden_states, "(total_tokens, width)")
    check_last_dim_contiguous("hidden_states", hidden_states)
    wide = hidden_states if query.dtype == hidden_states.dtype else hidden_states.new_empty(0, dtype=torch.float32)
    check_tensor("query", query, f"(num_rows, nheads, {'width' if keys is None else 'key_dim'})", like=wide)
    check_last_dim_contiguous("query", query)
    num_heads, width = query.shape[1], hidden_states.shape[1]
    if keys is not None:
        _check_keys(keys, query, hidden_states)
    elif query.shape[2] != width:
        raise ValueError(f"query must have hidden_states' width {width}, got {query.shape[2]}")
    if not 16 <= width <= 4096:
        raise ValueError(f"hidden_states must have a width from 16 to 4096, got {width}")
    if not 1 <= num_heads <= 64:
        raise ValueError(f"query must have 1 to 64 heads, got {num_heads}")
    layout = PackedLayout.of(hidden_states, cu_seqlens, max_seqlen, layout)
    _check_rows(query, layout, num_splits, bias, row_bounds)
    if norm is not None and (keys is not None or norm.bias is None or not takes_norm(hidden_states)):
        hidden_states, norm = add_layer_norm(hidden_states, *norm), None
    if norm is not None:
        check_add_norm(hidden_states, *norm)
    if not runs_triton(query):
        return _cls_attention_windows(query, hidden_states, layout, softmax_scale, keys, bias, row_bounds)
    return _launch_cls_attention(query, hidden_states, layout, softmax_scale, num_splits, norm, keys, bias, row_bounds)


def takes_norm(hidden_states: Tensor) -> bool:
    """Whether `cls_attention` takes a layer norm within its own pass, without one over memory before it.

    Args:
        hidden_states: (total_tokens, width), as `cls_attention` takes them.
    """
    if not runs_triton(hidden_states):
        return False
    width = hidden_states.shape[1]
    tile = cls_tile(arch_of(hidden_states.device), hidden_states.dtype, width)
    # A row's mean takes all of its columns.
    return tile.NORM and width <= tile.BLOCK_W * tile.CHUNKS


@traceable
def cls_attention_kv(
    query: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    softmax_scale: float | None = None,
    *,
    num_splits: int | None = None,
    layout: PackedLayout | None = None,
    bias: Tensor | None = None,
    row_bounds: RowBounds | None = None,
) -> Tensor:
    """Attention of few rows' queries over packed keys and values.

    Args:
        query: (num_rows, nheads, headdim), float32, float16 or bfloat16: row i is of sequence i, where row_bounds do
            not say otherwise.
        k, v: (total_tokens, nheads, headdim) in query's dtype; any strides with a contiguous last dimension.
        cu_seqlens, max_seqlen, num_splits, layout, bias, row_bounds: as in `cls_attention`.
        softmax_scale: factor on the scores; ``headdim ** -0.5`` if None.

    Returns:
        (num_rows, nheads, headdim) in query's dtype; zero for a row that reads no token.

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape, stride, device, head size or length that does not fit.
    """
    check_tensor("query", query, "(num_rows, nheads, headdim)")
    for name, tensor in (("k", k), ("v", v)):
        check_tensor(name, tensor, "(total_tokens, nheads, headdim)", like=query)
        if tensor.shape[1:] != query.shape[1:] or tensor.shape != k.shape:
            raise ValueError(
                f"{name} must have shape (total_tokens, {query.shape[1]}, {query.shape[2]}), the same for k and v, "
                f"got {tuple(tensor.shape)}"
            )
    for name, tensor in (("query", query), ("k", k), ("v", v)):
        check_last_dim_contiguous(name, tensor)
    check_head_dim("query", query.shape[2])
    layout = PackedLayout.of(k, cu_seqlens, max_seqlen, layout)
    _check_rows(query, layout, num_splits, bias, row_bounds)
    scale = query.shape[2] ** -0.5 if softmax_scale is None else softmax_scale
    if not runs_triton(query):
        return _cls_attention_kv_windows(query, k, v, layout, scale, bias, row_bounds)
    return _launch_cls_attention_kv(query, k, v, layout, scale, num_splits, bias, row_bounds)


def _check_keys(keys: Tensor, query: Tensor, hidden_states: Tensor) -> None:
    check_tensor("keys", keys, "(total_tokens, nheads, key_dim)", like=hidden_states)
    check_last_dim_contiguous("keys", keys)
    expected = (hidden_states.shape[0], *query.shape[1:])
    if keys.shape != expected:
        raise ValueError(
            f"keys must have shape {expected}, as hidden_states' tokens and query's heads are, got {tuple(keys.shape)}"
        )
    check_head_dim("keys", keys.shape[2])


def _check_rows(
    query: Tensor, layout: PackedLayout, num_splits: int | None, bias: Tensor | None, row_bounds: RowBounds | None
) -> None:
    if row_bounds is not None:
        _check_row_bounds(row_bounds, query, layout)
    elif query.shape[0] != layout.num_sequences:
        raise ValueError(
            f"query must have one row for each of the {layout.num_sequences} sequences of cu_seqlens, "
            f"got {query.shape[0]}"
        )
    if bias is not None:
        wide = torch.promote_types(query.dtype, torch.float32)
        check_tensor("bias", bias, "(total_tokens, nheads)", like=query.new_empty(0, dtype=wide))
        if bias.shape != (layout.total_tokens, query.shape[1]) or not bias.is_contiguous():
            raise ValueError(
                f"bias must be contiguous, of shape ({layout.total_tokens}, {query.shape[1]}), "
                f"got shape {tuple(bias.shape)} with strides {bias.stride()}"
            )
    if num_splits is not None and not 1 <= num_splits <= 65535:
        raise ValueError(f"num_splits must be from 1 to 65535 or None, got {num_splits}")


def _check_row_bounds(row_bounds: RowBounds, query: Tensor, layout: PackedLayout) -> None:
    if not isinstance(row_bounds, tuple) or len(row_bounds) != 2:
        raise TypeError(f"row_bounds must be a tuple (starts, ends), got {type(row_bounds).__name__}")
    for name, bound in zip(("starts", "ends"), row_bounds, strict=True):
        if not isinstance(bound, Tensor) or bound.dtype != torch.int32:
            found = getattr(bound, "dtype", type(bound).__name__)
            raise TypeError(f"row_bounds' {name} must be a torch.int32 tensor, got {found}")
        if bound.shape != query.shape[:1] or not bound.is_contiguous():
            raise ValueError(
                f"row_bounds' {name} must be contiguous, of shape (num_rows,) = ({query.shape[0]},), "
                f"got shape {tuple(bound.shape)} with strides {bound.stride()}"
            )
        check_device(f"row_bounds' {name}", bound, query)
    starts, ends = row_bounds
    # On a GPU their values are trusted: reading them would stall it.
    if starts.device.type != "cpu" or starts.numel() == 0:
        return
    shortest, longest = (int(bound) for bound in torch.aminmax(ends - starts))
    first, last = int(starts.min()), int(ends.max())
    if first < 0 or shortest < 0 or last > layout.total_tokens:
        raise ValueError(
            f"row_bounds must hold 0 <= start <= end <= total_tokens = {layout.total_tokens}, got rows from {first} "
            f"to {last}, the shortest of {shortest}"
        )
    if longest > layout.max_seqlen:
        raise ValueError(f"max_seqlen must be at least the longest of row_bounds, {longest}, got {layout.max_seqlen}")
