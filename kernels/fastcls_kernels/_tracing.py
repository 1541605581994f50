"""Where calls go while a graph is traced: to the operators of `operators.py`, one node each."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

# By the name of the function; filled by `operators.py`.
TRACED: dict[str, Callable[..., Any]] = {}

_Operation = TypeVar("_Operation", bound=Callable[..., Any])


def traceable(operation: _Operation) -> _Operation:
    """Makes a public function one node of a graph that ``torch.compile`` or ``torch.export`` traces.

    Its checks read values and choose by them, which no graph can hold; they are made when the node runs.
    """
    name = operation.__name__

    @functools.wraps(operation)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return TRACED[name](*args, **kwargs)
        return operation(*args, **kwargs)

    return call  # type: ignore[return-value]
