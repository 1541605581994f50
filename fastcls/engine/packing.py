"""Flat batches to packed tokens.

Where the mask and the ids lie on the CPU, as tokenizers leave them, packing happens there: lengths can be read without
stalling a GPU, and all that a pass needs travels in one asynchronous copy. Where they lie on a GPU they are packed
there, after their lengths were read once.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastcls_kernels import PackedLayout


class PackShape(NamedTuple):
    """What the memory and the launches of a pass depend on: rows of packed tokens, and sequences."""

    tokens: int
    sequences: int


# oneDNN keeps two thirds of a MiB for each shape of a product, whatever its size, so there must be few shapes. Reading
# the weights takes as long as some 32 rows: filling up at most a sixteenth of both costs 1 to 2 % of the time. Many
# rows are filled up by a thirty-second, since few processes see all sizes of large batches, and never by 64 or more: a
# CPU's passes are bounded, and a GPU gains nothing.
_WEIGHTS_AS_ROWS = 32
_FILL_ROWS_PART, _FILL_MANY_ROWS_PART = 16, 32
_MANY_ROWS_STEP, _MAX_STEP = 16, 64
# Sequences count in the last layer only, so they are filled up further. Up to 8 stay as they are.
_FILL_SEQUENCES_PART = 4
# Each array starts at a multiple of 64 bytes, so that no kernel is compiled again for a less aligned pointer.
_ALIGNMENT = 16
# Modules of arrays whose memory is what they hold. That of a masked array, numpy.ma's, also holds what is masked.
_ARRAYS = ("array", "numpy")


def fill_rows(tokens: int, sequences: int) -> PackShape:
    """One of few shapes that holds some tokens in some sequences, at the cost of little time."""
    num_sequences = sequences + -sequences % _power_of_two((sequences - 1) // _FILL_SEQUENCES_PART)
    # An empty sequence after the last one is read at its first token, so that row must exist.
    tokens += num_sequences > sequences
    rows = tokens + _WEIGHTS_AS_ROWS
    many = max(_power_of_two(rows // _FILL_MANY_ROWS_PART), _MANY_ROWS_STEP)
    step = min(_power_of_two(rows // _FILL_ROWS_PART), many, _MAX_STEP)
    return PackShape(tokens + -tokens % step, num_sequences)


def _power_of_two(number: int) -> int:
    """The largest one up to ``number``, at least 1."""
    return 1 << max(number.bit_length() - 1, 0)


class PackFields(NamedTuple):
    """The integers that a packing holds beside lengths and position ids."""

    ids: bool
    types: bool
    places: bool
    rows: int | None


@dataclass(frozen=True)
class PackedTokens:
    """Sequences without padding, one after the other.

    Rows after the last token and empty sequences after the last one fill a shape up; they belong to no text.

    Attributes:
        integers: int32, the one piece of memory that the following, up to ``row_sequences``, lie in.
        token_ids: (total_tokens,) int32, or None where ``inputs_embeds`` stands in.
        position_ids: (total_tokens,) int32, rows of a table of positions.
        token_type_ids: (total_tokens,) int32, or None for type 0 everywhere.
        layout: where each sequence lies; ``layout.cu_seqlens`` is (num_sequences + 1,) int32, ``layout.positions`` are
            the places of tokens in their padded texts where a mask has holes.
        rows: (num_rows,) int32, the chosen rows, or None.
        row_sequences: (num_rows,) int32, the sequence of each chosen row, or None.
        inputs_embeds: (total_tokens, embedding_size), or None.
        num_texts: how many sequences, the first ones, are texts.
        num_tokens: how many rows, the first ones, are their tokens.
        order: (num_texts,) int64 on the CPU: packed sequence i is row ``order[i]`` of the batch it came from, or None
            where it is row i.
        origins: where each token, or each chosen row, stood in the flat batch, int64; None where nobody asked.
    """

    integers: Tensor
    fields: PackFields
    token_ids: Tensor | None
    position_ids: Tensor
    token_type_ids: Tensor | None
    layout: PackedLayout
    rows: Tensor | None
    row_sequences: Tensor | None
    inputs_embeds: Tensor | None
    num_texts: int
    num_tokens: int
    order: Tensor | None
    origins: Tensor | None

    @property
    def shape(self) -> PackShape:
        return PackShape(self.layout.total_tokens, self.layout.num_sequences)

    def to(self, device: torch.device) -> PackedTokens:
        """The same tokens on ``device``, by one copy, which is asynchronous from pinned memory."""
        if self.integers.device == device:
            return self
        return self.over(
            self.integers.to(device, non_blocking=True),
            None if self.inputs_embeds is None else self.inputs_embeds.to(device),
        )

    def over(
        self, integers: Tensor, inputs_embeds: Tensor | None = None, max_seqlen: int | None = None
    ) -> PackedTokens:
        """The same packing over other memory of the same layout, and with a higher bound on lengths, if given."""
        return packed_over(
            integers,
            self.shape,
            self.fields,
            max_seqlen=self.layout.max_seqlen if max_seqlen is None else max_seqlen,
            inputs_embeds=inputs_embeds,
            num_texts=self.num_texts,
            num_tokens=self.num_tokens,
            order=self.order,
            origins=self.origins,
        )

    def check_in_one_piece(self) -> None:
        """Checks that `to` would move all integers: a caller may have put others in their place.

        Raises:
            ValueError: some lie elsewhere than in ``integers``, or are read in another way.
        """
        moved = self.over(self.integers)._memory()
        for name, memory in self._memory().items():
            if memory != moved[name]:
                found = "None" if memory is None else "another tensor"
                raise ValueError(
                    f"{name} must lie in the packing's integers to be moved, as `pack` lays it, got {found}"
                )

    def _memory(self) -> dict[str, tuple[Any, ...] | None]:
        """Where integers lie, and how they are read; None for those that are not there."""
        fields = {
            "token_ids": self.token_ids,
            "position_ids": self.position_ids,
            "token_type_ids": self.token_type_ids,
            "layout.cu_seqlens": self.layout.cu_seqlens,
            "layout.positions": self.layout.positions,
        }
        return {
            name: None if field is None else (field.data_ptr(), field.dtype, field.shape, field.stride())
            for name, field in fields.items()
        }


def packed_over(
    integers: Tensor,
    shape: PackShape,
    fields: PackFields,
    *,
    max_seqlen: int,
    inputs_embeds: Tensor | None,
    num_texts: int,
    num_tokens: int,
    order: Tensor | None,
    origins: Tensor | None,
) -> PackedTokens:
    """Packed tokens as views of ``integers``."""
    parts = _sections(integers, shape, fields)
    return PackedTokens(
        integers,
        fields,
        parts.get("token_ids"),
        parts["position_ids"],
        parts.get("token_type_ids"),
        PackedLayout.unchecked(parts["cu_seqlens"], max_seqlen, shape.tokens, parts.get("places")),
        parts.get("rows"),
        parts.get("row_sequences"),
        inputs_embeds,
        num_texts,
        num_tokens,
        order,
        origins,
    )


def lay_out(
    shape: PackShape, fields: PackFields, device: torch.device | str = "cpu", *, pin: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """Zeros for the integers of a packing, and the part of them that each field takes."""
    size = sum(_aligned(size) for size in _sizes(shape, fields).values())
    integers = torch.zeros(size, dtype=torch.int32, device=device, pin_memory=pin)
    return integers, _sections(integers, shape, fields)


def _aligned(size: int) -> int:
    return size + -size % _ALIGNMENT


def _sizes(shape: PackShape, fields: PackFields) -> dict[str, int]:
    """How many integers each section holds, in their order in memory."""
    sizes = {"cu_seqlens": shape.sequences + 1, "position_ids": shape.tokens}
    for name, there in (("token_ids", fields.ids), ("token_type_ids", fields.types), ("places", fields.places)):
        if there:
            sizes[name] = shape.tokens
    if fields.rows is not None:
        sizes |= {"rows": fields.rows, "row_sequences": fields.rows}
    return sizes


def _sections(integers: Tensor, shape: PackShape, fields: PackFields) -> dict[str, Tensor]:
    parts, start = {}, 0
    for name, size in _sizes(shape, fields).items():
        parts[name] = integers[start : start + size]
        start += _aligned(size)
    return parts


class FlatBatch(NamedTuple):
    """The texts of a batch as flat arrays, checked and not yet packed, all on one device.

    Attributes:
        lengths: (num_texts,) int64, on the CPU, each at least 1.
        kept: (sum of lengths,) int64, where each kept token stands in the flat arrays, text by text; None where all are
            kept.
        token_ids, token_type_ids: flat integers, or None.
        position_ids: flat integers, or None for first_position, first_position + 1, ... along each text.
        inputs_embeds: (flat, embedding_size), on any device, or None.
        first_position: the position of a text's first token.
        places: flat integers, where each token stands in its padded text, or None where a mask has no holes.
        chosen: (flat,) bool, the tokens whose rows are wanted, or None.
        keeps_origins: whether `PackedTokens.origins` are wanted.
        texts: (num_texts,) int64 on the CPU, the row of the batch that each text stands in; None where text i is row i,
            as no row is masked as a whole.
    """

    lengths: Tensor
    kept: Tensor | None
    token_ids: Tensor | None
    token_type_ids: Tensor | None
    position_ids: Tensor | None
    inputs_embeds: Tensor | None
    first_position: int = 0
    places: Tensor | None = None
    chosen: Tensor | None = None
    keeps_origins: bool = False
    texts: Tensor | None = None

    @property
    def num_texts(self) -> int:
        return self.lengths.numel()


def kept_tokens(mask: Tensor, lengths: Tensor) -> Tensor:
    """Where the true elements of a mask stand in it, flat.

    Args:
        mask: (batch, seqlen) bool.
        lengths: (batch,) int64 on the CPU, how many of them each row has.
    """
    return _kept(mask.flatten(), int(lengths.sum()))


def _kept(mask: Tensor, count: int) -> Tensor:
    """The indices of the ``count`` true elements."""
    return mask.nonzero().squeeze(1) if mask.device.type == "cpu" else true_indices(mask, count)


def true_indices(mask: Tensor, count: int) -> Tensor:
    """The indices of the ``count`` true elements of (n,) bool. Unlike ``nonzero`` it asks no GPU for their number."""
    index = torch.arange(mask.numel(), device=mask.device)
    # What is not kept goes to a place of its own after the last.
    place = torch.where(mask, mask.cumsum(0) - 1, count)
    return index.new_empty(count + 1).scatter_(0, place, index)[:count]


def _is_int64_buffer(values: object) -> bool:
    """Whether values are an array that lies in memory as it will be wanted."""
    if type(values).__module__ not in _ARRAYS:
        return False
    try:
        view = memoryview(values)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False
    return view.format in ("q", "l") and view.itemsize == 8 and view.ndim == 1 and view.c_contiguous


def flat_integers(name: str, lists: Sequence[Sequence[int]]) -> Tensor:
    """All the integers one after the other, as int64.

    Raises:
        TypeError: something that is not an integer.
        ValueError: a number that int64 cannot hold.
    """
    if all(map(_is_int64_buffer, lists)):
        return torch.frombuffer(bytearray().join(lists), dtype=torch.int64)  # type: ignore[arg-type]
    try:
        numbers = array("q", chain.from_iterable(lists))
    except TypeError as error:
        raise TypeError(f"{name} must hold integers: {error}") from error
    except OverflowError as error:
        raise ValueError(f"{name} must hold numbers that 64 bits can hold: {error}") from error
    return torch.frombuffer(numbers, dtype=torch.int64)


class Part(NamedTuple):
    """Texts that one pass computes.

    Attributes:
        num_tokens: how many tokens they have.
        lengths: (num_texts,) int64 on the CPU.
        starts: (num_texts,) int64 on the CPU, where each text begins among the kept tokens.
        order: (num_texts,) int64 on the CPU, which text of the batch each is, or None where they are in order.
        texts: where in the order of the batch they stand.
    """

    num_tokens: int
    lengths: Tensor
    starts: Tensor
    order: Tensor | None
    texts: slice

    @property
    def num_texts(self) -> int:
        return self.lengths.numel()


def parts_of(batch: FlatBatch, max_tokens: int, *, sort: bool) -> Iterator[Part]:
    """Parts of at most ``max_tokens`` tokens, but at least one text.

    Args:
        batch: the texts.
        max_tokens: the size of a part before it is filled up.
        sort: by length, so that texts of equal length are neighbours: the PyTorch path attends over each such run at
            once, as a view.
    """
    # One text is in order, and sorting takes a good part of the time that it spends outside of the model.
    sort = sort and batch.num_texts > 1
    lengths, order = batch.lengths.sort(stable=True) if sort else (batch.lengths, None)
    starts = batch.lengths.cumsum(0) - batch.lengths
    for texts, tokens in _slices(lengths, max_tokens):
        rows = None if order is None else order[texts]
        yield Part(tokens, lengths[texts], starts[texts] if rows is None else starts[rows], rows, texts)


def pack(batch: FlatBatch, part: Part, shape: PackShape, *, pin: bool = False) -> PackedTokens:
    """Packs a part of a batch, on the device that the batch lies on.

    Args:
        batch: the texts.
        part: which of them.
        shape: what they are filled up to: at least theirs.
        pin: keep what is packed in memory that a GPU copies from while the CPU goes on.
    """
    tokens, lengths, starts, order, texts = part
    num_texts = part.num_texts
    device = next(tensor.device for tensor in (batch.kept, batch.token_ids, batch.position_ids) if tensor is not None)
    columns = None
    if order is None:
        # The texts' tokens are neighbours already.
        first = int(starts[0])
        index: slice | Tensor = slice(first, first + tokens)
    else:
        columns = _columns(lengths, tokens)
        index = columns + starts.repeat_interleave(lengths)
    if batch.kept is not None:
        index = batch.kept[index if isinstance(index, slice) else index.to(device)]

    ends = lengths.cumsum(0)
    rows = None if batch.chosen is None else batch.chosen[index].nonzero().squeeze(1)
    origins = None
    if batch.keeps_origins:
        origins = torch.arange(index.start, index.stop, device="cpu") if isinstance(index, slice) else index
        origins = origins if rows is None else origins[rows]
    fields = PackFields(
        ids=batch.token_ids is not None,
        types=batch.token_type_ids is not None,
        places=batch.places is not None,
        rows=None if rows is None else rows.numel(),
    )
    integers, parts = lay_out(shape, fields, device, pin=pin and device.type == "cpu")
    cu_seqlens, positions = parts["cu_seqlens"], parts["position_ids"]
    ends = ends.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else ends
    cu_seqlens[1 : num_texts + 1] = ends
    if shape.sequences > num_texts:
        cu_seqlens[num_texts + 1 :].fill_(tokens)
    if batch.position_ids is not None:
        positions[:tokens] = batch.position_ids[index]
    else:
        if columns is None:
            columns = _columns(lengths, tokens)
        positions[:tokens] = columns + batch.first_position if batch.first_position else columns
    for name, flat in (
        ("token_ids", batch.token_ids),
        ("token_type_ids", batch.token_type_ids),
        ("places", batch.places),
    ):
        if flat is not None:
            parts[name][:tokens] = flat[index]
    if rows is not None:
        parts["rows"][:] = rows
        parts["row_sequences"][:] = torch.searchsorted(ends, rows, right=True)

    embeds = None
    if batch.inputs_embeds is not None:
        place = batch.inputs_embeds.device
        if isinstance(index, Tensor) and index.device.type == "cpu" and place.type == "cuda":
            index = index.pin_memory().to(place, non_blocking=True)
        embeds = batch.inputs_embeds[index]
        embeds = torch.cat((embeds, embeds.new_zeros(shape.tokens - tokens, embeds.shape[1])))
    return packed_over(
        integers,
        shape,
        fields,
        max_seqlen=int(lengths.max()),
        inputs_embeds=embeds,
        num_texts=num_texts,
        num_tokens=tokens,
        order=order if batch.texts is None else batch.texts[texts if order is None else order],
        origins=origins,
    )


def _columns(lengths: Tensor, tokens: int) -> Tensor:
    """Which token of its text each one is."""
    if lengths.numel() == 1:
        return torch.arange(tokens, device=lengths.device)
    return torch.arange(tokens, device=lengths.device) - (lengths.cumsum(0) - lengths).repeat_interleave(lengths)


def _slices(lengths: Tensor, max_tokens: int) -> Iterator[tuple[slice, int]]:
    """Neighbouring texts, and how many tokens they have."""
    start = tokens = 0
    for row, length in enumerate(lengths.tolist()):
        if tokens and tokens + length > max_tokens:
            yield slice(start, row), tokens
            start, tokens = row, 0
        tokens += length
    yield slice(start, lengths.numel()), tokens
