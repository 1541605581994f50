"""Changes between two runs: only those beyond the noise of both."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
from rich.console import RenderableType
from rich.markup import escape

from .results import Report
from .tables import duration, plain_table

_KEY = ["case", "provider"]


@dataclass(frozen=True)
class Comparison:
    """Two runs side by side.

    Attributes:
        changes: a row for each provider but the baselines: ``case``, ``provider``, and of both runs, with the endings
            ``_old`` and ``_new``, what `Report.figures` says; ``ratio``, how many times faster it has become, relative
            to its baseline; and whether it ``moved`` by more than both runs' noise.
        machine: how many times faster the baselines have become, as a median: another machine, or another hour.
        only_old, only_new: measured in one of the runs only.
        broken: timed before, and failed now.
        differing: the differences between the runs' provenance.
        same_machine: whether both ran on the same chip with as many threads.
    """

    changes: pd.DataFrame
    machine: float | None
    only_old: list[str]
    only_new: list[str]
    broken: list[str]
    differing: list[str]
    same_machine: bool

    @property
    def moved(self) -> pd.DataFrame:
        return self.changes[self.changes.moved.astype(bool)]

    def reasons_to_fail(self, percent: float) -> list[str]:
        """Why the new run does not pass as slower than the old one by at most ``percent``, beyond the noise."""
        reasons = [f"{name} has failed" for name in self.broken]
        if not self.same_machine:
            reasons.append("the runs are of different machines or numbers of threads")
        if self.changes.empty:
            reasons.append("the runs have no figures in common")
        slower = self.moved[1 / self.moved.ratio - 1 > percent / 100]
        return reasons + [
            f"{each.case}, {each.provider}: {1 / each.ratio - 1:.0%} slower, more than {percent:g} %"
            for each in slower.itertuples()
        ]


def compare(old: Report, new: Report) -> Comparison:
    """Compares each provider's speed relative to its baseline, so that a slower hour of the machine is no change."""
    before, after = (_timed(report) for report in (old, new))
    both = before.merge(after, on=_KEY, suffixes=("_old", "_new")) if len(before) and len(after) else pd.DataFrame()
    changes, machine = pd.DataFrame(columns=[*_KEY, "ratio", "moved"]), None
    if len(both):
        both = both[both.baseline_old == both.baseline_new]
        is_baseline = both.provider == both.baseline_new
        machine = float((both.seconds_old / both.seconds_new)[is_baseline].median())
        found = both[~is_baseline & both.low_old.notna() & both.low_new.notna()]
        apart = (found.low_new > found.high_old) | (found.high_new < found.low_old)
        changes = found.assign(ratio=found.times_new / found.times_old, moved=apart)
    names_old, names_new = (
        [f"{case}, {provider}" for case, provider in zip(each.case, each.provider, strict=True)]
        for each in (before, after)
    )
    failed = {f"{case.name}, {row.provider}": None for case in new.cases for row in case.rows if row.status == "failed"}
    return Comparison(
        changes,
        machine,
        [name for name in names_old if name not in names_new],
        [name for name in names_new if name not in names_old],
        [name for name in failed if name in names_old],
        _differing(old, new),
        all(old.provenance[name] == new.provenance[name] for name in ("chip", "threads")),
    )


def _timed(report: Report) -> pd.DataFrame:
    figures = report.figures()
    return figures[figures.seconds.notna()]


def _differing(old: Report, new: Report) -> list[str]:
    facts = [{**each.provenance, **each.provenance["versions"]} for each in (old, new)]
    packages = sorted({*old.provenance["versions"], *new.provenance["versions"]})
    named = [*("chip", "threads", "driver", "python", "commit", "dirty"), *packages]
    values = ((name, *(each.get(name) for each in facts)) for name in named)
    return [f"{name}: {before} before, {after} now" for name, before, after in values if before != after]


def render(comparison: Comparison) -> list[RenderableType]:
    """Tables to read."""
    parts: list[RenderableType] = []
    if comparison.differing:
        parts.append("The runs differ in " + escape("; ".join(comparison.differing)) + ".\n")
    if comparison.machine is not None:
        slower = 1 / comparison.machine
        parts.append(f"The baselines took {slower:.2f} times as long as before; what follows is relative to them.\n")
    count, moved = len(comparison.changes), comparison.moved
    if len(moved):
        columns = ("case", "provider", "ms before", "ms now", "vs baseline", "change")
        table = plain_table(f"Beyond the noise of both runs: {len(moved)} of {count}", columns=columns, left=2)
        table.columns[0].no_wrap = False
        for each in moved.itertuples():
            shown = (
                duration(each.seconds_old),
                duration(each.seconds_new),
                f"{each.times_old:.2f} to {each.times_new:.2f}",
            )
            style = "green" if each.ratio > 1 else "red"
            table.add_row(escape(each.case), each.provider, *shown, f"{each.ratio - 1:+.0%}", style=style)
        parts.append(table)
    elif not count:
        parts.append("The runs have no figures in common.")
    else:
        parts.append(f"Unchanged: none of {count} figures moved beyond the noise of both runs.")
    lists = {"Failed now": comparison.broken, "Only before": comparison.only_old, "Only now": comparison.only_new}
    return parts + [f"{heading}: {escape('; '.join(names))}." for heading, names in lists.items() if names]
