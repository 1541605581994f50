"""Kernels of dropout, addition and layer norm that can be trained, and of their gradients:

    s = drop(x) + residual;    normed = n weight + norm_bias,    n = (s - mean(s)) rstd,    rstd = (var(s) + eps)^-½
    grad_s = rstd (g - mean(g) - n mean(g n)) + grad_summed,    g = grad_normed weight;    grad_x = drop(grad_s)
    grad_weight = Σ grad_normed n,    grad_norm_bias = Σ grad_normed    over rows

With ``rms`` neither s nor g is centred, and rstd is (mean(s²) + eps)^-½. Everything is taken of s as it is stored,
so that the gradients are those of what was computed. Forward a program takes one row. Backward a bounded number of
programs take turns with the rows, and each leaves one row of sums for the weight and one for the bias: atomics would
add them in another order each time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..layer_norm import norm_warps
from ..runtime.backend import device_guard, multiprocessor_count
from ..runtime.tile_tables import arch_of, unsqueezed
from ..runtime.triton import cdiv, jit, next_power_of_2, tl
from .dropout import Dropout, kept_numbers

# Of the backward pass: as many as its registers leave room for on a multiprocessor, so that all programs run at once.
WARPS_PER_PROCESSOR = 24
# Eight numbers a thread; the widths of most models are multiples of 128.
BLOCK_M = 8
BLOCK_N = 128


@jit(do_not_specialize=["seed", "threshold"])
def _training_add_norm_kernel(
    x_ptr,  # (num_rows, WIDTH)
    residual_ptr,  # (num_rows, WIDTH) or None
    weight_ptr,  # (WIDTH,)
    norm_bias_ptr,  # (WIDTH,) or None
    normed_ptr,  # (num_rows, WIDTH)
    sum_ptr,  # (num_rows, WIDTH) or None where it is x
    mean_ptr,  # (num_rows,) or None
    rstd_ptr,  # (num_rows,)
    eps,
    seed,
    threshold,
    factor,
    stride_xt,
    stride_rt,
    HAS_DROPOUT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_NORM_BIAS: tl.constexpr,
    RMS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    offs_w = tl.arange(0, BLOCK_W)
    in_width = offs_w < WIDTH
    # [BLOCK_W]
    summed = tl.load(x_ptr + row * stride_xt + offs_w, mask=in_width, other=0.0).to(tl.float32)
    if HAS_DROPOUT:
        summed = tl.where(kept_numbers(seed, threshold, tl.program_id(0), offs_w), summed * factor, 0.0)
    if HAS_RESIDUAL:
        summed += tl.load(residual_ptr + row * stride_rt + offs_w, mask=in_width, other=0.0).to(tl.float32)
    if HAS_DROPOUT or HAS_RESIDUAL:
        stored = summed.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + row * WIDTH + offs_w, stored, mask=in_width)
        summed = stored.to(tl.float32)
    if not RMS:
        mean = tl.sum(summed, 0) / WIDTH
        tl.store(mean_ptr + row, mean)
        summed = tl.where(in_width, summed - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(summed * summed, 0) / WIDTH + eps)
    tl.store(rstd_ptr + row, rstd)
    normed = summed * rstd * tl.load(weight_ptr + offs_w, mask=in_width, other=0.0).to(tl.float32)
    if HAS_NORM_BIAS:
        normed += tl.load(norm_bias_ptr + offs_w, mask=in_width, other=0.0).to(tl.float32)
    tl.store(normed_ptr + row * WIDTH + offs_w, normed.to(normed_ptr.dtype.element_ty), mask=in_width)


@jit(do_not_specialize=["num_rows", "seed", "threshold"])
def _training_norm_backward_kernel(
    grad_normed_ptr,  # (num_rows, WIDTH)
    grad_summed_ptr,  # (num_rows, WIDTH) or None
    sum_ptr,  # (num_rows, WIDTH)
    mean_ptr,  # (num_rows,) or None
    rstd_ptr,  # (num_rows,)
    weight_ptr,  # (WIDTH,)
    grad_residual_ptr,  # (num_rows, WIDTH)
    grad_x_ptr,  # (num_rows, WIDTH) or None
    weight_parts_ptr,  # (num_programs, WIDTH)
    bias_parts_ptr,  # (num_programs, WIDTH) or None
    num_rows,
    seed,
    threshold,
    factor,
    stride_st,
    HAS_GRAD_SUMMED: tl.constexpr,
    HAS_GRAD_X: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    HAS_NORM_BIAS: tl.constexpr,
    RMS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    program = tl.program_id(0)
    offs_w = tl.arange(0, BLOCK_W)
    in_width = offs_w < WIDTH
    # [BLOCK_W]
    weight = tl.load(weight_ptr + offs_w, mask=in_width, other=0.0).to(tl.float32)
    weight_part = tl.zeros([BLOCK_W], tl.float32)
    bias_part = tl.zeros([BLOCK_W], tl.float32)
    for number in range(program, num_rows, tl.num_programs(0)):
        row = tl.cast(number, tl.int64)
        grad = tl.load(grad_normed_ptr + row * WIDTH + offs_w, mask=in_width, other=0.0).to(tl.float32)
        normed = tl.load(sum_ptr + row * stride_st + offs_w, mask=in_width, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row)
        if not RMS:
            normed -= tl.load(mean_ptr + row)
        normed *= rstd
        weight_part += grad * normed
        if HAS_NORM_BIAS:
            bias_part += grad
        grad *= weight
        flow = grad - normed * (tl.sum(grad * normed, 0) / WIDTH)
        if not RMS:
            flow -= tl.sum(grad, 0) / WIDTH
        flow *= rstd
        if HAS_GRAD_SUMMED:
            flow += tl.load(grad_summed_ptr + row * WIDTH + offs_w, mask=in_width, other=0.0).to(tl.float32)
        stored = flow.to(grad_residual_ptr.dtype.element_ty)
        tl.store(grad_residual_ptr + row * WIDTH + offs_w, stored, mask=in_width)
        if HAS_GRAD_X:
            if HAS_DROPOUT:
                flow = tl.where(kept_numbers(seed, threshold, tl.cast(number, tl.int32), offs_w), flow * factor, 0.0)
            tl.store(grad_x_ptr + row * WIDTH + offs_w, flow.to(grad_x_ptr.dtype.element_ty), mask=in_width)
    tl.store(weight_parts_ptr + program * WIDTH + offs_w, weight_part, mask=in_width)
    if HAS_NORM_BIAS:
        tl.store(bias_parts_ptr + program * WIDTH + offs_w, bias_part, mask=in_width)


@jit(do_not_specialize=["num_rows", "seed", "threshold"])
def _drop_kernel(
    x_ptr,  # (num_rows, WIDTH)
    out_ptr,  # (num_rows, WIDTH)
    num_rows,
    seed,
    threshold,
    factor,
    stride_xt,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_tile = (offs_m < num_rows)[:, None] & (offs_n < WIDTH)[None, :]
    rows = offs_m.to(tl.int64)[:, None]
    # [BLOCK_M, BLOCK_N]
    x = tl.load(x_ptr + rows * stride_xt + offs_n[None, :], mask=in_tile, other=0.0).to(tl.float32)
    x = tl.where(kept_numbers(seed, threshold, offs_m[:, None], offs_n[None, :]), x * factor, 0.0)
    tl.store(out_ptr + rows * WIDTH + offs_n[None, :], x.to(out_ptr.dtype.element_ty), mask=in_tile)


def launch_add_norm(
    x: Tensor,  # (num_rows, width)
    residual: Tensor | None,  # (num_rows, width)
    dropout: Dropout | None,
    weight: Tensor,  # (width,)
    norm_bias: Tensor | None,  # (width,)
    eps: float,
    rms: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """The norm of drop(x) + residual, that sum, and of each row its mean and 1 / its deviation.

    The norm is (num_rows, width) in weight's dtype, and the sum in the residual's, or in x's, of which it is a view
    where nothing is dropped and added. The mean, None with ``rms``, and the other statistic are (num_rows,) float32.
    """
    num_rows, width = x.shape
    changed = dropout is not None or residual is not None
    normed = weight.new_empty(num_rows, width)
    summed = (x if residual is None else residual).new_empty(num_rows, width) if changed else x.view_as(x)
    mean = None if rms else x.new_empty(num_rows, dtype=torch.float32)
    rstd = x.new_empty(num_rows, dtype=torch.float32)
    if num_rows == 0:
        return normed, summed, mean, rstd
    with device_guard(x):
        _training_add_norm_kernel[(num_rows,)](
            x_ptr=x,
            residual_ptr=residual,
            weight_ptr=weight,
            norm_bias_ptr=norm_bias,
            normed_ptr=normed,
            sum_ptr=summed if changed else None,
            mean_ptr=mean,
            rstd_ptr=rstd,
            eps=eps,
            **_numbers_of(dropout),
            stride_xt=x.stride(0),
            stride_rt=0 if residual is None else residual.stride(0),
            HAS_DROPOUT=dropout is not None,
            HAS_RESIDUAL=residual is not None,
            HAS_NORM_BIAS=norm_bias is not None,
            RMS=rms,
            WIDTH=width,
            BLOCK_W=next_power_of_2(width),
            num_warps=norm_warps(width),
            enable_fp_fusion=True,
        )
    return normed, summed, mean, rstd


def launch_norm_backward(
    grad_normed: Tensor | None,  # (num_rows, width)
    grad_summed: Tensor | None,  # (num_rows, width)
    summed: Tensor,  # (num_rows, width)
    mean: Tensor | None,  # (num_rows,)
    rstd: Tensor,  # (num_rows,)
    weight: Tensor,  # (width,)
    dropout: Dropout | None,
    rms: bool,
    *,
    has_norm_bias: bool,
    x_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of the residual, of x, of the norm's weight and of its bias: see `launch_add_norm`.

    Those of the residual, in summed's dtype, and of x, in ``x_dtype``, are (num_rows, width), and one tensor where
    nothing is dropped and the dtypes agree. Those of the weight and the bias are (width,) float32, the same bit for bit
    each time, and None without ``grad_normed``; the bias's is None without ``has_norm_bias``, too.

    Raises:
        ValueError: neither ``grad_normed`` nor ``grad_summed`` is given.
    """
    if grad_normed is None:
        if grad_summed is None:
            raise ValueError("grad_normed or grad_summed must be a tensor, got None for both")
        grad_residual = grad_summed.to(summed.dtype)
        dropped = grad_residual if dropout is None else launch_drop(grad_residual, dropout, x_dtype)
        return grad_residual, dropped.to(x_dtype), None, None
    num_rows, width = summed.shape
    grad_residual = summed.new_empty(num_rows, width)
    has_grad_x = dropout is not None or x_dtype != summed.dtype
    grad_x = summed.new_empty(num_rows, width, dtype=x_dtype) if has_grad_x else grad_residual
    # Half as many numbers a thread as forward, since sums are held beside them.
    num_warps = min(2 * norm_warps(width), 16)
    num_programs = min(num_rows, WARPS_PER_PROCESSOR // num_warps * multiprocessor_count(summed.device))
    parts = summed.new_empty(1 + has_norm_bias, num_programs, width, dtype=torch.float32)
    if num_rows > 0:
        with device_guard(summed):
            _training_norm_backward_kernel[(num_programs,)](
                grad_normed_ptr=grad_normed.contiguous(),
                grad_summed_ptr=None if grad_summed is None else grad_summed.contiguous(),
                sum_ptr=summed,
                mean_ptr=mean,
                rstd_ptr=rstd,
                weight_ptr=weight,
                grad_residual_ptr=grad_residual,
                grad_x_ptr=grad_x if has_grad_x else None,
                weight_parts_ptr=parts[0],
                bias_parts_ptr=parts[1] if has_norm_bias else None,
                num_rows=num_rows,
                **_numbers_of(dropout),
                stride_st=summed.stride(0),
                HAS_GRAD_SUMMED=grad_summed is not None,
                HAS_GRAD_X=has_grad_x,
                HAS_DROPOUT=dropout is not None,
                HAS_NORM_BIAS=has_norm_bias,
                RMS=rms,
                WIDTH=width,
                BLOCK_W=next_power_of_2(width),
                num_warps=num_warps,
                **unsqueezed(arch_of(summed.device)),
                enable_fp_fusion=True,
            )
    sums = parts.sum(1)
    return grad_residual, grad_x, sums[0], sums[1] if has_norm_bias else None


def launch_drop(x: Tensor, dropout: Dropout, dtype: torch.dtype | None = None) -> Tensor:
    """``x`` (num_rows, width) behind dropout, in ``dtype`` or its own; of a gradient it is the gradient."""
    num_rows, width = x.shape
    out = x.new_empty(num_rows, width, dtype=dtype or x.dtype)
    if out.numel() == 0:
        return out
    x = x if x.stride(1) == 1 else x.contiguous()
    with device_guard(x):
        _drop_kernel[(cdiv(num_rows, BLOCK_M), cdiv(width, BLOCK_N))](
            x_ptr=x,
            out_ptr=out,
            num_rows=num_rows,
            **_numbers_of(dropout),
            stride_xt=x.stride(0),
            WIDTH=width,
            BLOCK_M=BLOCK_M,
            BLOCK_N=BLOCK_N,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return out


def _numbers_of(dropout: Dropout | None) -> dict[str, float]:
    """What a kernel takes of a dropout, which it does not read where there is none."""
    if dropout is None:
        return {"seed": 0, "threshold": 0, "factor": 1.0}
    return {"seed": dropout.signed_seed, "threshold": dropout.threshold, "factor": dropout.factor}
