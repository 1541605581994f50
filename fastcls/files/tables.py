"""Files with typed columns: parquet and arrow."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.compute as compute
import pyarrow.parquet as pq

from ..texts import first_line
from .compression import failures
from .rows import BATCH_ROWS, ColumnNames, Columns, Rows, not_utf8, resolved

# Rows are read in greater numbers than they are handed on, as each read has a price; of documents fewer.
_READ_ROWS, _READ_BYTES = 8192, 4 << 20
_STRINGS = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
_BYTES = (
    pa.types.is_binary,
    pa.types.is_large_binary,
    pa.types.is_binary_view,
    pa.types.is_fixed_size_binary,
    # A column without one value.
    pa.types.is_null,
)


def rows_of(
    batch: pa.RecordBatch, wanted: ColumnNames, schema: pa.Schema, places: Sequence[int], problems: dict[int, str]
) -> Rows:
    """Rows of a batch that has the wanted columns. Texts are checked to be UTF-8, which not all writers do.

    Args:
        batch: it has each wanted column once.
        wanted: their names.
        schema: of the kept columns: strings for those of texts.
        places: see `Rows`.
        problems: what is bad already.
    """
    texts: dict[str, list[str | None]] = {}
    arrays: dict[str, pa.Array] = {}
    for name in wanted.texts:
        array = _decoded(batch.column(name), name, problems)
        texts[name], arrays[name] = array.to_pylist(), array
        if array.null_count:
            for row, text in enumerate(texts[name]):
                if text is None:
                    problems.setdefault(row, f"{name} is null")
    for field in schema:
        if field.name not in arrays:
            arrays[field.name] = _checked(batch.column(field.name), field, problems)
    if wanted.keep:
        kept = pa.RecordBatch.from_arrays([arrays[name] for name in wanted.keep], schema=schema)
    else:
        kept = batch.select([])
    return Rows(texts[wanted.text], None if wanted.pair is None else texts[wanted.pair], kept, places, problems)


def _decoded(column: pa.Array, name: str, problems: dict[int, str]) -> pa.StringArray:
    """A column of texts as valid strings; null where they are not UTF-8."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    # A cast from one kind of strings to another does not look at their bytes.
    column = column.cast(pa.binary())
    try:
        return column.cast(pa.string())
    except pa.ArrowInvalid:
        values: list[Any] = column.to_pylist()
        for row, value in enumerate(values):
            try:
                values[row] = None if value is None else value.decode()
            except UnicodeDecodeError as error:
                problems.setdefault(row, f"{name} is {not_utf8(error)}")
                values[row] = None
        return pa.array(values, pa.string())


def _checked(column: pa.Array, field: pa.Field, problems: dict[int, str]) -> pa.Array:
    """A kept column whose strings are valid; a value with one that is not is null, and its row bad."""
    if column.type != field.type:
        return _decoded(column, field.name, problems)
    try:
        column.validate(full=True)
        return column
    except pa.ArrowInvalid:
        pass
    if pa.types.is_dictionary(column.type):
        return _decoded(column, field.name, problems).cast(column.type)
    good = []
    for row in range(len(column)):
        try:
            column.slice(row, 1).validate(full=True)
        except pa.ArrowInvalid as error:
            problems.setdefault(row, f"{field.name} is not valid: {first_line(error)}")
            good.append(False)
        else:
            good.append(True)
    return compute.if_else(pa.array(good), column, pa.scalar(None, column.type))


class _Table:
    """What parquet and arrow files share."""

    num_rows: int | None = None
    unit = "row"

    def __init__(self, name: str, found: pa.Schema, columns: Columns) -> None:
        """Args:
        name: the path.
        found: the file's schema.
        columns: what to read.

        Raises:
            ValueError: a column is missing, or cannot hold texts.
        """
        self.name = name
        self._fraction: float | None = 0.0
        strings = [field.name for field in found if _is_any(_value_type(field.type), _STRINGS)]
        self._wanted = wanted = resolved(name, columns, found.names, strings)
        for text in wanted.texts:
            of_text = found.field(text).type
            if not _is_any(_value_type(of_text), (*_STRINGS, *_BYTES)):
                raise ValueError(f"{name}: column {text} must hold strings, it is {of_text}")
        self.schema = pa.schema(
            [(kept, pa.string() if kept in wanted.texts else found.field(kept).type) for kept in wanted.keep]
        )

    def fraction(self) -> float | None:
        return self._fraction

    def rows(self, first: int = 0) -> Iterator[Rows]:
        with self._batches(first) as (done, batches):
            while True:
                with failures(self.name, done):
                    batch = next(batches, None)
                if batch is None:
                    break
                for start in range(max(first - done, 0), batch.num_rows, BATCH_ROWS):
                    part = batch.slice(start, BATCH_ROWS)
                    place = done + start
                    if self.num_rows:
                        self._fraction = (place + part.num_rows) / self.num_rows
                    places = range(place + 1, place + part.num_rows + 1)
                    yield rows_of(part, self._wanted, self.schema, places, {})
                done += batch.num_rows
        self._fraction = 1.0

    def _batches(self, first: int) -> AbstractContextManager[tuple[int, Iterator[pa.RecordBatch]]]:
        """How many rows are skipped, at most ``first``, and the batches behind them."""
        raise NotImplementedError


class Parquet(_Table):
    """A parquet file."""

    def __init__(self, path: str, columns: Columns) -> None:
        """Args:
        path: the file.
        columns: what to read.

        Raises:
            OSError, ValueError: it is none, or see `_Table`.
        """
        with _opening(path, "parquet"), pq.ParquetFile(path) as file:
            metadata, schema = file.metadata, file.schema_arrow
        super().__init__(path, schema, columns)
        self.num_rows = metadata.num_rows
        self._groups = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self._rows_at_once = max(1, min(_READ_ROWS, _READ_BYTES // max(_bytes_of_row(metadata, self._wanted.all), 1)))

    @contextmanager
    def _batches(self, first: int) -> Iterator[tuple[int, Iterator[pa.RecordBatch]]]:
        done = skipped = 0
        while skipped < len(self._groups) and done + self._groups[skipped] <= first:
            done += self._groups[skipped]
            skipped += 1
        with failures(self.name, done):
            file = opened_parquet(self.name)
        with file:
            groups = range(skipped, len(self._groups))
            yield done, file.iter_batches(self._rows_at_once, row_groups=groups, columns=[*self._wanted.all])


def opened_parquet(path: str | os.PathLike[str]) -> pq.ParquetFile:
    """A parquet file of which no more is held than what is being read."""
    # Without a buffer all of a row group is read at once; with pre_buffer, since pyarrow 25 the default, all that was
    # read is held until the file is closed.
    return pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)


def _bytes_of_row(metadata: pq.FileMetaData, names: Sequence[str]) -> int:
    """The mean bytes of a row in some columns, of the row group where they are the most."""
    paths = [metadata.schema.column(place).path for place in range(metadata.num_columns)]
    # The fields of a struct are columns of their own.
    places = [place for place, path in enumerate(paths) if any(f"{path}.".startswith(f"{name}.") for name in names)]
    groups = (metadata.row_group(index) for index in range(metadata.num_row_groups))
    sizes = ((sum(group.column(place).total_uncompressed_size for place in places), group.num_rows) for group in groups)
    return max((size // max(rows, 1) for size, rows in sizes), default=0)


class Arrow(_Table):
    """Arrow files, each in the format of files or of streams, that are one data set."""

    def __init__(self, name: str, paths: Sequence[str], columns: Columns) -> None:
        """Args:
        name: what they are called together.
        paths: the files, at least one, of one schema.
        columns: what to read.

        Raises:
            OSError, ValueError: one is no such file, or see `_Table`.
        """
        self._paths = paths
        schemas = []
        for path in paths:
            with _opening(path, "arrow"), pa.memory_map(path) as file:
                schemas.append(_arrow_reader(file, None).schema)
        for path, schema in zip(paths, schemas, strict=True):
            if not schema.equals(schemas[0]):
                raise ValueError(f"{path}: its columns are not those of {paths[0]}")
        super().__init__(name, schemas[0], columns)
        counts = [_count(path) for path in paths]
        known = [count for count in counts if count is not None]
        self.num_rows = sum(known) if len(known) == len(counts) else None

    @contextmanager
    def _batches(self, first: int) -> Iterator[tuple[int, Iterator[pa.RecordBatch]]]:  # noqa: ARG002
        # Batches that are skipped are not read: in a mapped file they are addresses.
        yield 0, self._read()

    def _read(self) -> Iterator[pa.RecordBatch]:
        for path in self._paths:
            # Some writers put all rows into one batch, which no memory may hold: it is mapped.
            with pa.memory_map(path) as file:
                yield from _arrow_batches(_arrow_reader(file, self._wanted.all))


def _arrow_reader(file: pa.MemoryMappedFile, columns: Sequence[str] | None) -> Any:
    """A reader of either format."""
    is_file = file.read(6) == b"ARROW1"
    file.seek(0)
    opened = pa.ipc.open_file if is_file else pa.ipc.open_stream
    reader = opened(file)
    if columns is None:
        return reader
    places = [reader.schema.names.index(name) for name in columns]
    file.seek(0)
    return opened(file, options=pa.ipc.IpcReadOptions(included_fields=places))


def _arrow_batches(reader: Any) -> Iterator[pa.RecordBatch]:
    if isinstance(reader, pa.ipc.RecordBatchFileReader):
        return (reader.get_batch(place) for place in range(reader.num_record_batches))
    return iter(reader)


def _count(path: str) -> int | None:
    """The number of rows; None if a file breaks off, of which the rows before can be read."""
    with pa.memory_map(path) as file:
        names = _arrow_reader(file, None).schema.names
        file.seek(0)
        try:
            # Compressed batches are decompressed, so of one column alone.
            return sum(batch.num_rows for batch in _arrow_batches(_arrow_reader(file, names[:1])))
        except (OSError, pa.ArrowException):
            return None


def saved_files(folder: str) -> list[str]:
    """The arrow files of a data set that ``save_to_disk`` wrote.

    Raises:
        ValueError: the folder holds none, or several splits.
    """
    if os.path.isfile(os.path.join(folder, "dataset_dict.json")):
        with open(os.path.join(folder, "dataset_dict.json"), encoding="utf-8") as file:
            splits = json.load(file).get("splits", [])
        folders = ", ".join(os.path.join(folder, split) for split in splits)
        raise ValueError(f"{folder}: holds splits, name one of their folders: {folders}")
    state = os.path.join(folder, "state.json")
    if not os.path.isfile(state):
        raise ValueError(f"{folder}: is a folder, but no data set that datasets' save_to_disk wrote; name files")
    with open(state, encoding="utf-8") as file:
        content = json.load(file)
    if content.get("_indices_data_files"):
        raise ValueError(f"{folder}: keeps its rows in another order; save it again with datasets 2 or later")
    files = [os.path.join(folder, entry["filename"]) for entry in content["_data_files"]]
    if not files:
        raise ValueError(f"{folder}: names no file in its state.json")
    return files


@contextmanager
def _opening(path: str, kind: str) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path}: cannot be read as {kind}: {first_line(error)}") from error


def _value_type(of_column: pa.DataType) -> pa.DataType:
    return of_column.value_type if pa.types.is_dictionary(of_column) else of_column


def _is_any(found: pa.DataType, kinds: Sequence[Any]) -> bool:
    return any(kind(found) for kind in kinds)
