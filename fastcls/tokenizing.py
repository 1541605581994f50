"""Texts to token ids: cut to a length, by a tokenizer's own threads, and long ones without reading them to the end."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable, Sequence
from copy import deepcopy
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import TruncationStrategy
from transformers.utils.generic import PaddingStrategy

from .engine.batch import shortened
from .prefixes import ends_at_words, prefix
from .texts import Item, TextError, Truncation, first_line, read_count

_STRATEGIES = ("longest_first", "only_first", "only_second")
_PADDINGS = ("longest", "max_length", "do_not_pad")
# A tokenizer without a limit says 1e30; transformers takes any number above this for no limit.
_NO_LIMIT = 1e20

# (length,) int64.
Ids: TypeAlias = "NDArray[np.int64]"
_Given: TypeAlias = "str | tuple[str, str]"


class Cut(NamedTuple):
    """How texts are cut.

    Attributes:
        strategy: a tokenizer's name of it, or False.
        length: the number of tokens to cut to, special ones included; None if texts may have any length.
    """

    strategy: str | Literal[False]
    length: int | None

    @property
    def applied(self) -> tuple[str | Literal[False], int | None]:
        """Strategy and length, or neither."""
        return (self.strategy, self.length) if self.strategy and self.length is not None else (False, None)

    def options(self) -> dict[str, Any]:
        """For a tokenizer's call."""
        strategy, length = self.applied
        return {"truncation": strategy, "max_length": length}

    def problem(self, length: int) -> str | None:
        """Why a text of so many tokens was not cut as it should be, or None."""
        strategy, limit = self.applied
        if limit is None or length <= limit:
            return None
        return f"is {length} tokens long, and truncation={strategy!r} cannot cut it to {limit}"


def check_tokenizer(tokenizer: object) -> None:
    """Refuses what is no tokenizer of transformers'.

    Raises:
        TypeError: it is something else, with what to do about it.
    """
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        return
    remedy = "pass the model's own, AutoTokenizer.from_pretrained(...)"
    if isinstance(tokenizer, (str, os.PathLike)):
        remedy = "to load both by name use Classifier.from_pretrained"
    elif type(tokenizer).__module__.partition(".")[0] == "tokenizers":
        remedy = "wrap it, transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)"
    raise TypeError(f"tokenizer must be a tokenizer of transformers', got {type(tokenizer).__name__}: {remedy}")


def own_copy(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy of a tokenizer, so that nobody else changes its padding and truncation, which one in Rust keeps as state.

    Raises:
        ValueError: it cannot be copied.
    """
    try:
        return deepcopy(tokenizer)
    except Exception as error:
        # Copying pickles a tokenizer in Rust, and components made in Python cannot be pickled.
        raise ValueError(
            f"tokenizer must be one that can be copied, got {type(tokenizer).__name__}: {first_line(error)}. "
            "Where nothing else uses it, pass copy_tokenizer=False"
        ) from error


def length_limit(tokenizer: PreTrainedTokenizerBase, max_positions: int | None) -> int | None:
    """The length that ``truncation=True`` cuts to: the tokenizer's limit, and at most the model's positions.

    A checkpoint was trained with its tokenizer's limit, and transformers' pipeline cuts to it.
    """
    of_tokenizer = getattr(tokenizer, "model_max_length", None)
    limits = [] if max_positions is None else [max_positions]
    if of_tokenizer is not None and of_tokenizer < _NO_LIMIT:
        limits.append(int(of_tokenizer))
    return min(limits, default=None)


def read_cut(
    tokenizer: PreTrainedTokenizerBase,
    max_positions: int | None,
    default: Truncation,
    truncation: Truncation | None,
    max_length: int | None,
) -> Cut:
    """How the options of one call cut texts; they mean the same as a tokenizer's.

    Args:
        tokenizer, max_positions: see `length_limit`.
        default: the truncation if neither option is given.
        truncation: None cuts if ``max_length`` is given.
        max_length: replaces the tokenizer's limit.

    Raises:
        TypeError, ValueError: a value that an option does not have, or that leaves no room for special tokens.
    """
    if max_length is not None:
        max_length = read_count("max_length", max_length)
    if truncation is None:
        truncation = "longest_first" if max_length is not None and read_truncation(default) is False else default
    strategy = read_truncation(truncation)
    length = length_limit(tokenizer, max_positions)
    if max_length is not None:
        length = max_length if max_positions is None else min(max_length, max_positions)
    if strategy and length is not None:
        special = tokenizer.num_special_tokens_to_add(pair=False)
        if length < special:
            source = "tokenizer.model_max_length" if max_length is None else "max_length"
            raise ValueError(f"{source} must be at least {special}, the number of special tokens, got {length}")
    return Cut(strategy, length)


def read_truncation(truncation: object) -> str | Literal[False]:
    """A tokenizer's strategy, or False.

    Raises:
        ValueError: something else.
    """
    # The values of transformers' own enumeration have these names.
    value = getattr(truncation, "value", truncation)
    if isinstance(value, bool):
        return "longest_first" if value else False
    if value == "do_not_truncate":
        return False
    if not isinstance(value, str) or value not in _STRATEGIES:
        raise ValueError(f"truncation must be True, False or one of {', '.join(_STRATEGIES)}, got {truncation!r}")
    return value


def read_padding(padding: object) -> None:
    """Checks an option that has no effect, since nothing is padded.

    Raises:
        ValueError: a value that no tokenizer takes.
    """
    value = getattr(padding, "value", padding)
    if value is not None and not isinstance(value, bool) and not (isinstance(value, str) and value in _PADDINGS):
        raise ValueError(f"padding must be True, False or one of {', '.join(_PADDINGS)}, got {padding!r}")


class Encoded(NamedTuple):
    """Texts as a tokenizer gives them.

    Ids are arrays, since Python's garbage collector follows lists: after those of some 10,000 texts it looks through
    all that a process holds, which takes as long as tokenizing them.

    Attributes:
        ids: the token ids of each, special ones included.
        types: their token types; 0 where a tokenizer gives none, as in transformers' pipeline.
        cut: whether tokens were cut off.
        further: where windows were asked for, the ids and types of a text's windows behind the first.
    """

    ids: list[Ids]
    types: list[Ids]
    cut: list[bool]
    further: list[list[tuple[Ids, Ids]]]


def encode(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    pairs: Sequence[str] | None,
    cut: Cut,
    *,
    overlap: int | None = None,
) -> Encoded:
    """Texts, or pairs of texts, as the tokenizer's call gives them.

    Args:
        tokenizer: nobody else may use it meanwhile.
        texts, pairs: a text each, or the first and second of pairs.
        cut: how they are cut.
        overlap: what is cut off comes in further windows, each of which begins with so many tokens of the one before;
            for a tokenizer that `is_plain`.

    Raises:
        Exception: whatever a tokenizer raises at a text that it does not take.
    """
    if not texts:
        return Encoded([], [], [], [])
    if not is_plain(tokenizer):
        assert overlap is None, "windows are a tokenizer's in Rust"
        return _encode_by_call(tokenizer, texts, pairs, cut)
    strategy, length = cut.applied
    tokenizer.set_truncation_and_padding(
        padding_strategy=PaddingStrategy.DO_NOT_PAD,
        truncation_strategy=TruncationStrategy(strategy or "do_not_truncate"),
        max_length=length,
        stride=overlap or 0,
        pad_to_multiple_of=None,
        padding_side=None,
    )
    backend: Any = tokenizer.backend_tokenizer
    if backend.encode_special_tokens != tokenizer.split_special_tokens:
        backend.encode_special_tokens = tokenizer.split_special_tokens
    given: list[Any] = list(texts if pairs is None else zip(texts, pairs, strict=True))
    if overlap is not None:
        # Without offsets, tokenizers gives the second text of a pair type 0 in windows behind the first.
        encodings = backend.encode_batch(given)
    elif not strategy or length is None or tokenizer.truncation_side != "right":
        encodings = backend.encode_batch_fast(given)
    else:
        room = length - tokenizer.num_special_tokens_to_add(pair=True)
        encodings = _encodings_of_prefixes(backend, given, strategy, length, room)
    has_types = "token_type_ids" in tokenizer.model_input_names

    def types_of(encoding: Any) -> Ids:
        return _ids(encoding.type_ids) if has_types else _no_types(len(encoding))

    ids = [_ids(each.ids) for each in encodings]
    # Only a text of full length may have been cut, and asking for more makes objects of all that was cut off.
    is_full = [length is not None and len(row) >= length for row in ids]
    was_cut = [full and bool(each.overflowing) for full, each in zip(is_full, encodings, strict=True)]
    further: list[list[tuple[Ids, Ids]]] = []
    if overlap is not None:
        further = [[(_ids(more.ids), types_of(more)) for more in each.overflowing] for each in encodings]
    types = [types_of(each) for each in encodings]
    return Encoded(ids, types, was_cut, further)


def _no_types(count: int) -> Ids:
    return np.zeros(count, dtype=np.int64)


def _ids(values: Sequence[int]) -> Ids:
    return np.array(values, dtype=np.int64)


def is_plain(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer's call only hands on to its tokenizer in Rust, which may then be asked without it."""
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return False
    kind = type(tokenizer)
    return (
        kind._encode_plus is PreTrainedTokenizerFast._encode_plus
        and kind.__call__ is PreTrainedTokenizerBase.__call__
        and kind.set_truncation_and_padding is PreTrainedTokenizerFast.set_truncation_and_padding
        and getattr(kind, "_convert_encoding", None) is PreTrainedTokenizerFast._convert_encoding
    )


def _encode_by_call(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], pairs: Sequence[str] | None, cut: Cut
) -> Encoded:
    def call(texts: Sequence[str], pairs: Sequence[str] | None, options: dict[str, Any]) -> Any:
        seconds = None if pairs is None else list(pairs)
        return tokenizer(list(texts), seconds, **options, return_attention_mask=False, verbose=False)

    encoded = call(texts, pairs, cut.options())
    # array() refuses numbers that are no integers, which numpy would cut to some.
    ids = [_ids(array("q", row)) for row in encoded["input_ids"]]
    given_types = encoded.get("token_type_ids")
    types = [_ids(array("q", row)) for row in given_types] if given_types else [_no_types(len(row)) for row in ids]
    was_cut = [False] * len(ids)
    strategy, length = cut.applied
    # Cut on the left, a pair whose second text is empty loses the last [SEP], too.
    full = [row for row, found in enumerate(ids) if strategy and length is not None and len(found) >= length - 1]
    if full:
        seconds = None if pairs is None else [pairs[row] for row in full]
        whole = call([texts[row] for row in full], seconds, {"truncation": False, "max_length": None})["input_ids"]
        for row, found in zip(full, whole, strict=True):
            was_cut[row] = len(found) > len(ids[row])
    return Encoded(ids, types, was_cut, [])


class _Long(NamedTuple):
    """A text, or a pair, of which one text is read only as far as its first tokens reach.

    Attributes:
        given: the text or the pair.
        side: of a pair, which of its texts that is.
    """

    given: _Given
    side: int = 0

    @property
    def text(self) -> str:
        return self.given if isinstance(self.given, str) else self.given[self.side]

    def part(self, tokens: int) -> _Given:
        """With a beginning of its text that has probably more than so many tokens."""
        beginning = prefix(self.text, tokens)
        if isinstance(self.given, str):
            return beginning
        return (beginning, self.given[1]) if self.side == 0 else (self.given[0], beginning)


def _encodings_of_prefixes(backend: Any, given: Sequence[_Given], strategy: str, length: int, room: int) -> list[Any]:
    """The encodings of texts or pairs that are cut on the right, of long ones read as far as their first tokens reach.

    Args:
        backend: the tokenizer in Rust, which cuts as the other arguments say.
        given: texts or pairs.
        strategy, length: how they are cut.
        room: how many tokens of a pair's texts fit into the length.
    """
    long = _long_ones(backend, given, strategy, length, room)
    parts, factor = {row: each.part(length) for row, each in long.items()}, 1
    encodings = list(backend.encode_batch_fast([parts.get(row, each) for row, each in enumerate(given)]))
    while parts:
        # Where nothing was cut off, the part may have been too short.
        short = [row for row, part in parts.items() if part != given[row] and not encodings[row].overflowing]
        factor *= 4
        parts = {row: long[row].part(length * factor) for row in short}
        for row, encoding in zip(parts, backend.encode_batch_fast(list(parts.values())), strict=True):
            encodings[row] = encoding
    return encodings


def _long_ones(backend: Any, given: Sequence[_Given], strategy: str, length: int, room: int) -> dict[int, _Long]:
    """The rows that are cut as they would be, where a long text is read in part."""
    long = dict[int, _Long]()
    only = {"only_first": 0, "only_second": 1}.get(strategy)
    for row, each in enumerate(given):
        texts = [(0, each)] if isinstance(each, str) else enumerate(each)
        sides = [side for side, text in texts if only in (None, side) and len(prefix(text, length)) < len(text)]
        # Two long texts are both cut, and which of them is the longer one their beginnings do not tell.
        if len(sides) == 1:
            long[row] = _Long(each, sides[0])
    if not long or not ends_at_words(backend):
        return {}
    if strategy == "longest_first":
        # The other text is shorter than half of the room, so that none of its tokens is cut off.
        pairs = [(row, each.given[1 - each.side]) for row, each in long.items() if not isinstance(each.given, str)]
        others = backend.encode_batch_fast([other for _, other in pairs], add_special_tokens=False)
        for (row, _), other in zip(pairs, others, strict=True):
            if len(other) >= room // 2:
                del long[row]
    return long


def token_lists(
    tokenizer: PreTrainedTokenizerBase, items: Sequence[Item], first: int, cut: Cut
) -> tuple[list[Ids], list[Ids]]:
    """The token ids of each text, and their types.

    Args:
        tokenizer: nobody else may use it meanwhile.
        items: the texts.
        first: the index of the first one in the whole input, for messages.
        cut: how they are cut.

    Raises:
        TextError: a text that the tokenizer does not take, or that cannot be cut.
    """
    token_ids, types = [_ids(())] * len(items), [_ids(())] * len(items)
    singles = [row for row, item in enumerate(items) if item.pair is None]
    pairs = [row for row, item in enumerate(items) if item.pair is not None]

    def encode_rows(rows: list[int]) -> Encoded:
        seconds = [items[row].pair or "" for row in rows] if items[rows[0]].pair is not None else None
        return encode(tokenizer, [items[row].text for row in rows], seconds, cut)

    if pairs and (problem := pair_problem(tokenizer, cut)):
        raise TextError(first + pairs[0], problem)
    for rows in filter(None, (singles, pairs)):
        try:
            encoded = encode_rows(rows)
        except Exception:
            for row in rows:
                try:
                    encode_rows([row])
                except Exception as error:
                    raise TextError(first + row, tokenizer_problem(items[row], error)) from error
            raise
        for row, ids, row_kinds in zip(rows, encoded.ids, encoded.types, strict=True):
            if problem := cut.problem(len(ids)):
                raise TextError(first + row, problem)
            token_ids[row], types[row] = ids, row_kinds
    return token_ids, types


def pair_problem(tokenizer: PreTrainedTokenizerBase, cut: Cut) -> str | None:
    """Why no pair can be cut so, or None: below this length tokenizers would not cut at all."""
    strategy, length = cut.applied
    special = tokenizer.num_special_tokens_to_add(pair=True)
    if strategy and length is not None and length < special:
        return f"is a pair, whose {special} special tokens are more than the {length} to cut to"
    return None


def tokenizer_problem(parts: Iterable[str | None], error: Exception) -> str:
    """Why a tokenizer does not take a text."""
    for part in parts:
        try:
            (part or "").encode()
        except UnicodeEncodeError as surrogate:
            # The tokenizer's own error says that the text must be a str, which it is.
            return f"holds half a character, a lone surrogate, at place {surrogate.start}: {shortened(part)}"
    return f"cannot be tokenized: {first_line(error)}"
