"""`fastcls plan`: how long so many texts take, and how many machines, from a short measurement on this one."""

from __future__ import annotations

import json
import math
import os
import platform
import random
import time
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from . import demo_model
from .lines import decoded_lines, opened
from .options import Device, DType, Quantize, Threads
from .plan_report import Found, Sample, show, to_json
from .terminal import expected_errors, progress_bar, set_threads, stderr

if TYPE_CHECKING:
    from ..classifier import Classifier

_MOST_TEXTS = 10**18
# The shortest text is a word between two special tokens; longer ones than this would only be cut.
_FEWEST_TOKENS, _MOST_TOKENS = 3, 100_000
# With fewer texts a window would hold one twice, which a run over the file would not.
_FEWEST_LINES = {"cpu": 256, "cuda": 4096}
# More than any machine has cores: a mistyped number is not tried.
_MOST_PROCESSES = 1024
_CPUINFO = Path("/proc/cpuinfo")


def read_texts(value: str) -> int:
    """A count, "1e9" or "1_000_000".

    Raises:
        ValueError: no whole number from 1 to 1e18.
    """
    try:
        number = Decimal(value)
        if number.is_finite() and 1 <= number <= _MOST_TEXTS and number == int(number):
            return int(number)
    except InvalidOperation:
        pass
    raise ValueError(f"--texts must be a whole number from 1 to 1e18, as 1e9 or 1_000_000, got {value!r}")


def drawn(file: Path, count: int) -> Sample:
    """Draws lines from a file or from standard input, which is read once.

    Raises:
        ValueError: a folder, a line that is not UTF-8.
        OSError: it cannot be read.
    """
    if file.is_dir():
        raise ValueError(f"--like must be a file of texts, {file} is a folder")
    draw, kept, began, lines = random.Random(0), [], time.perf_counter(), 0
    with opened(file) as source:
        for lines, line in enumerate(decoded_lines(source, str(file)), start=1):
            if lines <= count:
                kept.append((lines, line))
            elif (place := draw.randrange(lines)) < count:
                kept[place] = (lines, line)
    texts = [line for _, line in sorted(kept)]
    mean_bytes = sum(len(text.encode()) + 1 for text in texts) / max(1, len(texts))
    return Sample(texts, lines, time.perf_counter() - began, mean_bytes)


@expected_errors
def plan(
    texts: Annotated[str, typer.Option(help="How many texts: 1e9, 1_000_000.")],
    model: Annotated[
        str | None, typer.Argument(help="A folder with a fine-tuned checkpoint, or a name on the hub.")
    ] = None,
    mean_tokens: Annotated[
        float | None, typer.Option(help="Tokens of a text on average, special ones included: texts are made up.")
    ] = None,
    like: Annotated[
        Path | None, typer.Option(help="Or a file of such texts, UTF-8, one a line; - is standard input.")
    ] = None,
    own_model: Annotated[
        bool, typer.Option("--demo", help="Take fastcls's own model of English reviews; leave MODEL out.")
    ] = False,
    hours: Annotated[float | None, typer.Option(help="The deadline: how many machines meet it?")] = None,
    price: Annotated[float | None, typer.Option(help="Of a machine for an hour: what does it all cost?")] = None,
    seconds: Annotated[float, typer.Option(help="How long to measure.")] = 20.0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output, for machines.")] = False,
    device: Device = None,
    dtype: DType = None,
    quantize: Quantize = None,
    processes: Annotated[
        int, typer.Option(help="Measure so many at once, on a CPU, each with --threads; their default is then 1.")
    ] = 1,
    threads: Threads = None,
) -> None:
    """How long so many texts take here, how many machines it needs, and what each figure rests on.

    Measures for --seconds on this machine, with texts as long as yours: made up, or
    drawn from a file. Nothing is said of other devices: run it there.
    """
    count = read_texts(texts)
    if (mean_tokens is None) == (like is None):
        raise ValueError("how long the texts are must be said once: by --mean-tokens or by --like")
    if mean_tokens is not None and not _FEWEST_TOKENS <= mean_tokens <= _MOST_TOKENS:
        raise ValueError(f"--mean-tokens must be from {_FEWEST_TOKENS} to {_MOST_TOKENS:,}, got {mean_tokens:g}")
    for name, value in (("--hours", hours), ("--price", price), ("--seconds", seconds)):
        if value is not None and not (0 < value < math.inf):
            raise ValueError(f"{name} must be a number above 0, got {value:g}")
    if not 1 <= processes <= _MOST_PROCESSES:
        raise ValueError(f"--processes must be from 1 to {_MOST_PROCESSES:,}, got {processes}")
    if own_model and model is not None:
        raise ValueError(f"--demo is a model of its own: leave MODEL out, got {model}")
    if not own_model and model is None:
        raise ValueError("MODEL must be given, a checkpoint's folder or a name on the hub; or use --demo without it")
    name = demo_model() if model is None else model

    from torch import get_num_threads

    from ..classifier import Classifier
    from ..loading import load_tokenizer, parse_device, parse_dtype, parse_quantize
    from .throughput import TEXTS, made_texts, measure_alone, quartiles

    set_threads(1 if threads is None and processes > 1 else threads)
    place, torch_dtype, products = parse_device(device), parse_dtype(dtype), parse_quantize(quantize)
    if processes > 1 and place.type != "cpu":
        raise ValueError(f"--processes is for CPUs, got {processes} on {place}: use --device cpu, or leave it out")
    sample = None
    if like is not None:
        with stderr.status(f"Reading {escape(str(like))}", spinner="dots"):
            sample = drawn(like, TEXTS)
        fewest = _FEWEST_LINES.get(place.type, _FEWEST_LINES["cpu"])
        if len(sample.texts) < fewest:
            raise ValueError(
                f"--like must have at least {fewest:,} lines for {place.type}, got {len(sample.texts):,} in {like}: "
                "use --mean-tokens"
            )
    with stderr.status("Loading the model", spinner="dots"):
        # The tokenizer first, since it may have no words to make texts of.
        tokenizer = load_tokenizer(name)
        chosen = made_texts(tokenizer, mean_tokens) if mean_tokens is not None else sample.texts if sample else []
        began = time.perf_counter()
        classifier = Classifier.from_pretrained(
            name, device=place, dtype=torch_dtype, truncation=True, quantize=products
        )
        loading = time.perf_counter() - began
    with progress_bar() as progress:
        task = progress.add_task("seconds", total=math.ceil(seconds))

        def moved(done: float) -> None:
            progress.update(task, completed=int(done))

        if processes == 1:
            measured = measure_alone(classifier, chosen, seconds, moved)
        else:
            from .processes import measure_together

            measured = measure_together(classifier, chosen, seconds, processes, get_num_threads(), moved)
    found = Found(
        "fastcls's own model" if own_model else name,
        _machine(classifier, processes, measured.others),
        sample,
        None if like is None else str(like),
        mean_tokens,
        measured,
        quartiles(measured.blocks),
        loading,
        count,
        hours,
        price,
    )
    if as_json:
        typer.echo(json.dumps(to_json(found), allow_nan=False))
    else:
        show(found, Console())


def _machine(classifier: Classifier, processes: int, others: float | None) -> dict[str, Any]:
    import torch

    model = classifier.model
    on_gpu = model.device.type == "cuda"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": _cpu_name(),
        "cores": cores,
        "processes": processes,
        "threads": torch.get_num_threads(),
        "cores_of_others": others,
        "device": str(model.device),
        "gpu": torch.cuda.get_device_name(model.device) if on_gpu else None,
        "gpus": torch.cuda.device_count() if on_gpu else 0,
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantize": model.quantize,
    }


def _cpu_name() -> str:
    try:
        lines = _CPUINFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()
