"""From a table's texts to its new columns: which column is read, what is refused, what is computed."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from ..engine.batch import shortened
from ..flow import MAX_ROWS, Flow
from ..results import Answers
from ..texts import Item
from .kinds import Columns, Table

if TYPE_CHECKING:
    import pyarrow


Errors = Literal["raise", "null", "column"]


def check_errors(errors: object) -> None:
    """Checks a value of ``errors``.

    Raises:
        ValueError: one that does not exist.
    """
    if errors not in get_args(Errors):
        raise ValueError(f"errors must be one of {', '.join(get_args(Errors))}, got {errors!r}")


class Job(NamedTuple):
    """What is asked of a table.

    Attributes:
        text: the column of texts; None is "text", or the only column of strings.
        pair: the column of second texts, if texts are pairs.
        results: makes columns of logits.
        flow: computes texts in windows; of what was computed only the results are kept.
        errors: "raise" for a text that cannot be classified, "null" for null results, or "column" for these and a
            column that says why.
    """

    text: Hashable | None
    pair: Hashable | None
    results: Answers
    flow: Flow
    errors: Errors

    @property
    def schema(self) -> pyarrow.Schema:
        """Of the new columns."""
        import pyarrow

        schema = self.results.schema
        if self.errors == "column":
            schema = schema.append(pyarrow.field(f"{self.results.prefix}error", pyarrow.string()))
        return schema


def text_column(read: Columns, job: Job) -> Any:
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
    taken = [name for name in job.schema.names if name in names]
    if taken:
        prefix = job.results.prefix
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


class _Window(NamedTuple):
    """Some rows: the number of the first one, and why the values of some are no text, by their place."""

    start: int
    problems: dict[int, str]


def _read(read: Table, text: Any, job: Job, start: int) -> tuple[list[Item | None], _Window]:
    """The texts of a window's rows."""
    names = _columns_to_read(text, job)
    columns = [read.values(name, start, start + MAX_ROWS) for name in names]
    items, problems = list[Item | None](), dict[int, str]()
    for row, values in enumerate(zip(*columns, strict=True)):
        for name, value in zip(names, values, strict=True):
            if not isinstance(value, str) and row not in problems:
                found = "is null" if value is None else f"must be a string, got {shortened(value)}"
                problems[row] = f"{name} {found}"
        items.append(None if row in problems else Item(values[0], values[1] if len(values) > 1 else None))
    return items, _Window(start, problems)


def computed(read: Table, text: Any, job: Job, first: int = 0) -> pyarrow.Table:
    """The new columns; `first` is the number of the table's first row, for messages."""
    import pyarrow

    batches = []
    windows = (_read(read, text, job, start) for start in range(0, read.num_rows, MAX_ROWS))
    for scored, window in job.flow.run(windows):
        if scored.problems and job.errors == "raise":
            row, problem = min(scored.problems.items())
            raise ValueError(f"column {text!r} in row {first + window.start + row} (from 0) {problem}")
        found = job.results.columns_of(scored)
        if job.errors == "column":
            problems = {**window.problems, **{row: f"the text {why}" for row, why in scored.problems.items()}}
            reasons = pyarrow.array(map(problems.get, range(found.num_rows)), pyarrow.string())
            found = pyarrow.RecordBatch.from_arrays([*found.columns, reasons], schema=job.schema)
        batches.append(found)
    return pyarrow.Table.from_batches(batches, schema=job.schema)
