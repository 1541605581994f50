"""Changes between two runs: only those beyond the noise of both."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
from rich.console import RenderableType
from rich.markup import escape

from .results import Report
from .tables import duration, plain_table


@dataclass(frozen=True)
class Comparison:
    """Two runs side by side."""

    # For each provider but the baselines `case`, `provider`, and of both runs, with the endings `_old` and `_new`, what
    # `Report.figures` says; `ratio`, how many times faster it has become, relative to its baseline; and whether it
    # `moved` by more than both runs' noise.
    changes: pd.DataFrame
    machine: float | None  # how many times faster the baselines have become, as a median: another machine or hour
    only_old: list[str]  # measured in one of the runs only, as the next
    only_new: list[str]
    broken: list[str]  # timed before, and failed now
    differing: list[str]  # between the runs' provenance
    same_machine: bool  # both ran on the same chip with as many threads

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
        for each in slower.itertuples():
            reasons.append(f"{each.case}, {each.provider}: {1 / each.ratio - 1:.0%} slower, more than {percent:g} %")
        return reasons


def compare(old: Report, new: Report) -> Comparison:
    """Compares each provider's speed relative to its baseline, so that a slower hour of the machine is no change."""
    before, after = (
        report.figures().assign(name=lambda each: each.case + ", " + each.provider) for report in (old, new)
    )
    failed = after.name[after.status == "failed"].unique()
    before, after = before.dropna(subset="seconds"), after.dropna(subset="seconds")
    both = before.merge(after, on=["case", "provider"], suffixes=("_old", "_new")).query("baseline_old == baseline_new")
    is_baseline = both.provider == both.baseline_new
    machine = (both.seconds_old / both.seconds_new)[is_baseline].median()
    found = both[~is_baseline & both.low_old.notna() & both.low_new.notna()]
    apart = (found.low_new > found.high_old) | (found.high_new < found.low_old)
    # Its own time, too, must have moved, in this hour of the machine: else it is the baseline that did.
    alone = found.seconds_old / found.seconds_new / machine
    noise = found[["noise_old", "noise_new"]].astype(float).fillna(0).sum(axis=1)
    apart &= ((alone - 1).abs() > noise) & ((alone > 1) == (found.times_new > found.times_old))
    facts = [{**each.provenance, **each.provenance["versions"]} for each in (old, new)]
    packages = sorted({*old.provenance["versions"], *new.provenance["versions"]})
    names = ("chip", "threads", "driver", "python", "commit", "dirty", *packages)
    differing = {name: tuple(each.get(name) for each in facts) for name in names}
    differing = {name: (was, now) for name, (was, now) in differing.items() if was != now}
    return Comparison(
        found.assign(ratio=found.times_new / found.times_old, moved=apart),
        float(machine) if len(both) else None,
        [name for name in before.name if name not in set(after.name)],
        [name for name in after.name if name not in set(before.name)],
        [name for name in failed if name in set(before.name)],
        [f"{name}: {was} before, {now} now" for name, (was, now) in differing.items()],
        not differing.keys() & {"chip", "threads"},
    )


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
            shown = [duration(each.seconds_old), duration(each.seconds_new)]
            shown += [f"{each.times_old:.2f} to {each.times_new:.2f}", f"{each.ratio - 1:+.0%}"]
            table.add_row(escape(each.case), each.provider, *shown, style="green" if each.ratio > 1 else "red")
        parts.append(table)
    elif not count:
        parts.append("The runs have no figures in common.")
    else:
        parts.append(f"Unchanged: none of {count} figures moved beyond the noise of both runs.")
    lists = {"Failed now": comparison.broken, "Only before": comparison.only_old, "Only now": comparison.only_new}
    return parts + [f"{heading}: {escape('; '.join(names))}." for heading, names in lists.items() if names]
