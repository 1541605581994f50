"""DeBERTa's attention over packed rows that can be trained: see `disentangled_attention` for what it computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..disentangled_attention.buckets import Buckets, DistanceTables
from ..layout import PackedLayout
from ..runtime.backend import runs_triton
from .attention import Heads, Scoring
from .derivatives import first_only
from .disentangled import disentangled_backward, disentangled_forward
from .disentangled_kernel import launch_disentangled_backward, launch_disentangled_forward


class _DisentangledAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        pos_key: Tensor | None,
        pos_query: Tensor | None,
        buckets: Buckets,
        heads: Heads,
        layout: PackedLayout,
        scoring: Scoring,
    ) -> Tensor:
        ctx.form = (buckets, heads, layout, scoring)
        q, k, v = heads.split(qkv)
        tables = DistanceTables(pos_key, pos_query, buckets)
        forward, _ = _functions(qkv)
        out, log_sums = forward(q, k, v, tables, layout, scoring.scale, scoring.dropout)
        ctx.save_for_backward(qkv, pos_key, pos_query, out, log_sums)
        return out.flatten(1)

    @staticmethod
    @first_only
    def backward(ctx: Any, grad: Tensor) -> Any:
        qkv, pos_key, pos_query, out, log_sums = ctx.saved_tensors
        buckets, heads, layout, scoring = ctx.form
        q, k, v = heads.split(qkv)
        grads = torch.zeros_like(qkv)
        tables = DistanceTables(pos_key, pos_query, buckets)
        _, backward = _functions(qkv)
        *_, grad_key, grad_query = backward(
            *(grad.contiguous().view(q.shape), q, k, v, out, log_sums, tables, layout, scoring.scale, scoring.dropout),
            into=heads.split(grads),
        )
        return (
            grads,
            None if grad_key is None else grad_key.to(qkv.dtype),
            None if grad_query is None else grad_query.to(qkv.dtype),
            *(None,) * 4,
        )


def _functions(qkv: Tensor) -> tuple[Any, Any]:
    if runs_triton(qkv):
        return launch_disentangled_forward, launch_disentangled_backward
    return disentangled_forward, disentangled_backward


def disentangled_attention(
    qkv: Tensor, tables: DistanceTables, heads: Heads, layout: PackedLayout, scoring: Scoring
) -> Tensor:
    """DeBERTa's attention within each packed sequence, differentiable.

    Args:
        qkv: (total_tokens, 3 * nheads * headdim), contiguous: all queries, then keys, then values.
        tables: the layer's embeddings of distances.
        heads: how many there are.
        layout: where each sequence lies.
        scoring: scale and dropout; no window.

    Returns:
        (total_tokens, nheads * headdim).
    """
    out: Tensor = _DisentangledAttention.apply(qkv, *tables, heads, layout, scoring)
    return out
