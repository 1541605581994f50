"""Where a run's output goes: in shards that appear whole, and of one file joined at the end.

Beside FILE stand FILE.parts/ with its shards, until it is whole, and FILE.manifest.jsonl, which stays. A folder holds
its shards and its manifest itself.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa

from ..texts import first_line
from .manifest import Manifest, Position, Shard, line_of, rename
from .writing import Form, Writer, join, open_writer

_UNFINISHED = ".unfinished"
_SHARD = re.compile(
    r"part-\d{5,}\.(errors|(parquet|jsonl|ndjson|csv|tsv|npy)(\.gz|\.zst)?)(\.unfinished)?", re.IGNORECASE
)


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
            ValueError: a form that is not known, or that does not fit the name; errors in the output itself.
        """
        by_name, asked = Form.of(output), None if form is None else Form.asked(form)
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
            found = cls(target, chosen, True, Path(errors) if errors else target / "errors.jsonl")
        elif by_name is None:
            raise ValueError(
                "--output must end with .parquet, .jsonl, .csv, .tsv or .npy, or be a folder with a / behind, "
                f"got {output}"
            )
        elif asked is not None and asked[:2] != by_name[:2]:
            raise ValueError(f"--output-format must fit the name of --output, got {form} for {output}")
        else:
            beside = target.with_name(f"{target.name}.errors.jsonl")
            found = cls(target, by_name, False, Path(errors) if errors else beside)
        if found.errors.resolve() in {path.resolve() for path in (target, found.manifest, found.parts)}:
            raise ValueError(f"--errors must be another file than the output and its manifest, got {errors}")
        return found

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

    def shards(self) -> list[Path]:
        """The files of shards that there are, of any form, finished or not; of others' files none."""
        return sorted(path for path in self.parts.glob("part-*") if _SHARD.fullmatch(path.name))

    def of_earlier_runs(self) -> list[Path]:
        """What earlier runs left."""
        own = [self.manifest, self.errors] if self.is_folder else [self.target, self.manifest, self.errors]
        return [path for path in (*own, *self.shards()) if path.exists()]


class Output:
    """A run's output, shard by shard. To look at what an earlier run left changes nothing: `open` begins.

    Args:
        places: its files.
        asked: what the run was asked for, for its manifest.
        resume: go on behind what an earlier run finished, if there was one.
        overwrite: remove what an earlier run left.

    Raises:
        ValueError: an earlier run's output is there and neither is asked, or it was asked for something else, or some
            of it is gone.
    """

    def __init__(self, places: Places, asked: Mapping[str, Any], *, resume: bool, overwrite: bool) -> None:
        self.places = places
        self._seen = _content(places.manifest)
        found = Manifest.read(places.manifest) if resume else None
        if found is not None:
            found.check_same(asked)
            self._check_whole(found)
        elif not overwrite and (earlier := places.of_earlier_runs()):
            remedy = "replace it with --overwrite"
            if not resume and Manifest.read(places.manifest) is not None:
                remedy = f"go on with --resume if its run was ended early, or {remedy}"
            raise ValueError(f"{earlier[0]} is there already: {remedy}")
        self.manifest = found or Manifest(places.manifest, asked)
        self._schema: pa.Schema = None
        self._held: Held | None = None
        self._writer: Writer | None = None
        self._errors: BinaryIO | None = None

    def _check_whole(self, found: Manifest) -> None:
        """Checks that what is finished is there."""
        finished = list(map(self.places.part, range(len(found.shards))))
        if found.finished and not self.places.is_folder:
            finished = [self.places.target]
        for path in finished:
            if not path.exists():
                raise ValueError(f"{path} must be there, as {found.path} says: begin anew with --overwrite")

    def open(self, schema: pa.Schema) -> None:
        """Begins to write batches of a schema.

        Raises:
            ValueError: another run is writing there, or has meanwhile.
            OSError: a file cannot be written.
        """
        self._schema = schema
        self.places.errors.parent.mkdir(parents=True, exist_ok=True)
        self.places.parts.mkdir(parents=True, exist_ok=True)
        self._held = Held.of(self.places.parts)
        if _content(self.places.manifest) != self._seen:
            self._held.release()
            self._held = None
            raise ValueError(f"{self.places.parts} must have one run at a time, and another one has just been there")
        if self.manifest.finished:
            return
        # First: from now on nothing says that what an earlier run left belongs to a run.
        self.manifest.begin()
        self._remove_stale()

    def _remove_stale(self) -> None:
        """Removes all files that no line of the manifest vouches for."""
        places, count = self.places, len(self.manifest.shards)
        kept = {path(index) for index in range(count) for path in (places.part, places.part_errors)}
        own = [places.errors] if places.is_folder else [places.errors, places.target]
        for path in (*own, *map(_unfinished, own), *places.shards()):
            if path not in kept:
                path.unlink(missing_ok=True)

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
        """Adds rows to the shard that is written.

        Raises:
            OSError: the disk does not take them.
        """
        with _writing(self.places.target):
            if self._writer is None:
                # A file's shards are joined, and only the first has a header.
                header = self.places.is_folder or self.index == 0
                self._writer = open_writer(_unfinished(self._part), self.places.form, self._schema, header=header)
            self._writer.write(batch)
        if errors:
            with _writing(self.places.errors):
                if self._errors is None:
                    self._errors = _unfinished(self.places.part_errors(self.index)).open("wb")
                self._errors.write(b"".join(map(line_of, errors)))

    @property
    def _part(self) -> Path:
        return self.places.part(self.index)

    def finish_shard(self, shard: Shard) -> None:
        """Has the disk hold the shard's files, and then the manifest its end.

        Raises:
            OSError: the disk does not take them.
        """
        if self._writer is None:
            return
        with _writing(self.places.target):
            self._writer.close()
            _appear(self._part)
            errors = self.places.part_errors(self.index)
            if self._errors is not None:
                self._errors.close()
                _appear(errors)
            self._writer = self._errors = None
            self.manifest.add(shard)

    def finish(self, joined: Callable[[int, int], None] = lambda *_: None) -> None:
        """Makes the output whole; once more is harmless.

        Args:
            joined: called with how many shards are joined, and of how many, after each.

        Raises:
            OSError: the disk does not take it.
        """
        with _writing(self.places.target):
            if not self.manifest.finished:
                self._finish(joined)
            self.remove_parts()

    def _finish(self, joined: Callable[[int, int], None]) -> None:
        places, count = self.places, len(self.manifest.shards)
        if not count:
            # Nothing came in: a file without rows, but with the names of its columns.
            self._writer = open_writer(_unfinished(places.part(0)), places.form, self._schema)
            self._writer.close()
            self._writer = None
            _appear(places.part(0))
        if not places.is_folder:
            parts = [places.part(index) for index in range(max(count, 1))]
            join(parts, _unfinished(places.target), places.form, self._schema, joined)
            _appear(places.target)
        errors = [path for path in map(places.part_errors, range(count)) if path.exists()]
        if errors:
            with _unfinished(places.errors).open("wb") as file:
                for path in errors:
                    file.write(path.read_bytes())
            _appear(places.errors)
        self.manifest.finish()

    def remove_parts(self) -> None:
        """Removes what is of no use once the output is whole."""
        places = self.places
        for path in places.shards():
            if not places.is_folder or ".errors" in path.suffixes:
                path.unlink(missing_ok=True)
        if not places.is_folder and places.parts.exists() and not any(places.parts.iterdir()):
            places.parts.rmdir()

    def _remove_unfinished(self) -> None:
        own = map(_unfinished, (self.places.target, self.places.errors))
        for path in (*own, *self.places.shards()):
            if path.suffix == _UNFINISHED:
                path.unlink(missing_ok=True)

    def leave(self) -> None:
        """Ends the run where it is; what is finished stays."""
        for each in (self._writer, self._errors):
            if each is not None:
                _quietly(each.close)
        if self._held is not None:
            # What has its name stays: the manifest may hold its line although writing that failed.
            _quietly(self._remove_unfinished)
            self._held.release()
            self._held = None


@contextmanager
def _writing(path: Path | str) -> Iterator[None]:
    """Says of errors which file could not be written."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        if isinstance(error, OSError) and (error.filename is not None or isinstance(error, BrokenPipeError)):
            raise
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else first_line(error)
        raise OSError(f"{path}: cannot be written: {reason}") from error


def _quietly(function: Callable[[], object]) -> None:
    """For what is left behind anyway, as on a disk that is full."""
    try:
        function()
    except (OSError, pa.ArrowException):
        return


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def _unfinished(path: Path) -> Path:
    return path.with_name(path.name + _UNFINISHED)


def _appear(path: Path) -> None:
    """Gives a file that is written its name."""
    rename(_unfinished(path), path)


class Held(NamedTuple):
    """A folder that other runs are kept out of until this process ends, where the system can."""

    descriptor: int | None

    @classmethod
    def of(cls, folder: Path) -> Held:
        """Keeps others out of a folder.

        Raises:
            ValueError: another run is in it.
        """
        try:
            import fcntl
        except ImportError:
            return cls(None)
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The run before may have removed it, and another one made it anew.
            is_this = folder.exists() and os.path.samestat(os.fstat(descriptor), folder.stat())
        except BlockingIOError:
            is_this = False
        if not is_this:
            os.close(descriptor)
            raise ValueError(f"{folder} must have one run at a time, and another one is writing there")
        return cls(descriptor)

    def release(self) -> None:
        """Lets others in."""
        if self.descriptor is not None:
            os.close(self.descriptor)


class Standard:
    """Rows on standard output as they come.

    Args:
        form: their form.
        errors: the file of bad rows, or None.
    """

    start = Position(0, 0)

    def __init__(self, form: Form, errors: str | None) -> None:
        self._form = form
        self._writer: Writer | None = None
        self._file: BinaryIO | None = None
        self.errors = None if errors is None else Path(errors)

    def open(self, schema: pa.Schema) -> None:
        """Begins to write batches of a schema.

        Raises:
            OSError: a file cannot be written.
        """
        if self.errors is not None:
            self._file = self.errors.open("wb")
        with self._writing():
            self._writer = open_writer(sys.stdout.buffer, self._form, schema)

    def write(self, batch: pa.RecordBatch, errors: Sequence[Mapping[str, Any]]) -> None:
        """Writes rows.

        Raises:
            OSError: they are not taken.
        """
        with self._writing():
            assert self._writer is not None
            self._writer.write(batch)
            sys.stdout.buffer.flush()
        if self._file is not None:
            with _writing(str(self.errors)):
                self._file.write(b"".join(map(line_of, errors)))

    def finish_shard(self, shard: Shard) -> None:
        """Does nothing: there are no shards."""

    def finish(self, joined: Callable[[int, int], None] = lambda *_: None) -> None:  # noqa: ARG002
        """Ends what is written; no shards are joined.

        Raises:
            OSError: it is not taken.
        """
        with self._writing():
            self._close()
        if self._file is not None:
            with _writing(str(self.errors)):
                self._file.flush()

    def leave(self) -> None:
        """Ends what is written, so that what was compressed can be read, and the file of bad rows."""
        _quietly(self._close)
        if self._file is not None:
            _quietly(self._file.close)

    def _close(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()
            sys.stdout.buffer.flush()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            with _writing("standard output"):
                yield
        except OSError:
            self._writer = None
            # What it holds would fail once more when Python ends, with a traceback and another exit status.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise
