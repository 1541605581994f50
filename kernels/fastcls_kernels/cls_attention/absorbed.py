"""The pass of few query rows over the layer's input, and its launcher.

All heads' scores are one product: with keys, the queries enter it as a block-diagonal matrix, whose blocks have GROUP
rows, as many as heads share their keys. A program takes one query row (or one split of its tokens), BLOCK_H heads and
up to four chunks of BLOCK_W columns. The layer norm that ends the layer before may be taken inside, so that its result
is never stored.
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
    q_ptr, chunk, in_heads, offs_h, stride_qh, scale_log2, WIDTH: tl.constexpr, BLOCK_W: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """A chunk of the queries' columns, [BLOCK_H, BLOCK_W], as a pair."""
    offs_w = chunk * BLOCK_W + tl.arange(0, BLOCK_W)
    query = tl.load(
        q_ptr + offs_h.to(tl.int64)[:, None] * stride_qh + offs_w[None, :],
        mask=in_heads[:, None] & (offs_w[None, :] < WIDTH),
        other=0.0,
    ).to(tl.float32)
    # Scaled before it is split: absorbed queries are the largest numbers of the layer, and float16 ends at 65,504.
    return as_pair(query * scale_log2, DTYPE)


@jit()
def _load_token_chunk(x_ptr, chunk, offs_t, in_split, stride_xt, width, BLOCK_W: tl.constexpr):
    """A chunk of the tokens' columns, [BLOCK_N, BLOCK_W]."""
    offs_w = chunk * BLOCK_W + tl.arange(0, BLOCK_W)
    return tl.load(
        x_ptr + offs_t[:, None] * stride_xt + offs_w[None, :],
        mask=in_split[:, None] & (offs_w[None, :] < width),
        other=0.0,
    )


@jit()
def _load_normalised_chunks(
    x_ptr,  # (total_tokens, width)
    residual_ptr,  # (total_tokens, width)
    bias_ptr,  # (width,)
    weight_ptr,  # (width,)
    norm_bias_ptr,  # (width,)
    offs_t, in_split, stride_xt, stride_rt, eps, WIDTH: tl.constexpr, BLOCK_W: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """The chunks of LayerNorm(x + residual + bias), [BLOCK_N, BLOCK_W] each, in the norm's dtype."""
    summed = []
    total = None
    for i in tl.static_range(CHUNKS):
        offs_w = i * BLOCK_W + tl.arange(0, BLOCK_W)
        chunk = _load_token_chunk(x_ptr, i, offs_t, in_split, stride_xt, WIDTH, BLOCK_W).to(tl.float32)
        chunk += _load_token_chunk(residual_ptr, i, offs_t, in_split, stride_rt, WIDTH, BLOCK_W).to(tl.float32)
        chunk += tl.load(bias_ptr + offs_w, mask=offs_w < WIDTH, other=0.0).to(tl.float32)[None, :]
        total = tl.sum(chunk, 1) if i == 0 else total + tl.sum(chunk, 1)
        summed += [chunk]
    # [BLOCK_N]
    mean = total / WIDTH
    centred = []
    squares = None
    for i in tl.static_range(CHUNKS):
        offs_w = i * BLOCK_W + tl.arange(0, BLOCK_W)
        chunk = tl.where(offs_w[None, :] < WIDTH, summed[i] - mean[:, None], 0.0)
        squares = tl.sum(chunk * chunk, 1) if i == 0 else squares + tl.sum(chunk * chunk, 1)
        centred += [chunk]
    # [BLOCK_N]
    scale = tl.rsqrt(squares / WIDTH + eps)
    normalised = []
    for i in tl.static_range(CHUNKS):
        offs_w = i * BLOCK_W + tl.arange(0, BLOCK_W)
        # Zero beyond the width, so that the chunk is, too.
        weight = tl.load(weight_ptr + offs_w, mask=offs_w < WIDTH, other=0.0)
        norm_bias = tl.load(norm_bias_ptr + offs_w, mask=offs_w < WIDTH, other=0.0).to(tl.float32)
        chunk = centred[i] * scale[:, None] * weight.to(tl.float32)[None, :] + norm_bias[None, :]
        normalised += [chunk.to(weight.dtype)]
    return normalised


@jit()
def _add_key_scores(
    scores, q_ptr, key_ptr, chunk, offs_t, in_split, key_head, scale_log2, stride_kt, num_columns,
    GROUP: tl.constexpr, KEY_DIM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, PAIR: tl.constexpr,
):  # fmt: skip
    """``scores``, [BLOCK_H, BLOCK_N], plus those of a chunk of the keys' columns: each head's query in its own ones.

    key_head: [BLOCK_H], the place of each head's keys.
    """
    offs_k = chunk * BLOCK_K + tl.arange(0, BLOCK_K)
    # [BLOCK_H, BLOCK_K]
    own = key_head[:, None] == (offs_k // KEY_DIM)[None, :]
    if GROUP == 1:
        # [BLOCK_K]
        columns = tl.load(q_ptr + offs_k, mask=offs_k < num_columns, other=0.0).to(tl.float32)
        query = tl.where(own, columns[None, :] * scale_log2, 0.0)
    else:
        # Heads that share their keys have other numbers in the same columns.
        offs_q = tl.arange(0, BLOCK_H)[:, None] * KEY_DIM + (offs_k % KEY_DIM)[None, :]
        own &= (offs_k < num_columns)[None, :]
        query = tl.load(q_ptr + offs_q, mask=own, other=0.0).to(tl.float32) * scale_log2
    high, low = as_pair(query, key_ptr.dtype.element_ty)
    # [BLOCK_N, BLOCK_K]
    k = _load_token_chunk(key_ptr, chunk, offs_t, in_split, stride_kt, num_columns, BLOCK_K)
    return pair_dot(high, low, tl.trans(k), scores, PAIR)


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
    q_ptr,  # (num_rows, nheads, width), with keys (num_rows, nheads * key_dim)
    x_ptr,  # (total_tokens, width)
    key_ptr,  # (total_tokens, nheads // GROUP * key_dim), or None
    score_bias_ptr,  # (total_tokens, nheads), or None
    out_ptr,  # (num_rows, num_splits, nheads, width)
    lse_ptr,  # (num_rows, num_splits, nheads)
    start_ptr,  # (num_rows,)
    end_ptr,  # (num_rows,)
    residual_ptr,  # (total_tokens, width), or None without NORM
    bias_ptr,  # (width,), or None without NORM
    norm_weight_ptr,  # (width,), or None without NORM
    norm_bias_ptr,  # (width,), or None without NORM
    num_splits, scale_log2, eps, stride_qb, stride_qh, stride_xt, stride_kt, stride_rt,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, KEY_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr, CHUNKS: tl.constexpr,
    COLUMN_GROUPS: tl.constexpr, BLOCK_K: tl.constexpr, KEY_CHUNKS: tl.constexpr, UNROLL_KEYS: tl.constexpr,
    PAIR: tl.constexpr, NORM: tl.constexpr, HAS_BIAS: tl.constexpr, LOG2_E: tl.constexpr,
):  # fmt: skip
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
    # [BLOCK_H], counted from the keys of this group's first head.
    key_head = tl.arange(0, BLOCK_H) // GROUP
    # The columns of keys from this group's first head to the last head.
    key_columns = NUM_HEADS // GROUP * KEY_DIM
    if KEY_CHUNKS > 0 and NUM_HEADS > BLOCK_H:
        first_head = head_group * BLOCK_H
        first_key_head = first_head // GROUP
        key_head = (first_head % GROUP + tl.arange(0, BLOCK_H)) // GROUP
        q_ptr += first_head * KEY_DIM
        key_ptr += first_key_head * KEY_DIM
        key_columns -= first_key_head * KEY_DIM

    # [BLOCK_H]
    row_max = tl.full([BLOCK_H], -1e30, dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_H], dtype=tl.float32)
    # [BLOCK_H, BLOCK_W] each
    acc = [tl.zeros([BLOCK_H, BLOCK_W], dtype=tl.float32)] * CHUNKS

    if COLUMN_GROUPS == 1 and KEY_CHUNKS == 0:
        # The queries stay on chip, and each tile of x serves both products.
        queries = []
        for i in tl.static_range(CHUNKS):
            queries += [_load_query_chunk(q_ptr, i, in_heads, offs_h, stride_qh, scale_log2, WIDTH, BLOCK_W, DTYPE)]

    for tile_start in range(split_start, split_end, BLOCK_N):
        offs_t = tile_start + tl.arange(0, BLOCK_N)
        in_split = offs_t < split_end
        offs_t = offs_t.to(tl.int64)
        if HAS_BIAS:
            # The tile's address takes 64 bits; offsets within it are the same in every step. Loaded here, since loading
            # the bias where it is added takes more registers.
            offs_b = tl.arange(0, BLOCK_N)[None, :] * NUM_HEADS + offs_h[:, None]
            # [BLOCK_H, BLOCK_N]
            score_bias = tl.load(
                score_bias_ptr + tl.cast(tile_start, tl.int64) * NUM_HEADS + offs_b,
                mask=in_heads[:, None] & in_split[None, :],
                other=0.0,
            )
        # [BLOCK_N, BLOCK_W] each
        if NORM:
            x = _load_normalised_chunks(
                x_ptr, residual_ptr, bias_ptr, norm_weight_ptr, norm_bias_ptr, offs_t, in_split, stride_xt, stride_rt,
                eps, WIDTH, BLOCK_W, CHUNKS,
            )  # fmt: skip
        else:
            x = []
            for i in tl.static_range(CHUNKS):
                x += [_load_token_chunk(x_ptr, chunk0 + i, offs_t, in_split, stride_xt, WIDTH, BLOCK_W)]

        # [BLOCK_H, BLOCK_N]
        scores = tl.zeros([BLOCK_H, BLOCK_N], dtype=tl.float32)
        if UNROLL_KEYS:
            # Unrolled, so that the queries stay on chip, too, and the next step's keys are fetched beside its x.
            for chunk in tl.static_range(KEY_CHUNKS):
                scores = _add_key_scores(
                    scores, q_ptr, key_ptr, chunk, offs_t, in_split, key_head, scale_log2, stride_kt, key_columns,
                    GROUP, KEY_DIM, BLOCK_H, BLOCK_K, PAIR,
                )  # fmt: skip
        elif KEY_CHUNKS > 0:
            for chunk in range(KEY_CHUNKS):
                scores = _add_key_scores(
                    scores, q_ptr, key_ptr, chunk, offs_t, in_split, key_head, scale_log2, stride_kt, key_columns,
                    GROUP, KEY_DIM, BLOCK_H, BLOCK_K, PAIR,
                )  # fmt: skip
        elif COLUMN_GROUPS == 1:
            for i in tl.static_range(CHUNKS):
                high, low = queries[i]
                scores = pair_dot(high, low, tl.trans(x[i]), scores, PAIR)
        else:
            for chunk in range((WIDTH + BLOCK_W - 1) // BLOCK_W):
                high, low = _load_query_chunk(
                    q_ptr, chunk, in_heads, offs_h, stride_qh, scale_log2, WIDTH, BLOCK_W, DTYPE
                )
                columns = _load_token_chunk(x_ptr, chunk, offs_t, in_split, stride_xt, WIDTH, BLOCK_W)
                scores = pair_dot(high, low, tl.trans(columns), scores, PAIR)

        if HAS_BIAS:
            scores += score_bias * LOG2_E
        scores = tl.where(in_split[None, :], scores, -1e30)
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        weights = tl.where(in_split[None, :], tl.exp2(scores - new_max[:, None]), 0.0)
        rescale = tl.exp2(row_max - new_max)
        row_sum = row_sum * rescale + tl.sum(weights, 1)
        row_max = new_max
        high, low = as_pair(weights, DTYPE)
        updated = []
        for i in tl.static_range(CHUNKS):
            updated += [pair_dot(high, low, x[i], acc[i] * rescale[:, None], PAIR)]
        acc = updated

    divisor = tl.where(row_sum > 0.0, row_sum, 1.0)
    out_row = row * num_splits + split
    out_ptr += out_row * NUM_HEADS * WIDTH
    for i in tl.static_range(CHUNKS):
        _store_output_chunk(out_ptr, acc[i] / divisor[:, None], chunk0 + i, in_heads, offs_h, WIDTH, BLOCK_W)
    # An empty split keeps -1e30, and weighs nothing beside any other. The first group of columns alone stores its sum:
    # by comparing blocks, since triton 3.9's interpreter refuses a block that is masked by a scalar.
    is_stored = offs_h + column_group * NUM_HEADS < NUM_HEADS
    tl.store(lse_ptr + out_row * NUM_HEADS + offs_h, row_max + tl.log2(divisor), mask=is_stored)


def _most_key_heads(num_heads: int, group: int, block_h: int) -> int:
    """The most key heads that one program's heads read."""
    firsts = range(0, num_heads, block_h)
    return max((min(first + block_h, num_heads) - 1) // group - first // group + 1 for first in firsts)


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
    """The sums, (num_rows, nheads, width), of arguments that `cls_attention` has checked; with ``keys`` no ``norm``."""
    num_rows, num_heads, query_dim = query.shape
    width = hidden_states.shape[1]
    out = query.new_empty(num_rows, num_heads, width)
    if out.numel() == 0:
        return out
    tile = cls_tile(arch_of(query.device), hidden_states.dtype, width)
    # Keys and bias take room beside x: half the tokens a step, where they are many.
    block_n = tile.BLOCK_N if keys is None and bias is None else max(16, tile.BLOCK_N // 2)
    # Where they are few, there is no room either for fetching all of the next step's keys ahead.
    unroll_keys = keys is not None and block_n < tile.BLOCK_N
    block_k = tile.BLOCK_W if unroll_keys else max(16, tile.BLOCK_W // 2)
    group, key_chunks = 1, 0
    if keys is not None:
        group = num_heads // keys.shape[1]
        key_chunks = cdiv(_most_key_heads(num_heads, group, tile.BLOCK_H) * query_dim, block_k)
        # One product takes all heads, which must be neighbours for it.
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
            GROUP=group,
            WIDTH=width,
            KEY_DIM=query_dim,
            BLOCK_H=tile.BLOCK_H,
            BLOCK_N=block_n,
            BLOCK_W=tile.BLOCK_W,
            CHUNKS=tile.CHUNKS,
            COLUMN_GROUPS=column_groups,
            BLOCK_K=block_k,
            KEY_CHUNKS=key_chunks,
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
