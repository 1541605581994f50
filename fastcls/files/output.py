"""Where a run's output goes: in shards that appear whole, and of one file joined at the end.

Beside FILE stand FILE.parts/ with its shards, until it is whole, and FILE.manifest.jsonl, which stays. A folder holds
its shards and its manifest itself.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa

from .manifest import Manifest, Position, Shard, sync_folder
from .writing import Form, Writer, join, open_writer


class Places(NamedTuple):
    """The files of a run.

    Attributes:
        target: the file or folder that was asked for.
        form: the form of its files.
        is_folder: whether the output is a folder of shards.
        errors: where rows without an answer go.
    """

    target: Path
    form: Form
    is_folder: bool
    errors: Path

    @classmethod
    def of(cls, output: str, form: str | None, errors: str | None) -> Places:
        """The files for an output's name.

        Raises:
            ValueError: a form that is not known, or that does not fit the name.
        """
        by_name, asked = Form.of(output), None if form is None else Form.of(form)
        if form is not None and asked is None:
            raise ValueError(
                f"--output-format must be parquet, jsonl, csv or tsv, the last three also with .gz or .zst, got {form}"
            )
        target = Path(output)
        is_folder = output.endswith(("/", os.sep)) or target.is_dir() or (by_name is None and not target.suffix)
        if is_folder:
            chosen = asked or Form("parquet", None, ".parquet")
            if chosen.name == "npy":
                raise ValueError(f"--output must be a file for vectors in .npy, got the folder {output}")
            return cls(target, chosen, True, Path(errors) if errors else target / "errors.jsonl")
        if by_name is None:
            raise ValueError(
                "--output must end with .parquet, .jsonl, .csv, .tsv or .npy, or be a folder with a / behind, "
                f"got {output}"
            )
        if asked is not None and asked != by_name:
            raise ValueError(f"--output-format must fit the name of --output, got {form} for {output}")
        beside = target.with_name(f"{target.name}.errors.jsonl")
        return cls(target, by_name, False, Path(errors) if errors else beside)

    @property
    def manifest(self) -> Path:
        return self.target / "manifest.jsonl" if self.is_folder else self._beside(".manifest.jsonl")

    @property
    def parts(self) -> Path:
        """The folder of shards."""
        return self.target if self.is_folder else self._beside(".parts")

    def _beside(self, ending: str) -> Path:
        return self.target.with_name(self.target.name + ending)

    def part(self, index: int) -> Path:
        return self.parts / f"part-{index:05d}{self.form.ending}"

    def part_errors(self, index: int) -> Path:
        return self.parts / f"part-{index:05d}.errors"

    def of_earlier_runs(self) -> list[Path]:
        """What earlier runs left."""
        own = [self.manifest, self.errors] if self.is_folder else [self.target, self.manifest, self.parts, self.errors]
        shards = sorted(self.parts.glob("part-*")) if self.is_folder else []
        return [path for path in (*own, *shards) if path.exists()]


class Output:
    """A run's output, shard by shard. To look at what an earlier run left changes nothing: `open` begins.

    Args:
        places: its files.
        asked: what the run was asked for, for its manifest.
        resume: go on behind what an earlier run finished, if there was one.
        overwrite: remove what an earlier run left.

    Raises:
        ValueError: an earlier run's output is there and neither is asked, or it was asked for something else.
    """

    def __init__(self, places: Places, asked: Mapping[str, Any], *, resume: bool, overwrite: bool) -> None:
        self.places = places
        found = Manifest.read(places.manifest) if resume else None
        if found is not None:
            found.check_same(asked)
        earlier = [] if found is not None else places.of_earlier_runs()
        if earlier and not overwrite:
            remedy = "replace it with --overwrite"
            if not resume and Manifest.read(places.manifest) is not None:
                remedy = f"go on with --resume if its run was ended early, or {remedy}"
            raise ValueError(f"{earlier[0]} is there already: {remedy}")
        self._earlier = earlier
        self.manifest = found or Manifest(places.manifest, asked)
        self._schema: pa.Schema = None
        self._held: int | None = None
        self._writer: Writer | None = None
        self._errors: BinaryIO | None = None

    def open(self, schema: pa.Schema) -> None:
        """Begins to write batches of a schema.

        Raises:
            ValueError: another run is writing there.
            OSError: a file cannot be written.
        """
        self._schema = schema
        self.places.parts.parent.mkdir(parents=True, exist_ok=True)
        self.places.errors.parent.mkdir(parents=True, exist_ok=True)
        # The manifest last: without it nothing says that the rest is a run's.
        for path in sorted(self._earlier, key=lambda path: path == self.places.manifest):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        self.places.parts.mkdir(exist_ok=True)
        self._held = _held(self.places.parts)
        self._remove_unfinished()
        if not self.manifest.finished:
            self.manifest.begin()

    @property
    def errors(self) -> Path | None:
        """The file of bad rows, if there are any."""
        return self.places.errors if self.places.errors.exists() else None

    @property
    def start(self) -> Position:
        """The first row that is not finished."""
        return self.manifest.end

    @property
    def index(self) -> int:
        """The number of the shard that is written."""
        return len(self.manifest.shards)

    def write(self, batch: pa.RecordBatch, errors: Sequence[Mapping[str, Any]]) -> None:
        """Adds rows to the shard that is written."""
        if self._writer is None:
            # A file's shards are joined, and only the first has a header.
            header = self.places.is_folder or self.index == 0
            self._writer = open_writer(_unfinished(self._part), self.places.form, self._schema, header=header)
        self._writer.write(batch)
        if errors:
            if self._errors is None:
                self._errors = _unfinished(self.places.part_errors(self.index)).open("wb")
            self._errors.write(_lines(errors))

    @property
    def _part(self) -> Path:
        return self.places.part(self.index)

    def finish_shard(self, shard: Shard) -> None:
        """Has the disk hold the shard's files, and then the manifest its end."""
        if self._writer is None:
            return
        self._writer.close()
        _appear(self._part)
        errors = self.places.part_errors(self.index)
        # A run before this one may have been ended between the two names.
        errors.unlink(missing_ok=True)
        if self._errors is not None:
            self._errors.close()
            _appear(errors)
        sync_folder(self.places.parts)
        self._writer = self._errors = None
        self.manifest.add(shard)

    def finish(self) -> None:
        """Makes the output whole; once more is harmless."""
        places, count = self.places, len(self.manifest.shards)
        if self.manifest.finished:
            self._remove_parts()
            return
        if not places.is_folder:
            if not count:
                # Nothing came in: a file without rows, but with the names of its columns.
                self._writer = open_writer(_unfinished(places.part(0)), places.form, self._schema)
                self._writer.close()
                self._writer = None
                _appear(places.part(0))
            parts = [places.part(index) for index in range(max(count, 1))]
            join(parts, _unfinished(places.target), places.form, self._schema)
            _appear(places.target)
        errors = [path for path in map(places.part_errors, range(count)) if path.exists()]
        if errors:
            with _unfinished(places.errors).open("wb") as file:
                for path in errors:
                    file.write(path.read_bytes())
            _appear(places.errors)
        self.manifest.finish()
        self._remove_parts()

    def _remove_parts(self) -> None:
        if self.places.is_folder:
            for path in self.places.parts.glob("part-*.errors"):
                path.unlink()
        elif self.places.parts.exists():
            shutil.rmtree(self.places.parts)

    def _remove_unfinished(self) -> None:
        for path in self.places.parts.glob("*.unfinished"):
            path.unlink()

    def leave(self) -> None:
        """Ends the run where it is; what is finished stays."""
        for each in (self._writer, self._errors):
            if each is not None:
                _quietly(each.close)
        _quietly(self._remove_unfinished)
        if self._held is not None:
            os.close(self._held)
            self._held = None


def _quietly(function: Callable[[], object]) -> None:
    """For what is left behind anyway, as on a disk that is full."""
    try:
        function()
    except OSError:
        return


def _unfinished(path: Path) -> Path:
    return path.with_name(f"{path.name}.unfinished")


def _appear(path: Path) -> None:
    """Gives a file that is written its name, once the disk holds it."""
    with _unfinished(path).open("rb") as file:
        os.fsync(file.fileno())
    os.replace(_unfinished(path), path)
    sync_folder(path.parent)


def _held(folder: Path) -> int | None:
    """Keeps other runs out of a folder until this process ends, where the system can."""
    try:
        import fcntl
    except ImportError:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ValueError(f"{folder} must have one run at a time, and another one is writing there") from None
    return descriptor


class Standard:
    """Rows on standard output as they come.

    Args:
        form: their form.
        errors: the file of bad rows, or None.
    """

    start = Position(0, 0)

    def __init__(self, form: Form, errors: str | None) -> None:
        self._form = form
        self.errors = None if errors is None else Path(errors)

    def open(self, schema: pa.Schema) -> None:
        """Begins to write batches of a schema."""
        self._writer = open_writer(sys.stdout.buffer, self._form, schema)
        self._file = None if self.errors is None else self.errors.open("wb")

    def write(self, batch: pa.RecordBatch, errors: Sequence[Mapping[str, Any]]) -> None:
        """Writes rows."""
        self._writer.write(batch)
        sys.stdout.buffer.flush()
        if self._file is not None:
            self._file.write(_lines(errors))

    def finish_shard(self, shard: Shard) -> None:
        """Does nothing: there are no shards."""

    def finish(self) -> None:
        """Ends what is written."""
        self._writer.close()
        sys.stdout.buffer.flush()

    def leave(self) -> None:
        """Closes the file of bad rows."""
        if self._file is not None:
            self._file.close()


def _lines(errors: Sequence[Mapping[str, Any]]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in errors)
