"""Reading and tokenizing the texts that callers pass, with errors that name the text that does not fit."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from numbers import Real
from typing import Any, Literal, NamedTuple, TypeAlias

from transformers import PreTrainedTokenizerBase

from .engine.batch import has_no_order, shortened

Text: TypeAlias = "str | Sequence[str] | Mapping[str, str]"
Truncation: TypeAlias = "bool | Literal['longest_first', 'only_first', 'only_second', 'do_not_truncate']"

_STRATEGIES = ("longest_first", "only_first", "only_second")
_PADDINGS = ("longest", "max_length", "do_not_pad")
# A tokenizer without a limit says 1e30; transformers takes any number above this for no limit.
_NO_LIMIT = 1e20
# How a column of a table becomes texts, by the table's library; pandas' way works for many others.
_COLUMN = 'frame["{}"].tolist()'
_COLUMNS = {
    "dask": 'frame["{}"].compute().tolist()',
    "datasets": 'dataset["{}"]',
    "polars": 'frame["{}"].to_list()',
    "pyarrow": 'table["{}"].to_pylist()',
}


class Item(NamedTuple):
    """One text, or a pair."""

    text: str
    pair: str | None


class TextError(ValueError):
    """A text that cannot be classified.

    Attributes:
        index: its index in the whole input, from 0.
        problem: what is wrong with it, "has no tokens".
        too_long: whether truncation would help.
    """

    def __init__(self, index: int, problem: str, too_long: bool = False) -> None:
        super().__init__(index, problem, too_long)
        self.index = index
        self.problem = problem
        self.too_long = too_long

    def __str__(self) -> str:
        remedy = ": pass truncation=True to cut such texts" if self.too_long else ""
        return f"texts[{self.index}] {self.problem}{remedy}"


class Cut(NamedTuple):
    """How texts are cut.

    Attributes:
        strategy: a tokenizer's name of it, or False.
        length: the number of tokens to cut to, special ones included; None if texts may have any length.
    """

    strategy: str | Literal[False]
    length: int | None

    def options(self) -> dict[str, Any]:
        """For a tokenizer's call."""
        cuts = bool(self.strategy) and self.length is not None
        return {"truncation": self.strategy if cuts else False, "max_length": self.length if cuts else None}


def plain(value: object) -> object:
    """The value of a pyarrow scalar; anything else as it is."""
    if isinstance(value, str):
        return value
    as_py = getattr(value, "as_py", None)
    return as_py() if callable(as_py) else value


def checked_texts(texts: object) -> Iterable[Any]:
    """Checks that an input is an iterable of texts, and returns it.

    Raises:
        TypeError: it is not, or it is a table, a set, one text, or a tuple that may be a pair or two texts.
    """
    found = type(texts).__name__
    if isinstance(texts, (bytes, bytearray, memoryview)):
        raise TypeError(f"texts must be an iterable of texts, got {found}: decode it first, texts.decode()")
    columns = _columns_of(texts)
    if columns is not None:
        library = type(texts).__module__.partition(".")[0]
        shown = ", ".join(map(str, columns[:8])) + (", ..." if len(columns) > 8 else "")
        column = _COLUMNS.get(library, _COLUMN)
        if "text" in columns and "text_pair" in columns:
            remedy = f"pass its pairs, list(zip({column.format('text')}, {column.format('text_pair')}))"
        else:
            name = "text" if "text" in columns or not columns else columns[0]
            remedy = f"pass one of its columns, {column.format(name)}"
        raise TypeError(
            f"texts must be an iterable of texts, got a table ({library} {found}, columns: {shown or 'unknown'}): "
            f"{remedy}"
        )
    if has_no_order(texts):
        raise TypeError(f"texts must have an order, which a {found} has not: pass a list")
    if isinstance(texts, (str, Mapping)) or not _is_iterable(texts):
        raise TypeError(f"texts must be an iterable of texts, got {found}")
    if getattr(texts, "ndim", 1) != 1:
        raise TypeError(f"texts must have one dimension, got {found} of shape {tuple(getattr(texts, 'shape', ()))}")
    if isinstance(texts, tuple) and len(texts) == 2 and all(isinstance(text, str) for text in texts):
        raise TypeError(
            "texts must be a list: [(text, text_pair)] for one pair, [text, text] for two texts; got a tuple"
        )
    return texts  # type: ignore[return-value]


def items_of(texts: Iterable[object]) -> Iterator[Item]:
    """Each text as an item.

    Raises:
        TypeError: something that is no text.
    """
    for index, text in enumerate(texts):
        yield _item(plain(text), index)


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


def read_count(name: str, value: Any) -> int:
    """Checks that a value is a positive integer, of any integer type.

    Raises:
        ValueError: it is not.
    """
    try:
        number = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise ValueError(f"{name} must be a positive int or None, got {value!r}")
    return number


def token_lists(
    tokenizer: PreTrainedTokenizerBase, items: Sequence[Item], first: int, cut: Cut
) -> tuple[list[list[int]], list[list[int]]]:
    """The token ids of each text, and their types.

    Args:
        tokenizer: nobody else may use it meanwhile.
        items: the texts.
        first: the index of the first one in the whole input, for messages.
        cut: how they are cut.

    Raises:
        TextError: a text that the tokenizer does not take, or that cannot be cut.
    """
    token_ids: list[list[int]] = [[]] * len(items)
    types: list[list[int]] = [[]] * len(items)
    singles = [row for row, item in enumerate(items) if item.pair is None]
    pairs = [row for row, item in enumerate(items) if item.pair is not None]

    def encode(rows: list[int]) -> Any:
        seconds = [items[row].pair or "" for row in rows] if items[rows[0]].pair is not None else None
        return tokenizer(
            [items[row].text for row in rows], seconds, **cut.options(), return_attention_mask=False, verbose=False
        )

    if pairs and cut.strategy and cut.length is not None:
        special = tokenizer.num_special_tokens_to_add(pair=True)
        # Below this length tokenizers would not cut at all.
        if cut.length < special:
            raise TextError(
                first + pairs[0], f"is a pair, whose {special} special tokens are more than the {cut.length} to cut to"
            )
    for rows in filter(None, (singles, pairs)):
        try:
            encoded = encode(rows)
        except Exception:
            for row in rows:
                try:
                    encode([row])
                except Exception as error:
                    raise TextError(first + row, tokenizer_problem(items[row], error)) from error
            raise
        # A tokenizer that gives no types means type 0, as in transformers' pipeline.
        kinds = encoded.get("token_type_ids") or [[0] * len(ids) for ids in encoded["input_ids"]]
        for row, ids, row_kinds in zip(rows, encoded["input_ids"], kinds, strict=True):
            if cut.strategy and cut.length is not None and len(ids) > cut.length:
                problem = f"is {len(ids)} tokens long, and truncation={cut.strategy!r} cannot cut it to {cut.length}"
                raise TextError(first + row, problem)
            token_ids[row], types[row] = ids, row_kinds
    return token_ids, types


def tokenizer_problem(parts: Iterable[str | None], error: Exception) -> str:
    """Why a tokenizer does not take a text."""
    for part in parts:
        try:
            (part or "").encode()
        except UnicodeEncodeError as surrogate:
            # The tokenizer's own error says that the text must be a str, which it is.
            return f"holds half a character, a lone surrogate, at place {surrogate.start}: {shortened(part)}"
    return f"cannot be tokenized: {first_line(error)}"


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the error's type."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _is_iterable(texts: object) -> bool:
    try:
        # Some data sets are iterable only through their items' indices, which isinstance does not see.
        iter(texts)  # type: ignore[call-overload]
    except TypeError:
        # iter() of an array without dimensions raises, too.
        return getattr(texts, "ndim", None) == 0
    return True


def _columns_of(texts: object) -> list[Any] | None:
    """The names of a table's columns; None for anything else. No library of tables is imported for it."""
    if isinstance(texts, (str, Mapping)):
        return None
    names = getattr(texts, "column_names", None)
    # The rows of a data set whose only columns are text and text_pair are texts.
    if names is not None and not hasattr(texts, "columns") and {"text"} <= set(names) <= {"text", "text_pair"}:
        return None
    for found in (names, getattr(texts, "columns", None), getattr(getattr(texts, "dtype", None), "names", None)):
        if found is not None and not callable(found):
            return list(found)
    return [] if hasattr(texts, "__dataframe__") else None


def _item(text: object, index: int) -> Item:
    if isinstance(text, str):
        return Item(text, None)
    if isinstance(text, Mapping):
        one, other = plain(text.get("text")), plain(text.get("text_pair"))
        fits = text.keys() <= {"text", "text_pair"}
        if fits and isinstance(one, str) and (other is None or isinstance(other, str)):
            return Item(one, other)
    if isinstance(text, (tuple, list)) and len(text) == 2:
        one, other = map(plain, text)
        if isinstance(one, str) and isinstance(other, str):
            return Item(one, other)
    raise TypeError(
        f"texts[{index}] must be a string, a pair of strings or a mapping with text and text_pair, "
        f"got {found_text(text)}"
    )


def found_text(text: object) -> str:
    """Describes something that is no text, and what to do about it."""
    return f"{type(text).__name__}: {shortened(text)}{_remedy(text)}"


def _remedy(text: object) -> str:
    if _is_missing(text):
        return ", a missing text: drop or fill such texts first"
    if isinstance(text, (bytes, bytearray)):
        return ": decode it first"
    if isinstance(text, Mapping):
        return _remedy_of_row(text)
    if isinstance(text, (tuple, list)) and len(text) == 2:
        if any(map(_is_missing, map(plain, text))):
            return ", with a missing text: drop or fill such pairs, or pass a text alone"
        if any(isinstance(plain(part), (bytes, bytearray)) for part in text):
            return ": decode its texts first"
    return ""


def _remedy_of_row(row: Mapping[Any, Any]) -> str:
    """Advice for a mapping that has other keys or values than a text or a pair has."""
    values = {key: plain(value) for key, value in row.items()}
    keys = [key for key in ("text", "text_pair") if key in values]
    if "text" not in keys:
        keys = [key for key, value in values.items() if isinstance(value, str)]
    for key in keys:
        value = values[key]
        # A text_pair of None means a single text.
        if _is_missing(value) and (key == "text" or value is not None):
            return f", whose {key} is missing: drop or fill such texts first"
        if isinstance(value, (bytes, bytearray)):
            return f": decode its {key} first"
        if isinstance(value, Real):
            return f": its {key} must be a string"
    if not keys and any(map(_is_missing, values.values())):
        return ", a missing text: drop or fill such texts first"
    if not keys or not all(isinstance(values[key], (str, type(None))) for key in keys):
        if len(keys) > 1:
            return ': pass its pairs, list(zip(columns["text"], columns["text_pair"]))'
        return ": pass a list of texts, as one of its values may be"
    first, *others = (f'row["{key}"]' for key in keys)
    single = f"[{first} for row in rows]"
    if not others:
        return f": pass {single}"
    pair = f"[({first}, {others[0]}) for row in rows]"
    return f": pass {pair}" if "text" in keys else f": pass {single}, or of pairs {pair}"


def _is_missing(value: object) -> bool:
    # Each library has its own missing value.
    return (
        value is None or type(value).__name__ in ("NAType", "NaTType") or (isinstance(value, Real) and value != value)
    )
