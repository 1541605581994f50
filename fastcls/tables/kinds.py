"""Tables as they are read and given back, a class for each kind. None of the libraries is imported for it: who passes a
table has done so."""

from __future__ import annotations

import copy
import secrets
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch

if TYPE_CHECKING:
    import pyarrow


class Columns(Protocol):
    """What is known of a table before its rows are."""

    names: list[Any]

    def kind(self, name: Any) -> str:
        """Of a column: "strings" if it holds them and nulls alone, "perhaps" if its values must tell, or its type."""


class Table(Columns, Protocol):
    """A table as this module reads it."""

    num_rows: int

    def is_clean(self, name: Any) -> bool:
        """Whether each value of a column is known to be a string without being seen."""

    def values(self, name: Any, start: int, stop: int) -> list[Any]:
        """Some of a column, with None for whatever the library takes for null."""

    def extended(self, columns: pyarrow.Table) -> Any:
        """The table with more columns."""


class PandasTable:
    def __init__(self, frame: Any) -> None:
        if frame.columns.nlevels > 1:
            raise ValueError(f"table must have one level of column names, got {frame.columns.nlevels}")
        self._frame, self._pandas = frame, sys.modules["pandas"]
        self.names, self.num_rows = list(frame.columns), len(frame)

    def kind(self, name: Any) -> str:
        if self.names.count(name) > 1:
            return "several columns"
        values = self._frame[name]
        dtype = values.dtype
        if isinstance(dtype, self._pandas.CategoricalDtype):
            values = dtype.categories
            dtype = values.dtype
        if isinstance(dtype, self._pandas.ArrowDtype):
            return "strings" if _is_string(dtype.pyarrow_dtype) else str(dtype)
        if isinstance(dtype, self._pandas.StringDtype):
            return "strings"
        if dtype.kind != "O":
            return str(dtype)
        inferred = str(self._pandas.api.types.infer_dtype(values, skipna=True))
        return {"string": "strings", "empty": "perhaps", "mixed": "perhaps", "mixed-integer": "perhaps"}.get(
            inferred, f"objects of the type {inferred}"
        )

    def is_clean(self, name: Any) -> bool:
        return self.kind(name) == "strings" and not bool(self._frame[name].isna().any())

    def values(self, name: Any, start: int, stop: int) -> list[Any]:
        part = self._frame[name].iloc[start:stop]
        return [None if is_null else value for value, is_null in zip(part.tolist(), part.isna().tolist(), strict=True)]

    def extended(self, columns: pyarrow.Table) -> Any:
        new = {}
        for name, column in zip(columns.column_names, columns.columns, strict=True):
            # Of lists pandas would make arrays.
            is_nested = column.type.num_fields > 0
            values = self._pandas.Series(column.to_pylist(), dtype=object) if is_nested else column.to_pandas()
            new[name] = values.set_axis(self._frame.index)
        return self._frame.assign(**new)


class PolarsTable:
    def __init__(self, frame: Any) -> None:
        self._frame, self._polars = frame, sys.modules["polars"]
        self.names, self.num_rows = list(frame.columns), frame.height

    def kind(self, name: Any) -> str:
        polars, dtype = self._polars, self._frame.schema[name]
        if isinstance(dtype, (polars.String, polars.Categorical, polars.Enum)):
            return "strings"
        return "perhaps" if isinstance(dtype, polars.Null) else str(dtype)

    def is_clean(self, name: Any) -> bool:
        return bool(self._frame[name].null_count() == 0)

    def values(self, name: Any, start: int, stop: int) -> list[Any]:
        return list(self._frame[name][start:stop].to_list())

    def extended(self, columns: pyarrow.Table) -> Any:
        return self._frame.hstack(self._polars.from_arrow(columns))


class ArrowTable:
    """A Table or a RecordBatch."""

    def __init__(self, table: Any) -> None:
        self._table = table
        self.names, self.num_rows = list(table.schema.names), table.num_rows

    def kind(self, name: Any) -> str:
        if self.names.count(name) > 1:
            return "several columns"
        return _kind_of_type(self._table.schema.field(name).type)

    def is_clean(self, name: Any) -> bool:
        return _is_clean(self._table.column(name))

    def values(self, name: Any, start: int, stop: int) -> list[Any]:
        return list(self._table.column(name).slice(start, stop - start).to_pylist())

    def extended(self, columns: pyarrow.Table) -> Any:
        import pyarrow

        table = self._table
        for field, column in zip(columns.schema, columns.columns, strict=True):
            whole = column.combine_chunks() if isinstance(table, pyarrow.RecordBatch) else column
            table = table.append_column(field, whole)
        return table


class DatasetTable:
    def __init__(self, dataset: Any) -> None:
        self._dataset, self._stored = dataset, dict[Any, Any]()
        self.names, self.num_rows = list(dataset.column_names), len(dataset)

    def kind(self, name: Any) -> str:
        return _kind_of_type(self._dataset.data.schema.field(name).type)

    def is_clean(self, name: Any) -> bool:
        # Rows of the whole that are not selected count, too; then the selected ones are looked at.
        return _is_clean(self._dataset.data.column(name))

    def values(self, name: Any, start: int, stop: int) -> list[Any]:
        # As they are stored, whatever format the dataset has.
        if name not in self._stored:
            self._stored[name] = self._dataset.with_format("arrow", columns=[name])
        rows = self._stored[name][start : min(stop, self.num_rows)]
        return list(rows.column(name).to_pylist())

    def extended(self, columns: pyarrow.Table) -> Any:
        import pyarrow

        # Its parts may be replaced.
        dataset, indices = copy.copy(self._dataset), self._dataset._indices
        dataset._indices = None
        if self.num_rows == 0:
            # A joined table has no parts then, and datasets fails to add a column to none.
            indices = None
            dataset._data = sys.modules["datasets"].table.InMemoryTable(dataset.data.schema.empty_table())
        elif indices is not None:
            # Rows are selected from a whole that stays where it is, on a disk perhaps. To add a column, datasets would
            # write the selected ones into a new file beside it. So the column is made as long as the whole.
            selected = torch.from_numpy(indices.column(0).to_numpy().astype("int64"))
            rows = torch.full((dataset.data.num_rows,), -1)
            rows[selected] = torch.arange(len(selected))
            columns = columns.take(pyarrow.array(rows.numpy(), mask=(rows < 0).numpy()))
        features = sys.modules["datasets"].Features.from_arrow_schema(columns.schema)
        for name, column in zip(columns.column_names, columns.columns, strict=True):
            # Without a fingerprint all values would be hashed for one, and no hash says which model they are from.
            fingerprint = secrets.token_hex(8)
            dataset = dataset.add_column(name, column, feature=features[name], new_fingerprint=fingerprint)
        dataset._indices = indices
        return dataset


class Rows:
    """A batch of a stream: lists by their column's name."""

    def __init__(self, columns: Mapping[str, list[Any]]) -> None:
        self._columns = columns
        self.names = list(columns)
        self.num_rows = len(next(iter(columns.values()), []))

    def kind(self, name: Any) -> str:  # noqa: ARG002
        return "perhaps"

    def is_clean(self, name: Any) -> bool:  # noqa: ARG002
        return False

    def values(self, name: Any, start: int, stop: int) -> list[Any]:
        return list(self._columns[name][start:stop])

    def extended(self, columns: pyarrow.Table) -> Any:
        return columns.to_pydict()


STREAM = "datasets.IterableDataset"
SPLITS = ("datasets.DatasetDict", "datasets.IterableDatasetDict")
_KINDS: dict[str, Callable[[Any], Table]] = {
    "pandas.DataFrame": PandasTable,
    "polars.DataFrame": PolarsTable,
    "pyarrow.Table": ArrowTable,
    "pyarrow.RecordBatch": ArrowTable,
    "datasets.Dataset": DatasetTable,
}


def read(table: Any) -> Table:
    """A table of one of the kinds that can be read row by row."""
    return _KINDS[kind_of(table)](table)


def kind_of(table: Any) -> str:
    """The library and name of a table's class, or of the known one that it derives from."""
    for base in type(table).__mro__:
        kind = f"{base.__module__.partition('.')[0]}.{base.__name__}"
        if kind in _KINDS or kind in (STREAM, *SPLITS):
            return kind
    library, found = type(table).__module__.partition(".")[0], type(table).__name__
    if found == "LazyFrame":
        remedy = ": call .collect() first"
    elif library == "dask":
        remedy = ": call .compute() first"
    else:
        remedy = "; texts in a list or a column go to the classifier itself, classifier(texts)"
    raise TypeError(
        "table must be a DataFrame of pandas or polars, a Table or RecordBatch of pyarrow, or a Dataset of datasets, "
        f"got {found}{f' of {library}' if library != 'builtins' else ''}{remedy}"
    )


def _is_string(kind: pyarrow.DataType) -> bool:
    import pyarrow

    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    return kind in (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view())


def _kind_of_type(kind: pyarrow.DataType) -> str:
    if _is_string(kind):
        return "strings"
    return "perhaps" if str(kind) == "null" else str(kind)


def _is_clean(column: pyarrow.ChunkedArray) -> bool:
    import pyarrow

    # A dictionary's count leaves out the nulls among its own values.
    return column.null_count == 0 and not pyarrow.types.is_dictionary(column.type)
