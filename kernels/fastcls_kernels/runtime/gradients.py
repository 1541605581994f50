"""Where a gradient is asked for, an operation is computed by its differentiable form."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ParamSpec, TypeVar

import torch

from .invariance import is_batch_invariant

_Given = ParamSpec("_Given")
_Made = TypeVar("_Made")
_Form = TypeVar("_Form", bound=Callable[..., Any])

_FORMS: dict[Callable[..., Any], Callable[..., Any]] = {}


def differentiable_form_of(operation: Callable[..., Any]) -> Callable[[_Form], _Form]:
    """Makes a function of the same arguments the form in which ``operation`` is differentiated."""

    def register(form: _Form) -> _Form:
        _FORMS[operation] = form
        return form

    return register


def differentiably(operation: Callable[_Given, _Made], *args: _Given.args, **kwargs: _Given.kwargs) -> _Made:
    """Calls an operation, or where an argument requires a gradient its differentiable form.

    Raises:
        RuntimeError: a gradient is asked for inside of `batch_invariant`.
    """
    if torch.is_grad_enabled() and (requires_gradient(args) or requires_gradient(kwargs.values())):
        if is_batch_invariant():
            raise RuntimeError("gradients must be asked for outside of batch_invariant, whose promise they would break")
        made: _Made = _FORMS[operation](*args, **kwargs)
        return made
    return operation(*args, **kwargs)


def requires_gradient(values: Iterable[Any]) -> bool:
    """Whether a tensor among the values, or in a tuple of them, requires a gradient."""
    return any(
        value.requires_grad
        if isinstance(value, torch.Tensor)
        else isinstance(value, tuple) and requires_gradient(value)
        for value in values
    )
