"""Changes between two runs: only those beyond the noise of both."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import RenderableType
from rich.markup import escape

from .results import Case, Report
from .tables import duration, plain_table


@dataclass(frozen=True)
class Change:
    """One provider in one case of two runs.

    Attributes:
        before, after: how many times faster than the baseline it was; for the baseline itself, seconds.
        ratio: how many times faster it has become; below 1 it has become slower.
        moved: whether that is more than both runs' noise.
    """

    case: Case
    provider: str
    before: float
    after: float
    seconds_before: float
    seconds_after: float
    ratio: float
    moved: bool


@dataclass(frozen=True)
class Comparison:
    """Two runs side by side.

    Attributes:
        changes: of all providers but the baselines, in the order of the new run.
        machine: how many times faster the baselines have become, as a median: another machine, or another hour.
        only_old, only_new: measured in one of the runs only.
        broken: timed before, and failed now.
        differing: the differences between the runs' provenance.
        same_machine: whether both ran on the same chip with as many threads.
    """

    changes: list[Change]
    machine: float | None
    only_old: list[str]
    only_new: list[str]
    broken: list[str]
    differing: list[str]
    same_machine: bool

    @property
    def moved(self) -> list[Change]:
        return [change for change in self.changes if change.moved]

    def reasons_to_fail(self, percent: float) -> list[str]:
        """Why the new run does not pass as slower than the old one by at most ``percent``."""
        reasons = [f"{name} has failed" for name in self.broken]
        if not self.same_machine:
            reasons.append("the runs are of different machines or numbers of threads")
        if not self.changes:
            reasons.append("the runs have no figures in common")
        return reasons + [
            f"{change.case.name}, {change.provider}: {1 / change.ratio - 1:.0%} slower, more than {percent:g} %"
            for change in self.regressions(percent)
        ]

    def regressions(self, percent: float) -> list[Change]:
        """The changes that are slower by more than ``percent``, beyond the noise."""
        return [change for change in self.moved if 1 / change.ratio - 1 > percent / 100]


def compare(old: Report, new: Report) -> Comparison:
    """Compares each provider's speed relative to its baseline, so that a slower hour of the machine is no change."""
    before = {case.key: case for case in old.cases}
    changes, machine = [], []
    old_names, new_names = _names(old), _names(new)
    for case in new.cases:
        if case.key not in before:
            continue
        was = before[case.key]
        baselines = was.typical_seconds(was.baseline), case.typical_seconds(case.baseline)
        if baselines[0] and baselines[1] and was.baseline == case.baseline:
            machine.append(baselines[0] / baselines[1])
            changes += [change for row in case.rows if (change := _change(was, case, row.provider))]
    machine.sort()
    return Comparison(
        changes,
        machine[len(machine) // 2] if machine else None,
        [name for name in old_names if name not in new_names],
        [name for name in new_names if name not in old_names],
        [name for name in _names(new, "failed") if name in old_names],
        _differing(old, new),
        all(old.provenance[name] == new.provenance[name] for name in ("chip", "threads")),
    )


def _names(report: Report, status: str = "timed") -> dict[str, None]:
    """Every provider with this status, with its case; a dict, because it keeps the order."""
    return {f"{case.name}, {row.provider}": None for case in report.cases for row in case.rows if row.status == status}


def _differing(old: Report, new: Report) -> list[str]:
    facts = [
        (name, old.provenance[name], new.provenance[name])
        for name in ("chip", "threads", "driver", "python", "commit", "dirty")
    ]
    packages = {*old.provenance["versions"], *new.provenance["versions"]}
    facts += [
        (name, old.provenance["versions"].get(name), new.provenance["versions"].get(name)) for name in sorted(packages)
    ]
    return [f"{name}: {before} before, {after} now" for name, before, after in facts if before != after]


def _change(was: Case, case: Case, provider: str) -> Change | None:
    old, new = was.interval(provider), case.interval(provider)
    before, after = was.typical_seconds(provider), case.typical_seconds(provider)
    if provider == case.baseline or old is None or new is None or before is None or after is None:
        return None
    moved = new.low > old.high or new.high < old.low
    return Change(case, provider, old.median, new.median, before, after, new.median / old.median, moved)


def render(comparison: Comparison) -> list[RenderableType]:
    """Tables to read."""
    parts: list[RenderableType] = []
    if comparison.differing:
        parts.append("The runs differ in " + escape("; ".join(comparison.differing)) + ".\n")
    if comparison.machine is not None:
        parts.append(
            f"The baselines took {1 / comparison.machine:.2f} times as long as before; "
            "what follows is relative to them.\n"
        )
    count = len(comparison.changes)
    if comparison.moved:
        table = plain_table(f"Beyond the noise of both runs: {len(comparison.moved)} of {count}")
        table.add_column("case", overflow="fold")
        table.add_column("provider", no_wrap=True)
        for heading in ("ms before", "ms now", "vs baseline", "change"):
            table.add_column(heading, justify="right", no_wrap=True)
        for change in comparison.moved:
            percent = change.ratio - 1
            table.add_row(
                escape(change.case.name),
                change.provider,
                duration(change.seconds_before),
                duration(change.seconds_after),
                f"{change.before:.2f} to {change.after:.2f}",
                f"{percent:+.0%}",
                style="green" if percent > 0 else "red",
            )
        parts.append(table)
    elif not count:
        parts.append("The runs have no figures in common.")
    else:
        parts.append(f"Unchanged: none of {count} figures moved beyond the noise of both runs.")
    for heading, names in (
        ("Failed now", comparison.broken),
        ("Only before", comparison.only_old),
        ("Only now", comparison.only_new),
    ):
        if names:
            parts.append(f"{heading}: {escape('; '.join(names))}.")
    return parts
