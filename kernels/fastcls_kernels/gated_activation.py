"""Gated activation, the middle of a GeGLU feed-forward: out = f(x[:, :size]) * x[:, size:].

A program takes BLOCK_M rows and BLOCK_N columns of both halves, and rounds once, at the store.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ._ops import operator
from .runtime.activations import Activation, activate_, activated, check_activation
from .runtime.backend import device_guard, runs_triton
from .runtime.checks import check_last_dim_contiguous, check_tensor
from .runtime.gradients import differentiably
from .runtime.invariance import choices, in_pieces_
from .runtime.triton import cdiv, jit, tl

# Eight numbers a thread; the widths of most models are multiples of 128.
BLOCK_M = 8
BLOCK_N = 128


@jit(do_not_specialize=["num_tokens"])
def _gated_activation_kernel(
    x_ptr,  # (num_tokens, 2 * SIZE)
    out_ptr,  # (num_tokens, SIZE)
    num_tokens,
    stride_xt,
    SIZE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_tile = (offs_m < num_tokens)[:, None] & (offs_n < SIZE)[None, :]
    x_ptrs = x_ptr + offs_m[:, None] * stride_xt + offs_n[None, :]
    # [BLOCK_M, BLOCK_N]
    x = tl.load(x_ptrs, mask=in_tile, other=0.0).to(tl.float32)
    gate = tl.load(x_ptrs + SIZE, mask=in_tile, other=0.0).to(tl.float32)
    out = activated(x, ACTIVATION) * gate
    tl.store(out_ptr + offs_m[:, None] * SIZE + offs_n[None, :], out.to(out_ptr.dtype.element_ty), mask=in_tile)


def _launch_gated_activation(
    hidden_states: Tensor,  # (num_tokens, 2 * size)
    activation: Activation,
) -> Tensor:
    """(num_tokens, size) in hidden_states' dtype."""
    num_tokens, size = hidden_states.shape[0], hidden_states.shape[1] // 2
    out = hidden_states.new_empty(num_tokens, size)
    if out.numel() == 0:
        return out
    with device_guard(hidden_states):
        _gated_activation_kernel[(cdiv(num_tokens, BLOCK_M), cdiv(size, BLOCK_N))](
            x_ptr=hidden_states,
            out_ptr=out,
            num_tokens=num_tokens,
            stride_xt=hidden_states.stride(0),
            SIZE=size,
            ACTIVATION=activation,
            BLOCK_M=BLOCK_M,
            BLOCK_N=BLOCK_N,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return out


@operator(
    '(Tensor hidden_states, str activation="gelu") -> Tensor',
    fake=lambda hidden_states, *_: hidden_states.new_empty(hidden_states.shape[0], hidden_states.shape[1] // 2),
)
def gated_activation(hidden_states: Tensor, activation: Activation = "gelu") -> Tensor:
    """``activation(first half of the columns) * second half``, computed in float32.

    Args:
        hidden_states: (num_tokens, 2 * size), float32, float16 or bfloat16, contiguous last dimension.
        activation: "gelu" (the exact, erf form), "gelu_tanh", "relu", "silu" or "tanh".

    Returns:
        (num_tokens, size), contiguous, in hidden_states' dtype.

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape, stride or activation that does not fit.
    """
    check_tensor("hidden_states", hidden_states, "(num_tokens, 2 * size)")
    if hidden_states.shape[1] % 2:
        raise ValueError(f"hidden_states must have an even number of columns, got {tuple(hidden_states.shape)}")
    check_last_dim_contiguous("hidden_states", hidden_states)
    check_activation(activation)
    return differentiably(gated_activation_unchecked, hidden_states, activation)


def gated_activation_unchecked(hidden_states: Tensor, activation: Activation) -> Tensor:
    """`gated_activation` of arguments that are known to fit."""
    if runs_triton(hidden_states):
        return _launch_gated_activation(hidden_states, activation)
    dtype = torch.promote_types(hidden_states.dtype, torch.float32)
    x, gate = hidden_states.chunk(2, dim=1)
    activate = functools.partial(activate_, activation)
    x = x.to(dtype, copy=True, memory_format=torch.contiguous_format)
    x = activate(x) if choices().whole_pointwise else in_pieces_(activate, x)
    return x.mul_(gate).to(hidden_states.dtype)
