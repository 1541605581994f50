"""Rotary positions in place: each head's halves (a, b) become (a cos - b sin, b cos + a sin), with angles by position.

Interleaved, the pairs are neighbours: the even numbers of a head stand for a, the odd ones for b. One program turns the
heads of one token, or a block of them, so that it reads the row of cosines and sines once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._ops import operator
from .runtime.backend import device_guard, runs_triton
from .runtime.checks import (
    check_device,
    check_head_dim,
    check_integers,
    check_last_dim_contiguous,
    check_no_gradient,
    check_range,
    check_tensor,
)
from .runtime.gradients import differentiably
from .runtime.triton import cdiv, jit, next_power_of_2, tl

MAX_BLOCK_H = 32


@jit()
def _rotary_kernel(
    x_ptr,  # (total_tokens, NUM_HEADS, 2 * HALF)
    positions_ptr,  # (total_tokens,)
    cos_ptr,  # (max_positions, HALF)
    sin_ptr,  # (max_positions, HALF)
    stride_xt,
    stride_xh,
    NUM_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    offs_h = tl.program_id(1).to(tl.int64) * BLOCK_H + tl.arange(0, BLOCK_H)
    offs_d = tl.arange(0, BLOCK_D)
    in_half = offs_d < HALF
    in_heads = (offs_h < NUM_HEADS)[:, None] & in_half[None, :]
    STEP: tl.constexpr = 2 if INTERLEAVED else 1
    angles = tl.load(positions_ptr + token).to(tl.int64) * HALF + offs_d
    # [BLOCK_D]
    cos = tl.load(cos_ptr + angles, mask=in_half, other=0.0)[None, :]
    sin = tl.load(sin_ptr + angles, mask=in_half, other=0.0)[None, :]
    # [BLOCK_H, BLOCK_D]
    first_ptr = x_ptr + token * stride_xt + offs_h[:, None] * stride_xh + offs_d[None, :] * STEP
    second_ptr = first_ptr + (1 if INTERLEAVED else HALF)
    first = tl.load(first_ptr, mask=in_heads, other=0.0).to(tl.float32)
    second = tl.load(second_ptr, mask=in_heads, other=0.0).to(tl.float32)
    tl.store(first_ptr, (first * cos - second * sin).to(x_ptr.dtype.element_ty), mask=in_heads)
    tl.store(second_ptr, (second * cos + first * sin).to(x_ptr.dtype.element_ty), mask=in_heads)


def _launch_rotary(
    x: Tensor,  # (total_tokens, num_heads, head_dim)
    positions: Tensor,  # (total_tokens,)
    cos: Tensor,  # (max_positions, head_dim // 2)
    sin: Tensor,  # (max_positions, head_dim // 2)
    interleaved: bool,
) -> None:
    total_tokens, num_heads, head_dim = x.shape
    if x.numel() == 0:
        return
    half = head_dim // 2
    block_h, block_d = min(next_power_of_2(num_heads), MAX_BLOCK_H), next_power_of_2(half)
    with device_guard(x):
        _rotary_kernel[(total_tokens, cdiv(num_heads, block_h))](
            x_ptr=x,
            positions_ptr=positions,
            cos_ptr=cos,
            sin_ptr=sin,
            stride_xt=x.stride(0),
            stride_xh=x.stride(1),
            NUM_HEADS=num_heads,
            HALF=half,
            INTERLEAVED=interleaved,
            BLOCK_H=block_h,
            BLOCK_D=block_d,
            # A thread takes eight numbers of each half.
            num_warps=max(block_h * block_d // 256, 1),
            enable_fp_fusion=True,
        )


def _rotate(x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> None:
    wide = x if x.dtype.itemsize >= 4 else x.float()
    cos, sin = (table[positions].to(wide.dtype).unsqueeze(1) for table in (cos, sin))
    first, second = (wide[..., ::2], wide[..., 1::2]) if interleaved else wide.chunk(2, -1)
    crossed = first * sin
    # Not addcmul_: a compiler may round its vectors and its remainders differently.
    first.mul_(cos).sub_(second * sin)
    second.mul_(cos).add_(crossed)
    if wide is not x:
        x.copy_(wide)


@operator(
    "(Tensor(a0!) x, Tensor positions, Tensor cos, Tensor sin, bool interleaved=False) -> ()", fake=lambda *_: None
)
def apply_rotary_(x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Turns each head by its token's position, in place.

    Args:
        x: (total_tokens, nheads, headdim), float32, float16 or bfloat16, even head sizes from 4 to 128. Any strides
            with a contiguous last dimension: the queries and keys of a fused projection can be turned in one call, as
            twice as many heads.
        positions: (total_tokens,), int32 or int64, contiguous.
        cos, sin: (max_positions, headdim // 2), float32, contiguous: of each position's angles.
        interleaved: whether pairs are neighbours, 2i and 2i + 1 (RoFormer's and GPT-J's form), not of a head's halves
            (the form that transformers calls ``rotate_half``).

    Returns:
        x. The first half h1 and second half h2 of each head, or, interleaved, its even and its odd numbers, became
        h1 cos - h2 sin and h2 cos + h1 sin, computed in float32 and rounded once.

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape, stride, device or head size that does not fit, or, on the CPU, a position outside the
            tables. On a GPU positions are trusted, since checking them would stall the device.
    """
    check_tensor("x", x, "(total_tokens, nheads, headdim)")
    check_last_dim_contiguous("x", x)
    total_tokens, _num_heads, head_dim = x.shape
    check_head_dim("x", head_dim)
    if head_dim % 2:
        raise ValueError(f"x must have an even head size, got {head_dim}")
    check_integers("positions", positions)
    if positions.shape != (total_tokens,) or not positions.is_contiguous():
        raise ValueError(
            f"positions must be contiguous, of shape (total_tokens,) = ({total_tokens},), got {tuple(positions.shape)}"
        )
    check_device("positions", positions, x)
    for name, table in (("cos", cos), ("sin", sin)):
        _check_table(name, table, head_dim // 2, x)
    if sin.shape != cos.shape:
        raise ValueError(f"sin must have cos's shape {tuple(cos.shape)}, got {tuple(sin.shape)}")
    check_range("positions", positions, cos.shape[0])
    return differentiably(apply_rotary_unchecked_, x, positions, cos, sin, interleaved=interleaved)


def apply_rotary_unchecked_(
    x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False
) -> Tensor:
    """`apply_rotary_` of arguments that are known to fit."""
    if runs_triton(x):
        _launch_rotary(x, positions, cos, sin, interleaved)
    else:
        _rotate(x, positions, cos, sin, interleaved)
    return x


def _check_table(name: str, table: Tensor, half: int, x: Tensor) -> None:
    if not isinstance(table, Tensor) or table.dtype != torch.float32:
        found = table.dtype if isinstance(table, Tensor) else type(table).__name__
        raise TypeError(f"{name} must be a torch.float32 tensor, got {found}")
    if table.ndim != 2 or table.shape[1] != half or not table.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous, of shape (max_positions, headdim // 2) = (max_positions, {half}), "
            f"got shape {tuple(table.shape)} with strides {table.stride()}"
        )
    check_device(name, table, x)
    check_no_gradient(name, table)
