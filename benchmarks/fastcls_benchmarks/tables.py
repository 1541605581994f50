"""A run's measurements as tables for a terminal of 100 columns."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

from rich import box
from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table

from .providers import FASTCLS
from .results import Case, FirstCall, Report
from .texts import CLASSIFIER

NONE = "-"
HIGHLIGHTED = (FASTCLS.name, CLASSIFIER.name)
_UNITS = {"s": 1, "ms": 1e3, "µs": 1e6}


def number(value: float | None) -> str:
    """Three digits or more, with thousands separated; NaN is unknown, as None is."""
    if value is None or math.isnan(value):
        return NONE
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value >= 1 else f"{value:.2g}"


def duration(seconds: float | None, unit: str = "ms") -> str:
    """A time in milliseconds or microseconds, with three digits."""
    if seconds is None or math.isnan(seconds):
        return NONE
    scaled = seconds * _UNITS[unit]
    decimals = 0 if scaled >= 1000 else max(0, 3 - math.floor(math.log10(scaled))) if scaled > 0 else 0
    return f"{scaled:,.{min(decimals, 3)}f}"


def share(value: float | None, digits: int = 0) -> str:
    return NONE if value is None or math.isnan(value) else f"{value:.{digits}%}"


def times(case: Case, provider: str, baseline: str = "") -> str:
    """How many times faster, as text: "none" if the difference is within the noise."""
    ratio, interval = case.times_faster(provider, baseline), case.interval(provider, baseline)
    if ratio is None:
        return NONE
    return "none" if interval and interval.low <= 1 <= interval.high else f"{ratio:.2f} x"


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
    """A case's columns, the provider's name first."""
    baseline = case.baseline.removeprefix("transformers ")
    vs = f"vs {baseline if len(baseline) < 9 else 'first row'}"
    if case.kind == "kernel":
        return ("provider", "µs", "p20 to p80", vs, "of floor", "error")
    checked = ("labels", "mean off") if case.judged_on else ("of floor" if case.flops else "labels", "off")
    counted = ("texts/s",) if case.kind == "text" else ("texts/s", "tokens/s")
    return ("provider", *(("p50 ms", "p99 ms") if case.is_latency else ("ms", "p20 to p80")), vs, *counted, *checked)


def cells(case: Case, row: Any) -> tuple[str, ...]:
    """A row of `Report.figures` under `headings`."""
    off = row.mean_error if case.judged_on else row.difference
    error, labels = NONE if math.isnan(off) else f"{off:.1e}", share(row.agreement, 1)
    unit = "µs" if case.kind == "kernel" else "ms"
    if math.isnan(row.seconds):
        why = {"timed": "not timed", "failed": "failed", "unavailable": "cannot run"}[row.status]
        middle = [NONE] * (len(headings(case)) - 4)
        return (row.provider, why, *middle, labels, error)
    p20_p80 = f"{duration(row.p20, unit)} to {duration(row.p80, unit)}"
    faster = "1" if row.provider == case.baseline else times(case, row.provider)
    shown = (row.provider, duration(row.seconds, unit), duration(row.p99) if case.is_latency else p20_p80, faster)
    checked = labels if case.judged_on or not case.flops else share(row.share)
    if case.kind == "kernel":
        return (*shown, share(row.share), error)
    return (*shown, *map(number, [row.texts, row.tokens][: 1 if case.kind == "text" else 2]), checked, error)


def title(case: Case) -> str:
    if case.kind == "kernel":
        return f"{case.name}: {case.real_tokens:,.0f} tokens"
    if case.kind == "text":
        return f"{case.name}: {case.about}"
    return f"{case.name}: {case.real_tokens / case.padded_tokens:.0%} of {case.padded_tokens:,.0f} tokens are real"


def caption(report: Report, case: Case) -> str:
    noise = "unknown" if case.noise is None else f"{case.noise:.1%}"
    rounds = f"Noise {noise} in {len(case.seconds.get(case.baseline, []))} rounds."
    rounds += " More than 8 %: close other programs and run again." if (case.noise or 0) > 0.08 else ""
    if case.judged_on:
        return f"Labels kept, and how far an answer is off: {case.judged_on}. {rounds}"
    floor, unit = report.floor_seconds(case), "µs" if case.kind == "kernel" else "ms"
    return f"Floor {duration(floor, unit)} {unit}. {rounds}" if floor else rounds


def new_remarks(cases: Iterable[Case]) -> list[list[tuple[str, str]]]:
    """For each case the remarks on its providers, (provider, remark), that no earlier case had."""
    said: set[tuple[str, str]] = set()
    remarks = []
    for case in cases:
        found = [(row.provider, row.detail) for row in case.rows if row.detail and row.status != "unavailable"]
        remarks.append([remark for remark in found if remark not in said])
        said.update(found)
    return remarks


def machine_line(report: Report) -> str:
    """The best measured rates."""
    products = {rate.dtype: report.best_rate("product", rate.dtype) for rate in report.rates if rate.kind == "product"}
    shown = [f"{dtype} products {(rate or 0) / 1e9:,.0f} GFLOP/s" for dtype, rate in products.items()]
    copies = report.best_rate("copy")
    return f"This machine at best, in this run: {', '.join(shown)}, copies {(copies or 0) / 1e9:,.1f} GB/s."


def case_rows(report: Report) -> Iterator[tuple[Case, list[tuple[str, tuple[str, ...]]]]]:
    """Each case with its rows, (style, cells), without those that cannot run."""
    groups = dict(iter(report.figures().groupby("case", sort=False)))
    for case in report.cases:
        rows = []
        for row in groups[case.name].itertuples():
            style = "failed" if row.status == "failed" else "ours" if row.provider in HIGHLIGHTED else ""
            if row.status != "unavailable":
                rows.append((style, cells(case, row)))
        yield case, rows


def published_rows(report: Report) -> list[tuple[str, ...]]:
    """Of rerankers: each provider's most pairs a second over batch sizes, beside what was published elsewhere."""
    figures = report.figures()
    if not len(figures) or not figures.published.notna().any():
        return []
    best = figures[figures.kind == "text"].pivot_table("texts", "subject", "provider", "max", sort=False)
    published = figures.groupby("subject", sort=False).published.max()
    names = [name for name in dict.fromkeys(figures.provider) if name in best.columns]
    heading = ("pairs/s at the best batch", *names, "published")
    return [heading, *((each, *map(number, best.loc[each, names]), number(published[each])) for each in best.index)]


def plain_table(heading: str, below: str = "", columns: Iterable[str] = (), left: int = 1) -> Table:
    """A table whose first ``left`` columns are text."""
    table = Table(
        title=escape(heading),
        caption=escape(below) or None,
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
        title_style="bold",
        padding=(0, 1, 0, 0),
    )
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index < left else "right", no_wrap=True)
    return table


_PUBLISHED = (
    "Published: on one H100 80GB in bfloat16, Natural Questions' pairs of at most 512 tokens, best batch size (Hugging "
    "Face's blog on the Ettin rerankers, May 2026). Another machine, other pairs: the bar, not a comparison."
)
FIRST_CALL = ("model, workload", "provider", "import", "load", "convert", "first batch", "memory")


def first_call_cells(each: FirstCall) -> tuple[str, ...]:
    """Under `FIRST_CALL`."""
    seconds = (each.import_seconds, each.load_seconds, each.convert_seconds, each.first_seconds)
    memory = NONE if each.peak_bytes is None else f"{each.peak_bytes / 2**20:.1f}"
    shown = (NONE if value is None else f"{value:.2f}" for value in seconds)
    return (f"{each.model}, {each.workload}, {each.dtype}", each.provider, *shown, memory)


def render(report: Report) -> Iterator[RenderableType]:
    """All tables and lines about a run, in order."""
    if report.partial:
        yield "[bold red]Partial: the run was stopped before its end.[/]"
    yield escape("\n".join(facts(report.provenance))) + "\n"
    if report.rates:
        yield f"{machine_line(report)}\n"
    for (case, rows), new in zip(case_rows(report), new_remarks(report.cases), strict=True):
        table = plain_table(title(case), caption(report, case), headings(case))
        for style, shown in rows:
            table.add_row(*map(escape, shown), style={"failed": "red", "ours": "bold"}.get(style))
        yield table
        if new:
            yield "\n".join(f"  {escape(provider)}: {escape(remark)}" for provider, remark in new) + "\n"
    if rows_of_published := published_rows(report):
        heading, *lines = rows_of_published
        table = plain_table("Rerankers", _PUBLISHED)
        for index, name in enumerate(heading):
            table.add_column(name, justify="right" if index else "left")
        for line in lines:
            table.add_row(*line)
        yield table
    if report.first_calls:
        about = "First call, in a fresh process: seconds; peak memory of a later forward: MiB"
        meaning = "Load: building the transformers model. Convert: from there to what is called."
        table = plain_table(about, meaning, FIRST_CALL, left=2)
        for each in report.first_calls:
            table.add_row(*first_call_cells(each))
            if each.detail:
                table.add_row("", f"  {escape(each.detail)}")
        yield table
    missing = cannot_run(report)
    if missing:
        yield "Cannot run here: " + "; ".join(f"{escape(name)} ({escape(why)})" for name, why in missing.items())
