"""Rows of a source, and what a source is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    import pyarrow as pa

# The most rows of a batch.
BATCH_ROWS = 512


class Rows(NamedTuple):
    """Some neighbouring rows of a source.

    Attributes:
        texts: a text for each row, None where it has none that could be read; `problems` says why.
        pairs: the second text of each row, likewise, or None if the source has no pair column.
        kept: the columns that go to the output as they are, as many rows; its schema is `Source.schema`. What cannot be
            read is null.
        places: where each row stands in its file, from 1: the number of its line (txt, jsonl), or of its row (csv, tsv,
            parquet, arrow), header and blank lines not counted.
        problems: index in this batch to why the row is bad: "text is null". Bytes are counted from 0.
    """

    texts: Sequence[str | None]
    pairs: Sequence[str | None] | None
    kept: pa.RecordBatch
    places: Sequence[int]
    problems: Mapping[int, str]


class Columns(NamedTuple):
    """What to read.

    Attributes:
        text: None takes "text" if there is such a column, else the only column of strings.
        pair: the column of second texts.
        keep: the columns to carry to the output; None keeps the text columns.
    """

    text: str | None = None
    pair: str | None = None
    keep: tuple[str, ...] | None = None


class Source(Protocol):
    """A file of texts, or several that are one data set.

    Attributes:
        name: its path, or "standard input".
        num_rows: their number, where the file says so without being read (parquet, arrow files).
        unit: what `Rows.places` counts, "line" or "row".
        schema: of the kept columns.
    """

    name: str
    num_rows: int | None
    unit: str
    schema: pa.Schema

    def rows(self, first: int = 0) -> Iterator[Rows]:
        """The rows from number ``first`` on, counted from 0, bad ones included; at most 512 at a time.

        Raises:
            OSError, ValueError: the file itself cannot be read further; all rows before that have been yielded.
        """
        ...

    def fraction(self) -> float | None:
        """How much of the file was read, 0 to 1; None if that is unknown, as of a pipe."""
        ...


class ColumnNames(NamedTuple):
    """The names of the columns of one source, `Columns` resolved."""

    text: str
    pair: str | None
    keep: tuple[str, ...]

    @property
    def texts(self) -> tuple[str, ...]:
        return (self.text,) if self.pair is None else (self.text, self.pair)

    @property
    def all(self) -> tuple[str, ...]:
        """Each column once, those of texts first."""
        return tuple(dict.fromkeys((*self.texts, *self.keep)))


def resolved(source: str, columns: Columns, names: Sequence[str], strings: Sequence[str]) -> ColumnNames:
    """Which columns of a source are wanted.

    Args:
        source: its name, for messages.
        columns: what to read.
        names: all of its columns.
        strings: those that may hold texts.

    Raises:
        ValueError: a column is missing, stands there twice, or is not clear.
    """
    found = ", ".join(map(str, names)) or "none"
    text = columns.text
    if text is None:
        if "text" not in names and len(strings) != 1:
            raise ValueError(f"{source}: which column has the texts? Name it; the columns are: {found}")
        text = "text" if "text" in names else strings[0]
    texts = (text,) if columns.pair is None else (text, columns.pair)
    wanted = ColumnNames(text, columns.pair, texts if columns.keep is None else columns.keep)
    for name in wanted.all:
        if name not in names:
            raise ValueError(f"{source}: has no column {name}; the columns are: {found}")
        if names.count(name) > 1:
            raise ValueError(f"{source}: has {names.count(name)} columns named {name}; the columns are: {found}")
    return wanted


def not_utf8(error: UnicodeDecodeError) -> str:
    """Where bytes stop being UTF-8."""
    return f"not UTF-8 at byte {error.start} (0x{error.object[error.start]:02x})"


def half_character(error: UnicodeEncodeError) -> str:
    """Where a text holds what is no character."""
    return f"holds half a character, a lone surrogate, at place {error.start}"
