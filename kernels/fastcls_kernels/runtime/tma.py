"""The copy engine of sm_90 and newer: what it takes, and how it is told."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .triton import HAS_TRITON

if HAS_TRITON:
    from triton.tools.tensor_descriptor import TensorDescriptor


def is_aligned(tensor: Tensor) -> bool:
    """Whether the tensor and each of its rows begin where the copy engine can begin."""
    return tensor.stride(0) * tensor.itemsize % 16 == 0 and tensor.data_ptr() % 16 == 0


def descriptor(tensor: Tensor, columns: int, block_rows: int, block_columns: int) -> Any:
    """Fetches blocks of ``tensor``, each row of which is ``columns`` neighbouring numbers."""
    return TensorDescriptor(tensor, [tensor.shape[0], columns], [tensor.stride(0), 1], [block_rows, block_columns])
