"""Embeddings that can be trained: rows of tables, and the sum of rows of their gradient."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..runtime.backend import runs_triton
from .derivatives import first_only
from .embedding_kernel import launch_table_gradient


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, ids: Tensor, padding_id: int | None) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.form = (table.shape[0], padding_id, table.dtype)
        return F.embedding(ids, table)

    @staticmethod
    @first_only
    def backward(ctx: Any, grad: Tensor) -> Any:
        (ids,) = ctx.saved_tensors
        num_rows, padding_id, dtype = ctx.form
        if runs_triton(grad):
            found = launch_table_gradient(ids, grad.contiguous(), num_rows, padding_id).to(dtype)
        else:
            none = -1 if padding_id is None else padding_id
            found = torch.ops.aten.embedding_dense_backward(grad.to(dtype), ids, num_rows, none, False)
        return found, None, None


def embedded(table: Tensor, ids: Tensor, padding_id: int | None = None) -> Tensor:
    """Rows of a table, (num_tokens, width), differentiable.

    The gradient of the table is dense, and the same bit for bit each time.

    Args:
        table: (num_rows, width).
        ids: (num_tokens,), int32 or int64.
        padding_id: a row whose gradient is left zero, as ``padding_idx`` of `torch.nn.Embedding`.
    """
    out: Tensor = _Rows.apply(table, ids, padding_id)
    return out
