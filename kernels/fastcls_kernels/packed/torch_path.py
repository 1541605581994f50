"""The same products by PyTorch's operators, from the same packed weights."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from ..runtime.activations import Activation, activate_
from ..runtime.invariance import choices, in_blocks, in_pieces_
from .weight import GROUP, PackedWeight

# Where all numbers of a group lie closer to zero, they are taken for zero.
_SMALLEST_RANGE = 1e-30


def quantised(rows: Tensor) -> Tensor:
    """Rows, (num_rows, in_features) float32, as the int8 product reads them: quantised by groups, and back."""
    parts = []
    for part in rows.split(GROUP, 1):
        low, high = part.amin(1, keepdim=True).clamp(max=0), part.amax(1, keepdim=True).clamp(min=0)
        scale = torch.where(high - low > _SMALLEST_RANGE, (high - low) / 255, 1)
        inverse = 1 / scale
        zero_point = (-low * inverse).round()
        values = ((part * inverse).round() + zero_point).clamp(0, 255)
        # A group with NaN or infinity has a range that is not finite: all of it becomes NaN.
        parts.append(torch.where((high - low).isfinite(), (values - zero_point) * scale, torch.nan))
    return torch.cat(parts, 1)


def torch_product(
    rows: Tensor, weight: PackedWeight, activation: Activation | None = None, residual: Tensor | None = None
) -> Tensor:
    """`packed_linear` of float32 rows."""
    if weight.packing == "int8":
        rows = quantised(rows)
    elif weight.packing == "bfloat16":
        rows = rows.bfloat16().float()
    given = (rows, weight.unpacked(), weight.bias[: weight.out_features])
    if choices().library_products:
        product = F.linear(*given)
        product = product if activation is None else activate_(activation, product)
    else:
        product = in_blocks(F.linear, *given, name="product of packed weights")
        product = product if activation is None else in_pieces_(functools.partial(activate_, activation), product)
    return product if residual is None else product.add_(residual)
