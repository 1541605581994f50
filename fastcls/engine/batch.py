"""What callers hand in: padded batches and lists of token ids, checked before anything is computed."""

from __future__ import annotations

from collections.abc import ItemsView, Iterable, KeysView, Mapping
from collections.abc import Set as AbstractSet
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastcls_kernels.runtime.checks import check_device, check_integers, check_range, check_tensor

from .packing import FlatBatch, PackedTokens, flat_integers, kept_tokens
from .spec import EncoderSpec


class BadText(ValueError):  # noqa: N818  # it is the text that is bad
    """A text, among many, that cannot be computed.

    Attributes:
        row: its index.
        problem: the rest of a sentence that begins with the text.
    """

    def __init__(self, row: int, problem: str) -> None:
        super().__init__(f"token_ids[{row}] {problem}")
        self.row = row
        self.problem = problem


def outside(token_id: int, size: int) -> str:
    return f"holds the id {token_id}, outside the vocabulary of {size}"


class PaddedBatch(NamedTuple):
    """A padded batch as callers pass it, see `FastClassifier.forward`."""

    input_ids: Tensor | None
    attention_mask: Tensor | None
    token_type_ids: Tensor | None
    position_ids: Tensor | None
    inputs_embeds: Tensor | None

    @property
    def shape(self) -> torch.Size:
        """(batch, seqlen), of a checked batch."""
        if self.input_ids is not None:
            return self.input_ids.shape
        assert self.inputs_embeds is not None
        return self.inputs_embeds.shape[:2]


class BatchReader(NamedTuple):
    """Checks batches for one encoder, and flattens them.

    Attributes:
        spec: the encoder's shape.
        device, dtype: the weights'.
    """

    spec: EncoderSpec
    device: torch.device
    dtype: torch.dtype

    def check(self, batch: PaddedBatch) -> None:
        """Checks types, shapes and devices, but no values.

        Raises:
            TypeError: an argument of the wrong type or dtype.
            ValueError: a shape or device that does not fit.
        """
        shape = self._shape_of(batch.input_ids, batch.inputs_embeds)
        if batch.attention_mask is not None:
            _check_is_tensor("attention_mask", batch.attention_mask)
            if batch.attention_mask.shape != shape:
                raise ValueError(
                    f"attention_mask must have the batch's shape {tuple(shape)}, "
                    f"got {tuple(batch.attention_mask.shape)}"
                )
            self._check_place("attention_mask", batch.attention_mask)
        if batch.token_type_ids is not None:
            self.check_integers("token_type_ids", batch.token_type_ids)
            if batch.token_type_ids.shape != shape:
                raise ValueError(
                    f"token_type_ids must have shape {tuple(shape)}, got {tuple(batch.token_type_ids.shape)}"
                )
        if batch.position_ids is not None:
            self.check_integers("position_ids", batch.position_ids)
            if batch.position_ids.shape not in (shape, (1, shape[1])):
                raise ValueError(
                    f"position_ids must have shape {tuple(shape)} or (1, {shape[1]}), "
                    f"got {tuple(batch.position_ids.shape)}"
                )

    def check_integers(self, name: str, tensor: Tensor) -> None:
        """Checks that ``tensor`` holds integers, on the CPU or on the weights' device."""
        if not isinstance(tensor, Tensor) or tensor.dtype not in (torch.int64, torch.int32):
            found = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name} must be an int64 or int32 tensor, got {found}")
        self._check_place(name, tensor)

    def flatten(
        self, batch: PaddedBatch, *, needs_first: bool, chosen: Tensor | None = None, keeps_origins: bool = False
    ) -> FlatBatch:
        """The texts of a checked batch, of which there is at least one.

        Args:
            batch: a batch that `check` has passed.
            needs_first: whether the first column must be kept, where [CLS] is.
            chosen: (batch, seqlen) bool, the tokens whose rows are wanted, or None.
            keeps_origins: see `FlatBatch`.

        Raises:
            ValueError: a value that does not fit.
        """
        given = (batch.input_ids, batch.attention_mask, batch.token_type_ids, batch.position_ids)
        # An input on a GPU has to be waited for anyway, so the others follow it there.
        on_cpu = all(tensor is None or tensor.device.type == "cpu" for tensor in given)
        place = torch.device("cpu") if on_cpu else self.device

        def placed(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(place, non_blocking=True)

        ids, values, types, positions = map(placed, given)
        shape, spec = batch.shape, self.spec
        if not spec.token_types:
            # Tokenizers make token types for models without them, too.
            types = None
        if not spec.position_rows and not spec.rotary:
            positions = None
        # A CPU sees in one look that nothing is padding, and then spares itself the rest; a GPU would be waited for.
        is_full = ids is not None and (values is None or (on_cpu and bool((values == 1).all())))
        mask = None if is_full else _mask_of(values, shape, place)
        if positions is not None:
            positions = positions.expand(shape)
        elif ids is not None and spec.padding_id is not None:
            positions = _padded_positions(ids, spec.padding_id)
        read = [tensor for tensor in (ids, types, positions) if tensor is not None]
        if mask is None:
            facts, places = _facts_of_full(shape, read), None
        else:
            columns = torch.arange(shape[1], device=place).expand(shape)
            facts = _facts(mask, values, read, columns)
            places = columns if facts.has_holes else None
        self._check_values(facts, types, positions, ids, needs_first=needs_first)
        if spec.mask_token_id is not None and ids is not None and mask is not None:
            self._check_masks(ids, mask)
        if positions is None and places is not None:
            positions = places + spec.first_position

        def flat(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.flatten(0, 1)

        # A row that is masked as a whole is no text.
        lengths = torch.tensor([length for length in facts.lengths if length], dtype=torch.int64, device="cpu")
        texts = None
        if 0 in facts.lengths:
            there = [row for row, length in enumerate(facts.lengths) if length]
            texts = torch.tensor(there, dtype=torch.int64, device="cpu")
        return FlatBatch(
            lengths,
            None if mask is None else kept_tokens(mask, lengths),
            flat(ids),
            flat(types),
            flat(positions),
            flat(batch.inputs_embeds),
            spec.first_position,
            flat(places) if spec.needs_places else None,
            flat(placed(chosen)),
            keeps_origins,
            texts,
        )

    def flatten_lists(
        self, token_ids: Iterable[Iterable[int]], token_type_ids: Iterable[Iterable[int]] | None
    ) -> FlatBatch | None:
        """Sequences of token ids, all of them checked; None where there is none.

        Raises:
            TypeError: something that is not an integer, or that has no order.
            ValueError: an empty or too long sequence, an id outside its table, or shapes that differ.
        """
        token_ids = _listed("token_ids", token_ids)
        lengths = [len(ids) for ids in token_ids]
        if token_type_ids is not None:
            token_type_ids = _listed("token_type_ids", token_type_ids)
            if [len(types) for types in token_type_ids] != lengths:
                raise ValueError("token_type_ids must have the lengths of token_ids")
        if not lengths:
            return None
        if min(lengths) == 0:
            raise BadText(lengths.index(0), "has no tokens")
        spec = self.spec
        self._check_longest(max(lengths))
        ids = flat_integers("token_ids", token_ids)
        low, high = _bounds(ids)
        if low < 0 or high >= spec.vocab_size:
            wrong = next(iter(((ids < 0) | (ids >= spec.vocab_size)).nonzero()))
            row = int(torch.searchsorted(torch.tensor(lengths, device="cpu").cumsum(0), wrong, right=True))
            raise BadText(row, outside(int(ids[wrong]), spec.vocab_size))
        types = None
        if token_type_ids is not None and spec.token_types:
            types = flat_integers("token_type_ids", token_type_ids)
            low, high = _bounds(types)
            _check_range("token_type_ids", int(low), int(high), spec.token_types, "type_vocab_size")
        positions = None
        if spec.padding_id is not None and bool((ids == spec.padding_id).any()):
            split = ids.split(lengths)
            positions = torch.cat([_padded_positions(each[None], spec.padding_id)[0] for each in split])
        lengths_ = torch.tensor(lengths, device="cpu")
        return FlatBatch(lengths_, None, ids, types, positions, None, spec.first_position)

    def _shape_of(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> torch.Size:
        """(batch, seqlen)."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given")
        if input_ids is not None:
            self.check_integers("input_ids", input_ids)
            if input_ids.ndim != 2:
                raise ValueError(f"input_ids must have shape (batch, seqlen), got {tuple(input_ids.shape)}")
            shape = input_ids.shape
        else:
            assert inputs_embeds is not None
            _check_is_tensor("inputs_embeds", inputs_embeds)
            size = self.spec.embedding_size
            if inputs_embeds.ndim != 3 or inputs_embeds.shape[2] != size:
                raise ValueError(
                    f"inputs_embeds must have shape (batch, seqlen, {size}), got {tuple(inputs_embeds.shape)}"
                )
            if inputs_embeds.dtype != self.dtype:
                raise TypeError(f"inputs_embeds must be {self.dtype} like the model, got {inputs_embeds.dtype}")
            if inputs_embeds.device != self.device:
                raise ValueError(f"inputs_embeds must be on {self.device} like the model, got {inputs_embeds.device}")
            shape = inputs_embeds.shape[:2]
        if shape[0] and not shape[1]:
            raise ValueError(f"a batch of {shape[0]} texts must hold at least one token each, got shape {tuple(shape)}")
        return shape

    def _check_values(
        self,
        facts: _Facts,
        types: Tensor | None,
        positions: Tensor | None,
        ids: Tensor | None,
        *,
        needs_first: bool,
    ) -> None:
        if not facts.is_binary:
            raise ValueError("attention_mask must hold 1 (token) and 0 (padding) only, got other values")
        if needs_first and 0 in facts.first_column:
            for row, (first, length) in enumerate(zip(facts.first_column, facts.lengths, strict=True)):
                if length and not first:
                    raise ValueError(
                        f"attention_mask must be 1 in its first column, where [CLS] is; it is 0 in row {row}. "
                        'For left-padded batches set tokenizer.padding_side = "right"'
                    )
        spec, bounds = self.spec, iter(facts.bounds)
        if ids is not None:
            _check_range("input_ids", next(bounds), next(bounds), spec.vocab_size, "vocab_size")
        if types is not None:
            _check_range("token_type_ids", next(bounds), next(bounds), spec.token_types, "type_vocab_size")
        if positions is None or spec.padding_id is not None:
            # Positions that follow from ids reach no farther than the last column.
            self._check_longest(max(facts.last_column) + 1)
        if positions is not None:
            rows = spec.position_rows or spec.max_positions
            assert rows is not None
            _check_range("position_ids", next(bounds), next(bounds), rows, "max_position_embeddings")

    def _check_masks(self, ids: Tensor, mask: Tensor) -> None:
        token = self.spec.mask_token_id
        if bool(((ids == token) & ~mask).any()):
            raise ValueError(
                f"input_ids must hold mask tokens ({token}) only where attention_mask is 1, got some where it is 0: "
                "this model scales its embeddings by how many there are, those included"
            )

    def _check_longest(self, longest: int) -> None:
        if self.spec.max_positions is not None and longest > self.spec.max_positions:
            raise ValueError(
                f"a text of {longest} tokens is longer than the model's {self.spec.max_positions} positions: "
                f"pass truncation=True, max_length={self.spec.max_positions} to the tokenizer"
            )

    def _check_place(self, name: str, tensor: Tensor) -> None:
        if tensor.device.type != "cpu" and tensor.device != self.device:
            raise ValueError(f"{name} must be on the CPU or on {self.device} like the model, got {tensor.device}")


def check_packed(packed: PackedTokens, spec: EncoderSpec, word_weight: Tensor) -> PackedTokens:
    """Checks packed tokens of a caller's, which need not be what `pack` gave, and brings them to the weights' device.

    Args:
        packed: the tokens.
        spec: the encoder's shape.
        word_weight: a weight, whose dtype and device count.

    Returns:
        The same tokens, on the device of ``word_weight``.

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape, stride or device that does not fit, or, on a CPU, a value outside its table: reading values
            would stall a GPU.
    """
    if packed.integers.device != word_weight.device:
        packed.check_in_one_piece()
        packed = packed.to(word_weight.device)
    total, sequences = packed.shape
    check_device("layout", packed.layout.cu_seqlens, word_weight)
    packed.layout.check()
    for name, count, most in (("num_texts", packed.num_texts, sequences), ("num_tokens", packed.num_tokens, total)):
        if not 0 <= count <= most:
            raise ValueError(f"{name} must lie from 0 to {most}, as the layout says, got {count}")
    if (packed.inputs_embeds is None) == (packed.token_ids is None):
        raise ValueError("exactly one of token_ids and inputs_embeds must be given")
    sizes = {
        "token_ids": spec.vocab_size,
        "token_type_ids": spec.token_types,
        "position_ids": spec.position_rows or spec.max_positions,
    }
    for name, size in sizes.items():
        ids = getattr(packed, name)
        if ids is None:
            continue
        check_integers(name, ids)
        check_device(name, ids, word_weight)
        if ids.shape != (total,) or not ids.is_contiguous() or size == 0:
            wanted = "None for this model" if size == 0 else f"contiguous, of shape ({total},)"
            raise ValueError(f"{name} must be {wanted}, got shape {tuple(ids.shape)} with strides {ids.stride()}")
        if size is not None:
            check_range(name, ids, size)
    embeds = packed.inputs_embeds
    if embeds is not None:
        check_tensor("inputs_embeds", embeds, "(total_tokens, embedding_size)", like=word_weight)
        if embeds.shape != (total, spec.embedding_size) or not embeds.is_contiguous():
            raise ValueError(
                f"inputs_embeds must be contiguous, of shape ({total}, {spec.embedding_size}), "
                f"got shape {tuple(embeds.shape)} with strides {embeds.stride()}"
            )
    return packed


class _Facts(NamedTuple):
    lengths: list[int]
    first_column: list[int]
    last_column: list[int]
    is_binary: bool
    # Lowest and highest of the ids, types and positions that were given.
    bounds: list[int]

    @property
    def has_holes(self) -> bool:
        return any(last + 1 != length for last, length in zip(self.last_column, self.lengths, strict=True))


def _mask_of(values: Tensor | None, shape: torch.Size, place: torch.device) -> Tensor:
    return torch.ones(shape, dtype=torch.bool, device=place) if values is None else values.bool()


def _facts(mask: Tensor, values: Tensor | None, read: list[Tensor], columns: Tensor) -> _Facts:
    """All that must be known of the values, read at once, so that a GPU is waited for only once.

    Args:
        mask: (batch, seqlen) bool.
        values: the attention mask that it was made of, or None.
        read: the integers whose lowest and highest are wanted, (batch, seqlen) each.
        columns: (batch, seqlen), which column each is.
    """
    binary = mask.new_ones(1) if values is None else (mask.to(values.dtype) == values).all()[None]
    last = torch.where(mask, columns, -1).amax(1)
    ranges = [bound[None] for tensor in read for bound in _bounds(torch.where(mask, tensor, 0))]
    numbers = torch.cat([fact.long() for fact in (mask.sum(1), mask[:, 0], last, binary, *ranges)]).tolist()
    texts = mask.shape[0]
    lengths, first, last_ = (numbers[start : start + texts] for start in (0, texts, 2 * texts))
    is_binary, *bounds = numbers[3 * texts :]
    return _Facts(lengths, first, last_, bool(is_binary), bounds)


def _facts_of_full(shape: torch.Size, read: list[Tensor]) -> _Facts:
    """`_facts` of a batch without padding."""
    texts, seqlen = shape
    bounds = torch.stack([bound.long() for tensor in read for bound in _bounds(tensor)]).tolist()
    return _Facts([seqlen] * texts, [1] * texts, [seqlen - 1] * texts, True, bounds)


def _padded_positions(ids: Tensor, padding_id: int) -> Tensor:
    """RoBERTa's positions: counted from behind padding_id, padding tokens not counted."""
    real = ids != padding_id
    return real.cumsum(1) * real + padding_id


def _listed(name: str, lists: Iterable[Iterable[int]]) -> list[Any]:
    """Each text's ids with a length: iterators, which can be read only once, become lists.

    Raises:
        TypeError: a text is no sequence of ids, or has no order.
    """
    texts = _with_length(name, lists, "hold a sequence of ids for each text")
    return [
        ids if isinstance(ids, (list, tuple)) else _with_length(f"{name}[{row}]", ids, "be a sequence of ids")
        for row, ids in enumerate(texts)
    ]


def has_no_order(values: object) -> bool:
    """Whether values have no order, like a set's."""
    return isinstance(values, AbstractSet) and not isinstance(values, (KeysView, ItemsView))


def _with_length(name: str, values: Any, wanted: str) -> Any:
    """The values, as a list if they have no length.

    Raises:
        TypeError: they cannot be iterated over, or have no order.
    """
    problem = f"{name} must {wanted}, got {type(values).__name__}"
    if isinstance(values, Mapping):
        raise TypeError(f'{problem}: pass what it holds as "input_ids"')
    if has_no_order(values):
        raise TypeError(f"{problem}, which has no order: pass a list")
    try:
        # A tensor or array without dimensions has a length, but iter() refuses it.
        once = iter(values)
    except TypeError:
        raise TypeError(f"{problem}: {shortened(values)}") from None
    return values if hasattr(values, "__len__") else list(once)


def _check_is_tensor(name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def _bounds(integers: Tensor) -> tuple[Tensor, Tensor]:
    low, high = torch.aminmax(integers)
    return low, high


def _check_range(name: str, low: int, high: int, size: int, config_name: str) -> None:
    if low < 0 or high >= size:
        raise ValueError(f"{name} must lie from 0 to {size - 1} (config.{config_name} = {size}), got {low} to {high}")


def shortened(value: object, limit: int = 60) -> str:
    """A value in one line, for a message."""
    shown = repr(value).replace("\n", " ")
    return shown if len(shown) <= limit else shown[: limit - 3] + "..."
