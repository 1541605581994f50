"""The pass of few query rows over the layer's input, and its launcher.

All heads' scores are one product: with keys, the queries enter it as a block-diagonal matrix. A program takes one query
row (or one split of its tokens), BLOCK_H heads and up to four chunks of BLOCK_W columns. The layer norm that ends the
layer before may be taken inside, so that its result is never stored.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..attention.kernel import LOG2_E
from ..layer_norm import AddNorm
from ..layout import PackedLayout
from ..runtime.backend import device_guard
from ..runtime.split_precision import as_pair, pair_dot
from ..runtime.tile_tables import arch_of, cls_tile, unsqueezed
from ..runtime.triton import cdiv, jit, tl
from .splits import Partials, RowBounds, bounds_of, default_num_splits


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


def launch_cls_attention(
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
    starts, ends = bounds_of(layout, row_bounds)
    partials = Partials(out, num_splits)
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
