"""What a run measured, as tables to read in a terminal of 100 columns."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.console import RenderableType
from rich.table import Table

from .results import BASELINE, Case, Memory, Report, Row
from .stats import is_noise, spread

NONE = "-"


def times(ratio: float | None, noise: float | None) -> str:
    """A ratio to read: "none" where it is within the noise."""
    if ratio is None:
        return NONE
    return "none" if noise is not None and is_noise(ratio, noise) else f"{ratio:.2f} x"


def render(report: Report) -> Iterator[RenderableType]:
    """All that there is to show of a run, in order."""
    if report.partial:
        yield "[bold red]Partial: the run was stopped before its end.[/]"
    provenance = report.provenance
    versions = ", ".join(f"{name} {version}" for name, version in provenance["versions"].items() if version)
    commit = f"{(provenance['commit'] or 'unknown')[:9]}{' with changes' if provenance['dirty'] else ''}"
    yield f"{provenance['chip']}, {provenance['threads']} threads\n{versions}\ncommit {commit}, {provenance['date']}\n"
    for case in report.cases:
        yield _case_table(case)
        yield from _notes(case)
    if report.memory:
        yield _memory_table(report.memory)


def _case_table(case: Case) -> Table:
    table = Table(
        title=f"{case.name}, {case.dtype}: {case.real_tokens / case.padded_tokens:.0%} of "
        f"{case.padded_tokens // case.num_batches} tokens a batch are real",
        caption=_caption(case),
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
        title_style="bold",
    )
    table.add_column("\nprovider", no_wrap=True)
    for heading in ("ms a\nbatch", "\np20 to p80", "vs\nsdpa", "real\nwork", "own\nwork", "logits\noff by"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in case.rows:
        table.add_row(row.provider, *_cells(case, row))
    return table


def _cells(case: Case, row: Row) -> list[str]:
    off = NONE if row.difference is None else f"{row.difference:.1e}"
    seconds = case.batch_seconds(row.provider)
    if row.status != "timed" or not seconds:
        shown = {"timed": "not timed", "failed": "[red]failed[/]", "unavailable": "cannot run"}[row.status]
        return [shown, NONE, NONE, NONE, NONE, off]
    low, median, high = spread([1e3 * each for each in seconds])
    ratio = case.times_faster(row.provider)
    faster = "1" if row.provider == BASELINE else times(ratio, case.noise)
    shares = [case.share(row.provider, flops) for flops in (case.flops, row.flops)]
    shown_shares = [NONE if share is None else f"{share:.0%}" for share in shares]
    return [f"{median:.1f}", f"{low:.1f} to {high:.1f}", faster, *shown_shares, off]


def _caption(case: Case) -> str:
    rates = {name: case.product_rate(name) for name in case.ceilings}
    shown = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in rates.items() if rate)
    noise = "unknown" if case.noise is None else f"{case.noise:.1%}"
    return f"Matrix products at these shapes, GFLOP/s: {shown or 'not measured'}. Noise: {noise}."


def _notes(case: Case) -> Iterator[str]:
    details = [f"  {row.provider}: {row.detail}" for row in case.rows if row.detail]
    if details:
        yield "\n".join(details) + "\n"


def _memory_table(memory: list[Memory]) -> Table:
    table = Table(
        title="Peak memory of one forward on the largest batch, above what was held before",
        box=box.SIMPLE_HEAD,
        title_justify="left",
        title_style="bold",
    )
    for heading in ("model", "workload", "provider"):
        table.add_column(heading, no_wrap=True)
    table.add_column("MiB", justify="right")
    for each in memory:
        shown = each.detail if each.peak_bytes is None else f"{each.peak_bytes / 2**20:.1f}"
        table.add_row(each.model, each.workload, each.provider, shown)
    return table
