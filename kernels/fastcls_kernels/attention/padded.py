"""Attention over a padded batch, by the kernel of packed rows: each row's length says which of its tokens are real."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .._ops import operator
from ..layout import PaddedRows
from ..runtime.backend import runs_triton
from ..runtime.checks import check_device, check_qkv
from ..runtime.gradients import differentiably
from ..runtime.invariance import choices
from .cpu import attend_batch, is_finite_all
from .kernel import choose_tile, launch_attention


@operator(
    "(Tensor q, Tensor k, Tensor v, Tensor seqlens, float? softmax_scale=None) -> Tensor",
    fake=lambda q, *_: q.new_empty(q.shape),
)
def attention_padded(q: Tensor, k: Tensor, v: Tensor, seqlens: Tensor, softmax_scale: float | None = None) -> Tensor:
    """Bidirectional attention over a padded batch whose real tokens come first in each row.

    Args:
        q, k, v: (batch, seqlen, nheads, headdim), dtypes, head sizes and strides as in `attention_varlen`. A copy is
            made where batch and seqlen cannot be seen as one dimension.
        seqlens: (batch,), int32 or int64: the real tokens in each row, from 0 to seqlen.
        softmax_scale: factor on the scores; ``headdim ** -0.5`` if None.

    Returns:
        (batch, seqlen, nheads, headdim), contiguous, in q's dtype; zero at the padding.

    Raises:
        TypeError, ValueError: as `attention_varlen`.
    """
    check_qkv(q, k, v, "(batch, seqlen, nheads, headdim)")
    _check_seqlens(seqlens, q)
    scale = q.shape[3] ** -0.5 if softmax_scale is None else softmax_scale
    return differentiably(attention_padded_unchecked, q, k, v, seqlens, scale)


def attention_padded_unchecked(q: Tensor, k: Tensor, v: Tensor, seqlens: Tensor, scale: float) -> Tensor:
    """`attention_padded` of arguments that are known to fit."""
    batch, seqlen = q.shape[:2]
    # A GPU's lengths were not read, which would stall it: clamped, no row reaches into the next one.
    seqlens = seqlens.clamp(0, seqlen)
    real = torch.arange(seqlen, device=seqlens.device)[None, :] < seqlens[:, None]
    if not runs_triton(q):
        return _attention_masked(q, k, v, seqlens, real, scale)
    rows = PaddedRows(seqlens, seqlen)
    queries, keys, values = (tensor.flatten(0, 1) for tensor in (q, k, v))
    out = launch_attention(queries, keys, values, rows, scale, choose_tile(queries, keys, values, rows))
    # A sequence's last tile holds padding, too.
    return out.unflatten(0, (batch, seqlen)).masked_fill_(~real[:, :, None, None], 0.0)


def _attention_masked(q: Tensor, k: Tensor, v: Tensor, seqlens: Tensor, real: Tensor, scale: float) -> Tensor:
    if not choices().joined_texts or not is_finite_all(q, k):
        return _attention_rows(q, k, v, seqlens, scale)
    # A row of padding alone would be a softmax over nothing: it attends everywhere, and is zeroed below.
    mask = (real | (seqlens[:, None] == 0))[:, None, None, :]
    # Padding may hold NaN, and a weight of zero times NaN is NaN.
    k, v = (tensor.masked_fill(~real[:, :, None, None], 0.0) for tensor in (k, v))
    queries, keys, values = (tensor.transpose(1, 2) for tensor in (q, k, v))
    attended = scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale).transpose(1, 2)
    return attended.masked_fill(~real[:, :, None, None], 0.0).contiguous()


def _attention_rows(q: Tensor, k: Tensor, v: Tensor, seqlens: Tensor, scale: float) -> Tensor:
    """One row of the batch at a time, without its padding."""
    out = q.new_zeros(q.shape)
    for row, length in enumerate(seqlens.tolist()):
        if length:
            queries, keys, values = (tensor[row, None, :length].transpose(1, 2) for tensor in (q, k, v))
            out[row, :length] = attend_batch(queries, keys, values, scale)[0].transpose(0, 1)
    return out


def _check_seqlens(seqlens: Tensor, q: Tensor) -> None:
    if not isinstance(seqlens, Tensor) or seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"seqlens must be an int32 or int64 tensor, got {getattr(seqlens, 'dtype', type(seqlens))}")
    if seqlens.shape != q.shape[:1]:
        raise ValueError(f"seqlens must have shape (batch,) = ({q.shape[0]},), got {tuple(seqlens.shape)}")
    check_device("seqlens", seqlens, q)
    if not seqlens.is_cuda and seqlens.numel() and not 0 <= int(seqlens.min()) <= int(seqlens.max()) <= q.shape[1]:
        raise ValueError(
            f"seqlens must lie between 0 and seqlen = {q.shape[1]}, got {int(seqlens.min())} to {int(seqlens.max())}"
        )
