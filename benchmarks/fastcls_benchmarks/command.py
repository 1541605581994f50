"""The work of ``fastcls bench``: checking its options, measuring, writing and showing."""

from __future__ import annotations

import datetime
import importlib.util
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table

from . import comparison, provenance, runner, suites, tables
from .provider import Provider
from .providers import PROVIDERS
from .results import Report
from .suites import Suite
from .texts import CORPORA, PIPELINE, TEXT_PROVIDERS, server, tokenizer_of
from .training import TRAINING_PROVIDERS
from .workloads import LENGTHS, MODELS, SEED

RESULTS_FILE = "results.json"
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def chosen_suite(
    suite: str,
    models: Sequence[str],
    lengths: Sequence[str],
    batch_sizes: Sequence[int],
    providers: Sequence[str],
    dtypes: Sequence[str],
    url: str | None,
    device: torch.device,
) -> Suite:
    """The suite that the options ask for; ValueError, with the possible choices, for one that does not exist."""
    _check("--suite", [suite], suites.names(device))
    _check("--model", models, MODELS)
    _check("--lengths", lengths, LENGTHS)
    _check("--dtype", dtypes, _DTYPES)
    found = suites.suite(suite, device)
    trains = {plan.kind for plan in found.plans} == {"train"}
    _check("--provider", providers, TRAINING_PROVIDERS if trains else PROVIDERS)
    if url is not None:
        return suites.with_server(found, server(url))
    if models or lengths or batch_sizes or dtypes or providers:
        return suites.custom(found, models, batch_sizes, lengths, providers, [_DTYPES[name] for name in dtypes])
    return found


def save_checkpoint(suite: str, folder: Path, device: torch.device) -> Path:
    """Writes the model of the suite's first case from text to label, with its tokenizer, for a server to serve."""
    _check("--suite", [suite], suites.names(device))
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--save must be a folder, but {folder} is a file")
    plan = suites.with_server(suites.suite(suite, device), PIPELINE).plans[0]
    model = runner.Session(plan, device).model
    model.save_pretrained(folder)
    tokenizer_of(model).save_pretrained(folder)
    return folder


def _check(option: str, names: Sequence[str], known: Collection[str]) -> None:
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"{option} must be one of {', '.join(known)}; got {', '.join(unknown)}")


def result_folder(out: Path | None) -> Path:
    """The folder for results; ValueError if it holds results already."""
    if out is None:
        return Path("fastcls-bench") / datetime.datetime.now().strftime("%Y-%m-%d-%H%M%S")
    if (out / RESULTS_FILE).exists():
        raise ValueError(f"--out must be a folder without results, but {out / RESULTS_FILE} exists")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out must be a folder, but {out} is a file")
    return out


class _Shown:
    """A progress bar in planned seconds, or in a log a line for each case; keeps complete cases in a file."""

    def __init__(self, progress: Progress, total: float, path: Path) -> None:
        self.progress, self.path = progress, path
        self.task = progress.add_task("starting", total=total)

    def doing(self, what: str) -> None:
        self.progress.update(self.task, description=escape(what))

    def done(self, what: str, seconds: float) -> None:
        self.progress.advance(self.task, seconds)
        console, (task,) = self.progress.console, self.progress.tasks
        if not console.is_terminal:
            console.print(f"{task.percentage:3.0f}% {what}", highlight=False, markup=False)

    def keep(self, report: Report) -> None:
        report.write(self.path)


def _minutes(suite: Suite, device: torch.device) -> str:
    return f"about {max(sum(runner.planned_seconds(suite, device)) / 60, 1):.0f} min"


def measure(suite: Suite, device: torch.device, folder: Path, errors: Console) -> Report:
    """Runs the suite. Ctrl-C ends it early, and complete cases are kept."""
    by = [(plan, "; ".join(each.name for each in plan.providers)) for plan in suite.plans]
    plans = [f"{plan.subject}, {plan.workload.name}: {names}" for plan, names in by]
    arguments = {"suite": suite.name, "device": str(device), "seed": SEED, "plans": plans}
    # Before anything is measured, so that a folder that cannot be written to is an error now.
    folder.mkdir(parents=True, exist_ok=True)
    report = Report(suite.name, provenance.collect(device), arguments)
    columns = (SpinnerColumn(), BarColumn(16), TimeElapsedColumn(), TextColumn("left:"))
    columns += (TimeRemainingColumn(elapsed_when_finished=True), TextColumn("{task.description}"))  # type: ignore[assignment]
    errors.print(f"Suite {suite.name}: {_minutes(suite, device)}. Results go to {folder}.", highlight=False)
    options = {"console": errors, "transient": True, "disable": not errors.is_terminal, "speed_estimate_period": 3600}
    try:
        with Progress(*columns, **options) as progress:  # type: ignore[arg-type]
            shown = _Shown(progress, sum(runner.planned_seconds(suite, device)), folder / RESULTS_FILE)
            runner.run(suite, report, device, shown)
    except KeyboardInterrupt:
        errors.print("Interrupted: what was measured so far is kept.", style="bold red")
    return report


def pictures_missing() -> str | None:
    """Why pictures and the HTML page cannot be made."""
    missing = [name for name in ("matplotlib", "jinja2") if importlib.util.find_spec(name) is None]
    why = f'plots and report.html are left out: {" and ".join(missing)} not installed (pip install "fastcls[bench]")'
    return why if missing else None


def write(report: Report, folder: Path) -> list[str]:
    """Writes JSON, CSV, and if possible pictures and the HTML report; returns their names."""
    report.write(folder / RESULTS_FILE)
    report.samples().to_csv(folder / "samples.csv", index=False)
    if pictures_missing():
        return [RESULTS_FILE, "samples.csv"]
    from . import html, plots

    plots.save(report, folder)
    (folder / "report.html").write_text(html.page(report), encoding="utf-8")
    return ["report.html", RESULTS_FILE, "samples.csv", "plots"]


def show(report: Report, console: Console) -> None:
    """Prints the tables, in 100 columns if there is no terminal."""
    if not console.is_terminal:
        console.width = 100
    for part in tables.render(report):
        console.print(part, highlight=False)


def show_comparison(old: Report, new: Report, fail_above: float | None, console: Console) -> bool:
    """Prints what moved; returns whether nothing became slower by more than ``fail_above`` percent."""
    found = comparison.compare(old, new)
    for part in comparison.render(found):
        console.print(part, highlight=False)
    reasons = [] if fail_above is None else found.reasons_to_fail(fail_above)
    for reason in reasons:
        console.print(escape(reason), style="bold red", highlight=False)
    return not reasons


def show_choices(device: torch.device, console: Console) -> None:
    """Prints all suites, models, lengths and providers."""

    def can(provider: Provider) -> str:
        missing = provider.available(device, suites.default_dtype(device))
        return f"{provider.description}. Cannot run here: {missing}" if missing else provider.description

    def describe(name: str) -> str:
        suite = suites.suite(name, device)
        counts = Counter[str](plan.kind for plan in suite.plans)
        words = {"model": "models", "text": "from text to label", "kernel": "kernels", "train": "of fine-tuning"}
        shown = ", ".join(f"{counts[kind]} {what}" for kind, what in words.items() if counts[kind])
        return f"{shown}; {_minutes(suite, device)}"

    for heading, rows in (
        ("--suite", [(name, describe(name)) for name in suites.names(device)]),
        ("--model", [(name, each.about) for name, each in MODELS.items()]),
        ("--lengths", [(name, f"{each.description} ({each.source})") for name, each in LENGTHS.items()]),
        ("--provider", [(name, can(each)) for name, each in PROVIDERS.items()]),
        ("from text to label", [(name, can(each)) for name, each in TEXT_PROVIDERS.items() if ", sorted" not in name]),
        ("steps of fine-tuning", [(name, can(each)) for name, each in TRAINING_PROVIDERS.items()]),
        ("texts", list(CORPORA.items())),
    ):
        table = Table(Column(heading, no_wrap=True), "", box=box.SIMPLE_HEAD)
        for name, text in rows:
            table.add_row(name, escape(text))
        console.print(table, highlight=False)
    console.print("From text to label, each provider also runs in a loop over texts sorted by length: NAME, sorted.")
