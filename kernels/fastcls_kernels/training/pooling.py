"""Rows of packed sequences that can be trained: first ones, and means."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..layout import PackedLayout
from ..mean_pool import mean_pool_unchecked
from .derivatives import first_only


class _MeanPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, layout: PackedLayout) -> Tensor:
        ctx.layout = layout
        return mean_pool_unchecked(rows, layout)

    @staticmethod
    @first_only
    def backward(ctx: Any, grad: Tensor) -> Any:
        lengths = ctx.layout.cu_seqlens.diff()
        share = grad / lengths.clamp(min=1)[:, None].to(grad.dtype)
        return share.repeat_interleave(lengths, 0, output_size=ctx.layout.total_tokens), None


def mean_pool(rows: Tensor, layout: PackedLayout) -> Tensor:
    """The mean of each sequence's rows, (num_sequences, width), differentiable; zero for an empty one.

    Args:
        rows: (total_tokens, width), each of a sequence.
        layout: where each sequence lies.
    """
    out: Tensor = _MeanPool.apply(rows, layout)
    return out
