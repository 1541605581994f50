"""A classifier on top of a pooler, as in BERT: logits = W_c f(W_p x + b_p) + b_c, with an activation f, usually tanh.

A program makes BLOCK_N columns of the pooled rows and multiplies them by their part of the classifier at once, and a
second kernel adds the parts up. The pooled rows are never stored.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._ops import operator
from .layer_norm import check_vector
from .linear import linear_activation_unchecked, linear_unchecked
from .runtime.activations import Activation, activated, check_activation
from .runtime.backend import device_guard, runs_triton
from .runtime.checks import check_last_dim_contiguous, check_tensor
from .runtime.gradients import differentiably
from .runtime.split_precision import as_pair, pair_dot
from .runtime.tile_tables import RowsTile, arch_of, rows_tile
from .runtime.triton import cdiv, jit, next_power_of_2, tl


@jit(do_not_specialize=["num_rows"])
def _pooler_classifier_kernel(
    x_ptr,  # (num_rows, WIDTH)
    pooler_weight_ptr,  # (POOLED, WIDTH)
    pooler_bias_ptr,  # (POOLED,)
    classifier_weight_ptr,  # (LABELS, POOLED)
    parts_ptr,  # (num_rows, ceil(POOLED / BLOCK_N), LABELS)
    num_rows,
    stride_xb,
    stride_pw,
    stride_cw,
    WIDTH: tl.constexpr,
    POOLED: tl.constexpr,
    LABELS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_L: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PAIR: tl.constexpr,
):
    block = tl.program_id(1).to(tl.int64)
    offs_b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    offs_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows = offs_b < num_rows
    in_columns = offs_n < POOLED
    # [BLOCK_B, BLOCK_N]
    pooled = tl.zeros([BLOCK_B, BLOCK_N], dtype=tl.float32)
    for k in range(0, WIDTH, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        in_k = offs_k < WIDTH
        # [BLOCK_B, BLOCK_K]
        x = tl.load(
            x_ptr + offs_b[:, None] * stride_xb + offs_k[None, :], mask=in_rows[:, None] & in_k[None, :], other=0.0
        )
        # [BLOCK_N, BLOCK_K]
        weight = tl.load(
            pooler_weight_ptr + offs_n[:, None] * stride_pw + offs_k[None, :],
            mask=in_columns[:, None] & in_k[None, :],
            other=0.0,
        )
        pooled = tl.dot(x, tl.trans(weight), pooled, input_precision="ieee")
    pooled += tl.load(pooler_bias_ptr + offs_n, mask=in_columns, other=0.0).to(tl.float32)[None, :]
    pooled = activated(pooled, ACTIVATION)

    high, low = as_pair(pooled, classifier_weight_ptr.dtype.element_ty)
    for label in range(0, LABELS, BLOCK_L):
        offs_l = label + tl.arange(0, BLOCK_L)
        in_labels = offs_l < LABELS
        # [BLOCK_L, BLOCK_N]
        weight = tl.load(
            classifier_weight_ptr + offs_l.to(tl.int64)[:, None] * stride_cw + offs_n[None, :],
            mask=in_labels[:, None] & in_columns[None, :],
            other=0.0,
        )
        # [BLOCK_B, BLOCK_L]
        part = pair_dot(high, low, tl.trans(weight), tl.zeros([BLOCK_B, BLOCK_L], dtype=tl.float32), PAIR)
        tl.store(
            parts_ptr + (offs_b[:, None] * tl.num_programs(1) + block) * LABELS + offs_l[None, :],
            part,
            mask=in_rows[:, None] & in_labels[None, :],
        )


@jit()
def _sum_parts_kernel(
    parts_ptr,  # (num_rows, PARTS, LABELS)
    bias_ptr,  # (LABELS,)
    out_ptr,  # (num_rows, LABELS)
    PARTS: tl.constexpr,
    LABELS: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    offs_l = tl.program_id(1) * BLOCK_L + tl.arange(0, BLOCK_L)
    in_labels = offs_l < LABELS
    # [BLOCK_L]
    total = tl.load(bias_ptr + offs_l, mask=in_labels, other=0.0).to(tl.float32)
    for part in range(PARTS):
        total += tl.load(parts_ptr + (row * PARTS + part) * LABELS + offs_l, mask=in_labels, other=0.0)
    tl.store(out_ptr + row * LABELS + offs_l, total.to(out_ptr.dtype.element_ty), mask=in_labels)


def _launch_pooler_classifier(
    cls_states: Tensor,  # (num_rows, width)
    pooler_weight: Tensor,  # (pooled_width, width)
    pooler_bias: Tensor,  # (pooled_width,)
    classifier_weight: Tensor,  # (num_labels, pooled_width)
    classifier_bias: Tensor,  # (num_labels,)
    activation: Activation,
    tile: RowsTile,
) -> Tensor:
    """(num_rows, num_labels) in cls_states' dtype."""
    num_rows, width = cls_states.shape
    num_labels, pooled_width = classifier_weight.shape
    out = cls_states.new_empty(num_rows, num_labels)
    if out.numel() == 0:
        return out
    num_parts = cdiv(pooled_width, tile.BLOCK_N)
    parts = cls_states.new_empty(num_rows, num_parts, num_labels, dtype=torch.float32)
    block_l = min(64, max(16, next_power_of_2(num_labels)))
    with device_guard(cls_states):
        _pooler_classifier_kernel[(cdiv(num_rows, tile.BLOCK_B), num_parts)](
            x_ptr=cls_states,
            pooler_weight_ptr=pooler_weight,
            pooler_bias_ptr=pooler_bias,
            classifier_weight_ptr=classifier_weight,
            parts_ptr=parts,
            num_rows=num_rows,
            stride_xb=cls_states.stride(0),
            stride_pw=pooler_weight.stride(0),
            stride_cw=classifier_weight.stride(0),
            WIDTH=width,
            POOLED=pooled_width,
            LABELS=num_labels,
            BLOCK_B=tile.BLOCK_B,
            BLOCK_N=tile.BLOCK_N,
            BLOCK_K=tile.BLOCK_K,
            BLOCK_L=block_l,
            ACTIVATION=activation,
            PAIR=cls_states.dtype != torch.float32,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            enable_fp_fusion=True,
        )
        _sum_parts_kernel[(num_rows, cdiv(num_labels, block_l))](
            parts_ptr=parts,
            bias_ptr=classifier_bias,
            out_ptr=out,
            PARTS=num_parts,
            LABELS=num_labels,
            BLOCK_L=block_l,
            num_warps=1,
            enable_fp_fusion=True,
        )
    return out


@operator(
    "(Tensor cls_states, Tensor pooler_weight, Tensor pooler_bias, Tensor classifier_weight, Tensor classifier_bias, "
    "str activation) -> Tensor",
    fake=lambda cls_states, _weight, _bias, classifier_weight, *_: cls_states.new_empty(
        cls_states.shape[0], classifier_weight.shape[0]
    ),
)
def pooler_classifier(
    cls_states: Tensor,
    pooler_weight: Tensor,
    pooler_bias: Tensor,
    classifier_weight: Tensor,
    classifier_bias: Tensor,
    *,
    activation: Activation = "tanh",
) -> Tensor:
    """``activation(cls_states @ pooler_weight.T + pooler_bias) @ classifier_weight.T + classifier_bias``.

    Args:
        cls_states: (num_rows, width), float32, float16 or bfloat16, contiguous last dimension.
        pooler_weight: (pooled_width, width), contiguous last dimension.
        pooler_bias: (pooled_width,).
        classifier_weight: (num_labels, pooled_width), contiguous last dimension.
        classifier_bias: (num_labels,).
        activation: "gelu" (the exact, erf form), "gelu_tanh", "relu", "silu" or "tanh".

    Returns:
        (num_rows, num_labels) in cls_states' dtype.

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape, stride, device or activation that does not fit.
    """
    check_tensor("cls_states", cls_states, "(num_rows, width)")
    check_tensor("pooler_weight", pooler_weight, "(pooled_width, width)", like=cls_states)
    check_tensor("classifier_weight", classifier_weight, "(num_labels, pooled_width)", like=cls_states)
    for name, weight, width in (
        ("pooler_weight", pooler_weight, cls_states.shape[1]),
        ("classifier_weight", classifier_weight, pooler_weight.shape[0]),
    ):
        if weight.shape[1] != width:
            raise ValueError(f"{name} must have shape (rows, {width}), got {tuple(weight.shape)}")
        check_last_dim_contiguous(name, weight)
    check_last_dim_contiguous("cls_states", cls_states)
    check_vector("pooler_bias", pooler_bias, pooler_weight.shape[0], cls_states)
    check_vector("classifier_bias", classifier_bias, classifier_weight.shape[0], cls_states)
    check_activation(activation)
    return differentiably(
        pooler_classifier_unchecked,
        *(cls_states, pooler_weight, pooler_bias, classifier_weight, classifier_bias, activation),
    )


def pooler_classifier_unchecked(
    cls_states: Tensor,
    pooler_weight: Tensor,
    pooler_bias: Tensor,
    classifier_weight: Tensor,
    classifier_bias: Tensor,
    activation: Activation = "tanh",
) -> Tensor:
    """`pooler_classifier` of arguments that are known to fit."""
    if runs_triton(cls_states):
        tile = rows_tile(arch_of(cls_states.device), "pooler_classifier", cls_states.dtype, cls_states.shape[0])
        return _launch_pooler_classifier(
            cls_states, pooler_weight, pooler_bias, classifier_weight, classifier_bias, activation, tile
        )
    pooled = linear_activation_unchecked(cls_states, pooler_weight, pooler_bias, activation)
    return linear_unchecked(pooled, classifier_weight, classifier_bias)
