"""Tables in, the same kind out with columns of labels added: pandas, polars, pyarrow, datasets."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from .job import Errors, Job, check_errors, check_values, computed, text_column
from .kinds import SPLITS, STREAM, ArrowTable, Rows, Table, kind_of, read

__all__ = ["Errors", "Job", "check_errors", "with_results"]

# A stream's rows may be large, and wait until their texts are classified.
_STREAM_WINDOW = 1000


def with_results(table: Any, job: Job) -> Any:
    """A table of any kind, with the columns that a job asks for.

    Raises:
        TypeError: no table, or of another kind; a column of another type; a value that is no string.
        ValueError: columns that are not there, or there already; a null; a text that cannot be classified;
            another value of ``errors``.
    """
    check_errors(job.errors)
    if kind_of(table) in SPLITS:
        # Each split is checked before the first is computed.
        ready = {name: _ready(split, job) for name, split in table.items()}
        return type(table)({name: finish() for name, finish in ready.items()})
    return _ready(table, job)()


def _ready(table: Any, job: Job) -> Callable[[], Any]:
    """What computes a table's results, once the table is known to fit."""
    if kind_of(table) == STREAM:
        return partial(_streamed, table, _job_of_stream(table, job))
    given = read(table)
    text = text_column(given, job)
    if job.errors == "raise":
        check_values(given, text, job)
    return lambda: given.extended(computed(given, text, job))


class _OfBatch:
    """What a stream calls with each batch of its rows, in the form of its format. Worker processes can have a copy."""

    def __init__(self, job: Job) -> None:
        self._job = job

    def __call__(self, batch: Any, numbers: Sequence[int]) -> Any:
        job, first = self._job, numbers[0]
        given: Table = Rows(batch) if isinstance(batch, Mapping) else read(batch)
        text = text_column(given, job)
        if job.errors == "raise":
            check_values(given, text, job, first)
        return given.extended(computed(given, text, job, first))


def _job_of_stream(stream: Any, job: Job) -> Job:
    """With the column of texts named, as it should be the same in each batch."""
    if stream.features is None:
        # Only its rows can tell.
        return job if job.text is not None else job._replace(text="text")
    return job._replace(text=text_column(ArrowTable(stream.features.arrow_schema.empty_table()), job))


def _streamed(stream: Any, job: Job) -> Any:
    features = stream.features
    if features is not None:
        kinds = sys.modules["datasets"].Features
        features = kinds({**features, **kinds.from_arrow_schema(job.schema)})
    return stream.map(_OfBatch(job), with_indices=True, batched=True, batch_size=_STREAM_WINDOW, features=features)
