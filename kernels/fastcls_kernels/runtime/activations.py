"""Activations by name, in PyTorch and inside kernels:

gelu       x Φ(x) = x (1 + erf(x / √2)) / 2
gelu_tanh  x (1 + tanh(√(2/π) (x + 0.044715 x³))) / 2
relu       max(x, 0)
silu       x / (1 + exp(-x))
tanh       tanh(x)
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from .triton import jit, tl

Activation = Literal["gelu", "gelu_tanh", "relu", "silu", "tanh"]


def check_activation(name: str) -> None:
    """Checks that an activation has this name."""
    if name not in get_args(Activation):
        raise ValueError(f"activation must be one of {', '.join(get_args(Activation))}, got {name!r}")


def activate_(name: Activation, x: Tensor) -> Tensor:
    """The activation of ``x``, in place."""
    if name == "relu":
        return x.relu_()
    if name == "silu":
        return F.silu(x, inplace=True)
    if name == "tanh":
        return x.tanh_()
    return torch.ops.aten.gelu_(x, approximate="tanh" if name == "gelu_tanh" else "none")


@jit()
def activated(x, ACTIVATION: tl.constexpr):
    """The activation of float32 ``x``; an exponential that overflows gives the limit, never NaN."""
    if ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    if ACTIVATION == "gelu_tanh":
        # (1 + tanh(u)) / 2 = 1 / (1 + exp(-2u)).
        return x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    if ACTIVATION == "relu":
        # tl.maximum would lose NaN.
        return tl.where(x < 0.0, 0.0, x)
    if ACTIVATION == "silu":
        return x / (1.0 + tl.exp(-x))
    decay = tl.exp(-2.0 * tl.abs(x))
    return tl.where(x < 0.0, decay - 1.0, 1.0 - decay) / (1.0 + decay)
