"""Products that can be trained, and those of their gradients, on a CPU and on a GPU.

    out = rows weightᵀ + bias;    grad_rows = grad weight,  grad_weight = gradᵀ rows,  grad_bias = Σ grad

A CPU takes all three by the library that is the fastest there: oneDNN reads transposed views as they are. Between an
activation and the product behind it nothing is kept: the backward pass computes the activation again from what it was
taken of, since it reads that anyway for the derivative.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..gated_activation import gated_activation_unchecked
from ..linear.cpu import cpu_product
from ..runtime.activations import Activation, activate_
from ..runtime.backend import runs_triton
from .activation_kernel import launch_activation, launch_activation_backward
from .derivatives import first_only


def product(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """rows weightᵀ + bias: (num_rows, in_features) by (out_features, in_features), either of them a transposed view."""
    # oneDNN refuses sums of no terms, as a weight's gradient is where there are no rows.
    return cpu_product(rows, weight, bias) if rows.is_cpu and rows.shape[1] else F.linear(rows, weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # A frozen weight's gradient, which reads the rows, is not asked for.
        ctx.save_for_backward(rows if ctx.needs_input_grad[1] else None, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return product(rows, weight.to(rows.dtype), None if bias is None else bias.to(rows.dtype))

    @staticmethod
    @first_only
    def backward(ctx: Any, grad: Tensor) -> Any:
        rows, weight = ctx.saved_tensors
        return product_gradients(ctx, grad.contiguous(), rows, weight)


class _ActivatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, up: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation, gated: bool
    ) -> Tensor:
        ctx.save_for_backward(up, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.form = (activation, gated)
        rows = activate(up, activation, gated=gated)
        return product(rows, weight.to(rows.dtype), None if bias is None else bias.to(rows.dtype))

    @staticmethod
    @first_only
    def backward(ctx: Any, grad: Tensor) -> Any:
        up, weight = ctx.saved_tensors
        activation, gated = ctx.form
        grad = grad.contiguous()
        needs_up, needs_weight, _ = ctx.needs_input_grad[:3]
        grad_rows = product(grad, weight.to(grad.dtype).t()) if needs_up else None
        rows = grad_up = None
        if grad_rows is not None:
            rows, grad_up = activate_backward(grad_rows, up, activation, gated=gated)
        elif needs_weight:
            rows = activate(up, activation, gated=gated)
        _, grad_weight, grad_bias = product_gradients(ctx, grad, rows, weight, needs_rows=False)
        return grad_up, grad_weight, grad_bias, None, None


def product_gradients(
    ctx: Any, grad: Tensor, rows: Tensor | None, weight: Tensor, *, needs_rows: bool = True
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of rows, weight and bias, the first three arguments of ``ctx``'s function, as far as asked for."""
    grad_rows = grad_weight = grad_bias = None
    if needs_rows and ctx.needs_input_grad[0]:
        grad_rows = product(grad, weight.to(grad.dtype).t())
    if ctx.needs_input_grad[1]:
        assert rows is not None
        grad_weight = product(grad.t(), rows.t()).to(weight.dtype)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[2]:
        # PyTorch sums 16 bits in float32.
        grad_bias = grad.sum(0).to(ctx.bias_dtype)
    return grad_rows, grad_weight, grad_bias


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """rows weightᵀ + bias, differentiable.

    Args:
        rows: (num_rows, in_features), contiguous; its dtype is the one that is computed in.
        weight: (out_features, in_features), of that dtype or a wider one, in which its gradient comes.
        bias: (out_features,) or None, as weight.

    Returns:
        (num_rows, out_features).
    """
    out: Tensor = _Linear.apply(rows, weight, bias)
    return out


def activated_linear(
    up: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation, *, gated: bool = False
) -> Tensor:
    """activation(up) weightᵀ + bias, differentiable; of the activation nothing is kept.

    Args:
        up: (num_rows, in_features), or gated (num_rows, 2 * in_features), as `gated_activation` takes it.
        weight, bias: as in `linear`.
        activation: its name.
        gated: whether the first half's activation is multiplied by the second half.
    """
    out: Tensor = _ActivatedLinear.apply(up, weight, bias, activation, gated)
    return out


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, up: Tensor, activation: Activation, gated: bool) -> Tensor:
        ctx.save_for_backward(up)
        ctx.form = (activation, gated)
        return activate(up, activation, gated=gated)

    @staticmethod
    @first_only
    def backward(ctx: Any, grad: Tensor) -> Any:
        (up,) = ctx.saved_tensors
        activation, gated = ctx.form
        return activate_backward(grad.contiguous(), up, activation, gated=gated)[1], None, None


def activation(up: Tensor, name: Activation, *, gated: bool = False) -> Tensor:
    """The activation of ``up``, (num_rows, width), differentiable; gated, of its first half times the second."""
    out: Tensor = _Activation.apply(up, name, gated)
    return out


def activate(up: Tensor, name: Activation, *, gated: bool) -> Tensor:
    """The activation alone, without a graph."""
    if runs_triton(up):
        return launch_activation(up, name, gated)
    return gated_activation_unchecked(up, name) if gated else activate_(name, up.clone())


def activate_backward(grad: Tensor, up: Tensor, name: Activation, *, gated: bool) -> tuple[Tensor, Tensor]:
    """The activation of ``up``, once more, and the gradient of ``up``."""
    if runs_triton(up):
        return launch_activation_backward(grad, up, name, gated)
    if not gated:
        return activate_(name, up.clone()), _derivative(grad, up, name)
    half, gate = up.chunk(2, 1)
    activated = activate_(name, half.clone())
    grad_up = torch.empty_like(up)
    torch.mul(grad, activated, out=grad_up[:, half.shape[1] :])
    grad_up[:, : half.shape[1]] = _derivative(grad * gate, half, name)
    return activated.mul_(gate), grad_up


def _derivative(grad: Tensor, up: Tensor, name: Activation) -> Tensor:
    aten = torch.ops.aten
    found: Tensor
    if name == "relu":
        found = aten.threshold_backward(grad, up, 0)
    elif name == "silu":
        found = aten.silu_backward(grad, up)
    elif name == "tanh":
        found = aten.tanh_backward(grad, up.tanh())
    else:
        found = aten.gelu_backward(grad, up, approximate="tanh" if name == "gelu_tanh" else "none")
    return found
