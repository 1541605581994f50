"""Files with a row in each line: txt and jsonl."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pyarrow as pa

from ..engine.batch import shortened
from ..texts import first_line
from .compression import BLOCK, LONGEST_ROW, Bytes, ByteStream, failures
from .rows import BATCH_ROWS, ColumnNames, Columns, Rows, half_character, not_utf8, resolved

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# In the schema of kept columns: strings that hold values as JSON.
_JSON_TEXT = {b"fastcls": b"json"}
_WORDS = {
    pa.string(): "a string",
    pa.bool_(): "true or false",
    pa.int64(): "an integer of 64 bits",
    pa.float64(): "a number",
}


class _Lines:
    """What txt and jsonl share."""

    num_rows: int | None = None
    unit = "line"
    # Whether blank lines at the end are no rows.
    ignores_blank_end = False

    def __init__(self, file: Bytes) -> None:
        self.name = file.name
        self._file = file
        self._fraction: float | None = None if file.is_pipe else 0.0

    def fraction(self) -> float | None:
        return self._fraction

    def rows(self, first: int = 0) -> Iterator[Rows]:
        done = 0
        before = 0.0
        with self._file.opened() as stream:
            blocks = _blocks_of_lines(self.name, stream, self.ignores_blank_end)
            while True:
                with failures(self.name, done):
                    lines = next(blocks, None)
                if lines is None:
                    break
                after = stream.fraction()
                for start in range(max(first - done, 0), len(lines), BATCH_ROWS):
                    part = lines[start : start + BATCH_ROWS]
                    if after is not None:
                        self._fraction = before + (after - before) * (start + len(part)) / len(lines)
                    yield self._rows(part, range(done + start + 1, done + start + len(part) + 1))
                done += len(lines)
                before = after or 0.0
            self._fraction = stream.fraction()

    def _rows(self, lines: Sequence[bytes], places: range) -> Rows:
        raise NotImplementedError


class TextLines(_Lines):
    """One text a line, or two with a tab between."""

    def __init__(self, file: Bytes, columns: Columns, pairs: bool) -> None:
        """Args:
        file: its lines end with a line feed, or carriage return and line feed.
        columns: they are named text and text_pair.
        pairs: whether lines hold two texts.

        Raises:
            ValueError: another column is asked for.
        """
        super().__init__(file)
        names = ["text", "text_pair"] if pairs else ["text"]
        if pairs and columns.pair is None:
            columns = columns._replace(pair="text_pair")
        self._wanted = resolved(self.name, columns, names, names)
        self._pairs = pairs
        self.schema = pa.schema([(name, pa.string()) for name in self._wanted.keep])
        # So that a missing file is an error before anything is read.
        file.head()

    def _rows(self, lines: Sequence[bytes], places: range) -> Rows:
        problems: dict[int, str] = {}
        texts: list[str | None]
        try:
            texts = [line.decode() for line in lines]
        except UnicodeDecodeError:
            texts = [_decoded(line, row, problems) for row, line in enumerate(lines)]
        texts = [text[:-1] if text is not None and text.endswith("\r") else text for text in texts]
        columns = {"text": texts}
        if self._pairs:
            parts = [None if text is None else text.split("\t") for text in texts]
            for row, part in enumerate(parts):
                if part is not None and len(part) != 2:
                    problems[row] = f"has {len(part) - 1} tabs, 1 was expected, between two texts"
                    parts[row] = None
            columns = {
                name: [None if part is None else part[place] for part in parts]
                for place, name in enumerate(("text", "text_pair"))
            }
        kept = batch_of([pa.array(columns[name], pa.string()) for name in self._wanted.keep], self.schema, len(lines))
        pair = self._wanted.pair
        return Rows(columns[self._wanted.text], None if pair is None else columns[pair], kept, places, problems)


class JsonLines(_Lines):
    """One object of JSON a line."""

    ignores_blank_end = True

    def __init__(self, file: Bytes, columns: Columns) -> None:
        """Args:
        file: its lines are read by Python's json, so NaN and Infinity are numbers.
        columns: keys of the objects; a kept one has the type of its first value that is not null.

        Raises:
            ValueError: a column that no row has.
        """
        super().__init__(file)
        with failures(self.name, 0):
            self._wanted, guess = self._look_ahead(columns)
        # A column of nulls has no type yet: `settle` gives it one.
        self.schema = pa.schema([guess.get(name, pa.field(name, pa.null())) for name in self._wanted.keep])

    def settle(self, types: pa.Schema) -> None:
        """Gives columns that hold nulls alone the types of other files, or strings."""
        for place, field in enumerate(self.schema):
            if pa.types.is_null(field.type):
                known = types.field(field.name) if field.name in types.names else field
                settled = pa.field(field.name, pa.string()) if pa.types.is_null(known.type) else known
                self.schema = self.schema.set(place, settled)

    def _look_ahead(self, columns: Columns) -> tuple[ColumnNames, dict[str, pa.Field]]:
        """The columns of the first block, and the types of kept ones, for which it may read on."""
        names: dict[str, pa.Field | None] = {}
        wanted = None
        for values in self._objects_of_blocks():
            for value in filter(None, values):
                for name, content in value.items():
                    names[name] = _wider(names.get(name), name, content)
            if not names:
                continue
            if wanted is None:
                strings = [name for name, field in names.items() if field is not None and _is_string(field)]
                # Kept columns may come later.
                wanted = resolved(self.name, columns._replace(keep=()), [*names], strings)
                wanted = wanted._replace(keep=wanted.texts if columns.keep is None else columns.keep)
            if all(names.get(name) is not None for name in wanted.keep):
                break
        if wanted is None:
            # A file without one good row: it has any column.
            asked = [*filter(None, (columns.text or "text", columns.pair)), *(columns.keep or ())]
            wanted = resolved(self.name, columns, [*dict.fromkeys(asked)], [asked[0]])
        else:
            for name in wanted.keep:
                if name not in names:
                    raise ValueError(f"{self.name}: has no column {name}; the columns are: {', '.join(names)}")
        guess = {name: field for name, field in names.items() if field is not None}
        return wanted, guess | {name: pa.field(name, pa.string()) for name in wanted.texts}

    def _objects_of_blocks(self) -> Iterator[list[Any]]:
        """The rows of each block, None for bad ones; of a pipe the whole lines of the first."""
        if self._file.is_pipe:
            head = self._file.head()
            lines = head.removeprefix(_BYTE_ORDER_MARK).split(b"\n")
            yield _objects(lines if len(head) < BLOCK else lines[:-1], {})
            return
        with self._file.opened() as stream:
            for lines in _blocks_of_lines(self.name, stream, True):
                yield _objects(lines, {})

    def _rows(self, lines: Sequence[bytes], places: range) -> Rows:
        problems: dict[int, str] = {}
        objects = _objects(lines, problems)
        texts: dict[str, list[str | None]] = {}
        arrays: dict[str, pa.Array] = {}
        for name in self._wanted.texts:
            values = [None if value is None else value.get(name) for value in objects]
            if not all(type(value) is str for value in values):
                for row, value in enumerate(objects):
                    if value is not None and type(values[row]) is not str:
                        problems.setdefault(row, _text_problem(name, value))
                        values[row] = None
            texts[name], arrays[name] = values, _strings(name, values, problems)
        for field in self.schema:
            if field.name not in arrays:
                values = [None if value is None else value.get(field.name) for value in objects]
                arrays[field.name] = _kept(field, values, problems)
        kept = batch_of([arrays[name] for name in self._wanted.keep], self.schema, len(lines))
        pair = self._wanted.pair
        return Rows(texts[self._wanted.text], None if pair is None else texts[pair], kept, places, problems)


def batch_of(arrays: Sequence[pa.Array], schema: pa.Schema, rows: int) -> pa.RecordBatch:
    """A batch that has so many rows also where it has no columns."""
    if arrays:
        return pa.RecordBatch.from_arrays(arrays, schema=schema)
    return pa.RecordBatch.from_arrays([pa.nulls(rows)], ["none"]).select([])


def _blocks_of_lines(name: str, stream: ByteStream, ignores_blank_end: bool) -> Iterator[list[bytes]]:
    """The lines of a file, some mebibyte at a time, without the line feeds."""
    tail: list[bytes] = []
    blanks = 0
    line = length = 0
    is_first = True
    while True:
        read = stream.read(BLOCK)
        block, is_first = read.removeprefix(_BYTE_ORDER_MARK) if is_first else read, False
        first, *lines = block.split(b"\n")
        tail.append(first)
        length += len(first)
        if lines or not read:
            whole = b"".join(tail)
            tail = [lines.pop()] if lines else []
            length = sum(map(len, tail))
            # The line feed at the end of a file ends a line, and begins none.
            lines = [whole, *lines] if read or whole else []
        elif length > LONGEST_ROW:
            raise ValueError(f"{name}: line {line + 1} is longer than {LONGEST_ROW >> 20} MiB: is it a file of lines?")
        if ignores_blank_end:
            lines = [b""] * blanks + lines
            kept = len(lines)
            while kept and not lines[kept - 1].strip():
                kept -= 1
            blanks = len(lines) - kept
            del lines[kept:]
        line += len(lines)
        if lines:
            yield lines
        if not read:
            return


def _decoded(line: bytes, row: int, problems: dict[int, str]) -> str | None:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        problems[row] = f"is {not_utf8(error)}"
        return None


def _objects(lines: Sequence[bytes], problems: dict[int, str]) -> list[Any]:
    """The object of each line, None where there is none."""
    loads = json.loads
    objects: list[Any] = []
    for row, line in enumerate(lines):
        value = None
        try:
            value = loads(line.decode())
        except UnicodeDecodeError as error:
            problems[row] = f"is {not_utf8(error)}"
        except (ValueError, RecursionError) as error:
            problems[row] = f"is not JSON: {first_line(error)}" if line.strip() else "is empty"
        else:
            if type(value) is not dict:
                problems[row] = f"must be an object, got {shortened(value)}"
                value = None
        objects.append(value)
    return objects


def _text_problem(name: str, row: dict[str, Any]) -> str:
    if name not in row:
        return f"has no column {name}"
    return f"{name} is null" if row[name] is None else f"{name} must be a string, got {shortened(row[name])}"


def _strings(name: str, values: list[str | None], problems: dict[int, str]) -> pa.Array:
    """Strings as an array; one with a lone surrogate, which JSON can hold and UTF-8 cannot, becomes None in both."""
    try:
        return pa.array(values, pa.string())
    except UnicodeEncodeError:
        for row, value in enumerate(values):
            try:
                (value or "").encode()
            except UnicodeEncodeError as error:
                problems.setdefault(row, f"{name} {half_character(error)}")
                values[row] = None
        return pa.array(values, pa.string())


class _Kind(NamedTuple):
    """How values of JSON become those of a column."""

    fits: Callable[[Any], bool]
    convert: Callable[[Any], Any]


_KINDS = {
    pa.string(): _Kind(lambda value: type(value) is str, str),
    pa.bool_(): _Kind(lambda value: type(value) is bool, bool),
    pa.int64(): _Kind(lambda value: type(value) is int and -(1 << 63) <= value < 1 << 63, int),
    # Greater integers have no double.
    pa.float64(): _Kind(lambda value: type(value) is float or (type(value) is int and abs(value) < 1 << 1023), float),
}
_ANY = _Kind(lambda value: True, lambda value: json.dumps(value, ensure_ascii=False))  # noqa: ARG005
# Of a column that held nulls alone, and got the type of another file's.
_NONE = _Kind(lambda value: False, lambda value: value)  # noqa: ARG005


def _kept(field: pa.Field, values: list[Any], problems: dict[int, str]) -> pa.Array:
    """A kept column; a value of another type is null, and its row bad."""
    fits, convert = _ANY if field.metadata == _JSON_TEXT else _KINDS.get(field.type, _NONE)
    for row, value in enumerate(values):
        if value is None:
            continue
        if fits(value):
            values[row] = convert(value)
        else:
            wanted = _WORDS.get(field.type, f"null, as JSON has no {field.type}, its type in other files")
            problems.setdefault(row, f"{field.name} must be {wanted}, got {shortened(value)}")
            values[row] = None
    return _strings(field.name, values, problems) if pa.types.is_string(field.type) else pa.array(values, field.type)


def _is_string(field: pa.Field) -> bool:
    return pa.types.is_string(field.type) and field.metadata is None


def _wider(field: pa.Field | None, name: str, value: Any) -> pa.Field | None:
    """The type of a column after one more value: that of the first, but for integers before a fraction."""
    if value is None or (field is not None and (field.type != pa.int64() or type(value) is not float)):
        return field
    for kind, (fits, _) in _KINDS.items():
        if fits(value):
            return pa.field(name, kind)
    return pa.field(name, pa.string(), metadata=_JSON_TEXT)
