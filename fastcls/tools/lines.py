"""Reading lines of files and of standard input as texts."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


def opened(file: Path) -> BinaryIO:
    """Opens a file, or standard input for -."""
    return sys.stdin.buffer if str(file) == "-" else file.open("rb")


def write_utf8() -> None:
    """Has standard output write UTF-8."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # JSON lines are UTF-8, whatever the terminal's encoding.
        sys.stdout.reconfigure(encoding="utf-8")


def texts_of(lines: Iterator[str], name: str, pairs: bool) -> Iterator[str | tuple[str, str]]:
    """Each line as a text, or as a pair of texts with a tab between."""
    for number, line in enumerate(lines, start=1):
        if not pairs:
            yield line
            continue
        text, tab, pair = line.partition("\t")
        if not tab:
            raise ValueError(f"{name}, line {number}: --pairs needs a tab between two texts, got {line!r}")
        yield text, pair


def labelled(lines: Iterator[str], name: str) -> Iterator[tuple[str, str]]:
    """Each line without its label, and the label: what follows its last tab."""
    for number, line in enumerate(lines, start=1):
        rest, tab, label = line.rpartition("\t")
        if tab == "":
            raise ValueError(f"{name}, line {number}: --labelled needs a tab before the label, got {line!r}")
        yield rest, label


def decoded_lines(source: BinaryIO, name: str) -> Iterator[str]:
    """Lines of UTF-8, without their line ends."""
    for number, raw in enumerate(source, start=1):
        try:
            # The first line may carry a byte order mark, which is no part of the text.
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{name}, line {number}: not UTF-8 at byte {error.start + 1} of the line (0x{raw[error.start]:02x}). "
                "Convert the file first, for instance with iconv"
            ) from error
        yield line.rstrip("\r\n")


def count_lines(file: Path) -> int | None:
    """Reads a regular file through once, so that a line that is not UTF-8 is found before the model is loaded."""
    if file.is_dir():
        raise ValueError(f"{file} must be a file, it is a folder")
    if file.exists() and not file.is_file():
        # A pipe can be read once only.
        return None
    with file.open("rb") as source:
        return sum(1 for _ in decoded_lines(source, str(file)))
