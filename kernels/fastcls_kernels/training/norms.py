"""Dropout, addition and layer norm that can be trained:

    summed = drop(rows) + residual;    normed = norm(summed) weight + norm_bias

The backward pass reads the sum and two numbers a row. The mask of the dropout is made again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..layer_norm import cpu_norm
from ..runtime.backend import runs_triton
from .derivatives import first_only
from .dropout import Dropout, drop
from .norm_kernel import launch_add_norm, launch_drop, launch_norm_backward


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        norm_bias: Tensor | None,
        eps: float,
        rms: bool,
        dropout: Dropout | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.form = (rms, dropout, norm_bias is not None, rows.dtype)
        ctx.has_residual = residual is not None
        ctx.set_materialize_grads(False)
        if runs_triton(rows):
            normed, summed, mean, rstd = launch_add_norm(rows, residual, dropout, weight, norm_bias, eps, rms)
        else:
            kept = drop(rows, dropout)
            summed = kept if residual is None else torch.add(residual, kept)
            if rms:
                mean, rstd = None, (summed.square().mean(1) + eps).rsqrt()
                normed = cpu_norm(summed.to(weight.dtype), weight, norm_bias, eps, rms=True)
            else:
                wide = summed.to(weight.dtype)
                normed, mean, rstd = torch.native_layer_norm(wide, weight.shape, weight, norm_bias, eps)
            if residual is None and summed is rows:
                # An output of its own, as a result must be.
                summed = rows.view_as(rows)
        ctx.save_for_backward(summed, mean, rstd, weight, norm_bias)
        return normed, summed

    @staticmethod
    @first_only
    def backward(ctx: Any, grad_normed: Tensor | None, grad_summed: Tensor | None) -> Any:
        summed, mean, rstd, weight, norm_bias = ctx.saved_tensors
        rms, dropout, has_norm_bias, dtype = ctx.form
        if grad_normed is None and grad_summed is None:
            return (None,) * 7
        grad_residual: Tensor | None
        grad_rows: Tensor | None
        if runs_triton(summed):
            grad_residual, grad_rows, grad_weight, grad_bias = launch_norm_backward(
                *(grad_normed, grad_summed, summed, mean, rstd, weight, dropout, rms),
                has_norm_bias=has_norm_bias,
                x_dtype=dtype,
            )
        else:
            grad_residual, grad_weight, grad_bias = grad_summed, None, None
            if grad_normed is not None:
                needs = ctx.needs_input_grad
                flow, grad_weight, grad_bias = _norm_backward(
                    grad_normed.contiguous(), summed.to(weight.dtype), mean, rstd, weight, norm_bias, rms,
                    (any(needs[:2]), needs[2], needs[3]),
                )  # fmt: skip
                if flow is not None:
                    flow = flow.to(summed.dtype)
                    grad_residual = flow if grad_summed is None else flow.add_(grad_summed)
            grad_rows = None
            if ctx.needs_input_grad[0] and grad_residual is not None:
                grad_rows = drop(grad_residual.to(dtype), dropout)
        return (
            *(grad_rows, grad_residual if ctx.has_residual else None),
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None or norm_bias is None else grad_bias.to(norm_bias.dtype),
            *(None, None, None),
        )


def _norm_backward(
    grad: Tensor,
    summed: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    weight: Tensor,
    norm_bias: Tensor | None,
    rms: bool,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of the sum, the weight and the bias, by PyTorch's own kernels."""
    needs_rows, needs_weight, needs_bias = needs
    if not rms:
        assert mean is not None
        found: tuple[Tensor | None, Tensor | None, Tensor | None] = torch.ops.aten.native_layer_norm_backward(
            grad, summed, weight.shape, mean, rstd, weight, norm_bias, [needs_rows, needs_weight, needs_bias]
        )
        return found
    wide = summed * rstd[:, None]
    grad_weight = (grad * wide).sum(0) if needs_weight else None
    grad_bias = grad.sum(0) if needs_bias else None
    if not needs_rows:
        return None, grad_weight, grad_bias
    scaled = grad * weight
    inner = (scaled * wide).mean(1, keepdim=True)
    return (scaled - wide * inner) * rstd[:, None], grad_weight, grad_bias


def add_norm(
    rows: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    norm_bias: Tensor | None,
    eps: float,
    *,
    rms: bool = False,
    dropout: Dropout | None = None,
) -> tuple[Tensor, Tensor]:
    """norm(drop(rows) + residual) and that sum, differentiable.

    Args:
        rows: (num_rows, width), contiguous.
        residual: (num_rows, width) or None, as wide a dtype as ``rows`` or wider.
        weight: (width,), in the residual's dtype; the norm comes in it.
        norm_bias: (width,) or None, as weight.
        eps: added to the variance, or to the mean of squares.
        rms: whether to divide by the root mean square alone.
        dropout: what drops numbers of ``rows``, or None.
    """
    normed, summed = _AddNorm.apply(rows, residual, weight, norm_bias, eps, rms, dropout)
    return normed, summed


class _Drop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, dropout: Dropout) -> Tensor:
        ctx.dropout = dropout
        return drop_rows(rows, dropout)

    @staticmethod
    @first_only
    def backward(ctx: Any, grad: Tensor) -> Any:
        return drop_rows(grad.contiguous(), ctx.dropout), None


def dropped(rows: Tensor, dropout: Dropout | None) -> Tensor:
    """``rows`` (num_rows, width) behind dropout, differentiable; None leaves it out."""
    if dropout is None:
        return rows
    out: Tensor = _Drop.apply(rows, dropout)
    return out


def drop_rows(rows: Tensor, dropout: Dropout | None) -> Tensor:
    """``rows`` (num_rows, width) behind dropout, without a graph; None leaves it out."""
    return launch_drop(rows, dropout) if dropout is not None and runs_triton(rows) else drop(rows, dropout)
