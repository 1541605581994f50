"""Padded batches and lists of token ids to packed tokens, and rows of results back into the order they came in.

Packing happens on the CPU, where tokenizers leave their output and where lengths can be read without stalling a GPU;
the packed tensors then travel together. Sequences are sorted by length, so that those of equal length are neighbours:
the CPU path attends over each such run at once, as a view.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastcls_kernels import PackedLayout

# oneDNN multiplies a row count that is not a multiple of 8 up to a quarter slower; filling up costs under 3 %.
_FILL_ROWS_TO = 8
_FILL_FROM_ROWS = 256


@dataclass(frozen=True)
class PackedTokens:
    """Sequences without padding, one after the other, sorted by length.

    Attributes:
        token_ids: (total_tokens,) int64, or None where ``inputs_embeds`` stands in.
        position_ids: (total_tokens,) int64.
        token_type_ids: (total_tokens,) int64, or None for type 0 everywhere.
        inputs_embeds: (total_tokens, hidden_size), or None.
        layout: where each sequence lies. A few rows at the end may belong to none.
        order: (num_sequences,) int64 on the CPU: packed sequence i is row ``order[i]`` of the batch it came from.
    """

    token_ids: Tensor | None
    position_ids: Tensor
    token_type_ids: Tensor | None
    inputs_embeds: Tensor | None
    layout: PackedLayout
    order: Tensor

    def to(self, device: torch.device) -> PackedTokens:
        """The same tokens on ``device``."""
        if self.position_ids.device == device:
            return self

        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device)

        layout = self.layout
        return PackedTokens(
            move(self.token_ids),
            self.position_ids.to(device),
            move(self.token_type_ids),
            move(self.inputs_embeds),
            PackedLayout(layout.cu_seqlens.to(device), layout.max_seqlen, layout.total_tokens),
            self.order,
        )


def pack_padded(
    attention_mask: Tensor,
    input_ids: Tensor | None,
    token_type_ids: Tensor | None,
    position_ids: Tensor,
    inputs_embeds: Tensor | None,
    max_tokens: int | None,
) -> Iterator[PackedTokens]:
    """Packs the tokens that a mask keeps, in parts of at most ``max_tokens`` tokens (but at least one sequence).

    Args:
        attention_mask: (batch, seqlen) bool, on the CPU; any pattern with at least one token a row.
        input_ids, token_type_ids: (batch, seqlen) int64 on the CPU, or None.
        position_ids: (batch, seqlen) int64 on the CPU.
        inputs_embeds: (batch, seqlen, hidden_size) on any device, or None.
        max_tokens: the size of a part, or None for one part.
    """
    lengths, order = attention_mask.sum(1).sort(stable=True)
    for part in _parts(lengths, max_tokens):
        rows = order[part]
        keep = attention_mask[rows].nonzero(as_tuple=True)
        index = (rows[keep[0]], keep[1])

        def take(tensor: Tensor | None, index: tuple[Tensor, Tensor] = index) -> Tensor | None:
            if tensor is None:
                return None
            return tensor[index[0].to(tensor.device), index[1].to(tensor.device)]

        ids, types, embeds = take(input_ids), take(token_type_ids), take(inputs_embeds)
        yield _packed(ids, position_ids[index], types, embeds, lengths[part], rows)


def pack_lists(
    token_ids: Sequence[Sequence[int]], token_type_ids: Sequence[Sequence[int]] | None, max_tokens: int | None
) -> Iterator[PackedTokens]:
    """Packs token ids as tokenizers give them without padding, in parts of at most ``max_tokens`` tokens.

    Args:
        token_ids: for each sequence its ids, at least one.
        token_type_ids: the same shape, or None for type 0 everywhere.
        max_tokens: the size of a part, or None for one part.
    """
    lengths, order = torch.tensor([len(ids) for ids in token_ids], dtype=torch.int64).sort(stable=True)
    for part in _parts(lengths, max_tokens):
        rows = order[part].tolist()
        flat_ids = torch.tensor([token for row in rows for token in token_ids[row]])
        flat_types = None
        if token_type_ids is not None:
            flat_types = torch.tensor([kind for row in rows for kind in token_type_ids[row]])
        starts = lengths[part].cumsum(0) - lengths[part]
        positions = torch.arange(flat_ids.numel()) - starts.repeat_interleave(lengths[part])
        yield _packed(flat_ids, positions, flat_types, None, lengths[part], order[part])


def unpack_rows(parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Rows computed part by part, each with its `PackedTokens.order`, as one tensor in the batch's own order."""
    rows = torch.cat([rows for rows, _ in parts])
    order = torch.cat([order for _, order in parts]).to(rows.device)
    out = torch.empty_like(rows)
    out[order] = rows
    return out


def _parts(lengths: Tensor, max_tokens: int | None) -> Iterator[slice]:
    if max_tokens is None:
        yield slice(0, lengths.numel())
        return
    start = tokens = 0
    for row, length in enumerate(lengths.tolist()):
        if tokens and tokens + length > max_tokens:
            yield slice(start, row)
            start, tokens = row, 0
        tokens += length
    yield slice(start, lengths.numel())


def _packed(
    token_ids: Tensor | None,
    position_ids: Tensor,
    token_type_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    lengths: Tensor,
    order: Tensor,
) -> PackedTokens:
    total_tokens = position_ids.numel()
    fill = -total_tokens % _FILL_ROWS_TO if total_tokens >= _FILL_FROM_ROWS else 0

    def filled(tensor: Tensor | None) -> Tensor | None:
        return tensor if tensor is None or not fill else torch.cat((tensor, tensor.new_zeros(fill, *tensor.shape[1:])))

    cu_seqlens = torch.zeros(lengths.numel() + 1, dtype=torch.int32)
    torch.cumsum(lengths, 0, out=cu_seqlens[1:])
    positions = filled(position_ids)
    assert positions is not None
    return PackedTokens(
        filled(token_ids),
        positions,
        filled(token_type_ids),
        filled(inputs_embeds),
        PackedLayout(cu_seqlens, int(lengths[-1]), total_tokens + fill),
        order,
    )
