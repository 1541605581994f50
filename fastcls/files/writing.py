"""Writing Arrow batches: Parquet, JSON lines, CSV and TSV, also compressed, and .npy of vectors."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from ..flow import MAX_ROWS
from .tables import opened_parquet

_ENDINGS = {".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "tsv", ".npy": "npy"}
_COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
# A row group of Parquet ends with the batch that brings it to so many bytes in memory, or rows.
_GROUP_BYTES, _GROUP_ROWS = 16 << 20, 1 << 20
# What JSON and CSV have no form for.
_BINARY = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary, pa.types.is_binary_view)


class Form(NamedTuple):
    """The form of a file that is written.

    Attributes:
        name: "parquet", "jsonl", "csv", "tsv" or "npy".
        compression: "gzip" or "zstd" of lines, or None.
        ending: of its files' names.
    """

    name: str
    compression: str | None
    ending: str

    @classmethod
    def of(cls, name: str) -> Form | None:
        """The form that the ending of a file's name says, or None."""
        path = Path(name)
        compression = _COMPRESSED.get(path.suffix.lower())
        inner = Path(path.stem).suffix if compression else path.suffix
        found = _ENDINGS.get(inner.lower())
        if found is None or (compression and found in ("parquet", "npy")):
            return None
        return cls(found, compression, inner + (path.suffix if compression else ""))

    @classmethod
    def asked(cls, ending: str) -> Form | None:
        """The form of an ending without its first dot, as "csv.gz", or None."""
        return cls.of(f"name.{ending}")

    @property
    def keeps_bad_rows(self) -> bool:
        """Whether a row that has no answer stands in the output all the same, so that row i is row i of the input."""
        return self.name == "npy"


class Writer(Protocol):
    """A file that is being written."""

    def write(self, batch: pa.RecordBatch) -> None: ...
    def close(self) -> None: ...


def check_schema(schema: pa.Schema, form: Form) -> None:
    """Checks that a form can hold columns.

    Raises:
        ValueError: a column of a type that it cannot hold; of .npy any but one of vectors.
    """
    if form.name == "npy" and not (len(schema) == 1 and pa.types.is_fixed_size_list(schema.types[0])):
        raise ValueError(f"a .npy file must hold vectors and nothing else, got {', '.join(schema.names)}")
    if form.name in ("parquet", "npy"):
        return
    for field in schema:
        if _holds_bytes(field.type):
            raise ValueError(f"column {field.name} must have a form in {form.name}, got {field.type}: write .parquet")
    if form.name != "jsonl":
        names = _flat(_empty(schema)).schema.names
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"columns of {form.name} must have different names, got two columns {twice[0]}")


def open_writer(file: Path | BinaryIO, form: Form, schema: pa.Schema, *, header: bool = True) -> Writer:
    """Opens a file for batches of a schema that `check_schema` has passed.

    Args:
        file: where to write: a path, or a stream, which stays open.
        form: its form.
        schema: of the batches.
        header: of CSV and TSV, whether the names of columns come first.
    """
    if form.name == "parquet":
        return _Parquet(file, schema)
    stream: Any = file.open("wb") if isinstance(file, Path) else file
    closing: list[Any] = [stream] if isinstance(file, Path) else []
    if form.name == "npy":
        return _Vectors(stream, closing)
    if form.compression:
        # It closes what it writes to.
        inner = stream if closing else _LeftOpen(stream)
        stream = pa.CompressedOutputStream(pa.PythonFile(inner, "w"), form.compression)
        closing.insert(0, stream)
    if form.name == "jsonl":
        return _Lines(stream, closing)
    return _Separated(stream, closing, schema, "\t" if form.name == "tsv" else ",", header)


class _LeftOpen:
    """A stream that others may close, and that stays open."""

    closed = False

    def __init__(self, stream: BinaryIO) -> None:
        self.write, self.flush = stream.write, stream.flush

    def close(self) -> None:
        self.flush()


class _Parquet:
    """Batches gathered to row groups: what a file's end says of each of them, some kilobytes, is held until then."""

    def __init__(self, file: Any, schema: pa.Schema) -> None:
        self._writer = pa.parquet.ParquetWriter(file, schema, compression="zstd", compression_level=1)
        self._gathered: list[pa.RecordBatch] = []
        self._rows = self._bytes = 0

    def write(self, batch: pa.RecordBatch) -> None:
        if batch.num_rows:
            self._gathered.append(batch)
            self._rows += batch.num_rows
            self._bytes += batch.nbytes
        if self._bytes >= _GROUP_BYTES or self._rows >= _GROUP_ROWS:
            self._write_group()

    def _write_group(self) -> None:
        gathered, rows = self._gathered, self._rows
        self._gathered, self._rows, self._bytes = [], 0, 0
        if gathered:
            self._writer.write_table(pa.Table.from_batches(gathered), rows)
            # Else the process would keep what a group took, and a little more with each.
            pa.default_memory_pool().release_unused()

    def close(self) -> None:
        try:
            self._write_group()
        finally:
            self._writer.close()


class _Stream:
    def __init__(self, stream: Any, closing: Sequence[Any]) -> None:
        self._stream, self._closing = stream, closing

    def close(self) -> None:
        # Each of them, even if one before it fails.
        with ExitStack() as stack:
            for each in reversed(self._closing):
                stack.callback(each.close)


class _Lines(_Stream):
    def write(self, batch: pa.RecordBatch) -> None:
        columns = [_as_plain(column) for column in batch.columns]
        plain = pa.RecordBatch.from_arrays(columns, names=batch.schema.names)
        # Line by line: what is not written yet when Ctrl-C comes, a buffer still holds.
        for row in plain.to_pylist():
            self._stream.write(f"{_json(row)}\n".encode())


class _Separated(_Stream):
    def __init__(self, stream: Any, closing: Sequence[Any], schema: pa.Schema, delimiter: str, header: bool) -> None:
        super().__init__(stream, closing)
        self._flat = _flat(_empty(schema)).schema
        options = pa.csv.WriteOptions(include_header=header, delimiter=delimiter)
        self._writer = pa.csv.CSVWriter(stream, self._flat, write_options=options)

    def write(self, batch: pa.RecordBatch) -> None:
        self._writer.write_batch(_flat(batch))

    def close(self) -> None:
        try:
            self._writer.close()
        finally:
            super().close()


class _Vectors(_Stream):
    """Rows of vectors, without the head of a .npy file, which says how many there are: `join` writes it."""

    def write(self, batch: pa.RecordBatch) -> None:
        column = batch.column(0)
        vectors = np.full((len(column), column.type.list_size), math.nan, np.float32)
        vectors[column.is_valid().to_numpy(zero_copy_only=False)] = (
            column.drop_null().flatten().to_numpy(zero_copy_only=False).reshape(-1, column.type.list_size)
        )
        self._stream.write(vectors.tobytes())


def join(
    parts: Sequence[Path],
    target: Path,
    form: Form,
    schema: pa.Schema,
    report: Callable[[int, int], None] = lambda *_: None,
) -> None:
    """Writes the files of a run one after the other into one; those of CSV have no header but the first.

    Args:
        parts: the files.
        target: the file that is written.
        form: of all of them.
        schema: of their rows.
        report: called with how many of the files are written, and of how many, after each.
    """
    if form.name == "parquet":
        with closing(_Parquet(target, schema)) as writer:
            for done, part in enumerate(parts, 1):
                with opened_parquet(part) as file:
                    # Batches reach over row groups otherwise, and of documents many rows are much.
                    for group in range(file.num_row_groups):
                        for batch in file.iter_batches(MAX_ROWS, row_groups=[group]):
                            writer.write(batch)
                report(done, len(parts))
        return
    with target.open("wb") as output:
        if form.name == "npy":
            width = schema.types[0].list_size
            rows = sum(part.stat().st_size for part in parts) // (4 * width)
            head = {"descr": "<f4", "fortran_order": False, "shape": (rows, width)}
            np.lib.format.write_array_header_1_0(output, head)
        for done, part in enumerate(parts, 1):
            with part.open("rb") as source:
                shutil.copyfileobj(source, output, 1 << 20)
            report(done, len(parts))


def _json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, default=str)
    except ValueError:
        # JSON has neither infinite numbers nor NaN.
        return json.dumps(_finite(value), ensure_ascii=False, default=str)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list):
        return list(map(_finite, value))
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _holds_bytes(of_column: pa.DataType) -> bool:
    if pa.types.is_dictionary(of_column):
        return _holds_bytes(of_column.value_type)
    inner = (of_column.field(place).type for place in range(of_column.num_fields))
    return any(is_binary(of_column) for is_binary in _BINARY) or any(map(_holds_bytes, inner))


def _empty(schema: pa.Schema) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays([pa.array([], field.type) for field in schema], schema=schema)


def _as_plain(column: pa.Array) -> pa.Array:
    """Times as strings and durations as counts, as CSV has them: Python has none of nanoseconds."""
    if pa.types.is_duration(column.type):
        return column.cast(pa.int64())
    return column.cast(pa.string()) if pa.types.is_temporal(column.type) else column


def _flat(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Structs as a column for each field, NAME.FIELD, also of structs in them; lists as JSON."""
    names: list[str] = []
    arrays: list[pa.Array] = []

    def add(name: str, array: pa.Array) -> None:
        if pa.types.is_struct(array.type):
            for field, inner in zip(array.type, array.flatten(), strict=True):
                add(f"{name}.{field.name}", inner)
            return
        if pa.types.is_nested(array.type):
            array = pa.array([None if row is None else _json(row) for row in array.to_pylist()], pa.string())
        elif pa.types.is_string_view(array.type) or isinstance(array.type, pa.BaseExtensionType):
            # What CSV's writer does not know.
            array = pa.array([None if row is None else str(row) for row in array.to_pylist()], pa.string())
        names.append(name)
        arrays.append(array)

    for name, array in zip(batch.schema.names, batch.columns, strict=True):
        add(name, array)
    return pa.RecordBatch.from_arrays(arrays, names=names)
