"""Products of a frozen weight and of the low-rank ones that adapters (LoRA) add to it, which can be trained:

    inner = drop(rows) downᵀ;    out = rows weightᵀ + bias + inner upᵀ

The adapters' gradients are products as narrow as their rank, where the gradient of a sum of both weights would cost as
much as the weight's own. Of rows behind dropout nothing is kept: the backward pass drops the same numbers again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .derivatives import first_only
from .dropout import Dropout
from .norms import drop_rows
from .products import product, product_gradients


class _Adapted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, inner: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(rows if ctx.needs_input_grad[1] else None, weight, inner, up)
        ctx.bias_dtype = None if bias is None else bias.dtype
        out = product(rows, weight.to(rows.dtype), None if bias is None else bias.to(rows.dtype))
        up = up.to(inner.dtype)
        # Adapters may be wider than the weight: their part is rounded once, with the sum.
        return out.addmm_(inner, up.t()) if inner.dtype == out.dtype else out.add_(inner @ up.t())

    @staticmethod
    @first_only
    def backward(ctx: Any, grad: Tensor) -> Any:
        rows, weight, inner, up = ctx.saved_tensors
        grad = grad.contiguous()
        wide = grad.to(inner.dtype)
        grad_inner = wide @ up.to(inner.dtype) if ctx.needs_input_grad[3] else None
        grad_up = (wide.t() @ inner).to(up.dtype) if ctx.needs_input_grad[4] else None
        return *product_gradients(ctx, grad, rows, weight), grad_inner, grad_up


class _Inner(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, down: Tensor, dtype: torch.dtype, dropout: Dropout | None) -> Tensor:
        ctx.save_for_backward(rows if ctx.needs_input_grad[1] else None, down)
        ctx.form = (rows.dtype, dtype, dropout)
        return drop_rows(rows, dropout).to(dtype) @ down.to(dtype).t()

    @staticmethod
    @first_only
    def backward(ctx: Any, grad: Tensor) -> Any:
        rows, down = ctx.saved_tensors
        rows_dtype, dtype, dropout = ctx.form
        grad_rows = grad_down = None
        if ctx.needs_input_grad[0]:
            grad_rows = drop_rows((grad @ down.to(dtype)).to(rows_dtype), dropout)
        if ctx.needs_input_grad[1]:
            grad_down = (grad.t() @ drop_rows(rows, dropout).to(dtype)).to(down.dtype)
        return grad_rows, grad_down, None, None


def low_rank_inner(rows: Tensor, down: Tensor, dtype: torch.dtype, dropout: Dropout | None = None) -> Tensor:
    """drop(rows) downᵀ, differentiable.

    Args:
        rows: (num_rows, in_features), contiguous.
        down: (rank, in_features), LoRA's A.
        dtype: what is computed in, and what comes.
        dropout: what drops numbers of ``rows``, or None.

    Returns:
        (num_rows, rank).
    """
    inner: Tensor = _Inner.apply(rows, down, dtype, dropout)
    return inner


def adapted_linear(rows: Tensor, weight: Tensor, bias: Tensor | None, inner: Tensor, up: Tensor) -> Tensor:
    """rows weightᵀ + bias + inner upᵀ, differentiable.

    Args:
        rows, weight, bias: as in `linear`.
        inner: (num_rows, rank), from `low_rank_inner`, in the dtype of ``rows`` or a wider one.
        up: (out_features, rank), LoRA's B times its scale.

    Returns:
        (num_rows, out_features), in the dtype of ``rows``.
    """
    out: Tensor = _Adapted.apply(rows, weight, bias, inner, up)
    return out
