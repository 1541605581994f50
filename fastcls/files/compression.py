"""Files of bytes, as they are or decompressed, and standard input."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import pyarrow as pa

from ..texts import first_line

# What a file's ending says about its compression.
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
STANDARD_INPUT = "standard input"
BLOCK = 1 << 20
# No row of a text file may be longer: what has longer ones is most likely no file of rows.
LONGEST_ROW = 1 << 24
# What a broken file decompresses to, up to the read that fails, is lost with that read: so reads are short.
_READ = 1 << 16


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


class ByteStream:
    """The bytes of a file, decompressed."""

    def __init__(self, file: _Readable, raw: Any | None, size: int, head: bytes = b"") -> None:
        """Args:
        file: what to read.
        raw: what it reads from, whose place is known; None for a pipe.
        size: the number of bytes of ``raw``.
        head: bytes that were read already.
        """
        self._file, self._raw, self._size, self._head = file, raw, size, head

    def read(self, size: int) -> bytes:
        """Exactly so many bytes, or all that are left, or those before an error, which comes with the next call."""
        parts = [self._head[:size]]
        self._head = self._head[size:]
        missing = size - len(parts[0])
        try:
            while missing and (part := self._file.read(min(missing, _READ))):
                parts.append(part)
                missing -= len(part)
        except (OSError, pa.ArrowException) as error:
            self._file = _Broken(error)
            if not any(parts):
                raise
        return b"".join(parts)

    def fraction(self) -> float | None:
        """How much of the file was read, before decompression."""
        if self._raw is None:
            return None
        return min(self._raw.tell() / self._size, 1.0) if self._size else 1.0


class _Broken:
    """A file after an error."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def read(self, size: int, /) -> bytes:  # noqa: ARG002 - a file's method
        raise self._error


def is_pipe(path: str) -> bool:
    """Whether a path can be read once only: standard input, a named pipe, what a shell's <(...) gives."""
    return path == "-" or (os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path))


class Bytes:
    """A file of bytes that can be opened, standard input and other pipes once."""

    def __init__(self, path: str) -> None:
        """Args:
        path: "-" is standard input.
        """
        self.is_pipe = is_pipe(path)
        self.name = STANDARD_INPUT if path == "-" else path
        self._compression = None if self.is_pipe else COMPRESSIONS.get(os.path.splitext(path)[1].lower())
        self._head: bytes | None = None
        self._was_read = False

    def head(self) -> bytes:
        """The first mebibyte, or all if it is less."""
        if not self.is_pipe:
            with self.opened() as stream:
                return stream.read(BLOCK)
        if self._head is None:
            self._head = self._pipe.read(BLOCK)
        return self._head

    @functools.cached_property
    def _pipe(self) -> Any:
        if self.name == STANDARD_INPUT:
            return sys.stdin.buffer
        with failures(self.name, 0):
            return open(self.name, "rb")

    @contextmanager
    def opened(self) -> Iterator[ByteStream]:
        """A stream from the beginning.

        Raises:
            OSError: there is no such file, or it cannot be read.
            ValueError: standard input was read already.
        """
        if self.is_pipe:
            if self._was_read:
                raise ValueError(f"{self.name} can be read only once")
            self._was_read = True
            yield ByteStream(self._pipe, None, 0, self._head or b"")
            return
        with failures(self.name, 0):
            raw = pa.OSFile(self.name)
        with raw:
            file = raw if self._compression is None else pa.CompressedInputStream(raw, self._compression)
            yield ByteStream(file, raw, raw.size())


@contextmanager
def failures(name: str, row: int) -> Iterator[None]:
    """Says of an error of a file which file it is, and where reading stopped.

    Args:
        name: the file.
        row: the number of rows before, bad ones included.

    Raises:
        OSError: the file cannot be read further.
    """
    try:
        yield
    except (OSError, EOFError, pa.ArrowException) as error:
        raise OSError(f"{name}: reading stopped after row {row}: {first_line(error)}") from error
