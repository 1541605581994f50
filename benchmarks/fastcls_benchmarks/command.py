"""The work of ``fastcls bench``: checking its options, measuring, writing and showing."""

from __future__ import annotations

import datetime
import importlib.util
from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from . import comparison, provenance, runner, suites, tables
from .providers import PROVIDERS
from .results import Report
from .suites import Suite
from .workloads import LENGTHS, MODELS, SEED

RESULTS_FILE = "results.json"
COLUMNS = 100
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Choice:
    """The options, checked.

    Raises:
        ValueError: a choice that does not exist; it names the option, its value and the possible ones.
    """

    def __init__(
        self,
        suite: str,
        models: Sequence[str],
        lengths: Sequence[str],
        batch_sizes: Sequence[int],
        providers: Sequence[str],
        dtypes: Sequence[str],
        device: torch.device,
    ) -> None:
        _check("--suite", [suite], suites.names(device))
        _check("--model", models, MODELS)
        _check("--lengths", lengths, LENGTHS)
        _check("--provider", providers, PROVIDERS)
        _check("--dtype", dtypes, _DTYPES)
        self.device = device
        self.suite = self._suite(suite, models, lengths, batch_sizes, providers, [_DTYPES[name] for name in dtypes])

    def _suite(
        self,
        name: str,
        models: Sequence[str],
        lengths: Sequence[str],
        batch_sizes: Sequence[int],
        providers: Sequence[str],
        dtypes: Sequence[torch.dtype],
    ) -> Suite:
        if models or lengths or batch_sizes or dtypes:
            chosen = [PROVIDERS[each] for each in providers]
            return suites.custom(name, self.device, models, batch_sizes, lengths, chosen, dtypes)
        found = suites.suite(name, self.device)
        return suites.with_providers(found, providers) if providers else found


def _check(option: str, names: Sequence[str], known: Collection[str]) -> None:
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"{option} must be one of {', '.join(known)}; got {', '.join(unknown)}")


def result_folder(out: Path | None) -> Path:
    """The folder for results.

    Raises:
        ValueError: it holds results already.
    """
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
        self.progress = progress
        self.task = progress.add_task("starting", total=total)
        self.path = path
        self.total = total
        self.passed = 0.0

    def doing(self, what: str) -> None:
        self.progress.update(self.task, description=escape(what))

    def done(self, what: str, seconds: float) -> None:
        self.passed += seconds
        self.progress.update(self.task, advance=seconds)
        console = self.progress.console
        if not console.is_terminal:
            console.print(f"{self.passed / self.total:4.0%} {what}", highlight=False, markup=False)

    def keep(self, report: Report) -> None:
        report.write(self.path)


def measure(choice: Choice, folder: Path, errors: Console) -> Report:
    """Runs the suite. Ctrl-C ends it early, and complete cases are kept."""
    arguments = {
        "suite": choice.suite.name,
        "device": str(choice.device),
        "seed": SEED,
        "plans": [
            f"{plan.model}, {plan.workload.name}: {'; '.join(each.name for each in plan.providers)}"
            for plan in choice.suite.models
        ],
    }
    # Before anything is measured, so that a folder that cannot be written to is an error now.
    folder.mkdir(parents=True, exist_ok=True)
    report = Report(choice.suite.name, provenance.collect(choice.device), arguments)
    columns = (
        SpinnerColumn(),
        BarColumn(16),
        TimeElapsedColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.description}"),
    )
    total = sum(runner.planned_seconds(choice.suite, choice.device))
    errors.print(
        f"Suite {choice.suite.name}: about {max(total / 60, 1):.0f} min. Results go to {folder}.", highlight=False
    )
    try:
        with Progress(
            *columns, console=errors, transient=True, disable=not errors.is_terminal, speed_estimate_period=3600
        ) as progress:
            runner.run(choice.suite, report, choice.device, _Shown(progress, total, folder / RESULTS_FILE))
    except KeyboardInterrupt:
        errors.print("Interrupted: what was measured so far is kept.", style="bold red")
    return report


def pictures_missing() -> str | None:
    """Why pictures and the HTML page cannot be made."""
    missing = [name for name in ("matplotlib", "jinja2") if importlib.util.find_spec(name) is None]
    if not missing:
        return None
    return f'plots and report.html are left out: {" and ".join(missing)} not installed (pip install "fastcls[bench]")'


def write(report: Report, folder: Path) -> list[str]:
    """Writes JSON, CSV, and if possible pictures and the HTML report; returns their names."""
    folder.mkdir(parents=True, exist_ok=True)
    report.write(folder / RESULTS_FILE)
    report.write_csv(folder / "samples.csv")
    if pictures_missing():
        return [RESULTS_FILE, "samples.csv"]
    from . import html, plots

    plots.save(report, folder)
    (folder / "report.html").write_text(html.page(report), encoding="utf-8")
    return ["report.html", RESULTS_FILE, "samples.csv", "plots"]


def show(report: Report, console: Console) -> None:
    """Prints the tables, in 100 columns if there is no terminal."""
    if not console.is_terminal:
        console.width = COLUMNS
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
    dtype = suites.default_dtype(device)
    for heading, rows in (
        ("--suite", [(name, _describe(suites.suite(name, device), device)) for name in suites.names(device)]),
        ("--model", [(name, each.about) for name, each in MODELS.items()]),
        ("--lengths", [(name, f"{each.description} ({each.source})") for name, each in LENGTHS.items()]),
        ("--provider", [(name, _can(name, device, dtype)) for name in PROVIDERS]),
    ):
        table = Table(box=box.SIMPLE_HEAD, title_justify="left")
        table.add_column(heading, no_wrap=True)
        table.add_column("")
        for name, text in rows:
            table.add_row(name, escape(text))
        console.print(table, highlight=False)


def _describe(suite: Suite, device: torch.device) -> str:
    minutes = max(sum(runner.planned_seconds(suite, device)) / 60, 1)
    return f"{len(suite.models)} cases, {len(suite.kernels)} kernels, about {minutes:.0f} min"


def _can(name: str, device: torch.device, dtype: torch.dtype) -> str:
    provider = PROVIDERS[name]
    missing = provider.available(device, dtype)
    return f"{provider.description}. Cannot run here: {missing}" if missing else provider.description
