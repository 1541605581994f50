"""Layer norm and the additions before it:

    out = (s - mean(s)) / sqrt(var(s) + eps) * weight + norm_bias,    s = hidden_states + bias + residual,

where ``bias`` belongs to the product that made ``hidden_states``. With ``rms`` it is the root mean square's norm, which
does not centre: s / sqrt(mean(s²) + eps) * weight + norm_bias. One program normalises one row, in float32. The product
may come as float32 parts, which the program sums in their order. A pre-norm encoder also reads s, so the kernel can
store it.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, overload

import torch.nn.functional as F
from torch import Tensor

from ._ops import operator
from .runtime.backend import device_guard, runs_triton
from .runtime.checks import check_last_dim_contiguous, check_rows, check_tensor, num_rows_of
from .runtime.gradients import differentiably
from .runtime.triton import jit, next_power_of_2, tl

MAX_WIDTH = 16384


class AddNorm(NamedTuple):
    """A layer norm that another operation takes first: the arguments of `add_layer_norm` after ``hidden_states``.

    Attributes:
        bias: (width,) or None.
        residual: (num_tokens, width).
        weight, norm_bias: (width,).
        eps: added to the variance.
    """

    bias: Tensor | None
    residual: Tensor
    weight: Tensor
    norm_bias: Tensor
    eps: float


@jit()
def normalise_row(
    row,  # [BLOCK_W]
    weight_ptr,  # (WIDTH,)
    norm_bias_ptr,  # (WIDTH,) or None
    offs_w,  # [BLOCK_W]
    in_width,  # [BLOCK_W]
    eps,
    HAS_NORM_BIAS: tl.constexpr,
    RMS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The norm of one row in registers, which is zero beyond its width; the embedding kernel shares it."""
    if not RMS:
        mean = tl.sum(row, 0) / WIDTH
        row = tl.where(in_width, row - mean, 0.0)
    mean_square = tl.sum(row * row, 0) / WIDTH
    weight = tl.load(weight_ptr + offs_w, mask=in_width, other=0.0).to(tl.float32)
    if HAS_NORM_BIAS:
        norm_bias = tl.load(norm_bias_ptr + offs_w, mask=in_width, other=0.0).to(tl.float32)
        return row * tl.rsqrt(mean_square + eps) * weight + norm_bias
    return row * tl.rsqrt(mean_square + eps) * weight


@jit()
def _add_layer_norm_kernel(
    x_ptr,  # (num_tokens, PARTS, WIDTH)
    bias_ptr,  # (WIDTH,) or None
    residual_ptr,  # (num_tokens, WIDTH) or None
    rows_ptr,  # (num_rows,) or None
    weight_ptr,  # (WIDTH,)
    norm_bias_ptr,  # (WIDTH,) or None
    sum_ptr,  # (num_rows, WIDTH) or None
    out_ptr,  # (num_rows, WIDTH)
    eps,
    stride_xt,
    stride_xp,
    stride_rt,
    stride_ot,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_NORM_BIAS: tl.constexpr,
    RMS: tl.constexpr,
    KEEP_SUM: tl.constexpr,
    GATHER_X: tl.constexpr,
    GATHER_RESIDUAL: tl.constexpr,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    offs_w = tl.arange(0, BLOCK_W)
    in_width = offs_w < WIDTH
    x_row = token
    residual_row = token
    if GATHER_X or GATHER_RESIDUAL:
        row_of_token = tl.load(rows_ptr + token).to(tl.int64)
        if GATHER_X:
            x_row = row_of_token
        if GATHER_RESIDUAL:
            residual_row = row_of_token
    x_ptr += x_row * stride_xt
    # [BLOCK_W]
    row = tl.load(x_ptr + offs_w, mask=in_width, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        row += tl.load(x_ptr + part * stride_xp + offs_w, mask=in_width, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        row += tl.load(residual_ptr + residual_row * stride_rt + offs_w, mask=in_width, other=0.0).to(tl.float32)
    if HAS_BIAS:
        row += tl.load(bias_ptr + offs_w, mask=in_width, other=0.0).to(tl.float32)
    if KEEP_SUM:
        tl.store(sum_ptr + token * stride_ot + offs_w, row.to(sum_ptr.dtype.element_ty), mask=in_width)
    out = normalise_row(row, weight_ptr, norm_bias_ptr, offs_w, in_width, eps, HAS_NORM_BIAS, RMS, WIDTH)
    tl.store(out_ptr + token * stride_ot + offs_w, out.to(out_ptr.dtype.element_ty), mask=in_width)


def launch_sum_add_layer_norm(
    parts: Tensor,  # (num_tokens, num_parts, width)
    bias: Tensor | None,  # (width,)
    residual: Tensor | None,  # (num_tokens, width)
    rows: Tensor | None,  # (num_rows,)
    weight: Tensor,  # (width,)
    norm_bias: Tensor | None,  # (width,)
    eps: float,
    *,
    gather_parts: bool = False,
    keep_sum: bool = False,
    rms: bool = False,
) -> tuple[Tensor, Tensor]:
    """The norm of the sum of ``parts``, ``bias`` and ``residual``; then that sum with ``keep_sum``, else the norm.

    ``rows`` selects rows of ``residual``, and with ``gather_parts`` of ``parts`` as well. Both results are (num_rows,
    width) in weight's dtype.
    """
    num_parts, width = parts.shape[1:]
    num_rows = num_rows_of(parts, rows)
    out = weight.new_empty(num_rows, width)
    summed = weight.new_empty(num_rows, width) if keep_sum else None
    if out.numel() > 0:
        with device_guard(parts):
            _add_layer_norm_kernel[(num_rows,)](
                x_ptr=parts,
                bias_ptr=bias,
                residual_ptr=residual,
                rows_ptr=rows,
                weight_ptr=weight,
                norm_bias_ptr=norm_bias,
                sum_ptr=summed,
                out_ptr=out,
                eps=eps,
                stride_xt=parts.stride(0),
                stride_xp=parts.stride(1),
                stride_rt=0 if residual is None else residual.stride(0),
                stride_ot=out.stride(0),
                HAS_BIAS=bias is not None,
                HAS_RESIDUAL=residual is not None,
                HAS_NORM_BIAS=norm_bias is not None,
                RMS=rms,
                KEEP_SUM=keep_sum,
                GATHER_X=gather_parts,
                GATHER_RESIDUAL=rows is not None,
                PARTS=num_parts,
                WIDTH=width,
                BLOCK_W=next_power_of_2(width),
                num_warps=norm_warps(width),
                enable_fp_fusion=True,
            )
    return out, out if summed is None else summed


def cpu_norm(rows: Tensor, weight: Tensor, norm_bias: Tensor | None, eps: float, *, rms: bool) -> Tensor:
    """The norm of each row by PyTorch, which computes it in float32 where rows have fewer bits."""
    if not rms:
        return F.layer_norm(rows, weight.shape, weight, norm_bias, eps)
    normed = F.rms_norm(rows, weight.shape, weight, eps)
    return normed if norm_bias is None else normed.add_(norm_bias)


def norm_warps(width: int) -> int:
    """Warps for one row: about 8 numbers a thread, at most 16 warps."""
    return min(16, max(1, next_power_of_2(width) // 256))


def check_norm(weight: Tensor, norm_bias: Tensor | None, width: int, like: Tensor) -> None:
    """Checks a norm's weight and bias."""
    check_width(width)
    check_vector("weight", weight, width, like)
    if norm_bias is not None:
        check_vector("norm_bias", norm_bias, width, like)


def check_width(width: int) -> None:
    """Checks the width of a row that one program takes."""
    if not 1 <= width <= MAX_WIDTH:
        raise ValueError(f"the width must be from 1 to {MAX_WIDTH}, got {width}")


def check_vector(name: str, tensor: Tensor, width: int, like: Tensor) -> None:
    """Checks a contiguous (width,) vector, in ``like``'s dtype and on its device."""
    check_tensor(name, tensor, "(width,)", like=like)
    if tensor.shape[0] != width:
        raise ValueError(f"{name} must have shape ({width},), got {tuple(tensor.shape)}")
    check_last_dim_contiguous(name, tensor)


@operator(
    "(Tensor hidden_states, Tensor weight, Tensor? norm_bias, float eps, bool rms=False) -> Tensor",
    fake=lambda hidden_states, *_: hidden_states.new_empty(hidden_states.shape),
)
def layer_norm(
    hidden_states: Tensor, weight: Tensor, norm_bias: Tensor | None, eps: float, *, rms: bool = False
) -> Tensor:
    """Layer norm of each row, or RMS norm.

    Args:
        hidden_states: (num_tokens, width), float32, float16 or bfloat16, width up to 16,384.
        weight: (width,).
        norm_bias: (width,) or None.
        eps: added to the variance, or to the mean of squares.
        rms: whether to divide each row by its root mean square alone, without centring it.

    Returns:
        (num_tokens, width) in hidden_states' dtype.

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape, stride or device that does not fit.
    """
    check_tensor("hidden_states", hidden_states, "(num_tokens, width)")
    check_norm(weight, norm_bias, hidden_states.shape[1], hidden_states)
    check_last_dim_contiguous("hidden_states", hidden_states)
    return differentiably(layer_norm_unchecked, hidden_states, weight, norm_bias, eps, rms=rms)


def layer_norm_unchecked(
    hidden_states: Tensor, weight: Tensor, norm_bias: Tensor | None, eps: float, *, rms: bool = False
) -> Tensor:
    """`layer_norm` of arguments that are known to fit."""
    if runs_triton(hidden_states):
        parts = hidden_states.unsqueeze(1)
        return launch_sum_add_layer_norm(parts, None, None, None, weight, norm_bias, eps, rms=rms)[0]
    return cpu_norm(hidden_states, weight, norm_bias, eps, rms=rms)


def fake_norm_and_sum(like: Tensor, num_rows: Any, keep_sum: bool) -> list[Tensor]:
    """What an operator with ``keep_sum`` gives, unfilled: (num_rows, width) tensors in the dtype of ``like``."""
    return [like.new_empty(num_rows, like.shape[1]) for _ in range(1 + keep_sum)]


@overload
def add_layer_norm(
    hidden_states: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    norm_bias: Tensor | None,
    eps: float,
    *,
    rows: Tensor | None = None,
    keep_sum: Literal[False] = False,
    rms: bool = False,
) -> Tensor: ...


@overload
def add_layer_norm(
    hidden_states: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    norm_bias: Tensor | None,
    eps: float,
    *,
    rows: Tensor | None = None,
    keep_sum: Literal[True],
    rms: bool = False,
) -> tuple[Tensor, Tensor]: ...


@operator(
    "(Tensor hidden_states, Tensor? bias, Tensor residual, Tensor weight, Tensor? norm_bias, float eps, Tensor? rows, "
    "bool keep_sum, bool rms=False) -> Tensor[]",
    fake=lambda x, _bias, _residual, _weight, _norm_bias, _eps, rows, keep_sum, *_: fake_norm_and_sum(
        x, num_rows_of(x, rows), keep_sum
    ),
)
def add_layer_norm(
    hidden_states: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    norm_bias: Tensor | None,
    eps: float,
    *,
    rows: Tensor | None = None,
    keep_sum: bool = False,
    rms: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Layer norm of ``hidden_states + bias + residual``, or RMS norm.

    Args:
        hidden_states: (num_tokens, width), float32, float16 or bfloat16, width up to 16,384.
        bias: (width,) or None: of the product that made ``hidden_states``.
        residual: (num_tokens, width).
        weight: (width,), the norm's own.
        norm_bias: (width,) or None, the norm's own.
        eps: added to the variance, or to the mean of squares.
        rows: (num_rows,), int32 or int64, contiguous: the rows to compute, or None for all.
        keep_sum: whether to return the sum as well, as a pre-norm encoder needs it.
        rms: whether to divide each row by its root mean square alone, without centring it.

    Returns:
        (num_tokens or num_rows, width), contiguous, in hidden_states' dtype; with keep_sum a pair of these, the norm
        and the sum before it.

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape, stride or device that does not fit, or, on the CPU, a row that does not exist. On a GPU
            rows are trusted, since checking them would stall the device.
    """
    check_add_norm(hidden_states, bias, residual, weight, norm_bias, eps)
    if rows is not None:
        check_rows("rows", rows, hidden_states)
    normed, summed = differentiably(
        add_layer_norm_unchecked,
        *(hidden_states, bias, residual, weight, norm_bias, eps, rows),
        keep_sum=keep_sum,
        rms=rms,
    )
    return (normed, summed) if keep_sum else normed


def add_layer_norm_unchecked(
    hidden_states: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    norm_bias: Tensor | None,
    eps: float,
    rows: Tensor | None = None,
    *,
    keep_sum: bool = False,
    rms: bool = False,
) -> tuple[Tensor, Tensor]:
    """`add_layer_norm` of arguments that are known to fit: the normed rows, and the sum where it is kept."""
    if runs_triton(hidden_states):
        return launch_sum_add_layer_norm(
            *(hidden_states.unsqueeze(1), bias, residual, rows, weight, norm_bias, eps),
            gather_parts=rows is not None,
            keep_sum=keep_sum,
            rms=rms,
        )
    summed = hidden_states + residual if rows is None else hidden_states[rows] + residual[rows]
    if bias is not None:
        summed += bias
    return cpu_norm(summed, weight, norm_bias, eps, rms=rms), summed


def check_add_norm(
    hidden_states: Tensor, bias: Tensor | None, residual: Tensor, weight: Tensor, norm_bias: Tensor | None, _eps: float
) -> None:
    """Checks the arguments of `add_layer_norm`."""
    check_tensor("hidden_states", hidden_states, "(num_tokens, width)")
    check_tensor("residual", residual, "(num_tokens, width)", like=hidden_states)
    if residual.shape != hidden_states.shape:
        raise ValueError(
            f"residual must have hidden_states' shape {tuple(hidden_states.shape)}, got {tuple(residual.shape)}"
        )
    width = hidden_states.shape[1]
    check_norm(weight, norm_bias, width, hidden_states)
    if bias is not None:
        check_vector("bias", bias, width, hidden_states)
    for name, tensor in (("hidden_states", hidden_states), ("residual", residual)):
        check_last_dim_contiguous(name, tensor)
