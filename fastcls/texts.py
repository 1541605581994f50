"""Reading the texts that callers pass, with errors that name the text that does not fit."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Real
from typing import Any, Literal, NamedTuple, TypeAlias

from .engine.batch import has_no_order, shortened

Text: TypeAlias = "str | Sequence[str] | Mapping[str, str]"
Truncation: TypeAlias = "bool | Literal['longest_first', 'only_first', 'only_second', 'do_not_truncate']"

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

    @property
    def characters(self) -> int:
        """How many it has, both texts of a pair together."""
        return len(self.text) + len(self.pair or "")


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
