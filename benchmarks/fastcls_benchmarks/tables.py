"""A run's measurements as tables for a terminal of 100 columns."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from rich import box
from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table

from .providers import FASTCLS
from .results import MUCH_NOISE, Case, FirstCall, Report
from .texts import CLASSIFIER

NONE = "-"
HIGHLIGHTED = (FASTCLS.name, CLASSIFIER.name)
STEP_BYTES = "MiB: kept for the backward pass, weights left out; on a GPU the most that a step allocates."
FIRST_CALL = ("model, workload", "provider", "import", "load", "convert", "first batch", "memory")
_PUBLISHED = (
    "Published: on one H100 80GB in bfloat16, Natural Questions' pairs of at most 512 tokens, best batch size (Hugging "
    "Face's blog on the Ettin rerankers, May 2026). Another machine, other pairs: the bar, not a comparison."
)


class Shown(NamedTuple):
    """A case as a table."""

    case: Case
    title: str
    caption: str
    headings: tuple[str, ...]
    rows: list[tuple[str, tuple[str, ...]]]  # (style, cells)
    notes: list[tuple[str, str]]  # (provider, remark), which no earlier case had


def number(value: float | None) -> str:
    """Three digits or more, with thousands separated; NaN is unknown, as None is."""
    if value is None or math.isnan(value):
        return NONE
    return f"{value:{',.0f' if value >= 100 else '.3g' if value >= 1 else '.2g'}}"


def duration(seconds: float | None, unit: str = "ms") -> str:
    """A time in milliseconds or microseconds, with three digits."""
    if seconds is None or math.isnan(seconds):
        return NONE
    scaled = seconds * {"ms": 1e3, "µs": 1e6}[unit]
    decimals = 3 - math.floor(math.log10(scaled)) if scaled > 0 else 0
    return f"{scaled:,.{min(max(decimals, 0), 3)}f}"


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
    chip, code = f"{provenance['chip']}, {provenance['threads']} threads", f"fastcls {provenance['fastcls']}, {commit}"
    return [chip, f"{driver}{versions}", f"{code}, {provenance['date']}"]


def cannot_run(report: Report) -> dict[str, str]:
    """The providers that could not run here, with the reason; if some models ran, it says which did not."""
    figures, found = report.figures(), dict[str, str]()
    missing = figures[figures.status == "unavailable"]
    ran = set(figures.provider[figures.status != "unavailable"])
    for (provider, why), subjects in missing.groupby(["provider", "detail"], sort=False).subject:
        with_what = f"{', '.join(subjects.unique())}: " if provider in ran else ""
        found[provider] = "; ".join(filter(None, (found.get(provider), with_what + why)))
    return found


def _headings(case: Case) -> tuple[str, ...]:
    baseline = case.baseline.removeprefix("transformers ")
    vs = f"vs {baseline if len(baseline) < 9 else 'first row'}"
    if case.kind == "kernel":
        return ("provider", "µs", "p20 to p80", vs, "of floor", "error")
    checked = ("labels", "mean off") if case.judged_on else ("of floor" if case.flops else "labels", "off")
    counted = ("texts/s",) if case.kind == "text" else ("texts/s", "tokens/s")
    if case.kind == "train":
        checked = ("MiB", "gradient off")
    return ("provider", *(("p50 ms", "p99 ms") if case.is_latency else ("ms", "p20 to p80")), vs, *counted, *checked)


def _cells(case: Case, row: Any) -> tuple[str, ...]:
    """A row of `Report.figures` under `_headings`."""
    off = row.mean_error if case.judged_on else row.difference
    error, labels = NONE if math.isnan(off) else f"{off:.1e}", share(row.agreement, 1)
    if math.isnan(row.seconds):
        why = "failed" if row.status == "failed" else "not timed"
        return (row.provider, why, *[NONE] * (len(_headings(case)) - 4), labels, error)
    unit = "µs" if case.kind == "kernel" else "ms"
    spread = duration(row.p99) if case.is_latency else f"{duration(row.p20, unit)} to {duration(row.p80, unit)}"
    faster = "1" if row.provider == case.baseline else times(case, row.provider)
    counted = {"kernel": (), "text": (row.texts,)}.get(case.kind, (row.texts, row.tokens))
    checked = share(row.share) if case.kind == "kernel" or (case.flops and not case.judged_on) else labels
    if case.kind == "train":
        checked = number(row.step_bytes / 2**20)
    return (row.provider, duration(row.seconds, unit), spread, faster, *map(number, counted), checked, error)


def cases(report: Report) -> Iterator[Shown]:
    """Each case without the providers that cannot run."""
    figures, said = report.figures(), set[tuple[str, str]]()
    for case in report.cases:
        about = f"{case.real_tokens / (case.padded_tokens or 1):.0%} of {case.padded_tokens:,.0f} tokens are real"
        about = {"kernel": f"{case.real_tokens:,.0f} tokens", "text": case.about}.get(case.kind, about)
        noise = "unknown" if case.noise is None else f"{case.noise:.1%}"
        caption = f"Noise {noise} in {len(case.seconds.get(case.baseline, []))} rounds."
        caption += f" More than {MUCH_NOISE:.0%}: close other programs and run again." if case.is_noisy else ""
        floor, unit = report.floor_seconds(case), "µs" if case.kind == "kernel" else "ms"
        if case.judged_on:
            caption = f"Labels kept, and how far an answer is off: {case.judged_on}. {caption}"
        elif case.kind == "train":
            caption = f"{STEP_BYTES} {caption}"
        elif floor:
            caption = f"Floor {duration(floor, unit)} {unit}. {caption}"
        rows, notes = [], []
        for row in figures[(figures.case == case.name) & (figures.status != "unavailable")].itertuples():
            style = "failed" if row.status == "failed" else "ours" if row.provider in HIGHLIGHTED else ""
            rows.append((style, _cells(case, row)))
            if row.detail and (row.provider, row.detail) not in said:
                notes.append((row.provider, row.detail))
        said.update(notes)
        yield Shown(case, f"{case.name}: {about}", caption, _headings(case), rows, notes)


def machine_line(report: Report) -> str:
    """The best measured rates."""
    products = {rate.dtype: report.best_rate("product", rate.dtype) for rate in report.rates if rate.kind == "product"}
    shown = [f"{dtype} products {(rate or 0) / 1e9:,.0f} GFLOP/s" for dtype, rate in products.items()]
    copies = report.best_rate("copy")
    return f"This machine at best, in this run: {', '.join(shown)}, copies {(copies or 0) / 1e9:,.1f} GB/s."


def published_rows(report: Report) -> list[tuple[str, ...]]:
    """Of rerankers: each provider's most pairs a second over batch sizes, beside what was published elsewhere."""
    figures = report.figures()
    if not figures.published.notna().any():
        return []
    best = figures[figures.kind == "text"].pivot_table("texts", "subject", "provider", "max", sort=False)
    published = figures.groupby("subject", sort=False).published.max()
    names = [name for name in dict.fromkeys(figures.provider) if name in best.columns]
    heading = ("pairs/s at the best batch", *names, "published")
    return [heading, *((each, *map(number, best.loc[each, names]), number(published[each])) for each in best.index)]


def plain_table(heading: str, below: str = "", columns: Iterable[str] = (), left: int = 1, wrap: bool = False) -> Table:
    """A table whose first ``left`` columns are text."""
    table = Table(title=escape(heading), caption=escape(below) or None, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.title_justify = table.caption_justify = "left"
    table.title_style = "bold"
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index < left else "right", no_wrap=not wrap)
    return table


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
    for shown in cases(report):
        table = plain_table(shown.title, shown.caption, shown.headings)
        for style, cells in shown.rows:
            table.add_row(*map(escape, cells), style={"failed": "red", "ours": "bold"}.get(style))
        yield table
        if shown.notes:
            yield "\n".join(f"  {escape(provider)}: {escape(remark)}" for provider, remark in shown.notes) + "\n"
    if published := published_rows(report):
        table = plain_table("Rerankers", _PUBLISHED, published[0], wrap=True)
        for line in published[1:]:
            table.add_row(*line)
        yield table
    if report.first_calls:
        about = "First call, in a fresh process: seconds; peak memory of a later one: MiB"
        meaning = "Load: building the transformers model. Convert: from there to what is called."
        table = plain_table(about, meaning, FIRST_CALL, left=2)
        for each in report.first_calls:
            table.add_row(*first_call_cells(each))
            if each.detail:
                table.add_row("", f"  {escape(each.detail)}")
        yield table
    if missing := cannot_run(report):
        yield "Cannot run here: " + "; ".join(f"{escape(name)} ({escape(why)})" for name, why in missing.items())
