"""What a run has finished, in a file of JSON lines: the first says what was asked, each further one a finished shard.

A line counts once the disk holds it whole, so that a run that was ended at any moment can be resumed behind the last.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..engine.batch import shortened

_FORMAT = 1


class Position(NamedTuple):
    """A row of the input: of which source, and how many of its rows come before."""

    source: int
    row: int


class Shard(NamedTuple):
    """A finished part of the output.

    Attributes:
        rows: how many rows of the input it is of, bad ones included.
        bad: how many of these have no answer.
        cut: how many texts were cut.
        not_finite: how many have a score that is infinite or no number.
        tokens: how many tokens were computed.
        end: the row behind its last.
    """

    rows: int
    bad: int
    cut: int
    not_finite: int
    tokens: int
    end: Position


class Manifest:
    """The record of a run.

    Args:
        path: its file.
        asked: what was asked, in JSON's types: options, model and inputs.
        shards: what is finished.
        finished: whether the output is.
    """

    def __init__(
        self, path: Path, asked: Mapping[str, Any], shards: Sequence[Shard] = (), finished: bool = False
    ) -> None:
        self.path, self.asked = path, dict(asked)
        self.shards, self.finished = list(shards), finished

    @classmethod
    def read(cls, path: Path) -> Manifest | None:
        """The record in a file; None if there is none, or no whole line in it.

        Raises:
            ValueError: a file that is no record of ours.
        """
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        # The last line may have been cut off in the middle.
        lines = content[: content.rfind(b"\n") + 1].splitlines()
        if not lines:
            return None
        try:
            head, *rest = map(json.loads, lines)
            if head["manifest"] != _FORMAT:
                raise ValueError(f"manifest {head['manifest']}")
            shards = [Shard(**{**row, "end": Position(*row["end"])}) for row in rest if "finished" not in row]
            return cls(path, head["asked"], shards, any("finished" in row for row in rest))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} must be the record of a run, got something else: {shortened(error)}") from error

    def begin(self) -> None:
        """Writes the record anew, as far as it goes."""
        rows = [{"manifest": _FORMAT, "asked": self.asked}, *map(_row_of, self.shards)]
        temporary = self.path.with_name(f"{self.path.name}.new")
        temporary.write_bytes(b"".join(map(line_of, rows)))
        rename(temporary, self.path)

    def add(self, shard: Shard) -> None:
        """Records a shard, whose files are on the disk."""
        self._append(_row_of(shard))
        self.shards.append(shard)

    def finish(self) -> None:
        """Records that the output is whole."""
        self._append({"finished": True})
        self.finished = True

    def _append(self, row: Mapping[str, Any]) -> None:
        with self.path.open("ab") as file:
            file.write(line_of(row))
            file.flush()
            os.fsync(file.fileno())

    @property
    def end(self) -> Position:
        """The row behind the last finished shard."""
        return self.shards[-1].end if self.shards else Position(0, 0)

    def check_same(self, asked: Mapping[str, Any]) -> None:
        """Checks that a run asks for what this one's did.

        Raises:
            ValueError: something differs; the first such thing is named.
        """
        for name in (*self.asked, *asked):
            old, new = self.asked.get(name), asked.get(name)
            if old != new:
                raise ValueError(
                    f"--resume must go on with what {self.path} began, got another {name}: {_difference(old, new)}. "
                    "Run it as before, or begin anew with --overwrite"
                )


def _difference(old: Any, new: Any) -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in (*old, *new):
            if old.get(key) != new.get(key):
                return f"{key} was {shortened(old.get(key))}, is {shortened(new.get(key))}"
    return f"it was {shortened(old)}, is {shortened(new)}"


def _row_of(shard: Shard) -> dict[str, Any]:
    return {**shard._asdict(), "end": list(shard.end)}


def line_of(row: Mapping[str, Any]) -> bytes:
    """A row as a line of JSON."""
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


def rename(written: Path, path: Path) -> None:
    """Gives a file that is written its name, once the disk holds it, and has the disk hold the name."""
    with written.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(written, path)
    if os.name != "posix":
        # Other systems do not sync folders.
        return
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
