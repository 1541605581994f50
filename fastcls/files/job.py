"""Files of texts to files of labels, as `fastcls classify` does it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from .. import __version__
from ..loading import parse_device
from ..predicting.checkpoint import fingerprint
from ..predicting.loaded import answers_of, load
from ..predicting.options import PredictOptions
from .compression import STANDARD_INPUT, is_pipe
from .output import Output, Places, Standard
from .rows import Columns
from .run import SHARD_ROWS, Totals, Windows, run
from .sources import Source, open_sources
from .writing import Form, check_schema


@dataclass(frozen=True, kw_only=True)
class Options(PredictOptions):
    """What is read, computed and written: see ``fastcls classify --help``.

    Attributes:
        format: of the input, where its name does not say it.
        text_column, pair_column: the columns of texts, and of second texts; None for "text" or the only one of strings.
        id_columns: columns that are written instead of the texts.
        pairs: whether each line of txt is two texts with a tab between.
        header, quotes: of csv and tsv.
        output_format: of a folder, or of standard output.
        shard_rows: rows of the input a shard.
    """

    format: str | None = None
    text_column: str | None = None
    pair_column: str | None = None
    id_columns: tuple[str, ...] | None = None
    pairs: bool = False
    header: bool = True
    quotes: bool | None = None
    output_format: str | None = None
    shard_rows: int = SHARD_ROWS

    def spelled(self, name: str) -> str:
        return f"--{name.replace('_', '-')}"


class Workers(Windows, Protocol):
    """Processes with a model, on this machine or others: see `fastcls.ray.workers.Workers`."""

    @property
    def device(self) -> str: ...
    def load(self, model: str, options: PredictOptions) -> None: ...


class Job:
    """A run that is prepared: its options, files and what an earlier run left were looked at, nothing is loaded.

    Args:
        model: a folder with a checkpoint, or a name on the hub.
        inputs: files, patterns, folders of datasets, or "-" for standard input.
        output: a file or folder, or "-" for standard output.
        options: what is read, computed and written.
        errors: the file of bad rows; None for one beside the output.
        strict: end at the first bad row. On standard output without ``errors`` it is always so.
        resume, overwrite: see `Output`.
        workers: other processes that compute; None for this one.

    Raises:
        ValueError, TypeError, OSError: something that does not fit or cannot be read.
    """

    def __init__(
        self,
        model: str,
        inputs: Sequence[str],
        output: str,
        options: Options,
        *,
        errors: str | None = None,
        strict: bool = False,
        resume: bool = False,
        overwrite: bool = False,
        workers: Workers | None = None,
    ) -> None:
        options.check()
        self._workers = workers
        # By its name after the defaults are applied, so that a default that is written out asks for the same.
        self._device = str(parse_device(options.device)) if workers is None else options.device or workers.device
        self.options, self._model = options, model
        self._output: Output | Standard
        is_stream = output == "-"
        if is_stream:
            self.form = _stream_form(options.output_format)
            if resume or overwrite:
                raise ValueError("--resume and --overwrite are for files: name one with --output")
        else:
            places = Places.of(output, options.output_format, errors)
            self.form = places.form
        if resume and any(map(is_pipe, inputs)):
            pipe = next(filter(is_pipe, inputs))
            raise ValueError(f"--resume must have files that can be read again, got the pipe {pipe}")
        columns = Columns(options.text_column, options.pair_column, options.id_columns)
        if self.form.name == "npy" and options.id_columns is None:
            columns = columns._replace(keep=())
        self.sources: list[Source] = open_sources(
            inputs,
            columns,
            format=options.format,
            header=options.header,
            quotes=options.quotes,
            pairs_in_lines=options.pairs,
        )
        written = [Path(errors)] if errors else []
        if not is_stream:
            written = [places.target, places.errors, places.manifest, places.parts]
        _check_not_input(written, self.sources)
        self._strict = strict or (is_stream and errors is None)
        if is_stream:
            self._output = Standard(self.form, errors)
        else:
            self._output = Output(places, self._asked(errors), resume=resume, overwrite=overwrite)

    def _asked(self, errors: str | None) -> dict[str, Any]:
        options = asdict(self.options)
        options["device"] = self._device
        return {
            "model": {"name": self._model, "is": fingerprint(self._model)},
            "options": {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()},
            "errors": errors,
            "inputs": [fact for source in self.sources for fact in _facts(source.name)],
            "fastcls": __version__,
        }

    @property
    def is_finished(self) -> bool:
        """Whether an earlier run has done all."""
        return isinstance(self._output, Output) and self._output.manifest.finished

    def tidy(self) -> None:
        """Removes what a run that was ended after its output was whole left behind."""
        if isinstance(self._output, Output) and self.is_finished:
            self._output.remove_parts()

    @property
    def num_rows(self) -> int | None:
        """Rows of the input, where its files say so without being read."""
        counts = [source.num_rows for source in self.sources]
        return None if None in counts else sum(count for count in counts if count is not None)

    @property
    def done(self) -> Totals:
        """What earlier runs have done."""
        shards = self._output.manifest.shards if isinstance(self._output, Output) else []
        sums = {name: sum(getattr(shard, name) for shard in shards) for name in ("rows", "bad", "cut", "not_finite")}
        return Totals(**sums)

    @property
    def errors(self) -> Path | None:
        """The file of bad rows, if there are any."""
        return self._output.errors

    def load(self) -> None:
        """Loads the model.

        Raises:
            ValueError, TypeError, OSError: as `Classifier.from_pretrained`; columns of the input and of the answers
                that share a name, or that the output's form cannot hold.
        """
        self._flow: Windows
        if self._workers is None:
            self._flow, self._results = load(self._model, self.options)
        else:
            # The model last: what is refused is refused before it is sent to a cluster.
            self._flow, self._results = self._workers, answers_of(self._model, self.options)
        kept, found = self.sources[0].schema, self._results.schema
        if shared := [name for name in found.names if name in kept.names]:
            raise ValueError(
                f"columns must have different names, got {shared[0]} in the input and among the answers: add --prefix, "
                "as in --prefix predicted_"
            )
        schema = pa.schema([*kept, *found])
        check_schema(schema, self.form)
        self._schema = schema
        if self._workers is not None:
            asked = {field.name: getattr(self.options, field.name) for field in fields(PredictOptions)}
            self._workers.load(self._model, PredictOptions(**{**asked, "device": self._device}))

    def run(
        self,
        report: Callable[[Totals], None] = lambda _: None,
        joined: Callable[[int, int], None] = lambda *_: None,
    ) -> Totals:
        """Computes and writes what is missing. What is finished stays, however it ends.

        Args:
            report: called with what is done so far, after each window.
            joined: called with how many shards are joined to one file, and of how many, after each.

        Raises:
            BadRow: a bad row, where none is allowed.
            OSError, ValueError: a file that cannot be read or written.
        """
        try:
            self._output.open(self._schema)
            totals = run(
                self._flow,
                self.sources,
                self._results,
                self._output,
                shard_rows=self.options.shard_rows,
                keep_bad_rows=self.form.keeps_bad_rows,
                strict=self._strict,
                report=report,
            )
            self._output.finish(joined)
        finally:
            self._output.leave()
        return totals


def _stream_form(name: str | None) -> Form:
    form = Form.asked(name or "jsonl")
    if form is None or form.name in ("parquet", "npy"):
        raise ValueError(f"standard output must be jsonl, csv or tsv, got {name}")
    return form


def _check_not_input(written: Sequence[Path], sources: Sequence[Source]) -> None:
    """Checks that what is written, or lies in a folder that is, is not read, by a pattern for instance."""
    own = {path.resolve() for path in written}
    for source in sources:
        path = Path(source.name).resolve()
        if source.name != STANDARD_INPUT and (path in own or path.parent in own):
            raise ValueError(
                f"--output and --errors must be other files than the input, got {source.name} to read and to write"
            )


def _facts(name: str) -> list[list[Any]]:
    """The files of a source, their sizes and when they were last changed."""
    if name == STANDARD_INPUT:
        return [[name, None, None]]
    path = Path(name)
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
