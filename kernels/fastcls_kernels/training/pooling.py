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
        cu_seqlens, total_tokens = ctx.layout.cu_seqlens, ctx.layout.total_tokens
        share = grad / cu_seqlens.diff().clamp(min=1)[:, None].to(grad.dtype)
        rows = torch.arange(total_tokens, dtype=torch.int32, device=grad.device)
        # Rows behind the last sequence are of the one after it, whose share is zero.
        sequences = torch.searchsorted(cu_seqlens[1:].contiguous(), rows, right=True)
        return torch.nn.functional.pad(share, (0, 0, 0, 1))[sequences], None


def mean_pool(rows: Tensor, layout: PackedLayout) -> Tensor:
    """The mean of each sequence's rows, (num_sequences, width), differentiable; zero for an empty one.

    Args:
        rows: (total_tokens, width); those behind the last sequence are of none.
        layout: where each sequence lies.
    """
    out: Tensor = _MeanPool.apply(rows, layout)
    return out
