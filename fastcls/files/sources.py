"""From paths to sources of texts."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .compression import is_pipe
from .rows import Columns, Source

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["Columns", "Source", "open_sources"]

# A format by a file's ending, which is the format's name as well.
_FORMATS = {
    "txt": "txt",
    "jsonl": "jsonl",
    "ndjson": "jsonl",
    "csv": "csv",
    "tsv": "tsv",
    "parquet": "parquet",
    "arrow": "arrow",
    "feather": "arrow",
}
_COMPRESSIONS = (".gz", ".zst")
_WITH_COLUMNS = ("csv", "tsv")
_STANDARD_INPUT = "-"


def open_sources(
    paths: Sequence[str],
    columns: Columns,
    *,
    format: str | None = None,  # noqa: A002 - the option's name
    header: bool = True,
    quotes: bool | None = None,
    pairs_in_lines: bool = False,
) -> list[Source]:
    """Opens files of texts, so that what is wrong with them is known before anything is computed.

    A file is txt, jsonl, csv, tsv, parquet, arrow, or the folder of a data set that ``save_to_disk`` of datasets wrote.
    The first four may be compressed (.gz, .zst), and are UTF-8; what is not makes only its row bad.

    Args:
        paths: files, patterns like ``data/*.csv``, whose files come in sorted order, and "-", standard input.
        columns: what to read.
        format: of all files, as "csv"; None goes by their endings, and takes standard input for txt.
        header: whether the first row of a csv or tsv file has the columns' names, which without one are f0, f1, ...
        quotes: whether columns of csv and tsv files may stand in quotation marks; None is yes for csv and no for tsv.
        pairs_in_lines: whether each line of a txt file is two texts, with a tab between.

    Returns:
        The sources, in the order of the paths. Their kept columns have the same names and types.

    Raises:
        OSError: a file cannot be read.
        ValueError: a pattern matches nothing, a format is unknown, a column is missing or no text,
            an option applies to no file, or files differ in their kept columns.
    """
    from .lines import JsonLines

    if isinstance(paths, str):
        raise ValueError(f"paths must be a list of paths, got {paths!r}")
    if columns.keep is not None and len(set(columns.keep)) < len(columns.keep):
        raise ValueError(f"keep must name each column once, got {', '.join(columns.keep)}")
    if columns.pair is not None and columns.pair == columns.text:
        raise ValueError(f"text and pair must be two columns, got {columns.pair} for both")
    files = [file for path in paths for file in _expanded(path)]
    if not files:
        raise ValueError("paths must name at least one file, got none")
    if files.count(_STANDARD_INPUT) > 1:
        raise ValueError('paths must name "-", standard input, only once')
    formats = [_format_of(file, format) for file in files]
    for option, is_set, kinds in (
        ("header", not header, _WITH_COLUMNS),
        ("quotes", quotes is not None, _WITH_COLUMNS),
        ("pairs_in_lines", pairs_in_lines, ("txt",)),
    ):
        if is_set and not set(formats) & set(kinds):
            raise ValueError(f"{option} is for files of the format {' or '.join(kinds)}, and there is none")
    sources: list[Source] = [
        _opened(file, kind, columns, header, quotes, pairs_in_lines) for file, kind in zip(files, formats, strict=True)
    ]
    known = _known_types(sources)
    for source in sources:
        if isinstance(source, JsonLines):
            source.settle(known)
    for source in sources[1:]:
        if not source.schema.equals(sources[0].schema):
            raise ValueError(
                f"{source.name}: its kept columns are {_described(source.schema)}, "
                f"those of {sources[0].name} are {_described(sources[0].schema)}"
            )
    return sources


def _expanded(path: str) -> list[str]:
    if path == _STANDARD_INPUT or os.path.exists(path):
        return [path]
    if not glob.has_magic(path):
        raise ValueError(f"{path}: there is no such file")
    found = sorted(glob.glob(path, recursive=True))
    if not found:
        raise ValueError(f"{path}: no file matches this pattern")
    return found


def _format_of(path: str, asked: str | None) -> str:
    """The format of a file; "folder" for a data set's."""
    if asked is not None and asked not in _FORMATS:
        raise ValueError(f"format must be one of {', '.join(_FORMATS)}, got {asked!r}")
    if os.path.isdir(path):
        return "folder"
    stem, ending = os.path.splitext(path)
    is_compressed = ending.lower() in _COMPRESSIONS
    if path == _STANDARD_INPUT:
        kind = _FORMATS[asked or "txt"]
    elif asked is not None:
        kind = _FORMATS[asked]
    else:
        ending = os.path.splitext(stem if is_compressed else path)[1].lower()
        if is_pipe(path) and not ending:
            return "txt"
        if ending[1:] not in _FORMATS:
            known = ", ".join(f".{name}" for name in _FORMATS)
            raise ValueError(f"{path}: its ending names no format that is known ({known}): pass format")
        kind = _FORMATS[ending[1:]]
    if kind in ("parquet", "arrow"):
        if is_compressed:
            raise ValueError(f"{path}: {kind} is read only as it is: decompress it first")
        if path == _STANDARD_INPUT:
            raise ValueError(f"standard input must be txt, jsonl, csv or tsv, got {kind}, which is read from files")
    return kind


def _opened(
    path: str,
    kind: str,
    columns: Columns,
    header: bool,
    quotes: bool | None,
    pairs_in_lines: bool,
) -> Any:
    # These import pyarrow.
    from .compression import Bytes
    from .delimited import Delimited
    from .lines import JsonLines, TextLines
    from .tables import Arrow, Parquet, saved_files

    if kind == "folder":
        return Arrow(path, saved_files(path), columns)
    if kind == "parquet":
        return Parquet(path, columns)
    if kind == "arrow":
        return Arrow(path, [path], columns)
    file = Bytes(path)
    if kind == "txt":
        return TextLines(file, columns, pairs_in_lines)
    if kind == "jsonl":
        return JsonLines(file, columns)
    is_csv = kind == "csv"
    return Delimited(file, columns, "," if is_csv else "\t", header, is_csv if quotes is None else quotes)


def _known_types(sources: Sequence[Source]) -> pa.Schema:
    """Of each kept column the first type that says something."""
    import pyarrow as pa

    fields: dict[str, pa.Field] = {}
    for source in sources:
        for field in source.schema:
            if not pa.types.is_null(field.type):
                fields.setdefault(field.name, field)
    return pa.schema([*fields.values()])


def _described(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} ({field.type})" for field in schema) or "none"
