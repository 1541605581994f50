"""The same products and layers by PyTorch's operators, from the same packed weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention import attention_varlen_unchecked
from ..layout import PackedLayout
from ..runtime.activations import Activation, activate_
from .weight import GROUP, PackedWeight

if TYPE_CHECKING:
    from .layer import PackedLayer

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
    product = F.linear(rows, weight.unpacked(), weight.bias[: weight.out_features])
    if activation is not None:
        product = activate_(activation, product)
    return product if residual is None else product.add_(residual)


def torch_layer(hidden_states: Tensor, layout: PackedLayout, layer: PackedLayer, rows: Literal["all", "first"]) -> Tensor:
    """`packed_layer` of float32 rows."""
    heads = (layer.num_heads, layer.head_dim)
    q, k, v = torch_product(hidden_states, layer.qkv).unflatten(1, (3, *heads)).unbind(1)
    context = attention_varlen_unchecked(q, k, v, layout, layer.scale).flatten(1)
    residual = hidden_states
    if rows == "first":
        if not layout.total_tokens:
            return hidden_states.new_zeros(layout.num_sequences, layer.width)
        # Behind the last row stand empty sequences.
        first = layout.cu_seqlens[:-1].clamp(max=layout.total_tokens - 1)
        context, residual = context[first], hidden_states[first]
    width = (layer.width,)
    attended = torch_product(context, layer.out, residual=residual)
    attended = F.layer_norm(attended, width, *layer.attention_norm, layer.eps)
    inner = torch_product(attended, layer.up, layer.activation)
    return F.layer_norm(torch_product(inner, layer.down, residual=attended), width, *layer.output_norm, layer.eps)
