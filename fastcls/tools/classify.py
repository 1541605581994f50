"""`fastcls classify`: from files of texts to files of labels."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from . import demo_model
from .options import Device, DType, Quantize, Threads
from .terminal import INTERRUPTED, set_threads, stderr

if TYPE_CHECKING:
    from ..files.output import Output
    from ..files.run import Totals
    from ..flow import Flow

_INPUT, _TEXTS, _ANSWERS, _OUTPUT, _MODEL = "Input", "Long texts", "Answers", "Output", "Model"
# Where progress cannot be drawn, a line says it so often, in seconds.
_REPORT_EVERY = 60.0


def classify(
    model: Annotated[
        str | None, typer.Argument(help="A folder with a fine-tuned checkpoint, or a name on the hub.")
    ] = None,
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[INPUT]...",
            help="Files of txt, jsonl, csv, tsv, parquet or arrow, also .gz or .zst; patterns like 'data/*.csv'; folders "
            "that datasets saved. - or nothing: standard input.",
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
            help="Where bad rows go, as JSON lines with their place and reason. Default: beside the output. On standard "
            "output without it the first bad row ends the run.",
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
        typer.Option(help="Of the input, where its name does not say it; of standard input txt.", rich_help_panel=_INPUT),
    ] = None,
    text_column: Annotated[
        str | None,
        typer.Option(help="Default: text, or the only column of strings.", rich_help_panel=_INPUT),
    ] = None,
    pair_column: Annotated[
        str | None, typer.Option(help="The column of second texts.", rich_help_panel=_INPUT)
    ] = None,
    id_column: Annotated[
        list[str] | None,
        typer.Option(help="Write this column instead of the texts. Can be repeated; the texts' own name keeps them.", rich_help_panel=_INPUT),
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
    embeddings: Annotated[
        str | None,
        typer.Option(
            help="Give vectors instead of labels: first ([CLS]) or mean (of all tokens).", rich_help_panel=_ANSWERS
        ),
    ] = None,
    normalize: Annotated[
        bool, typer.Option("--normalize", help="Of length 1, of vectors.", rich_help_panel=_ANSWERS)
    ] = False,
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
    asked = {
        "format": format,
        "text_column": text_column,
        "pair_column": pair_column,
        "id_column": id_column,
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
        "embeddings": embeddings,
        "normalize": normalize,
        "output_format": output_format,
        "shard_rows": shard_rows,
    }
    _check_options(asked, output, paths, resume=resume, overwrite=overwrite)
    set_threads(threads)
    target = _target_of(output, output_format, errors)
    sources = _sources(paths, asked)
    flow, results = _flow_and_results(path, asked, device, dtype, quantize)
    ...
