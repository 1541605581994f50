"""Padded batches and lists of token ids to packed tokens, and rows of results back into the order they came in.

Where the mask and the ids lie on the CPU, as tokenizers leave them, packing happens there: lengths can be read without
stalling a GPU, and all that a pass needs travels in one asynchronous copy. Where they lie on a GPU they are packed
there, after their lengths were read once.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from fastcls_kernels import PackedLayout


class PackShape(NamedTuple):
    """What the memory and the launches of a pass depend on: rows of packed tokens, and sequences."""

    tokens: int
    sequences: int


# The shape that so many tokens in so many sequences are filled up to.
FillUp = Callable[[int, int], PackShape]

# oneDNN multiplies a row count that is not a multiple of 8 up to a quarter slower; filling up costs under 3 %.
_FILL_ROWS_TO = 8
_FILL_FROM_ROWS = 256
# Each array starts at a multiple of 64 bytes, so that no kernel is compiled once more for a pointer that is less
# aligned than another's.
_ALIGNMENT = 16


def fill_rows(tokens: int, sequences: int) -> PackShape:
    """Rows up to the next multiple of 8, for large products."""
    return PackShape(tokens + (-tokens % _FILL_ROWS_TO if tokens >= _FILL_FROM_ROWS else 0), sequences)


@dataclass(frozen=True)
class PackedTokens:
    """Sequences without padding, one after the other.

    Rows after the last token, and empty sequences after the last one, may fill a shape up; they belong to no text.

    Attributes:
        integers: int32, the one piece of memory that the following four lie in.
        token_ids: (total_tokens,) int32, or None where ``inputs_embeds`` stands in.
        position_ids: (total_tokens,) int32.
        token_type_ids: (total_tokens,) int32, or None for type 0 everywhere.
        layout: where each sequence lies; ``layout.cu_seqlens`` is (num_sequences + 1,) int32.
        inputs_embeds: (total_tokens, hidden_size), or None.
        num_texts: how many sequences, the first ones, are texts.
        order: (num_texts,) int64 on the CPU: packed sequence i is row ``order[i]`` of the batch it came from, or None
            where it is row i.
    """

    integers: Tensor
    token_ids: Tensor | None
    position_ids: Tensor
    token_type_ids: Tensor | None
    layout: PackedLayout
    inputs_embeds: Tensor | None
    num_texts: int
    order: Tensor | None

    @property
    def shape(self) -> PackShape:
        return PackShape(self.layout.total_tokens, self.layout.num_sequences)

    def to(self, device: torch.device) -> PackedTokens:
        """The same tokens on ``device``, by one copy that nobody waits for where the memory is pinned."""
        if self.integers.device == device:
            return self
        return self.over(
            self.integers.to(device, non_blocking=True),
            None if self.inputs_embeds is None else self.inputs_embeds.to(device),
        )

    def over(
        self, integers: Tensor, inputs_embeds: Tensor | None = None, max_seqlen: int | None = None
    ) -> PackedTokens:
        """The same packing over other memory of the same layout, with a higher bound on lengths if one is given."""
        return packed_over(
            integers,
            self.shape,
            has_ids=self.token_ids is not None,
            has_types=self.token_type_ids is not None,
            max_seqlen=self.layout.max_seqlen if max_seqlen is None else max_seqlen,
            inputs_embeds=inputs_embeds,
            num_texts=self.num_texts,
            order=self.order,
        )


def packed_over(
    integers: Tensor,
    shape: PackShape,
    *,
    has_ids: bool,
    has_types: bool,
    max_seqlen: int,
    inputs_embeds: Tensor | None,
    num_texts: int,
    order: Tensor | None,
) -> PackedTokens:
    """Packed tokens as views of ``integers``: cu_seqlens, position ids, then token ids and types if there are any."""
    cu_seqlens, position_ids, *rest = _sections(integers, shape, has_ids + has_types)
    return PackedTokens(
        integers,
        rest.pop(0) if has_ids else None,
        position_ids,
        rest.pop(0) if has_types else None,
        PackedLayout(cu_seqlens, max_seqlen, shape.tokens),
        inputs_embeds,
        num_texts,
        order,
    )


def _aligned(size: int) -> int:
    return size + -size % _ALIGNMENT


def _num_integers(shape: PackShape, optional: int) -> int:
    return _aligned(shape.sequences + 1) + (1 + optional) * _aligned(shape.tokens)


def _sections(integers: Tensor, shape: PackShape, optional: int) -> list[Tensor]:
    first = _aligned(shape.sequences + 1)
    starts = [first + index * _aligned(shape.tokens) for index in range(1 + optional)]
    return [integers[: shape.sequences + 1], *(integers[start : start + shape.tokens] for start in starts)]


class Source(NamedTuple):
    """What is packed, all on one device, and which of it.

    Attributes:
        lengths: (num_texts,) int64, on the CPU, each at least 1.
        kept: (sum of lengths,) int64, where each kept token stands in the flat arrays, text by text; None if all of
            them are kept.
        token_ids, token_type_ids: flat integers, or None.
        position_ids: flat integers, or None for 0, 1, 2, ... along each text.
        inputs_embeds: (flat, hidden_size), on any device, or None.
    """

    lengths: Tensor
    kept: Tensor | None
    token_ids: Tensor | None
    token_type_ids: Tensor | None
    position_ids: Tensor | None
    inputs_embeds: Tensor | None


def source_of_padded(
    attention_mask: Tensor,
    input_ids: Tensor | None,
    token_type_ids: Tensor | None,
    position_ids: Tensor,
    inputs_embeds: Tensor | None,
    lengths: Tensor | None = None,
) -> Source:
    """The tokens that a mask keeps.

    Args:
        attention_mask: (batch, seqlen) bool; any pattern with at least one token a row.
        input_ids, token_type_ids: (batch, seqlen) integers on the mask's device, or None.
        position_ids: the same.
        inputs_embeds: (batch, seqlen, hidden_size) on any device, or None.
        lengths: (batch,) int64 on the CPU: ``attention_mask.sum(1)``, where it was read before.
    """

    def flat(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.flatten(0, 1)

    lengths = attention_mask.sum(1).cpu() if lengths is None else lengths
    return Source(
        lengths,
        _kept(attention_mask.flatten(), int(lengths.sum())),
        flat(input_ids),
        flat(token_type_ids),
        flat(position_ids),
        flat(inputs_embeds),
    )


def _kept(mask: Tensor, count: int) -> Tensor:
    """The indices of the ``count`` true elements."""
    return mask.nonzero().squeeze(1) if mask.device.type == "cpu" else true_indices(mask, count)


def true_indices(mask: Tensor, count: int) -> Tensor:
    """The indices of the ``count`` true elements of (n,) bool. Unlike ``nonzero`` it asks no GPU for their number."""
    index = torch.arange(mask.numel(), device=mask.device)
    # What is not kept goes to a place of its own after the last.
    place = torch.where(mask, mask.cumsum(0) - 1, count)
    return index.new_empty(count + 1).scatter_(0, place, index)[:count]


def flat_integers(name: str, lists: Sequence[Sequence[int]]) -> Tensor:
    """All the integers one after the other, as int64.

    Raises:
        TypeError: something that is not an integer.
        ValueError: a number that int64 cannot hold.
    """
    try:
        numbers = array("q", chain.from_iterable(lists))
    except TypeError as error:
        raise TypeError(f"{name} must hold integers: {error}") from error
    except OverflowError as error:
        raise ValueError(f"{name} must hold numbers that 64 bits can hold: {error}") from error
    return torch.frombuffer(numbers, dtype=torch.int64)


def pack(
    source: Source, max_tokens: int, fill_up: FillUp = fill_rows, *, sort: bool = False, pin: bool = False
) -> Iterator[PackedTokens]:
    """Packs in parts of at most ``max_tokens`` tokens (but at least one sequence), where the source lies.

    Args:
        source: what to pack.
        max_tokens: the size of a part before it is filled up.
        fill_up: the shape that a part is filled up to.
        sort: by length, so that sequences of equal length are neighbours: the PyTorch path attends over each such run
            at once, as a view.
        pin: keep what is packed in memory that a GPU copies from while the CPU goes on.
    """
    # One text is in order, and what reorders texts would be a good part of its time outside of the model.
    sort = sort and source.lengths.numel() > 1
    lengths, order = source.lengths.sort(stable=True) if sort else (source.lengths, None)
    starts = source.lengths.cumsum(0) - source.lengths
    for part in _parts(lengths, max_tokens):
        rows = None if order is None else order[part]
        yield _pack_part(source, lengths[part], starts[part] if rows is None else starts[rows], rows, fill_up, pin)


def _pack_part(
    source: Source, lengths: Tensor, starts: Tensor, order: Tensor | None, fill_up: FillUp, pin: bool
) -> PackedTokens:
    num_texts, tokens = lengths.numel(), int(lengths.sum())
    shape = fill_up(tokens, num_texts)
    device = next(
        tensor.device for tensor in (source.kept, source.token_ids, source.position_ids) if tensor is not None
    )
    columns = None
    if order is None:
        # The texts' tokens are neighbours already.
        first = int(starts[0])
        index: slice | Tensor = slice(first, first + tokens)
    else:
        columns = torch.arange(tokens) - (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
        index = columns + starts.repeat_interleave(lengths)
    if source.kept is not None:
        index = source.kept[index if isinstance(index, slice) else index.to(device)]

    optional = [flat for flat in (source.token_ids, source.token_type_ids) if flat is not None]
    integers = torch.zeros(
        _num_integers(shape, len(optional)), dtype=torch.int32, device=device, pin_memory=pin and device.type == "cpu"
    )
    cu_seqlens, positions, *rest = _sections(integers, shape, len(optional))
    ends = lengths.cumsum(0)
    cu_seqlens[1 : num_texts + 1] = ends.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else ends
    cu_seqlens[num_texts + 1 :].fill_(tokens)
    if source.position_ids is not None:
        positions[:tokens] = source.position_ids[index]
    else:
        if columns is None:
            columns = torch.arange(tokens) - (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
        positions[:tokens] = columns
    for section, flat in zip(rest, optional, strict=True):
        section[:tokens] = flat[index]

    embeds = None
    if source.inputs_embeds is not None:
        place = source.inputs_embeds.device
        if isinstance(index, Tensor) and index.device.type == "cpu" and place.type == "cuda":
            index = index.pin_memory().to(place, non_blocking=True)
        embeds = source.inputs_embeds[index]
        embeds = torch.cat((embeds, embeds.new_zeros(shape.tokens - tokens, embeds.shape[1])))
    return packed_over(
        integers,
        shape,
        has_ids=source.token_ids is not None,
        has_types=source.token_type_ids is not None,
        max_seqlen=int(lengths.max()),
        inputs_embeds=embeds,
        num_texts=num_texts,
        order=order,
    )


def unpack_rows(parts: Sequence[tuple[Tensor, PackedTokens]]) -> Tensor:
    """Rows computed part by part, one a sequence, as one tensor with one row a text, in the batch's own order."""
    texts = [rows[: packed.num_texts] for rows, packed in parts]
    rows = texts[0] if len(texts) == 1 else torch.cat(texts)
    orders = [packed.order for _, packed in parts if packed.order is not None]
    if not orders:
        return rows
    out = torch.empty_like(rows)
    out[torch.cat(orders).to(rows.device)] = rows
    return out


def _parts(lengths: Tensor, max_tokens: int) -> Iterator[slice]:
    start = tokens = 0
    for row, length in enumerate(lengths.tolist()):
        if tokens and tokens + length > max_tokens:
            yield slice(start, row)
            start, tokens = row, 0
        tokens += length
    yield slice(start, lengths.numel())
