"""Products with weights that are packed once, on a CPU: float32, bfloat16 and int8.

A library packs a float32 weight at each call, which for few rows takes as long as the product. Here a weight is packed
once (weight.py), and the compiled kernels (source/, called through library.py) read it as it lies. Where they cannot
run, see `explain_compiled`, PyTorch's operators compute the same from the same packed weights (torch_path.py), no
faster than without packing. `fastcls_kernels.packed_layer` computes a whole layer so, in one call.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ..runtime.activations import Activation, check_activation
from ..runtime.checks import check_last_dim_contiguous, check_no_gradient, check_tensor
from .embedding import PackedTable, pack_table, packed_embedding_unchecked, packs_embedding
from .library import Packing, explain_compiled, library
from .torch_path import torch_product
from .weight import GROUP, PANEL, PackedWeight, function_number, pack_weight, packs

__all__ = [
    "PANEL",
    "PackedTable",
    "PackedWeight",
    "Packing",
    "explain_compiled",
    "pack_table",
    "pack_weight",
    "packed_embedding_unchecked",
    "packed_linear",
    "packed_linear_unchecked",
    "packs",
    "packs_embedding",
]

# Up to this many multiply-adds a second thread costs more than it brings.
_FEW_PRODUCTS = 30_000_000


def packed_linear(
    hidden_states: Tensor, weight: PackedWeight, activation: Activation | None = None, residual: Tensor | None = None
) -> Tensor:
    """``activation(hidden_states @ weight.T + bias) + residual`` of a packed weight.

    Args:
        hidden_states: (num_rows, in_features) float32, contiguous last dimension.
        weight: what `pack_weight` gives, with its bias.
        activation: "gelu" (the exact, erf form), "gelu_tanh", "relu", "silu", "tanh" or None.
        residual: (num_rows, out_features) float32, contiguous last dimension, or None.

    Returns:
        (num_rows, out_features) float32. By the compiled kernels a row depends on its own numbers
        alone, bit for bit, whatever else is computed and by how many threads.

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape, stride, device or activation that does not fit.
    """
    if activation is not None:
        check_activation(activation)
    given = [("hidden_states", hidden_states, weight.in_features)]
    if residual is not None:
        given.append(("residual", residual, weight.out_features))
    for name, rows, width in given:
        check_tensor(name, rows, f"(num_rows, {width})")
        check_no_gradient(name, rows)
        if rows.dtype != torch.float32:
            raise TypeError(f"{name} must be torch.float32, got {rows.dtype}")
        if rows.shape != (hidden_states.shape[0], width) or not rows.is_cpu:
            raise ValueError(
                f"{name} must have shape ({hidden_states.shape[0]}, {width}) on the CPU, got {tuple(rows.shape)} on "
                f"{rows.device}"
            )
        check_last_dim_contiguous(name, rows)
    return packed_linear_unchecked(hidden_states, weight, activation, residual)


def packed_linear_unchecked(
    hidden_states: Tensor, weight: PackedWeight, activation: Activation | None = None, residual: Tensor | None = None
) -> Tensor:
    """`packed_linear` of arguments that are known to fit."""
    compiled = library()
    if compiled is None or not packs(weight.packing, weight.in_features):
        return torch_product(hidden_states, weight, activation, residual)
    count, in_features = hidden_states.shape
    out = hidden_states.new_empty(count, weight.out_features)
    rows: list[Tensor | None] = [None, None, None]
    if weight.packing == "bfloat16":
        rows[0] = hidden_states.new_empty(count, in_features, dtype=torch.bfloat16)
    elif weight.packing == "int8":
        groups = -(-in_features // GROUP)
        rows[0] = hidden_states.new_empty(count, in_features, dtype=torch.uint8)
        rows[1] = hidden_states.new_empty(count, groups)
        rows[2] = hidden_states.new_empty(count, groups, dtype=torch.int32)
    threads = torch.get_num_threads() if count * in_features * weight.out_features > _FEW_PRODUCTS else 1
    compiled.product(
        ctypes.byref(weight.placed()),
        ctypes.c_void_p(hidden_states.data_ptr()),
        ctypes.c_ssize_t(hidden_states.stride(0)),
        count,
        *(None if each is None else ctypes.c_void_p(each.data_ptr()) for each in rows),
        function_number(activation),
        None if residual is None else ctypes.c_void_p(residual.data_ptr()),
        ctypes.c_ssize_t(0 if residual is None else residual.stride(0)),
        ctypes.c_void_p(out.data_ptr()),
        threads,
    )
    return out
