"""A run from sources to an output: rows in windows through a flow, results written shard by shard."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import pyarrow as pa
import torch
from torch import Tensor

from ..flow import MAX_CHARACTERS, MAX_ROWS, Scored
from ..results import Answers
from ..texts import Item
from .manifest import Position, Shard
from .rows import Rows
from .sources import Source

_T = TypeVar("_T")

# A shard is what a run that was ended early computes once more; a whole number of windows.
SHARD_ROWS = 16 * MAX_ROWS


class Windows(Protocol):
    """Computes windows of texts in their order: a `Flow`, or several in other processes."""

    def run(self, windows: Iterable[tuple[Sequence[Item | None], _T]]) -> Iterator[tuple[Scored, _T]]: ...


class Target(Protocol):
    """What rows are written to."""

    @property
    def start(self) -> Position: ...
    def write(self, batch: pa.RecordBatch, errors: Sequence[Mapping[str, Any]]) -> None: ...
    def finish_shard(self, shard: Shard) -> None: ...


class Totals(NamedTuple):
    """What a run has done so far.

    Attributes:
        rows: rows of the input, bad ones included.
        bad: rows that went to the errors file.
        cut: texts that were cut.
        repeated: rows that stand for a text that stood in their window before.
        not_finite: rows with a number that is infinite or none.
        tokens: tokens that were computed.
        busy: seconds for which the model was busy.
        seconds: seconds since the run began.
        read: how much of the input was read, from 0 to 1; None if nobody knows.
    """

    rows: int = 0
    bad: int = 0
    cut: int = 0
    repeated: int = 0
    not_finite: int = 0
    tokens: int = 0
    busy: float = 0.0
    seconds: float = 0.0
    read: float | None = None


class _Window(NamedTuple):
    """Rows of one window, and what is known of them before they are computed.

    Attributes:
        kept: the columns that go to the output as they are.
        sources: of each row its source.
        places: of each row the number of its line or row there.
        problems: of bad rows.
        end: the row behind the last.
        ends_shard: whether a shard ends with it.
    """

    kept: pa.RecordBatch
    sources: list[Source]
    places: list[int]
    problems: dict[int, str]
    end: Position
    ends_shard: bool


class BadRow(ValueError):  # noqa: N818  # it is the row that is bad
    """A bad row, where none is allowed."""


def run(
    flow: Windows,
    sources: Sequence[Source],
    results: Answers,
    target: Target,
    *,
    shard_rows: int = SHARD_ROWS,
    keep_bad_rows: bool = False,
    strict: bool = False,
    report: Callable[[Totals], None] = lambda _: None,
) -> Totals:
    """Computes all rows of the sources behind the target's start, and writes them.

    Args:
        flow: what computes them.
        sources: the input, in its order; the kept columns of all have one schema.
        results: what is written of each row behind the kept columns.
        target: where it is written.
        shard_rows: rows of a shard.
        keep_bad_rows: write rows without an answer, too, so that row i of the output is row i of the input.
        strict: stop at the first bad row.
        report: called after each window.

    Raises:
        BadRow: a bad row, with ``strict``, behind the rows before it.
        OSError, ValueError: a source that cannot be read further, behind the rows before; a target that cannot be
            written.
    """
    started = time.perf_counter()
    failures: list[Exception] = []
    totals = Totals()
    shard = Shard(0, 0, 0, 0, 0, target.start)
    for scored, window in flow.run(_windows(sources, target.start, shard_rows, failures)):
        problems = {**window.problems, **{row: f"the text {why}" for row, why in scored.problems.items()}}
        missing = sorted(problems)
        errors = [
            {"file": window.sources[row].name, window.sources[row].unit: window.places[row], "reason": problems[row]}
            for row in missing
        ]
        batch = _beside(window.kept, results.columns_of(scored))
        if errors and strict:
            target.write(batch.slice(0, missing[0]), ())
            source, row = window.sources[missing[0]], missing[0]
            raise BadRow(f"{source.name}, {source.unit} {window.places[row]}: {problems[row]}")
        if missing and not keep_bad_rows:
            good = torch.ones(batch.num_rows, dtype=torch.bool)
            good[missing] = False
            batch = batch.filter(pa.array(good.numpy()))
        target.write(batch, errors)
        not_finite = _not_finite(scored.scores, missing)
        rows = window.kept.num_rows
        shard = Shard(
            shard.rows + rows,
            shard.bad + len(errors),
            shard.cut + scored.cut,
            shard.not_finite + not_finite,
            shard.tokens + scored.tokens,
            window.end,
        )
        totals = Totals(
            totals.rows + rows,
            totals.bad + len(errors),
            totals.cut + scored.cut,
            totals.repeated + scored.repeated,
            totals.not_finite + not_finite,
            totals.tokens + scored.tokens,
            totals.busy + scored.seconds,
            time.perf_counter() - started,
            _read(sources, window.end),
        )
        if window.ends_shard:
            target.finish_shard(shard)
            shard = Shard(0, 0, 0, 0, 0, window.end)
        report(totals)
    if failures:
        # The rows since the last shard are read once more, so that all but the last shard are of one size.
        raise failures[0]
    if shard.rows:
        target.finish_shard(shard)
    return totals._replace(seconds=time.perf_counter() - started)


def _read(sources: Sequence[Source], end: Position) -> float | None:
    fraction = sources[min(end.source, len(sources) - 1)].fraction()
    return None if fraction is None else (end.source + fraction) / len(sources)


def _not_finite(scores: Tensor, missing: Sequence[int]) -> int:
    bad = ~scores.isfinite().all(1)
    bad[list(missing)] = False
    return int(bad.sum())


def _beside(kept: pa.RecordBatch, found: pa.RecordBatch) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays([*kept.columns, *found.columns], schema=pa.schema([*kept.schema, *found.schema]))


class _Gathered:
    """The rows of a window that is being filled."""

    def __init__(self) -> None:
        self.items: list[Item | None] = []
        self.kept: list[pa.RecordBatch] = []
        self.sources: list[Source] = []
        self.places: list[int] = []
        self.problems: dict[int, str] = {}
        self.characters = 0

    def add(self, rows: Rows, source: Source, first: int, count: int) -> int:
        """Takes at most ``count`` rows from ``first`` on, as far as the window's characters go; how many it took."""
        last = first
        offset = len(self.items) - first
        for row in range(first, min(first + count, len(rows.texts))):
            if self.characters >= MAX_CHARACTERS:
                break
            text, pair = rows.texts[row], None if rows.pairs is None else rows.pairs[row]
            if row in rows.problems or text is None:
                self.problems[row + offset] = rows.problems[row]
                self.items.append(None)
            else:
                self.items.append(Item(text, pair))
                self.characters += len(text) + len(pair or "")
            self.sources.append(source)
            self.places.append(rows.places[row])
            last = row + 1
        if last > first:
            self.kept.append(rows.kept.slice(first, last - first))
        return last - first

    def window(self, end: Position, ends_shard: bool) -> tuple[list[Item | None], _Window]:
        kept = pa.concat_batches(self.kept)
        return self.items, _Window(kept, self.sources, self.places, self.problems, end, ends_shard)


def _windows(
    sources: Sequence[Source], start: Position, shard_rows: int, failures: list[Exception]
) -> Iterator[tuple[list[Item | None], _Window]]:
    """The rows of all sources in windows, none of which reaches from one shard into the next.

    An error ends them and goes to ``failures``: raised here, it would overtake the windows that are under way.
    """
    gathered, in_shard = _Gathered(), 0
    for rows, source, begin in _until_failure(_batches(sources, start), failures):
        taken = 0
        while taken < len(rows.texts):
            room = min(MAX_ROWS - len(gathered.items), shard_rows - in_shard)
            count = gathered.add(rows, source, taken, room)
            taken += count
            in_shard += count
            is_full = len(gathered.items) == MAX_ROWS or gathered.characters >= MAX_CHARACTERS
            if is_full or in_shard == shard_rows:
                yield gathered.window(Position(begin.source, begin.row + taken), in_shard == shard_rows)
                gathered, in_shard = _Gathered(), in_shard % shard_rows
        end = Position(begin.source, begin.row + taken)
    if gathered.items:
        yield gathered.window(end, False)


def _until_failure(items: Iterator[_T], failures: list[Exception]) -> Iterator[_T]:
    try:
        yield from items
    except Exception as error:
        failures.append(error)


def _batches(sources: Sequence[Source], start: Position) -> Iterator[tuple[Rows, Source, Position]]:
    """The sources' rows from a position on, and where each batch of them begins."""
    for index in range(start.source, len(sources)):
        row = start.row if index == start.source else 0
        for rows in sources[index].rows(row):
            yield rows, sources[index], Position(index, row)
            row += len(rows.texts)
