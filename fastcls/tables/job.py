"""From a table's texts to its new columns: which column is read, what is refused, what is computed."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ..engine.batch import shortened
from ..flow import MAX_ROWS, Flow
from ..results import Results
from ..texts import Item
from .kinds import Table

if TYPE_CHECKING:
    import pyarrow


class Job(NamedTuple):
    """What is asked of a table.

    Attributes:
        text: the column of texts; None is "text", or the only column of strings.
        pair: the column of second texts, if texts are pairs.
        results: makes columns of logits.
        flow: computes texts in windows; of what was computed only the results are kept.
        errors: "raise" for a text that cannot be classified, or "null" for null results.
    """

    text: Hashable | None
    pair: Hashable | None
    results: Results
    flow: Flow
    errors: Literal["raise", "null"]


def text_column(read: Table, job: Job) -> Any:
    """The column of texts, once all columns are known to fit."""
    text = job.text
    if text is None:
        strings = [name for name in read.names if name != job.pair and read.kind(name) == "strings"]
        if "text" in read.names:
            text = "text"
        elif len(strings) == 1:
            text = strings[0]
        else:
            found = f"several of strings, {_shown(strings)}" if strings else f"none of strings: {_shown(read.names)}"
            raise ValueError(f"text_column must name a column, as the table has no column 'text' and {found}")
    _check_names(read.names, text, job)
    for name in _columns_to_read(text, job):
        if (kind := read.kind(name)) not in ("strings", "perhaps"):
            raise TypeError(f"column {name!r} must hold strings, got {kind}")
    return text


def _check_names(names: Sequence[Any], text: Any, job: Job) -> None:
    for option, name in (("text_column", text), ("pair_column", job.pair)):
        if name is not None and names.count(name) != 1:
            found = f"which {names.count(name)} columns have" if name in names else f"columns: {_shown(names)}"
            raise ValueError(f"{option} must name a column of the table, got {name!r}; {found}")
    taken = [name for name in job.results.schema.names if name in names]
    if taken:
        prefix = job.results.wanted.prefix
        remedy = f"another prefix than {prefix!r}" if prefix else 'prefix="predicted_"'
        raise ValueError(f"the table has a column {taken[0]!r} already: pass {remedy}, or rename that column")


def _columns_to_read(text: Any, job: Job) -> list[Any]:
    return [text] if job.pair is None else [text, job.pair]


def _shown(names: Sequence[Any]) -> str:
    return ", ".join(map(repr, names[:12])) + (", ..." if len(names) > 12 else "")


def check_values(read: Table, text: Any, job: Job, first: int = 0) -> None:
    """Refuses what is no string; ``first`` is the number of the table's first row, for messages."""
    for name in _columns_to_read(text, job):
        if read.is_clean(name):
            continue
        for start in range(0, read.num_rows, MAX_ROWS):
            for row, value in enumerate(read.values(name, start, start + MAX_ROWS), first + start):
                if not isinstance(value, str):
                    problem = "is null" if value is None else f"must be a string, got {shortened(value)}"
                    raise (ValueError if value is None else TypeError)(
                        f'column {name!r} in row {row} (from 0) {problem}: errors="null" gives null results there'
                    )


def _items(read: Table, text: Any, pair: Any, start: int, stop: int) -> list[Item | None]:
    firsts = read.values(text, start, stop)
    if pair is None:
        return [Item(first, None) if isinstance(first, str) else None for first in firsts]
    seconds = read.values(pair, start, stop)
    return [
        Item(first, second) if isinstance(first, str) and isinstance(second, str) else None
        for first, second in zip(firsts, seconds, strict=True)
    ]


def computed(read: Table, text: Any, job: Job, first: int = 0) -> pyarrow.Table:
    """The new columns; `first` is the number of the table's first row, for messages."""
    import pyarrow

    def windows() -> Iterator[tuple[list[Item | None], int]]:
        for start in range(0, read.num_rows, MAX_ROWS):
            yield _items(read, text, job.pair, start, start + MAX_ROWS), start

    batches = []
    for scored, start in job.flow.run(windows()):
        if scored.problems and job.errors == "raise":
            row, problem = min(scored.problems.items())
            raise ValueError(f"column {text!r} in row {first + start + row} (from 0) {problem}")
        batches.append(job.results.columns_of(scored))
    return pyarrow.Table.from_batches(batches, schema=job.results.schema)
