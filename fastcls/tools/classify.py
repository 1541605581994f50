"""`fastcls classify`: from files of texts to files of labels."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from . import demo_model
from .options import Device, DType, Quantize, Threads
from .terminal import INTERRUPTED, expected_errors, set_threads, stderr

if TYPE_CHECKING:
    from ..files.job import Job
    from ..files.run import Totals
    from ..ray.workers import Workers

_INPUT, _TEXTS, _ANSWERS, _OUTPUT, _MODEL = "Input", "Long texts", "Answers", "Output", "Model"
_CLUSTER = "Cluster"
# Where progress cannot be drawn, a line says it so often, in seconds.
_REPORT_EVERY = 60.0


@expected_errors
def classify(
    model: Annotated[
        str | None, typer.Argument(help="A folder with a fine-tuned checkpoint, or a name on the hub.")
    ] = None,
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[INPUT]...",
            help="Files of txt, jsonl, csv, tsv, parquet or arrow, also .gz or .zst; patterns like 'data/*.csv'; "
            "folders that datasets saved. - or nothing: standard input.",
        ),
    ] = None,
    own_model: Annotated[
        bool,
        typer.Option(
            "--demo", help="Take fastcls's own model of English reviews; leave MODEL out.", rich_help_panel=_MODEL
        ),
    ] = False,
    output: Annotated[
        str,
        typer.Option(
            "--output",
            "-o",
            help="A file that ends with .parquet, .jsonl, .csv, .tsv (the last three also .gz, .zst) or .npy, or a "
            "folder for a file a shard. Default: -, JSON lines on standard output.",
            rich_help_panel=_OUTPUT,
        ),
    ] = "-",
    output_format: Annotated[
        str | None,
        typer.Option(help="Of a folder (default: parquet) or standard output (jsonl).", rich_help_panel=_OUTPUT),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on where an earlier run was ended, if one was.", rich_help_panel=_OUTPUT),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier output.", rich_help_panel=_OUTPUT)
    ] = False,
    errors: Annotated[
        str | None,
        typer.Option(
            help="Where bad rows go, as JSON lines with their place and reason. Default: beside the output. On "
            "standard output without it the first bad row ends the run.",
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="End at the first bad row.", rich_help_panel=_OUTPUT)
    ] = False,
    shard_rows: Annotated[
        int, typer.Option(min=1, help="Rows of the input a shard.", rich_help_panel=_OUTPUT)
    ] = 65_536,
    format: Annotated[  # noqa: A002 - the option's name
        str | None,
        typer.Option(
            help="Of the input, where its name does not say it; of standard input txt.", rich_help_panel=_INPUT
        ),
    ] = None,
    text_column: Annotated[
        str | None,
        typer.Option(help="Default: text, or the only column of strings.", rich_help_panel=_INPUT),
    ] = None,
    pair_column: Annotated[str | None, typer.Option(help="The column of second texts.", rich_help_panel=_INPUT)] = None,
    id_column: Annotated[
        list[str] | None,
        typer.Option(
            help="Write this column instead of the texts. Can be repeated; the texts' own name keeps them.",
            rich_help_panel=_INPUT,
        ),
    ] = None,
    pairs: Annotated[
        bool,
        typer.Option("--pairs", help="Each line of txt is two texts with a tab between.", rich_help_panel=_INPUT),
    ] = False,
    header: Annotated[
        bool,
        typer.Option(
            "--header/--no-header",
            help="Whether csv and tsv begin with names; without them columns are f0, f1 ...",
            rich_help_panel=_INPUT,
        ),
    ] = True,
    quotes: Annotated[
        bool | None,
        typer.Option(
            "--quotes/--no-quotes",
            help="Whether fields of csv (default: yes) and tsv (no) may stand in quotation marks.",
            rich_help_panel=_INPUT,
        ),
    ] = None,
    long_texts: Annotated[
        str,
        typer.Option(
            help="Longer ones than the model takes: truncate cuts and counts them, error makes them bad rows, window "
            "reads them in overlapping windows.",
            rich_help_panel=_TEXTS,
        ),
    ] = "truncate",
    max_length: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens that a text may have. Default: what the model takes.", rich_help_panel=_TEXTS),
    ] = None,
    overlap: Annotated[
        int, typer.Option(min=0, help="Tokens that a window shares with the next.", rich_help_panel=_TEXTS)
    ] = 64,
    window_scores: Annotated[
        str, typer.Option(help="A text's scores are the mean or the max of its windows'.", rich_help_panel=_TEXTS)
    ] = "mean",
    top_k: Annotated[
        int | None,
        typer.Option(min=1, help="Give this many labels for each text, best first.", rich_help_panel=_ANSWERS),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(help="Give all labels whose score is at least this.", rich_help_panel=_ANSWERS),
    ] = None,
    all_scores: Annotated[
        bool, typer.Option("--all-scores", help="Give the score of each label, too.", rich_help_panel=_ANSWERS)
    ] = False,
    logits: Annotated[
        bool, typer.Option("--logits", help="Give the logit of each label, too.", rich_help_panel=_ANSWERS)
    ] = False,
    prefix: Annotated[
        str, typer.Option(help="What the names of the answers' columns begin with.", rich_help_panel=_ANSWERS)
    ] = "",
    embeddings: Annotated[
        str | None,
        typer.Option(
            help="Give vectors instead of labels: first ([CLS]) or mean (of all tokens).", rich_help_panel=_ANSWERS
        ),
    ] = None,
    normalize: Annotated[
        bool, typer.Option("--normalize", help="Of length 1, of vectors.", rich_help_panel=_ANSWERS)
    ] = False,
    fill_mask: Annotated[
        bool,
        typer.Option(
            "--fill-mask", help="Give the token that fills each text's mask, or --top-k.", rich_help_panel=_ANSWERS
        ),
    ] = False,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Compute on a cluster of Ray: auto for the one that this machine belongs to, its address, or local "
            "for one on this machine alone. Files are read and written here.",
            rich_help_panel=_CLUSTER,
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Processes with the model. Default: as many as it has CPUs, or GPUs, for.",
            rich_help_panel=_CLUSTER,
        ),
    ] = None,
    worker_gpus: Annotated[
        float | None,
        typer.Option(
            min=0, help="Of each; 0.5 has two share one. Default: 1 if the cluster has any.", rich_help_panel=_CLUSTER
        ),
    ] = None,
    device: Device = None,
    dtype: DType = None,
    quantize: Quantize = None,
    threads: Threads = None,
) -> None:
    """Classify texts: from files of texts to files of labels, in the order of the input.

    A bad row (a null, another type, bytes that are not UTF-8) goes to the errors file
    with its place and reason, and is counted; every other row is kept. An output
    appears once it is whole; what a run that was ended early has finished stays beside
    it, and --resume goes on from there. Memory does not grow with the input.

    Exit status 0 if all is written, bad rows or not; 2 for a mistake in what was asked,
    a bad row with --strict, or a file that cannot be read or written; 130 after Ctrl-C.

    Scores that are infinite or no number, as those of a model whose training diverged,
    are null in JSON, and a label that no number chose is null everywhere. Standard
    error says at the end how many there were.
    """
    path, paths = _model_and_inputs(model, inputs or [], own_model)
    for name, value in (("--workers", workers), ("--worker-gpus", worker_gpus)):
        if value is not None and ray is None:
            raise ValueError(f"{name} is for a cluster: add --ray ADDRESS, or leave it out")
    if ray is None:
        set_threads(threads)
    from ..files.job import Job, Options

    options: Any = {
        "format": format,
        "text_column": text_column,
        "pair_column": pair_column,
        "id_columns": tuple(id_column) if id_column else None,
        "pairs": pairs,
        "header": header,
        "quotes": quotes,
        "long_texts": long_texts,
        "max_length": max_length,
        "overlap": overlap,
        "window_scores": window_scores,
        "top_k": top_k,
        "threshold": threshold,
        "all_scores": all_scores,
        "logits": logits,
        "prefix": prefix,
        "embeddings": embeddings,
        "normalize": normalize,
        "fill_mask": fill_mask,
        "output_format": output_format,
        "shard_rows": shard_rows,
        "device": device,
        "dtype": dtype,
        "quantize": quantize,
    }
    asked: Any = {"errors": errors, "strict": strict, "resume": resume, "overwrite": overwrite}
    # A GPU that nobody computes on is not reserved.
    gpus = 0.0 if device == "cpu" and worker_gpus is None else worker_gpus
    with _cluster(ray, workers, threads or 1, gpus) as cluster:
        _run(Job(path, paths, output, Options(**options), **asked, workers=cluster), output, strict, cluster)


@contextlib.contextmanager
def _cluster(address: str | None, count: int | None, threads: int, gpus: float | None) -> Iterator[Workers | None]:
    """The workers of a cluster, if one is asked for."""
    if address is None:
        yield None
        return
    from ..ray.workers import Workers

    with stderr.status("Starting Ray" if address == "local" else "Connecting to Ray", spinner="dots"):
        workers = Workers(address, count=count, threads=threads, gpus=gpus)
    try:
        yield workers
    finally:
        workers.close()


def _run(job: Job, output: str, strict: bool, cluster: Workers | None) -> None:
    """Runs a job, and says on standard error how far it is and what it did."""
    from ..files.run import BadRow

    if job.is_finished:
        job.tidy()
        stderr.print(f"{output} is finished already: there is nothing to resume.", highlight=False, soft_wrap=True)
        return
    where = "" if cluster is None else f" in {cluster.count} workers on {cluster.device}"
    with stderr.status(f"Loading the model{where}", spinner="dots"):
        job.load()
    done = job.done
    display = _Display(done, job.num_rows, cluster.count if cluster is not None else 1)
    try:
        with display:
            totals = job.run(display.show, display.show_joined)
    except BadRow as error:
        _print_kept(job)
        remedy = "" if strict else ": add --errors FILE to write such rows there and go on"
        raise ValueError(f"{error}{remedy}") from error
    except KeyboardInterrupt:
        stderr.print(f"Interrupted: {display.rows} texts classified.", highlight=False)
        _print_kept(job)
        raise typer.Exit(INTERRUPTED) from None
    except BaseException:
        _print_kept(job)
        raise
    _summarize(done, totals, job, output, display.processes)
    if cluster is not None and cluster.lost:
        stderr.print(
            f"[yellow]Workers lost:[/] {cluster.lost:,} times; what they were computing was computed again.",
            highlight=False,
            soft_wrap=True,
        )


def _model_and_inputs(model: str | None, inputs: list[str], own_model: bool) -> tuple[str, list[str]]:
    """What to classify with, and what: with --demo all arguments are files."""
    if not own_model:
        if model is None:
            raise ValueError(
                "MODEL must be given, a checkpoint's folder or a name on the hub; or use --demo without it"
            )
        return model, inputs or ["-"]
    if model is not None and (Path(model) / "config.json").exists():
        raise ValueError(f"--demo is a model of its own: leave MODEL out, got {model}")
    return demo_model(), [*filter(None, (model,)), *inputs] or ["-"]


class _Display:
    """How far a run is: drawn on a terminal, else a line a minute.

    Args:
        done: what earlier runs have done.
        num_rows: rows of the input, if that is known.
        processes: how many have the model.

    Attributes:
        rows: rows of this run so far.
    """

    def __init__(self, done: Totals, num_rows: int | None, processes: int = 1) -> None:
        self._done, self._num_rows, self.processes = done.rows, num_rows, processes
        self.rows = 0
        self._reported = time.perf_counter()
        self._bar = Progress(
            SpinnerColumn(),
            BarColumn(bar_width=24),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            console=stderr,
            disable=not stderr.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task("", total=None)

    def __enter__(self) -> _Display:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, totals: Totals) -> None:
        """Shows a run's totals so far."""
        self.rows = totals.rows
        rows = self._done + totals.rows
        part = rows / self._num_rows if self._num_rows else totals.read
        line = f"{rows:,} rows, {_speed(totals, self.processes)}"
        self._show(line, part)

    def show_joined(self, shards: int, of: int) -> None:
        """Shows how many shards are joined to one file."""
        self._show(f"{shards:,} of {of:,} shards joined", shards / of)

    def _show(self, line: str, part: float | None) -> None:
        now = time.perf_counter()
        if not self._bar.disable:
            self._bar.update(self._task, description=line, completed=part or 0, total=None if part is None else 1)
        elif now - self._reported >= _REPORT_EVERY:
            self._reported = now
            stderr.print(line + ("" if part is None else f", {part:.0%} done"), highlight=False, soft_wrap=True)


def _speed(totals: Totals, processes: int) -> str:
    seconds = totals.seconds or 1e-9
    return (
        f"{totals.rows / seconds:,.0f} rows/s, {totals.tokens / seconds:,.0f} tokens/s, "
        f"model busy {min(totals.busy / seconds / processes, 1):.0%}"
    )


def _summarize(done: Totals, totals: Totals, job: Job, output: str, processes: int) -> None:
    """What a run did, on standard error."""
    where = "" if output == "-" else f" to {output}"
    before = f", {done.rows:,} of them by earlier runs" if done.rows else ""
    lines = []
    # On standard output a script's log has what is out of the ordinary, and nothing else.
    if output != "-" or stderr.is_terminal:
        speed = f"{_speed(totals, processes)}, {totals.seconds:,.1f} s."
        lines.append(f"{done.rows + totals.rows:,} rows{where}{before}: {speed}")
    if lines and totals.repeated:
        lines.append(f"Computed once: {totals.repeated:,} rows repeat a text of their window.")
    for count, what in (
        (done.cut + totals.cut, "Cut: {} texts were longer than the model takes; see --long-texts."),
        (done.bad + totals.bad, f"[yellow]Bad rows:[/] {{}}, in {escape(str(job.errors))}."),
        (
            done.not_finite + totals.not_finite,
            "[yellow]Not finite:[/] {} rows have a score that is infinite or no number.",
        ),
    ):
        if count:
            lines.append(what.format(f"{count:,}"))
    if lines:
        stderr.print("\n".join(lines), highlight=False, soft_wrap=True)


def _print_kept(job: Job) -> None:
    """What a run that ended early leaves, on standard error."""
    rows = job.done.rows
    if rows:
        stderr.print(f"Kept: {rows:,} finished rows; --resume goes on from there.", highlight=False, soft_wrap=True)
