"""The queries of the [CLS] pass: for each selected row its query, with the key projection absorbed into it,

    q̃_h = W_k,hᵀ (W_q,h x + b_q,h)

(kernels/README.md derives why). A program takes BLOCK_B rows, a head and BLOCK_N columns of the result. Each makes the
head's query anew, since that is small and its weights lie in the second-level cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._ops import operator
from .layer_norm import check_vector
from .linear import linear_per_head_unchecked, linear_unchecked
from .runtime.backend import device_guard, runs_triton
from .runtime.checks import check_head_dim, check_last_dim_contiguous, check_rows, check_tensor, num_rows_of
from .runtime.gradients import differentiably
from .runtime.split_precision import as_pair, pair_dot
from .runtime.tile_tables import RowsTile, arch_of, rows_tile
from .runtime.triton import cdiv, head_block, jit, tl


@jit(do_not_specialize=["num_rows"])
def _absorb_query_kernel(
    x_ptr,  # (total_tokens, WIDTH)
    rows_ptr,  # (num_rows,) or None
    query_weight_ptr,  # (NUM_HEADS * HEAD_DIM, WIDTH)
    query_bias_ptr,  # (NUM_HEADS * HEAD_DIM,)
    key_weight_ptr,  # (NUM_HEADS * HEAD_DIM, WIDTH)
    out_ptr,  # (num_rows, NUM_HEADS, WIDTH)
    num_rows,
    stride_xt,
    stride_qw,
    stride_kw,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GATHERS: tl.constexpr,
    PAIR: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    offs_b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    offs_n = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    in_rows = offs_b < num_rows
    in_columns = offs_n < WIDTH
    in_head = offs_d < HEAD_DIM
    rows = offs_b
    if GATHERS:
        rows = tl.load(rows_ptr + offs_b, mask=in_rows, other=0).to(tl.int64)
    weight_rows = head * HEAD_DIM + offs_d

    # [BLOCK_B, BLOCK_D]
    query = tl.zeros([BLOCK_B, BLOCK_D], dtype=tl.float32)
    for k in range(0, WIDTH, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        in_k = offs_k < WIDTH
        # [BLOCK_B, BLOCK_K]
        x = tl.load(
            x_ptr + rows[:, None] * stride_xt + offs_k[None, :], mask=in_rows[:, None] & in_k[None, :], other=0.0
        )
        # [BLOCK_D, BLOCK_K]
        weight = tl.load(
            query_weight_ptr + weight_rows[:, None] * stride_qw + offs_k[None, :],
            mask=in_head[:, None] & in_k[None, :],
            other=0.0,
        )
        query = tl.dot(x, tl.trans(weight), query, input_precision="ieee")
    query += tl.load(query_bias_ptr + weight_rows, mask=in_head, other=0.0).to(tl.float32)[None, :]

    # [BLOCK_D, BLOCK_N]
    key_weight = tl.load(
        key_weight_ptr + weight_rows[:, None] * stride_kw + offs_n[None, :],
        mask=in_head[:, None] & in_columns[None, :],
        other=0.0,
    )
    high, low = as_pair(query, key_weight.dtype)
    # [BLOCK_B, BLOCK_N]
    out = pair_dot(high, low, key_weight, tl.zeros([BLOCK_B, BLOCK_N], dtype=tl.float32), PAIR)
    tl.store(
        out_ptr + (offs_b[:, None] * NUM_HEADS + head) * WIDTH + offs_n[None, :],
        out,
        mask=in_rows[:, None] & in_columns[None, :],
    )


def _launch_absorb_query(
    hidden_states: Tensor,  # (total_tokens, width)
    rows: Tensor | None,  # (num_rows,)
    query_weight: Tensor,  # (num_heads * head_dim, width)
    query_bias: Tensor,  # (num_heads * head_dim,)
    key_weight: Tensor,  # (num_heads * head_dim, width)
    num_heads: int,
    tile: RowsTile,
) -> Tensor:
    """(num_rows, num_heads, width) float32."""
    num_rows, width = num_rows_of(hidden_states, rows), hidden_states.shape[1]
    head_dim = query_weight.shape[0] // num_heads
    out = hidden_states.new_empty(num_rows, num_heads, width, dtype=torch.float32)
    if out.numel() == 0:
        return out
    with device_guard(out):
        _absorb_query_kernel[(cdiv(num_rows, tile.BLOCK_B), num_heads, cdiv(width, tile.BLOCK_N))](
            x_ptr=hidden_states,
            rows_ptr=rows,
            query_weight_ptr=query_weight,
            query_bias_ptr=query_bias,
            key_weight_ptr=key_weight,
            out_ptr=out,
            num_rows=num_rows,
            stride_xt=hidden_states.stride(0),
            stride_qw=query_weight.stride(0),
            stride_kw=key_weight.stride(0),
            NUM_HEADS=num_heads,
            HEAD_DIM=head_dim,
            WIDTH=width,
            BLOCK_B=tile.BLOCK_B,
            BLOCK_D=head_block(head_dim),
            BLOCK_N=tile.BLOCK_N,
            BLOCK_K=tile.BLOCK_K,
            GATHERS=rows is not None,
            PAIR=hidden_states.dtype != torch.float32,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            enable_fp_fusion=True,
        )
    return out


def _fake_absorb_query(
    hidden_states: Tensor, rows: Tensor | None, _query_weight: Tensor, _bias: Tensor, _key_weight: Tensor, heads: int
) -> Tensor:
    dtype = torch.promote_types(hidden_states.dtype, torch.float32)
    return hidden_states.new_empty(num_rows_of(hidden_states, rows), heads, hidden_states.shape[1], dtype=dtype)


@operator(
    "(Tensor hidden_states, Tensor? rows, Tensor query_weight, Tensor query_bias, Tensor key_weight, "
    "SymInt num_heads) -> Tensor",
    fake=_fake_absorb_query,
)
def absorb_query(
    hidden_states: Tensor,
    rows: Tensor | None,
    query_weight: Tensor,
    query_bias: Tensor,
    key_weight: Tensor,
    num_heads: int,
) -> Tensor:
    """The absorbed queries of some rows, as `cls_attention` takes them.

    Args:
        hidden_states: (total_tokens, width), float32, float16 or bfloat16, contiguous last dimension.
        rows: (num_rows,), int32 or int64, contiguous: which rows; for [CLS], ``cu_seqlens[:-1]``. None for all.
        query_weight, key_weight: (nheads * headdim, width), contiguous last dimension, head sizes from 4 to 128.
        query_bias: (nheads * headdim,). The keys' bias has no part in a softmax.
        num_heads: nheads.

    Returns:
        (num_rows, nheads, width) in float32 (from float64, in float64): rounding it would cost more than rounding the
        keys that it replaces.

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape, stride, device or head size that does not fit, or, on the CPU, a row that does not exist.
            On a GPU rows are trusted, since checking them would stall the device.
    """
    check_tensor("hidden_states", hidden_states, "(total_tokens, width)")
    check_last_dim_contiguous("hidden_states", hidden_states)
    if rows is not None:
        check_rows("rows", rows, hidden_states)
    width = hidden_states.shape[1]
    for name, weight in (("query_weight", query_weight), ("key_weight", key_weight)):
        check_tensor(name, weight, "(nheads * headdim, width)", like=hidden_states)
        check_last_dim_contiguous(name, weight)
        if weight.shape[1] != width or weight.shape != query_weight.shape:
            raise ValueError(
                f"{name} must have shape (nheads * headdim, {width}), the same for both, got {tuple(weight.shape)}"
            )
    if num_heads < 1 or query_weight.shape[0] % num_heads:
        raise ValueError(f"num_heads must divide query_weight's {query_weight.shape[0]} rows, got {num_heads}")
    check_head_dim("query_weight", query_weight.shape[0] // num_heads)
    check_vector("query_bias", query_bias, query_weight.shape[0], hidden_states)
    return differentiably(absorb_query_unchecked, hidden_states, rows, query_weight, query_bias, key_weight, num_heads)


def absorb_query_unchecked(
    hidden_states: Tensor,
    rows: Tensor | None,
    query_weight: Tensor,
    query_bias: Tensor,
    key_weight: Tensor,
    num_heads: int,
) -> Tensor:
    """`absorb_query` of arguments that are known to fit."""
    if runs_triton(hidden_states):
        num_rows = num_rows_of(hidden_states, rows)
        tile = rows_tile(arch_of(hidden_states.device), "absorb_query", hidden_states.dtype, num_rows)
        return _launch_absorb_query(hidden_states, rows, query_weight, query_bias, key_weight, num_heads, tile)
    dtype = torch.promote_types(hidden_states.dtype, torch.float32)
    x = hidden_states if rows is None else hidden_states[rows]
    query = linear_unchecked(x.to(dtype), query_weight.to(dtype), query_bias.to(dtype))
    heads = (num_heads, query_weight.shape[0] // num_heads)
    return linear_per_head_unchecked(query.unflatten(1, heads), key_weight.to(dtype).unflatten(0, heads))
