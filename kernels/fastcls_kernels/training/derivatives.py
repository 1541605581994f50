"""Gradients that have no gradients of their own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

_Backward = TypeVar("_Backward", bound=Callable[..., Any])


def first_only(backward: _Backward) -> _Backward:
    """A backward pass that refuses ``create_graph=True``.

    PyTorch's ``once_differentiable`` refuses it later, and only where the gradient that comes in requires a gradient:
    otherwise second derivatives are left out without a word.
    """

    @functools.wraps(backward)
    def refusing(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError("create_graph must be False: fastcls computes first derivatives alone")
        kind = next((grad.device.type for grad in grads if isinstance(grad, Tensor)), "cpu")
        if not torch.is_autocast_enabled(kind):
            return backward(ctx, *grads)
        # The forward pass has chosen the dtypes.
        with torch.autocast(kind, enabled=False):
            return backward(ctx, *grads)

    return refusing  # type: ignore[return-value]
