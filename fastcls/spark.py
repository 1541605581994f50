"""Spark: a model over PySpark's frames, loaded once a Python worker, whose weights a machine holds once.

labelled = fastcls.spark.predict(spark.read.parquet("reviews/"), "your/bert-classifier")
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import pyarrow as pa

from .flow import MAX_ROWS, Flow
from .predicting.checkpoint import fingerprint, key_of, read_files, write_files
from .predicting.loaded import Loaded, answers_of, load_shared
from .predicting.options import PredictOptions
from .predicting.predictor import set_threads
from .tables import Errors, Job, check_errors, with_results
from .tables.job import text_column as found_text_column
from .texts import read_count

if TYPE_CHECKING:
    from pyspark import Broadcast
    from pyspark.sql import DataFrame, SparkSession
    from pyspark.sql.types import DataType, StructField

__all__ = ["PredictMaker", "predict"]


@dataclass(frozen=True)
class _Sent:
    """Gives, in an executor, the folder of a checkpoint or its name on the hub."""

    key: str  # tells the checkpoint from another of the same name
    name: str = field(compare=False)
    files: Broadcast[dict[str, bytes]] | None = field(compare=False)

    def __call__(self) -> str:
        files = self.files
        return self.name if files is None else write_files(self.key, lambda: files.value)


class _Asked(NamedTuple):
    """What a Python worker does with rows, as it is sent there."""

    checkpoint: _Sent
    options: PredictOptions
    threads: int
    names: list[str]
    text: str
    pair: str | None
    errors: Errors

    def job(self) -> Job:
        loaded = _loaded(self.checkpoint, self.options, self.threads)
        return Job(self.text, self.pair, loaded.answers, loaded.flow, self.errors)


# Spark hands a worker from one stage to another, and each stage of a job may have a model of its own.
@lru_cache(maxsize=3)
def _loaded(checkpoint: _Sent, options: PredictOptions, threads: int) -> Loaded:
    set_threads(threads)
    return load_shared(checkpoint, options)


def predict(
    frame: DataFrame,
    model: str,
    *,
    text_column: str | None = None,
    pair_column: str | None = None,
    errors: Errors = "column",
    threads: int = 1,
    window_rows: int = MAX_ROWS,
    broadcast: bool = True,
    **options: Any,
) -> DataFrame:
    """A frame with the model's columns added, computed where and when Spark computes it.

    Rows keep their columns and, within a partition, their order. The driver reads the config and the tokenizer alone.

    Args:
        frame: a frame of PySpark.
        model: a folder with a checkpoint, whose files the executors are sent, or a name on the hub.
        text_column: the column of texts; None is "text", or else the only column of strings.
        pair_column: the column of second texts, where texts are pairs.
        errors: what becomes of a text that is null or cannot be computed. "column" gives nulls and says why in a column
            "error", "null" gives nulls, "raise" ends the job.
        threads: CPU threads of a Python worker, of which an executor has one a core.
        window_rows: Spark's batches are gathered to up to so many rows, of which up to 4,096 are computed at once.
        broadcast: whether executors are sent a folder's files; without it each of them must see the folder.
        options: see `fastcls.predicting.options.PredictOptions`.

    Raises:
        ImportError: PySpark is not installed.
        TypeError: something that is no frame of PySpark, a column that holds no strings, an option that does not exist.
        ValueError: a column that is not there, or is already; an option's value; with Spark Connect a folder to send.
        OSError: as `Classifier.from_pretrained`.
    """
    _require_pyspark()
    from pyspark.sql import DataFrame
    from pyspark.sql.types import StructType

    if not isinstance(frame, DataFrame):
        raise TypeError(f"frame must be a pyspark.sql.DataFrame, got {type(frame).__module__}.{type(frame).__name__}")
    read_count("window_rows", window_rows)
    asked, job = _checked(model, text_column, pair_column, errors, threads, options)
    text = found_text_column(_Columns(frame), job)
    added = _spark_fields(job.schema)
    _check_names(frame, added, job)
    task = _Asked(_sent(model, frame.sparkSession, broadcast), asked, threads, frame.columns, text, pair_column, errors)
    # By name, mapInArrow would look for a column "a.b" as the field b of a column "a".
    numbered = frame.toDF(*map(str, range(len(frame.columns))))
    return numbered.mapInArrow(partial(_mapped, task, window_rows), StructType([*frame.schema.fields, *added]))


class PredictMaker:
    """Makes, in a Python worker, the function that ``pyspark.ml.functions.predict_batch_udf`` calls with texts.

        make = fastcls.spark.PredictMaker("your/bert-classifier")
        classify = predict_batch_udf(make, return_type=make.return_type, batch_size=4096)
        frame.withColumn("answer", classify("text"))

    A text that is null, or cannot be computed, has nulls for results, and for a vector one of NaN: this interface knows
    no null among vectors. Scores that are NaN it makes null.

    Args:
        model, threads, broadcast, options: see `predict`; without lists and structs in the results.
        pairs: whether the function takes two columns, the texts and the second ones.
        errors: see `predict`; rows in messages are counted in their batch.

    Attributes:
        return_type: of a vector an array, or else a struct with a field for each column of `predict`.

    Raises:
        ImportError, TypeError, ValueError, OSError: see `predict`.
    """

    def __init__(
        self,
        model: str,
        *,
        pairs: bool = False,
        errors: Errors = "null",
        threads: int = 1,
        broadcast: bool = True,
        **options: Any,
    ) -> None:
        _require_pyspark()
        from pyspark.sql import SparkSession
        from pyspark.sql.types import StructType

        pair = "pair" if pairs else None
        asked, job = _checked(model, "text", pair, errors, threads, options)
        for name in ("top_k", "threshold", "all_scores", "logits"):
            if (value := getattr(asked, name)) is not None and value is not False:
                raise ValueError(f"{name} must be left out: predict_batch_udf takes no nested structs, predict does")
        fields = _spark_fields(job.schema)
        self.return_type: DataType = fields[0].dataType if len(fields) == 1 else StructType(fields)
        sent = _sent(model, SparkSession.getActiveSession(), broadcast)
        self._asked = _Asked(sent, asked, threads, [], "text", pair, errors)

    def __call__(self) -> Callable[..., Any]:
        """The function. PySpark counts its parameters."""
        job = self._asked.job()

        if job.pair is None:
            return lambda texts: _answers(job, {"text": texts})
        return lambda texts, pairs: _answers(job, {"text": texts, "pair": pairs})


def _require_pyspark() -> None:
    try:
        import pyspark.sql.pandas.types  # noqa: F401
    except ImportError as error:
        raise ImportError(f'PySpark must be installed: pip install "fastcls[spark]" ({error})') from error


def _checked(
    model: str, text: str | None, pair: str | None, errors: Errors, threads: int, options: dict[str, Any]
) -> tuple[PredictOptions, Job]:
    """What is computed, and a job that knows its columns, once all values are known to exist."""
    asked = PredictOptions.of(options)
    asked.check()
    read_count("threads", threads)
    check_errors(errors)
    # The driver asks the job for its columns alone, and loads no model.
    return asked, Job(text, pair, answers_of(model, asked), cast(Flow, None), errors)


class _Columns:
    """The columns of a frame, whose rows are not on the driver."""

    def __init__(self, frame: DataFrame) -> None:
        self.names, self._schema = list[Any](frame.columns), frame.schema

    def kind(self, name: Any) -> str:
        from pyspark.sql.types import CharType, NullType, StringType, VarcharType

        found = self._schema[name].dataType
        if isinstance(found, (StringType, CharType, VarcharType)):
            return "strings"
        return "perhaps" if isinstance(found, NullType) else found.simpleString()


def _check_names(frame: DataFrame, added: list[StructField], job: Job) -> None:
    """Refuses names that Spark would not keep apart in the result, or fail at without saying why."""
    names = frame.columns
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"the frame must have no two columns of one name, got {twice[0]!r}: rename one of them")
    if frame.sparkSession.conf.get("spark.sql.caseSensitive") == "true":
        return
    old = {name.lower(): name for name in names}
    for each in added:
        if (found := old.get(each.name.lower())) is not None:
            raise ValueError(
                f"the frame has a column {found!r}, which Spark cannot tell from {each.name!r}: pass another prefix "
                f"than {job.results.prefix!r}, or rename that column"
            )


def _spark_fields(schema: pa.Schema) -> list[StructField]:
    from pyspark.sql.pandas.types import from_arrow_schema

    return list(from_arrow_schema(_as_lists(schema)).fields)


def _as_lists(schema: pa.Schema) -> pa.Schema:
    """With lists of any length in place of vectors, which Spark's reader of Arrow does not know."""
    kinds = (pa.list_(each.value_type) if pa.types.is_fixed_size_list(each) else each for each in schema.types)
    return pa.schema([each.with_type(kind) for each, kind in zip(schema, kinds, strict=True)], schema.metadata)


def _sent(model: str, session: SparkSession | None, broadcast: bool) -> _Sent:
    if not Path(model).is_dir():
        return _Sent(fingerprint(model), model, None)
    folder = os.path.abspath(model)
    if not broadcast:
        return _Sent(fingerprint(folder), folder, None)
    # Sessions of Spark Connect have none.
    context = getattr(session, "sparkContext", None)
    if context is None:
        why = "no Spark session is active that sends" if session is None else "Spark Connect does not send"
        raise ValueError(
            "model must be a name on the hub, or with broadcast=False a folder that each executor sees, got the folder "
            f"{model}: {why} its files"
        )
    files = read_files(folder)
    return _Sent(key_of(files), folder, context.broadcast(files))


def _mapped(task: _Asked, window_rows: int, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """The batches of a partition with the new columns."""
    first = 0
    for table in _gathered(batches, window_rows):
        job = task.job()
        try:
            found = with_results(table.rename_columns(task.names), job)
        except ValueError as error:
            raise ValueError(f"rows {first:,} to {first + table.num_rows:,} of a partition: {error}") from error
        first += table.num_rows
        yield from found.cast(_as_lists(found.schema)).to_batches()


def _gathered(batches: Iterable[pa.RecordBatch], rows: int) -> Iterator[pa.Table]:
    """Tables of as many batches as make up to so many rows."""
    held, count = list[pa.RecordBatch](), 0
    for batch in batches:
        if held and count + batch.num_rows > rows:
            yield pa.Table.from_batches(held)
            held, count = [], 0
        held.append(batch)
        count += batch.num_rows
    if count:
        yield pa.Table.from_batches(held)


def _answers(job: Job, texts: dict[str, Any]) -> Any:
    """The new columns as arrays of NumPy, by their names; of a single one the array."""
    # What pandas has for null, None or NaN, is one here.
    table = pa.table({name: pa.array(values, from_pandas=True) for name, values in texts.items()})
    found = with_results(table, job).select(job.schema.names)
    arrays = {name: _numpy(found.column(name).combine_chunks()) for name in job.schema.names}
    return arrays if len(arrays) > 1 else next(iter(arrays.values()))


def _numpy(column: pa.Array) -> Any:
    kind = column.type
    if pa.types.is_fixed_size_list(kind):
        # The values of a null vector are NaN.
        return column.values.to_numpy().reshape(len(column), kind.list_size)
    # Of integers with nulls pyarrow would make floats.
    return column.to_numpy(False) if pa.types.is_floating(kind) else np.array(column.to_pylist(), dtype=object)
