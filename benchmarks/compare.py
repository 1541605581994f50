"""Compares fastcls with its peers: python -m benchmarks.compare --help"""

from __future__ import annotations

import functools
import itertools
import random
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import BertForSequenceClassification

from . import memory, provenance
from .providers import ABSORBED, PROVIDERS, SDPA, Forward, Provider
from .results import BASELINE, BASELINE_AGAIN, Case, Report, Row
from .tables import render
from .verify import Reference
from .work import PRODUCTS, Ceiling, useful_flops
from .workloads import (
    MODELS,
    ROOT,
    SEED,
    WORKLOADS,
    Batch,
    UnavailableError,
    load_model,
    padded_tokens,
    real_tokens,
)

RESULTS = ROOT / "benchmarks" / "results"
COLUMNS = 100

Advance = Callable[[str], None]


class Settings(NamedTuple):
    """How each case is measured."""

    providers: Sequence[Provider]
    rounds: int
    num_batches: int
    device: torch.device
    memory_of: Sequence[Provider] = ()
    # ONNX Runtime's threads spin on after a run and would slow whoever is timed next by a fifth.
    pause_seconds: float = 0.3

    @property
    def steps(self) -> int:
        """How often a case says that it has advanced, if every provider can be timed."""
        return len(self.providers) + self.rounds * (len(self.providers) + 1 + len(PRODUCTS)) + len(self.memory_of)


def measure(
    case: Case,
    model: BertForSequenceClassification,
    batches: Sequence[Batch],
    settings: Settings,
    advance: Advance = lambda _: None,
) -> None:
    """Checks every provider, then times those that passed; fills ``case`` as it goes, one complete round at a time."""
    reference = Reference(model, batches)
    timed: dict[str, Forward] = {}
    for provider in settings.providers:
        row, forward = _prepare(provider, model, reference, settings.device)
        case.rows.append(row)
        if forward is not None:
            timed[provider.name] = forward
        advance(f"{case.name}: checked {provider.name}")
    if BASELINE in timed:
        timed[BASELINE_AGAIN] = timed[BASELINE]
    ceiling = Ceiling(model.config, batches, settings.device, model.dtype)
    case.ceiling_flops = sum(map(ceiling.flops, batches))
    timed |= {name: functools.partial(ceiling.multiply, product) for name, product in PRODUCTS.items()}

    order = random.Random(SEED)
    for number in range(1, settings.rounds + 1):
        this_round = {}
        for name in order.sample(list(timed), len(timed)):
            this_round[name] = _time(timed[name], batches, settings)
            advance(f"{case.name}: round {number}, {name}")
        for name, seconds in this_round.items():
            case.seconds.setdefault(name, []).append(seconds)


def _prepare(
    provider: Provider, model: BertForSequenceClassification, reference: Reference, device: torch.device
) -> tuple[Row, Forward | None]:
    """The provider's row, and its function if it may be timed."""
    missing = provider.available(device)
    if missing:
        return Row(provider.name, "unavailable", detail=missing), None
    start = time.perf_counter()
    try:
        forward, detail = provider.load(model)
        verdict = reference.check(provider, forward)
    except Exception as error:  # a provider that breaks is a row of the table, not the end of the run
        return Row(provider.name, "failed", detail=f"{type(error).__name__}: {error}"), None
    seconds = time.perf_counter() - start
    if not verdict.passed:
        return Row(provider.name, "failed", verdict.difference, verdict.reason, seconds), None
    flops = sum(provider.flops(model.config, batch) for batch in reference.batches)
    return Row(provider.name, "timed", verdict.difference, detail, seconds, flops), forward


@torch.inference_mode()
def _time(forward: Forward, batches: Sequence[Batch], settings: Settings) -> list[float]:
    """Seconds for each batch. One goes first untimed, so that nobody pays for what ran before him."""
    time.sleep(settings.pause_seconds)
    forward(batches[-1])
    _wait_for(settings.device)
    seconds = []
    for batch in batches:
        start = time.perf_counter()
        forward(batch)
        _wait_for(settings.device)
        seconds.append(time.perf_counter() - start)
    return seconds


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def new_case(
    model_name: str, workload_name: str, model: BertForSequenceClassification, batches: Sequence[Batch]
) -> Case:
    """A case of which nothing is measured yet."""
    return Case(
        model=model_name,
        workload=workload_name,
        dtype=str(model.dtype).removeprefix("torch."),
        num_batches=len(batches),
        real_tokens=sum(map(real_tokens, batches)),
        padded_tokens=sum(map(padded_tokens, batches)),
        flops=sum(useful_flops(model.config, batch) for batch in batches),
        ceilings=list(PRODUCTS),
    )


def measure_all(
    report: Report,
    models: Sequence[str],
    workloads: Sequence[str],
    settings: Settings,
    advance: Advance,
    leave_out: Advance,
) -> None:
    """Every model on every workload, into ``report``; what cannot be had here is left out, saying why."""
    for model_name, workload_name in itertools.product(models, workloads):
        try:
            model = load_model(model_name, settings.device)
            batches = WORKLOADS[workload_name].batches()[: settings.num_batches]
        except UnavailableError as error:
            leave_out(f"{model_name}, {workload_name} is left out: {error}")
            continue
        case = new_case(model_name, workload_name, model, batches)
        report.cases.append(case)
        measure(case, model, batches, settings, advance)
        for provider in settings.memory_of:
            report.memory.append(memory.measure(model_name, workload_name, provider.name, settings.device))
            advance(f"{case.name}: memory of {provider.name}")
    report.partial = False


def _check_known(option: str, names: Sequence[str], known: Collection[str]) -> None:
    unknown = [name for name in names if name not in known]
    if unknown:
        raise typer.BadParameter(f"{', '.join(unknown)}; known are: {', '.join(known)}", param_hint=option)


def _reason_not_to_publish(quick: bool) -> str | None:
    if quick:
        return "figures of a --quick run are not published"
    if provenance.is_dirty() is not False:
        return "figures are published for a commit: commit or put away your changes first"
    return None


app = typer.Typer(add_completion=False, rich_markup_mode="markdown")


@app.command()
def compare(
    model: Annotated[list[str] | None, typer.Option(help=f"One or more of: {', '.join(MODELS)}.")] = None,
    workload: Annotated[list[str] | None, typer.Option(help=f"One or more of: {', '.join(WORKLOADS)}.")] = None,
    provider: Annotated[list[str] | None, typer.Option(help=f"One or more of: {', '.join(PROVIDERS)}.")] = None,
    rounds: Annotated[int | None, typer.Option(min=3, help="How often each provider is timed (5; quick: 3).")] = None,
    batches: Annotated[int | None, typer.Option(min=1, help="Different batches in each timing (4; quick: 2).")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="For all providers alike (torch's default).")] = None,
    device: Annotated[str, typer.Option(help="cpu (in float32) or cuda (in bfloat16); cuda if there is one.")] = "",
    out: Annotated[Path | None, typer.Option(help="Write everything, all samples included, to this JSON file.")] = None,
    publish: Annotated[bool, typer.Option("--publish", help="Write it to benchmarks/results/<chip>/ too.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="A look: the small model, few rounds, no memory.")] = False,
) -> None:
    """Times fastcls and its peers on the same batches, in turn, after checking each one's logits.

    "vs sdpa" is how many times faster than transformers with sdpa: the median over the rounds of the ratio within a
    round; "none" means that the difference is within the noise, which is what sdpa timed twice differs from itself by.
    "real work" is the share of this machine's matrix product rate, measured in the same run, that the time amounts to
    if all layers' products are counted for all real tokens and for nothing else; "own work" counts those that the
    provider really computes. Ctrl-C keeps what was measured.
    """
    if publish and (reason := _reason_not_to_publish(quick)):
        raise typer.BadParameter(reason, param_hint="--publish")
    if threads:
        torch.set_num_threads(threads)
    models = model or (["minilm-l6"] if quick else list(MODELS))
    workloads = workload or list(WORKLOADS)
    by_default = [each.name for each in PROVIDERS.values() if each.by_default]
    providers = list(dict.fromkeys([SDPA.name, *(provider or by_default)]))
    _check_known("--model", models, MODELS)
    _check_known("--workload", workloads, WORKLOADS)
    _check_known("--provider", providers, PROVIDERS)
    settings = Settings(
        providers=[PROVIDERS[name] for name in providers],
        rounds=rounds or (3 if quick else 5),
        num_batches=batches or (2 if quick else 4),
        device=torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")),
        memory_of=[] if quick else [SDPA, ABSORBED],
    )
    arguments = {
        "models": models,
        "workloads": workloads,
        "providers": providers,
        "rounds": settings.rounds,
        "batches": settings.num_batches,
        "pause_seconds": settings.pause_seconds,
        "quick": quick,
        "seed": SEED,
    }
    report = Report(provenance.collect(settings.device), arguments)

    errors = Console(stderr=True)
    bar = (BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left:"), TimeRemainingColumn())
    try:
        with Progress(*bar, TextColumn("{task.description}"), console=errors) as progress:
            task = progress.add_task("starting", total=settings.steps * len(models) * len(workloads))
            measure_all(
                report,
                models,
                workloads,
                settings,
                advance=lambda what: progress.update(task, advance=1, description=what),
                leave_out=lambda why: errors.print(why, style="yellow"),
            )
    except KeyboardInterrupt:
        errors.print("stopped: what was measured so far is kept", style="bold red")

    if out:
        report.write(out)
    if publish and report.cases and not report.partial:
        report.write(RESULTS / provenance.slug(report.provenance["chip"]) / "compare.json")
    console = Console()
    if not console.is_terminal:
        console.width = COLUMNS
    for part in render(report):
        console.print(part)
    if report.partial:
        raise typer.Exit(130)
    if not report.cases:
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
