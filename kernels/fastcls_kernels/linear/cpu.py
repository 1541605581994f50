"""Products on a CPU, f(x weightᵀ + bias) + residual: the one place that chooses the library and what it fuses.

    numbers                      CPU                          product by   activation   residual
    float32, and bfloat16 where  AVX2 with MKL, <= 256 rows   oneDNN       after it     fused
    oneDNN multiplies it         AVX2 with MKL, more rows     PyTorch      after it     after it
                                 any other                    oneDNN       fused        fused
    all others; oneDNN off       any                          PyTorch      after it     after it

PyTorch's own product of float32 is MKL's or OpenBLAS's. With AVX-512 oneDNN is a third faster (AMD Zen 4). With AVX2
(AMD Zen 3) it is faster for few rows only, and its fused activations take longer than a pass of their own.

With `batch_invariant` the library is chosen as for one row and takes the rows in blocks of fixed sizes; oneDNN fuses
every activation, and a residual is added after the product.

oneDNN's operators are those that torch.compile emits.
"""

from __future__ import annotations

import functools
import sys
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..runtime.activations import Activation, activate_
from ..runtime.invariance import choices, in_blocks, in_pieces_

# (x, weight, bias, activation's name, its scalars, its form), and with the overload `binary` a residual.
_POINTWISE: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)

# oneDNN's name of an activation, and of its form. Its ReLU, which gives 0 for NaN, is left out.
_ONEDNN_NAMES: dict[Activation | None, tuple[str, str]] = {
    None: ("none", "none"),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
    "silu": ("swish", "none"),
    "tanh": ("tanh", "none"),
}

# MKL overtakes oneDNN between 256 and 512 rows, at the widths of BERT-base and MiniLM.
_AVX2_ONEDNN_ROWS = 256


class _Machine(NamedTuple):
    """Facts of the CPU and of this build of PyTorch, which no later call changes.

    Attributes:
        dtypes: the dtypes that oneDNN multiplies.
        most_rows: up to how many rows oneDNN is the fastest.
        fuses: whether oneDNN applies an activation faster than a pass of its own.
    """

    dtypes: tuple[torch.dtype, ...]
    most_rows: int
    fuses: bool


@functools.cache
def _machine() -> _Machine:
    dtypes: tuple[torch.dtype, ...] = ()
    if _POINTWISE is not None and torch.backends.mkldnn.is_available():
        has_bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
        dtypes = (torch.float32, torch.bfloat16) if has_bf16 else (torch.float32,)
    if torch.backends.cpu.get_cpu_capability() == "AVX2" and torch.backends.mkl.is_available():
        return _Machine(dtypes, most_rows=_AVX2_ONEDNN_ROWS, fuses=False)
    return _Machine(dtypes, most_rows=sys.maxsize, fuses=True)


def uses_onednn(tensor: Tensor) -> bool:
    """Whether a product over the rows of ``tensor``, (num_tokens, in_features), goes to oneDNN directly.

    It does on a CPU, in float32 and, where oneDNN multiplies it, bfloat16, while ``torch.backends.mkldnn.enabled`` is
    on; with AVX2 and MKL for up to 256 rows alone, since MKL is faster beyond.
    """
    return bool(
        tensor.is_cpu
        and tensor.dtype in (machine := _machine()).dtypes
        and tensor.shape[0] <= machine.most_rows
        and torch.backends.mkldnn.enabled
    )


def cpu_product(
    hidden_states: Tensor,  # (num_rows, in_features)
    weight: Tensor,  # (out_features, in_features)
    bias: Tensor | None,  # (out_features,)
    activation: Activation | None = None,
    residual: Tensor | None = None,  # (num_rows, out_features)
) -> Tensor:
    """activation(hidden_states weightᵀ + bias) + residual, (num_rows, out_features), in memory of its own."""
    if not choices().library_products:
        product = _product_in_blocks(hidden_states, weight, bias, activation)
    elif not uses_onednn(hidden_states):
        product = _with_activation(activation, F.linear(hidden_states, weight, bias))
    elif residual is not None and activation is None:
        fused: Tensor = _POINTWISE.binary(hidden_states, residual, weight, bias, "add")
        return fused
    elif _machine().fuses:
        product = _onednn_product(hidden_states, weight, bias, activation)
    else:
        product = _with_activation(activation, _onednn_product(hidden_states, weight, bias, None))
    return product if residual is None else product.add_(residual)


def _onednn_product(
    hidden_states: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation | None
) -> Tensor:
    if activation == "relu":
        return _onednn_product(hidden_states, weight, bias, None).relu_()
    name, form = _ONEDNN_NAMES[activation]
    product: Tensor = _POINTWISE.default(hidden_states, weight, bias, name, [], form)
    return product


def _with_activation(activation: Activation | None, product: Tensor) -> Tensor:
    return product if activation is None else activate_(activation, product)


def _product_in_blocks(
    hidden_states: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation | None
) -> Tensor:
    if uses_onednn(hidden_states[:1]):
        # Fused even where a pass of its own is faster: within blocks the activation is invariant, too.
        return in_blocks(
            lambda rows, weight, bias: _onednn_product(rows, weight, bias, activation),
            *(hidden_states, weight, bias),
            name=f"oneDNN product with activation {activation}",
        )
    product = in_blocks(F.linear, hidden_states, weight, bias, name="product")
    return product if activation is None else in_pieces_(functools.partial(activate_, activation), product)


def cpu_product_per_head(
    rows: Tensor,  # (num_rows, num_heads, in_features)
    weight: Tensor,  # (num_heads, in_features, out_features)
) -> Tensor:
    """(num_rows, num_heads, out_features), each head's part of a row times the head's matrix, by PyTorch's bmm."""
    if choices().library_products:
        return product_per_head(rows, weight)
    return in_blocks(product_per_head, rows, weight, name="product per head")


def product_per_head(rows: Tensor, weight: Tensor) -> Tensor:
    """As `cpu_product_per_head`, on any device and for all rows at once."""
    return torch.bmm(rows.transpose(0, 1), weight).transpose(0, 1)
