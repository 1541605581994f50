"""The output of the attention block from the sums of the [CLS] pass:

    out = LayerNorm(Σ_h W_o,h (W_v,h s_h + b_v,h) + b_o + residual),

where s_h are the weighted sums of rows that `cls_attention` gives, and the norm may be RMS norm. A program takes
BLOCK_B rows, a head and BLOCK_N columns of the output. It stores the head's part in float32, and the norm adds the
parts up.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from ._ops import operator
from .layer_norm import check_norm, check_vector, cpu_norm, fake_norm_and_sum, launch_sum_add_layer_norm
from .linear import linear_per_head_unchecked, linear_unchecked
from .runtime.backend import device_guard, runs_triton
from .runtime.checks import (
    check_device,
    check_head_dim,
    check_last_dim_contiguous,
    check_rows,
    check_tensor,
    num_rows_of,
)
from .runtime.gradients import differentiably
from .runtime.split_precision import as_pair, pair_dot
from .runtime.tile_tables import RowsTile, arch_of, rows_tile
from .runtime.triton import cdiv, head_block, jit, tl


@jit(do_not_specialize=["num_rows"])
def _cls_output_kernel(
    summed_ptr,  # (num_rows, NUM_HEADS, WIDTH)
    value_weight_ptr,  # (NUM_HEADS * HEAD_DIM, WIDTH)
    value_bias_ptr,  # (NUM_HEADS * HEAD_DIM,) or None
    out_weight_ptr,  # (OUT_WIDTH, NUM_HEADS * HEAD_DIM)
    parts_ptr,  # (num_rows, NUM_HEADS, OUT_WIDTH)
    num_rows,
    stride_sb,
    stride_sh,
    stride_vw,
    stride_ow,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    OUT_WIDTH: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_VALUE_BIAS: tl.constexpr,
    PAIR: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    offs_b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    offs_n = tl.program_id(2).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    in_rows = offs_b < num_rows
    in_columns = offs_n < OUT_WIDTH
    in_head = offs_d < HEAD_DIM
    head_columns = head * HEAD_DIM + offs_d
    DTYPE: tl.constexpr = value_weight_ptr.dtype.element_ty

    # [BLOCK_B, BLOCK_D]
    context = tl.zeros([BLOCK_B, BLOCK_D], dtype=tl.float32)
    for k in range(0, WIDTH, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        in_k = offs_k < WIDTH
        # [BLOCK_B, BLOCK_K]
        summed = tl.load(
            summed_ptr + offs_b[:, None] * stride_sb + head * stride_sh + offs_k[None, :],
            mask=in_rows[:, None] & in_k[None, :],
            other=0.0,
        ).to(tl.float32)
        # [BLOCK_D, BLOCK_K]
        weight = tl.load(
            value_weight_ptr + head_columns[:, None] * stride_vw + offs_k[None, :],
            mask=in_head[:, None] & in_k[None, :],
            other=0.0,
        )
        high, low = as_pair(summed, DTYPE)
        context = pair_dot(high, low, tl.trans(weight), context, PAIR)
    if HAS_VALUE_BIAS:
        context += tl.load(value_bias_ptr + head_columns, mask=in_head, other=0.0).to(tl.float32)[None, :]

    # [BLOCK_N, BLOCK_D]
    out_weight = tl.load(
        out_weight_ptr + offs_n[:, None] * stride_ow + head_columns[None, :],
        mask=in_columns[:, None] & in_head[None, :],
        other=0.0,
    )
    high, low = as_pair(context, DTYPE)
    # [BLOCK_B, BLOCK_N]
    part = pair_dot(high, low, tl.trans(out_weight), tl.zeros([BLOCK_B, BLOCK_N], dtype=tl.float32), PAIR)
    tl.store(
        parts_ptr + (offs_b[:, None] * NUM_HEADS + head) * OUT_WIDTH + offs_n[None, :],
        part,
        mask=in_rows[:, None] & in_columns[None, :],
    )


def _launch_cls_output(
    summed: Tensor,  # (num_rows, num_heads, width)
    value_weight: Tensor,  # (num_heads * head_dim, width)
    value_bias: Tensor | None,  # (num_heads * head_dim,)
    out_weight: Tensor,  # (out_width, num_heads * head_dim)
    tile: RowsTile,
) -> Tensor:
    """(num_rows, num_heads, out_width) float32, each head's part of the output."""
    num_rows, num_heads, width = summed.shape
    out_width = out_weight.shape[0]
    head_dim = value_weight.shape[0] // num_heads
    parts = summed.new_empty(num_rows, num_heads, out_width, dtype=torch.float32)
    if parts.numel() == 0:
        return parts
    with device_guard(summed):
        _cls_output_kernel[(cdiv(num_rows, tile.BLOCK_B), num_heads, cdiv(out_width, tile.BLOCK_N))](
            summed_ptr=summed,
            value_weight_ptr=value_weight,
            value_bias_ptr=value_bias,
            out_weight_ptr=out_weight,
            parts_ptr=parts,
            num_rows=num_rows,
            stride_sb=summed.stride(0),
            stride_sh=summed.stride(1),
            stride_vw=value_weight.stride(0),
            stride_ow=out_weight.stride(0),
            NUM_HEADS=num_heads,
            HEAD_DIM=head_dim,
            WIDTH=width,
            OUT_WIDTH=out_width,
            BLOCK_B=tile.BLOCK_B,
            BLOCK_D=head_block(head_dim),
            BLOCK_N=tile.BLOCK_N,
            BLOCK_K=tile.BLOCK_K,
            HAS_VALUE_BIAS=value_bias is not None,
            PAIR=value_weight.dtype != torch.float32,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            enable_fp_fusion=True,
        )
    return parts


@overload
def cls_output(
    summed: Tensor,
    value_weight: Tensor,
    value_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    hidden_states: Tensor,
    rows: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    eps: float,
    *,
    keep_sum: Literal[False] = False,
    rms: bool = False,
) -> Tensor: ...


@overload
def cls_output(
    summed: Tensor,
    value_weight: Tensor,
    value_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    hidden_states: Tensor,
    rows: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    eps: float,
    *,
    keep_sum: Literal[True],
    rms: bool = False,
) -> tuple[Tensor, Tensor]: ...


@operator(
    "(Tensor summed, Tensor value_weight, Tensor? value_bias, Tensor out_weight, Tensor? out_bias, "
    "Tensor hidden_states, Tensor? rows, Tensor norm_weight, Tensor? norm_bias, float eps, bool keep_sum, "
    "bool rms=False) -> Tensor[]",
    fake=lambda summed, *others: fake_norm_and_sum(others[4], summed.shape[0], keep_sum=others[9]),
)
def cls_output(
    summed: Tensor,
    value_weight: Tensor,
    value_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    hidden_states: Tensor,
    rows: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    eps: float,
    *,
    keep_sum: bool = False,
    rms: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Value projection, output projection, residual and layer norm, or RMS norm, after `cls_attention`.

    Args:
        summed: (num_rows, nheads, width), the result of `cls_attention`, in hidden_states' dtype or float32.
        value_weight: (nheads * headdim, width), contiguous last dimension, head sizes from 4 to 128.
        value_bias: (nheads * headdim,) or None.
        out_weight: (width, nheads * headdim), contiguous last dimension.
        out_bias, norm_bias: (width,) or None.
        norm_weight: (width,).
        hidden_states: (total_tokens, width), float32, float16 or bfloat16: the layer's input, whose rows are the
            residual.
        rows: (num_rows,), int32 or int64, contiguous: which rows; for [CLS], ``cu_seqlens[:-1]``. None for all.
        eps: added to the variance, or to the mean of squares.
        keep_sum: whether to return the sum before the norm as well, as a pre-norm encoder needs it.
        rms: whether to divide each row by its root mean square alone, without centring it.

    Returns:
        (num_rows, width) in hidden_states' dtype; with keep_sum a pair of these, the norm and the sum before it.

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape, stride, device or head size that does not fit, or, on the CPU, a row that does not exist.
            On a GPU rows are trusted, since checking them would stall the device.
    """
    check_tensor("hidden_states", hidden_states, "(total_tokens, width)")
    width = hidden_states.shape[1]
    if rows is not None:
        check_rows("rows", rows, hidden_states)
    num_rows = num_rows_of(hidden_states, rows)
    if summed.dtype not in (hidden_states.dtype, torch.float32):
        raise TypeError(f"summed must be {hidden_states.dtype} like hidden_states or float32, got {summed.dtype}")
    if summed.ndim != 3 or summed.shape[0] != num_rows or summed.shape[2] != width:
        raise ValueError(f"summed must have shape ({num_rows}, nheads, {width}), got {tuple(summed.shape)}")
    check_device("summed", summed, hidden_states)
    num_heads = summed.shape[1]
    check_tensor("value_weight", value_weight, "(nheads * headdim, width)", like=hidden_states)
    size = value_weight.shape[0]
    if value_weight.shape[1] != width or size % max(num_heads, 1):
        raise ValueError(
            f"value_weight must have shape ({num_heads} heads * headdim, {width}), got {tuple(value_weight.shape)}"
        )
    check_head_dim("value_weight", size // max(num_heads, 1))
    check_tensor("out_weight", out_weight, "(width, nheads * headdim)", like=hidden_states)
    if out_weight.shape != (width, size):
        raise ValueError(f"out_weight must have shape ({width}, {size}), got {tuple(out_weight.shape)}")
    for name, bias, length in (("value_bias", value_bias, size), ("out_bias", out_bias, width)):
        if bias is not None:
            check_vector(name, bias, length, hidden_states)
    check_norm(norm_weight, norm_bias, width, hidden_states)
    for name, tensor in (
        ("summed", summed),
        ("value_weight", value_weight),
        ("out_weight", out_weight),
        ("hidden_states", hidden_states),
    ):
        check_last_dim_contiguous(name, tensor)
    normed, attended = differentiably(
        cls_output_unchecked,
        *(summed, value_weight, value_bias, out_weight, out_bias, hidden_states, rows, norm_weight, norm_bias, eps),
        keep_sum=keep_sum,
        rms=rms,
    )
    return (normed, attended) if keep_sum else normed


def cls_output_unchecked(
    summed: Tensor,
    value_weight: Tensor,
    value_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    hidden_states: Tensor,
    rows: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    eps: float,
    *,
    keep_sum: bool = False,
    rms: bool = False,
) -> tuple[Tensor, Tensor]:
    """`cls_output` of arguments that are known to fit: the normed rows, and the rows that the next half adds to.

    Those are the sum where it is kept, else the normed rows again.
    """
    num_rows, num_heads, _ = summed.shape
    if runs_triton(hidden_states):
        tile = rows_tile(arch_of(hidden_states.device), "cls_output", hidden_states.dtype, num_rows)
        parts = _launch_cls_output(summed, value_weight, value_bias, out_weight, tile)
        return launch_sum_add_layer_norm(
            parts, out_bias, hidden_states, rows, norm_weight, norm_bias, eps, keep_sum=keep_sum, rms=rms
        )
    dtype = torch.promote_types(hidden_states.dtype, torch.float32)
    per_head = value_weight.to(dtype).unflatten(0, (num_heads, -1)).transpose(1, 2)
    context = linear_per_head_unchecked(summed.to(dtype), per_head).flatten(1)
    if value_bias is not None:
        context = context + value_bias.to(dtype)
    attended = linear_unchecked(context.to(hidden_states.dtype), out_weight, out_bias)
    attended += hidden_states if rows is None else hidden_states[rows]
    normed = cpu_norm(attended, norm_weight, norm_bias, eps, rms=rms)
    return normed, attended if keep_sum else normed
