"""Rows computed pass by pass, back in the order and the shape of the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from .packing import PackedTokens


def unpack_rows(parts: Sequence[tuple[Tensor, PackedTokens]], batch: int | None = None, fill: float = 0.0) -> Tensor:
    """Rows computed part by part, one a sequence, as one tensor with one row a text, in the batch's own order.

    Args:
        parts: (rows, width) each, and the packing that they come from.
        batch: rows of the batch, None for as many as texts.
        fill: what stands in those that no text stood in.
    """
    texts = [rows[: packed.num_texts] for rows, packed in parts]
    rows = texts[0] if len(texts) == 1 else torch.cat(texts)
    orders = [packed.order for _, packed in parts if packed.order is not None]
    if not orders:
        return rows
    if batch is None or batch == rows.shape[0]:
        out = torch.empty_like(rows)
    else:
        out = rows.new_full((batch, *rows.shape[1:]), fill)
    out[torch.cat(orders).to(rows.device)] = rows
    return out


def unpack_tokens(parts: Sequence[tuple[Tensor, PackedTokens]], shape: torch.Size, fill: float = 0.0) -> Tensor:
    """Rows computed part by part, one a token or one a chosen token, at their places in a padded batch.

    Args:
        parts: (rows, width) each, and the packing that they come from, with its origins.
        shape: (batch, seqlen).
        fill: what stands where no row was computed.

    Returns:
        (batch, seqlen, width).
    """
    first = parts[0][0]
    out = first.new_full((shape.numel(), first.shape[1]), fill)
    for rows, packed in parts:
        assert packed.origins is not None
        origins = packed.origins
        if out.is_cuda and not origins.is_cuda:
            # Pinned, so that nobody waits for the copy.
            origins = origins.pin_memory().to(out.device, non_blocking=True)
        out[origins] = rows
    return out.unflatten(0, tuple(shape))


def unpack_chosen(parts: Sequence[tuple[Tensor, PackedTokens]]) -> tuple[Tensor, Tensor]:
    """Chosen rows computed part by part, in the order in which they stand in the flat batch, and where that is."""
    rows = torch.cat([rows for rows, _ in parts])
    origins = torch.cat([cast(Tensor, packed.origins) for _, packed in parts])
    origins, order = origins.sort()
    return rows[order.to(rows.device)], origins
