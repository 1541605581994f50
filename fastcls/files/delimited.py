"""Files with columns between commas or tabs: csv and tsv.

pyarrow reads them. What experiments with it showed, on which this module stands:

- Without threads the handler of rows that do not fit gets each row's number: header included, blank lines not counted,
  the same over all blocks. It is called for all rows of a block before that block's batch comes, which may be empty,
  and does not come for blocks without a good row at the beginning. So rows merge by number.
- It decodes such a row's text before it calls the handler, and one that is not UTF-8 ends the reading. So bytes that
  are not UTF-8 are replaced before, in a way that can be undone.
- A thread of its own reads 32 blocks ahead, half a gigabyte. So it waits for the reader of rows.
- What ends the reader waits for that thread, and only `close` lets go of the interpreter's lock meanwhile, which the
  thread needs for a file of Python's. So it is closed in any case.
- An error of the file loses the blocks before it. So the file is ended where its error stands, which is raised later.
"""

from __future__ import annotations

import csv
import io
import re
import threading
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import closing
from typing import NamedTuple

import pyarrow as pa
import pyarrow.csv as pc

from ..texts import first_line
from .compression import BLOCK, LONGEST_ROW, Bytes, ByteStream, failures
from .rows import BATCH_ROWS, Columns, Rows, resolved
from .tables import rows_of

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# A byte that is not UTF-8 becomes the character of this number and its own: 128 of the private ones at Unicode's end.
# Should a file hold one of these, its bytes are replaced as well, so that nothing is lost.
_ESCAPE = 0x10F700
_AHEAD = 3
_ESCAPED = re.compile(rb"\xf4\x8f[\x9e\x9f][\x80-\xbf]")


class _Misfit(NamedTuple):
    """A row with another number of columns."""

    number: int
    problem: str


class _Merged(NamedTuple):
    """Good and bad rows.

    Attributes:
        batch: the good ones.
        order: for each row its index in the batch, None for a bad one.
        problems: why these are bad.
        fraction: how much of the file was read with them.
    """

    batch: pa.RecordBatch
    order: range | list[int | None]
    problems: dict[int, str]
    fraction: float | None


class _Feed:
    """A stream as pyarrow's thread reads it, at most `_AHEAD` blocks before what becomes of them."""

    closed = False

    def __init__(self, stream: ByteStream) -> None:
        self._stream = stream
        # For each block that was handed on and has not come back as rows: how much of the file was read then.
        self._marks: deque[float | None] = deque()
        self._fraction: float | None = None
        self._changed = threading.Condition()
        self._reading = threading.Lock()
        # It is from the beginning, for the first batch.
        self._is_awaited = True
        self._is_over = False
        self._ready = bytearray()
        # The beginning of a character.
        self._tail = b""
        self._has_begun = self._has_lines = self._has_ended = False
        self.has_escapes = False
        self.error: Exception | None = None

    def read(self, size: int) -> bytes:
        with self._reading:
            if self._is_over:
                return b""
            part, mark = self._filled(size), self._stream.fraction()
        if part:
            with self._changed:
                while len(self._marks) >= _AHEAD and not self._is_over:
                    # Blocks without a good row at the beginning never come back.
                    if not self._changed.wait(timeout=0.5) and self._is_awaited:
                        self._marks.popleft()
                self._marks.append(mark)
        return part

    def _filled(self, size: int) -> bytes:
        while len(self._ready) < size and not self._has_ended:
            block = b""
            try:
                block = self._stream.read(BLOCK)
            except (OSError, pa.ArrowException) as error:
                self.error = error
            if not self._has_begun:
                # pyarrow takes a blank line for the header.
                block, self._has_begun = block.removeprefix(_BYTE_ORDER_MARK).lstrip(b"\r\n"), True
            self._has_lines = self._has_lines or b"\n" in block
            self._has_ended = not block
            if self._has_ended and not self._has_lines:
                # pyarrow does not take a single line without an end.
                block = b"\n"
            self._ready += self._escaped(block)
        # A slice of the array itself would be a copy more, of 16 MiB.
        with memoryview(self._ready) as ready:
            part = bytes(ready[:size])
        del self._ready[:size]
        return part

    def awaited(self, reader: pc.CSVStreamingReader) -> tuple[pa.RecordBatch | None, float | None]:
        """The rows of the next block, None behind the last one, and how much of the file was read with it."""
        self._is_awaited = True
        batch = next(reader, None)
        with self._changed:
            self._is_awaited = False
            if self._marks:
                self._fraction = self._marks.popleft()
            self._changed.notify()
            return batch, self._fraction

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        """Nobody waits for rows any more: from now on the stream is not read, and may be closed."""
        self.closed = True
        with self._changed:
            self._is_over = True
            self._changed.notify()
        # A read under way ends first.
        with self._reading:
            pass

    def _escaped(self, block: bytes) -> bytes:
        block = self._tail + block
        self._tail = b""
        if not self._has_ended:
            # A character has at most four bytes.
            for length in range(1, min(4, len(block) + 1)):
                if block[-length] >= 0xC0:
                    missing = 2 if block[-length] < 0xE0 else 3 if block[-length] < 0xF0 else 4
                    if length < missing:
                        block, self._tail = block[:-length], block[-length:]
                    break
        if not _ESCAPED.search(block):
            try:
                block.decode()
            except UnicodeDecodeError:
                pass
            else:
                return block
        self.has_escapes = True
        block = _ESCAPED.sub(lambda found: b"".join(map(_escape, found[0])), block)
        # Each byte that is not UTF-8 is decoded to a lone surrogate, the number of the byte and 0xDC00.
        text = block.decode(errors="surrogateescape")
        return re.sub("[\udc80-\udcff]", lambda found: chr(ord(found[0]) - 0xDC00 + _ESCAPE), text).encode()


def _escape(byte: int) -> bytes:
    return chr(_ESCAPE + byte).encode()


def _restored(column: pa.Array) -> pa.Array:
    """The bytes as they stand in the file."""
    values = column.to_pylist()
    return pa.array(
        [value and _ESCAPED.sub(lambda found: bytes([ord(found[0].decode()) - _ESCAPE]), value) for value in values],
        pa.binary(),
    )


class Delimited:
    """A csv or tsv file. All columns are strings."""

    num_rows: int | None = None
    unit = "row"

    def __init__(self, file: Bytes, columns: Columns, delimiter: str, header: bool, quotes: bool) -> None:
        """Args:
        file: UTF-8.
        columns: names in the header; without one they are f0, f1 and so on.
        delimiter: between columns.
        header: whether the first row has the columns' names.
        quotes: whether columns may stand in quotation marks.

        Raises:
            ValueError: the file has no row, or not these columns.
        """
        self.name = file.name
        self._file, self._delimiter, self._header, self._quotes = file, delimiter, header, quotes
        self._fraction: float | None = None if file.is_pipe else 0.0
        with failures(self.name, 0):
            head = file.head().removeprefix(_BYTE_ORDER_MARK).lstrip(b"\r\n").decode(errors="replace")
        if not head:
            raise ValueError(f"{self.name}: is empty, it must have a {'header' if header else 'row'}")
        try:
            row = next(
                csv.reader(
                    io.StringIO(head, newline=""),
                    delimiter=delimiter,
                    quoting=csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE,
                )
            )
        except csv.Error as error:
            raise ValueError(f"{self.name}: its first row cannot be read: {first_line(error)}") from error
        self._names = row if header else [f"f{place}" for place in range(len(row))]
        self._wanted = resolved(self.name, columns, self._names, self._names)
        self.schema = pa.schema([(name, pa.string()) for name in self._wanted.keep])

    def fraction(self) -> float | None:
        return self._fraction

    def rows(self, first: int = 0) -> Iterator[Rows]:
        done = 0
        before = 0.0
        with self._file.opened() as stream, closing(_Feed(stream)) as feed, closing(self._merged(feed)) as merged:
            for batch, order, problems, after in merged:
                count = len(order)
                for start in range(max(first - done, 0), count, BATCH_ROWS):
                    stop = min(start + BATCH_ROWS, count)
                    if after is not None:
                        self._fraction = before + (after - before) * stop / count
                    if isinstance(order, range):
                        part = batch.slice(start, stop - start)
                    else:
                        part = batch.take(pa.array(order[start:stop], pa.int64()))
                    last = stop if problems else start
                    bad = {row - start: problems[row] for row in range(start, last) if row in problems}
                    if feed.has_escapes:
                        part = pa.RecordBatch.from_arrays([_restored(column) for column in part], part.schema.names)
                    yield rows_of(part, self._wanted, self.schema, range(done + start + 1, done + stop + 1), bad)
                done += count
                before = after or 0.0
            if feed.error is not None:
                with failures(self.name, done):
                    raise feed.error
            self._fraction = stream.fraction()

    def _merged(self, feed: _Feed) -> Generator[_Merged, None, None]:
        """All rows."""
        misfits: deque[_Misfit] = deque()
        # The header is a row, too.
        number = 2 if self._header else 1
        last: _Merged | None = None
        with closing(self._batches(feed, misfits)) as batches:
            for batch, fraction in batches:
                order: range | list[int | None] = range(batch.num_rows)
                problems: dict[int, str] = {}
                if misfits and misfits[0].number <= number + batch.num_rows:
                    order = []
                    good = 0
                    while good < batch.num_rows or (misfits and misfits[0].number == number + len(order)):
                        if misfits and misfits[0].number == number + len(order):
                            problems[len(order)] = misfits.popleft().problem
                            order.append(None)
                        else:
                            order.append(good)
                            good += 1
                number += len(order)
                if not order:
                    continue
                if last is not None:
                    yield last
                last = _Merged(batch, order, problems, fraction)
        if last is not None:
            # The last row before an error may be a part of one.
            yield last if feed.error is None else last._replace(order=last.order[:-1])

    def _batches(
        self, feed: _Feed, misfits: deque[_Misfit]
    ) -> Generator[tuple[pa.RecordBatch, float | None], None, None]:
        """What pyarrow reads, and an empty batch behind it, for bad rows at the end."""

        def note(row: pc.InvalidRow) -> str:
            columns = f"{row.actual_columns} column{'' if row.actual_columns == 1 else 's'}"
            expected = f"{row.expected_columns} {'was' if row.expected_columns == 1 else 'were'} expected"
            misfits.append(_Misfit(row.number, f"has {columns}, {expected}"))
            return "skip"

        # By their places, so that a name may stand there twice.
        places = {name: str(self._names.index(name)) for name in self._wanted.all}
        fraction = None
        reader = None
        try:
            reader = pc.open_csv(
                pa.PythonFile(feed, mode="r"),
                pc.ReadOptions(
                    use_threads=False,
                    block_size=LONGEST_ROW,
                    column_names=[*map(str, range(len(self._names)))],
                    skip_rows_after_names=int(self._header),
                ),
                pc.ParseOptions(
                    delimiter=self._delimiter,
                    quote_char='"' if self._quotes else False,
                    newlines_in_values=self._quotes,
                    invalid_row_handler=note,
                ),
                pc.ConvertOptions(
                    check_utf8=False,
                    column_types=dict.fromkeys(places.values(), pa.binary()),
                    include_columns=[*places.values()],
                    strings_can_be_null=True,
                    null_values=[""],
                    quoted_strings_can_be_null=False,
                ),
            )
            while True:
                batch, fraction = feed.awaited(reader)
                if batch is None:
                    break
                yield batch.rename_columns([*places]), fraction
        except pa.ArrowInvalid as error:
            if "straddl" not in str(error):
                raise ValueError(f"{self.name}: cannot be read: {first_line(error)}") from error
            quote = ", or a quotation mark that nothing closes" if self._quotes else ""
            raise ValueError(f"{self.name}: has a row of more than {LONGEST_ROW >> 20} MiB{quote}") from error
        finally:
            feed.close()
            if reader is not None:
                reader.close()
        yield pa.RecordBatch.from_pylist([], pa.schema([(name, pa.binary()) for name in places])), fraction
