"""Writing Arrow batches: Parquet, JSON lines, CSV and TSV, also compressed, and .npy of vectors."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

_ENDINGS = {".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "tsv", ".npy": "npy"}
_COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
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
        """The form that a file's name, or an ending without a dot, asks for, or None."""
        path = Path(name if "." in Path(name).name else f"name.{name}")
        compression = _COMPRESSED.get(path.suffix)
        inner = Path(path.stem).suffix if compression else path.suffix
        found = _ENDINGS.get(inner)
        if found is None or (compression and found in ("parquet", "npy")):
            return None
        return cls(found, compression, inner + (path.suffix if compression else ""))

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
    for field in schema:
        if form.name not in ("parquet", "npy") and any(is_binary(field.type) for is_binary in _BINARY):
            raise ValueError(f"column {field.name} must have a form in {form.name}, got {field.type}: write .parquet")


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
        stream = pa.CompressedOutputStream(pa.PythonFile(stream, "w"), form.compression)
        closing.insert(0, stream)
    if form.name == "jsonl":
        return _Lines(stream, closing)
    return _Separated(stream, closing, schema, "\t" if form.name == "tsv" else ",", header)


class _Parquet:
    def __init__(self, file: Any, schema: pa.Schema) -> None:
        self._writer = pa.parquet.ParquetWriter(file, schema, compression="zstd", compression_level=1)

    def write(self, batch: pa.RecordBatch) -> None:
        if batch.num_rows:
            self._writer.write_batch(batch)

    def close(self) -> None:
        self._writer.close()


class _Stream:
    def __init__(self, stream: Any, closing: Sequence[Any]) -> None:
        self._stream, self._closing = stream, closing

    def close(self) -> None:
        for each in self._closing:
            each.close()


class _Lines(_Stream):
    def write(self, batch: pa.RecordBatch) -> None:
        # Line by line: what is not written yet when Ctrl-C comes, a buffer still holds.
        for row in batch.to_pylist():
            self._stream.write(f"{_json(row)}\n".encode())


class _Separated(_Stream):
    def __init__(self, stream: Any, closing: Sequence[Any], schema: pa.Schema, delimiter: str, header: bool) -> None:
        super().__init__(stream, closing)
        self._flat = _flat(pa.RecordBatch.from_pylist([], schema=schema)).schema
        options = pa.csv.WriteOptions(include_header=header, delimiter=delimiter)
        self._writer = pa.csv.CSVWriter(stream, self._flat, write_options=options)

    def write(self, batch: pa.RecordBatch) -> None:
        self._writer.write_batch(_flat(batch))

    def close(self) -> None:
        self._writer.close()
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


def join(parts: Sequence[Path], target: Path, form: Form, schema: pa.Schema) -> None:
    """Writes the files of a run one after the other into one; those of CSV have no header but the first."""
    if form.name == "parquet":
        writer = pa.parquet.ParquetWriter(target, schema, compression="zstd", compression_level=1)
        with writer:
            for part in parts:
                with pa.parquet.ParquetFile(part) as file:
                    for group in range(file.num_row_groups):
                        writer.write_table(file.read_row_group(group))
        return
    with target.open("wb") as output:
        if form.name == "npy":
            width = schema.types[0].list_size
            rows = sum(part.stat().st_size for part in parts) // (4 * width)
            head = {"descr": "<f4", "fortran_order": False, "shape": (rows, width)}
            np.lib.format.write_array_header_1_0(output, head)
        for part in parts:
            with part.open("rb") as source:
                shutil.copyfileobj(source, output, 1 << 20)


def _json(row: dict[str, Any]) -> str:
    try:
        return json.dumps(row, ensure_ascii=False, allow_nan=False, default=str)
    except ValueError:
        # JSON has neither infinite numbers nor NaN.
        return json.dumps(_finite(row), ensure_ascii=False, default=str)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list):
        return list(map(_finite, value))
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _flat(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Structs as a column for each field, NAME.FIELD; lists as JSON."""
    names: list[str] = []
    arrays: list[pa.Array] = []
    for name, array in zip(batch.schema.names, batch.columns, strict=True):
        if pa.types.is_struct(array.type):
            names += [f"{name}.{field.name}" for field in array.type]
            arrays += array.flatten()
        elif pa.types.is_nested(array.type):
            names.append(name)
            arrays.append(pa.array([None if row is None else _json_of(row) for row in array.to_pylist()], pa.string()))
        else:
            names.append(name)
            arrays.append(array)
    return pa.RecordBatch.from_arrays(arrays, names=names)


def _json_of(value: Any) -> str:
    return json.dumps(_finite(value), ensure_ascii=False, default=str)
