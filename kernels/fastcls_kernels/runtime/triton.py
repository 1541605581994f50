"""Triton where it is installed, and a stand-in that lets the kernel files import where it is not."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError as error:
    if error.name != "triton":
        raise
    triton = None
    tl = None

__all__ = ["HAS_TRITON", "INTERPRETED", "cdiv", "head_block", "jit", "next_power_of_2", "tl"]

HAS_TRITON: bool = triton is not None
# Triton reads the variable when a kernel is decorated, so it is read once at import here, too.
INTERPRETED: bool = HAS_TRITON and os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "True")


def jit(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """``triton.jit(**options)``, or the undecorated function where triton is missing."""
    if triton is None:
        return lambda function: function
    return triton.jit(**options)


def cdiv(dividend: int, divisor: int) -> int:
    """The quotient rounded up."""
    return -(-dividend // divisor)


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is at least ``number``."""
    return 1 << max(number - 1, 0).bit_length()


def head_block(head_dim: int) -> int:
    """BLOCK_D of a kernel that multiplies heads: at least 16, the least that NVIDIA's matrix units take."""
    return max(16, next_power_of_2(head_dim))
