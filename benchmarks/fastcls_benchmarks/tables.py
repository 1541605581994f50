"""A run's measurements as tables for a terminal of 100 columns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from rich import box
from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table

from .results import Case, FirstCall, Report, Row
from .stats import spread

NONE = "-"


def times(case: Case, provider: str, baseline: str = "") -> str:
    """How many times faster, as text: "none" if the difference is within the noise."""
    ratio, interval = case.times_faster(provider, baseline), case.interval(provider, baseline)
    if ratio is None:
        return NONE
    return "none" if interval and interval.low <= 1 <= interval.high else f"{ratio:.2f} x"


def number(value: float | None) -> str:
    """Three digits or more, with thousands separated."""
    if value is None:
        return NONE
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value >= 1 else f"{value:.2g}"


def duration(seconds: float | None, unit: str = "ms") -> str:
    """A time in milliseconds or microseconds, with three digits."""
    if seconds is None:
        return NONE
    scaled = seconds * {"s": 1, "ms": 1e3, "µs": 1e6}[unit]
    decimals = 0 if scaled >= 1000 else 1 if scaled >= 100 else 2 if scaled >= 10 else 3
    return f"{scaled:,.{decimals}f}"


def facts(provenance: dict[str, Any]) -> list[str]:
    """The provenance of the figures, in lines."""
    versions = ", ".join(f"{name} {version}" for name, version in provenance["versions"].items() if version)
    commit = f"commit {(provenance['commit'] or 'unknown')[:9]}{' with changes' if provenance['dirty'] else ''}"
    driver = f"driver {provenance['driver']}, CUDA {provenance['cuda']}, " if provenance["driver"] else ""
    return [
        f"{provenance['chip']}, {provenance['threads']} threads",
        f"{driver}{versions}",
        f"fastcls {provenance['fastcls']}, {commit}, {provenance['date']}",
    ]


def cannot_run(report: Report) -> dict[str, str]:
    """The providers that could not run here, with the reason; if some models ran, it says which did not."""
    missing: dict[tuple[str, str], list[str]] = {}
    for case in report.cases:
        for row in case.rows:
            if row.status == "unavailable":
                missing.setdefault((row.provider, row.detail), []).append(case.subject)
    ran = {row.provider for case in report.cases for row in case.rows if row.status != "unavailable"}
    found: dict[str, str] = {}
    for (provider, why), subjects in missing.items():
        with_what = f"{', '.join(dict.fromkeys(subjects))}: " if provider in ran else ""
        found[provider] = "; ".join(filter(None, (found.get(provider), with_what + why)))
    return found


def headings(case: Case) -> tuple[str, ...]:
    """A case's columns after the provider's name."""
    baseline = case.baseline.replace("transformers ", "")
    vs = f"vs {baseline if len(baseline) < 8 else 'first row'}"
    if case.kind == "kernel":
        return ("µs", "p20 to p80", vs, "of floor", "error")
    checked = ("labels", "mean off") if case.judged_on else ("of floor", "logits off")
    times = ("p50 ms", "p99 ms") if case.is_latency else ("ms", "p20 to p80")
    return (*times, vs, "texts/s", "tokens/s", *checked)


def cells(report: Report, case: Case, row: Row) -> tuple[str, ...]:
    """A row's cells under `headings`."""
    difference = row.mean_error if case.judged_on else row.difference
    off = NONE if difference is None else f"{difference:.1e}"
    labels = NONE if row.agreement is None else f"{row.agreement:.1%}"
    seconds = case.round_seconds(row.provider)
    width = len(headings(case))
    if not seconds:
        shown = {"timed": "not timed", "failed": "failed", "unavailable": "cannot run"}[row.status]
        return (shown, *[NONE] * (width - 3), labels, off)
    unit = "µs" if case.kind == "kernel" else "ms"
    typical = duration(case.typical_seconds(row.provider), unit)
    if case.is_latency:
        around = duration(case.p99_seconds(row.provider), unit)
    else:
        low, _, high = spread(seconds)
        around = f"{duration(low, unit)} to {duration(high, unit)}"
    faster = "1" if row.provider == case.baseline else times(case, row.provider)
    # A kernel's row without an error computes something else, so the floor does not apply.
    is_answer = case.kind == "model" or row.difference is not None
    share = report.share_of_floor(case, row.provider) if is_answer else None
    of_floor = NONE if share is None else f"{share:.0%}"
    if case.kind == "kernel":
        return (typical, around, faster, of_floor, off)
    rates = (case.per_second(row.provider, amount) for amount in (case.batch_size, case.real_tokens))
    return (typical, around, faster, *map(number, rates), labels if case.judged_on else of_floor, off)


def title(case: Case) -> str:
    if case.kind == "kernel":
        return f"{case.name}: {case.real_tokens:,.0f} tokens"
    return f"{case.name}: {case.real_tokens / case.padded_tokens:.0%} of {case.padded_tokens:,.0f} tokens are real"


def caption(report: Report, case: Case) -> str:
    unit = "µs" if case.kind == "kernel" else "ms"
    noise = "unknown" if case.noise is None else f"{case.noise:.1%}"
    rounds = len(case.seconds.get(case.baseline, []))
    if case.judged_on:
        return f"Labels kept, and how far a logit is off: {case.judged_on}. Noise {noise} in {rounds} rounds."
    return f"Floor {duration(report.floor_seconds(case), unit)} {unit}. Noise {noise} in {rounds} rounds."


def new_remarks(cases: Iterable[Case]) -> list[list[tuple[str, str]]]:
    """For each case the remarks on its providers, (provider, remark), that no earlier case had."""
    said: set[tuple[str, str]] = set()
    remarks = []
    for case in cases:
        found = [(row.provider, row.detail) for row in case.rows if row.detail and row.status != "unavailable"]
        remarks.append([remark for remark in found if remark not in said])
        said.update(found)
    return remarks


def render(report: Report) -> Iterator[RenderableType]:
    """All tables and lines about a run, in order."""
    if report.partial:
        yield "[bold red]Partial: the run was stopped before its end.[/]"
    yield escape("\n".join(facts(report.provenance))) + "\n"
    yield from _machine(report)
    for case, new in zip(report.cases, new_remarks(report.cases), strict=True):
        yield _case_table(report, case)
        if new:
            yield "\n".join(f"  {escape(provider)}: {escape(remark)}" for provider, remark in new) + "\n"
    if report.first_calls:
        yield _first_call_table(report)
    missing = cannot_run(report)
    if missing:
        yield "Cannot run here: " + "; ".join(f"{escape(name)} ({escape(why)})" for name, why in missing.items())


def machine_line(report: Report) -> str:
    """The best measured rates."""
    products = {rate.dtype: report.best_rate("product", rate.dtype) for rate in report.rates if rate.kind == "product"}
    shown = [f"{dtype} products {(rate or 0) / 1e9:,.0f} GFLOP/s" for dtype, rate in products.items()]
    copies = report.best_rate("copy")
    return f"This machine at best, in this run: {', '.join(shown)}, copies {(copies or 0) / 1e9:,.1f} GB/s."


def _machine(report: Report) -> Iterator[RenderableType]:
    if report.rates:
        yield f"{machine_line(report)}\n"


def plain_table(heading: str, below: str = "") -> Table:
    return Table(
        title=escape(heading),
        caption=escape(below) or None,
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
        title_style="bold",
        padding=(0, 1, 0, 0),
    )


def _case_table(report: Report, case: Case) -> Table:
    table = plain_table(title(case), caption(report, case))
    table.add_column("provider", no_wrap=True)
    for heading in headings(case):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in case.rows:
        if row.status == "unavailable":
            continue
        shown = [escape(cell) for cell in cells(report, case, row)]
        style = "red" if row.status == "failed" else "bold" if row.provider == "fastcls" else None
        table.add_row(row.provider, *shown, style=style)
    return table


def first_call_cells(each: FirstCall) -> tuple[str, ...]:
    """Import, load, convert, first batch, memory."""
    seconds = (each.import_seconds, each.load_seconds, each.convert_seconds, each.first_seconds)
    memory = NONE if each.peak_bytes is None else f"{each.peak_bytes / 2**20:.1f}"
    return (*(NONE if value is None else f"{value:.2f}" for value in seconds), memory)


def _first_call_table(report: Report) -> Table:
    table = plain_table(
        "First call, in a fresh process: seconds; peak memory of a later forward: MiB",
        "Load: building the transformers model. Convert: from there to what is called.",
    )
    for heading in ("model, workload", "provider"):
        table.add_column(heading, no_wrap=True)
    for heading in ("import", "load", "convert", "first batch", "memory"):
        table.add_column(heading, justify="right", no_wrap=True)
    for each in report.first_calls:
        table.add_row(f"{each.model}, {each.workload}, {each.dtype}", each.provider, *first_call_cells(each))
        if each.detail:
            table.add_row("", f"  {escape(each.detail)}")
    return table
