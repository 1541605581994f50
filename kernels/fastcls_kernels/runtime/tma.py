"""The copy engine (TMA) of sm_90 and newer: which tensors it can fetch, and the descriptors that it needs."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .triton import HAS_TRITON

if HAS_TRITON:
    from triton.tools.tensor_descriptor import TensorDescriptor


def is_aligned(tensor: Tensor) -> bool:
    """Whether the tensor and each of its rows begin at an address that the copy engine takes."""
    return tensor.stride(0) * tensor.itemsize % 16 == 0 and tensor.data_ptr() % 16 == 0


def descriptor(tensor: Tensor, columns: int, block_rows: int, block_columns: int) -> Any:
    """Describes ``tensor``, whose rows are ``columns`` neighbouring numbers each, and the blocks to fetch of it."""
    return TensorDescriptor(tensor, [tensor.shape[0], columns], [tensor.stride(0), 1], [block_rows, block_columns])
