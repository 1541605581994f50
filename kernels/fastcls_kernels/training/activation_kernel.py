"""Kernels of activations that can be trained, and of their gradients:

    act = f(up);                       grad_up = grad_act f'(up)
    act = f(up₁) up₂, gated;           grad_up₁ = grad_act up₂ f'(up₁),    grad_up₂ = grad_act f(up₁)

where up₁ and up₂ are the halves of up's columns, as in `gated_activation`. The backward pass makes act again, since the
weight of the product behind it needs it, and it reads up anyway. A program takes BLOCK_M rows and BLOCK_N columns, of
both halves where it is gated, computes in float32 and rounds once.
"""

from __future__ import annotations

from torch import Tensor

from ..gated_activation import BLOCK_M, BLOCK_N, gated_activation_unchecked
from ..runtime.activations import Activation, activated
from ..runtime.backend import device_guard
from ..runtime.triton import cdiv, jit, tl


@jit()
def derivative(x, ACTIVATION: tl.constexpr):
    """f'(x) of float32 ``x``: no exponential overflows, and no small difference is taken of numbers close to 1."""
    if ACTIVATION == "gelu":
        # Φ(x) + x φ(x).
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * density
    if ACTIVATION == "gelu_tanh":
        # s(v) + x s'(v) v' with s(v) = 1 / (1 + exp(-v)); s'(v) is 0 for x beyond 16, where x³ could overflow.
        near = tl.where(tl.abs(x) > 16.0, 16.0, x)
        v = 1.5957691216057308 * (near + 0.044715 * near * near * near)
        decay = tl.exp(-tl.abs(v))
        slope = near * 1.5957691216057308 * (1.0 + 0.134145 * near * near) * decay / ((1.0 + decay) * (1.0 + decay))
        return tl.where(x < 0.0, decay, 1.0) / (1.0 + decay) + slope
    if ACTIVATION == "relu":
        return tl.where(x <= 0.0, 0.0, 1.0)
    if ACTIVATION == "silu":
        # s(x) (1 + x s(-x)) with s(x) = 1 / (1 + exp(-x)).
        decay = tl.exp(-tl.abs(x))
        sigmoid = tl.where(x < 0.0, decay, 1.0) / (1.0 + decay)
        return sigmoid * (1.0 + x * (tl.where(x < 0.0, 1.0, decay) / (1.0 + decay)))
    # 1 - tanh(x)².
    decay = tl.exp(-2.0 * tl.abs(x))
    return 4.0 * decay / ((1.0 + decay) * (1.0 + decay))


@jit(do_not_specialize=["num_rows"])
def _activation_kernel(
    up_ptr,  # (num_rows, SIZE)
    act_ptr,  # (num_rows, SIZE)
    num_rows,
    stride_ut,
    SIZE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_tile = (offs_m < num_rows)[:, None] & (offs_n < SIZE)[None, :]
    # [BLOCK_M, BLOCK_N]
    up = tl.load(up_ptr + offs_m[:, None] * stride_ut + offs_n[None, :], mask=in_tile, other=0.0).to(tl.float32)
    act = activated(up, ACTIVATION)
    tl.store(act_ptr + offs_m[:, None] * SIZE + offs_n[None, :], act.to(act_ptr.dtype.element_ty), mask=in_tile)


@jit(do_not_specialize=["num_rows"])
def _activation_backward_kernel(
    grad_act_ptr,  # (num_rows, SIZE)
    up_ptr,  # (num_rows, SIZE), or GATED (num_rows, 2 * SIZE)
    act_ptr,  # (num_rows, SIZE)
    grad_up_ptr,  # as up
    num_rows,
    stride_gt,
    stride_ut,
    GATED: tl.constexpr,
    SIZE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_tile = (offs_m < num_rows)[:, None] & (offs_n < SIZE)[None, :]
    rows, columns = offs_m[:, None], offs_n[None, :]
    element = grad_up_ptr.dtype.element_ty
    STRIDE: tl.constexpr = 2 * SIZE if GATED else SIZE
    # [BLOCK_M, BLOCK_N]
    grad = tl.load(grad_act_ptr + rows * stride_gt + columns, mask=in_tile, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + rows * stride_ut + columns, mask=in_tile, other=0.0).to(tl.float32)
    act = activated(up, ACTIVATION)
    if GATED:
        gate = tl.load(up_ptr + rows * stride_ut + SIZE + columns, mask=in_tile, other=0.0).to(tl.float32)
        tl.store(grad_up_ptr + rows * STRIDE + SIZE + columns, (grad * act).to(element), mask=in_tile)
        act *= gate
        grad *= gate
    tl.store(act_ptr + rows * SIZE + columns, act.to(act_ptr.dtype.element_ty), mask=in_tile)
    grad *= derivative(up, ACTIVATION)
    tl.store(grad_up_ptr + rows * STRIDE + columns, grad.to(element), mask=in_tile)


def launch_activation(
    up: Tensor,  # (num_rows, size), or gated (num_rows, 2 * size)
    activation: Activation,
    gated: bool,
) -> Tensor:
    """(num_rows, size) in up's dtype."""
    if gated:
        return gated_activation_unchecked(up, activation)
    num_rows, size = up.shape
    act = up.new_empty(num_rows, size)
    if act.numel() == 0:
        return act
    with device_guard(up):
        _activation_kernel[(cdiv(num_rows, BLOCK_M), cdiv(size, BLOCK_N))](
            up_ptr=up,
            act_ptr=act,
            num_rows=num_rows,
            stride_ut=up.stride(0),
            SIZE=size,
            ACTIVATION=activation,
            BLOCK_M=BLOCK_M,
            BLOCK_N=BLOCK_N,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return act


def launch_activation_backward(
    grad_act: Tensor,  # (num_rows, size)
    up: Tensor,  # (num_rows, size), or gated (num_rows, 2 * size)
    activation: Activation,
    gated: bool,
) -> tuple[Tensor, Tensor]:
    """The activation, (num_rows, size), once more, and the gradient of up, of its shape; both in up's dtype."""
    num_rows, size = grad_act.shape
    act, grad_up = up.new_empty(num_rows, size), up.new_empty(*up.shape)
    if act.numel() == 0:
        return act, grad_up
    with device_guard(up):
        _activation_backward_kernel[(cdiv(num_rows, BLOCK_M), cdiv(size, BLOCK_N))](
            grad_act_ptr=grad_act,
            up_ptr=up,
            act_ptr=act,
            grad_up_ptr=grad_up,
            num_rows=num_rows,
            stride_gt=grad_act.stride(0),
            stride_ut=up.stride(0),
            GATED=gated,
            SIZE=size,
            ACTIVATION=activation,
            BLOCK_M=BLOCK_M,
            BLOCK_N=BLOCK_N,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return act, grad_up
