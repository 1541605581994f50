"""Pictures of a run: narrow and with few words, so that they are legible on a phone and in print."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from .providers import ABSORBED, FASTCLS, FULL, INVARIANT, OURS, PROVIDERS, SELECTED
from .results import Case, Report
from .tables import duration, times
from .workloads import LENGTHS

# Okabe and Ito's colours, which most colour-blind people can tell apart; ours is the strongest.
# fmt: off
_COLOURS = (
    "#999999", "#0072b2", "#56b4e9", "#009e73", "#44aa99", "#e69f00", "#b8860b", "#cc79a7", "#882255",
    "#332288", "#117733", "#999933", "#aa4499",
)
# fmt: on
_OURS = "#d55e00"
_MARKERS = "os^vDPX*<>hp"
_WIDTH = 5.6
# The steps after the baseline; on a CPU the last two are one.
STEPS = (FULL.name, SELECTED.name, ABSORBED.name, FASTCLS.name)


class Plot(NamedTuple):
    """A picture.

    Attributes:
        name: of the file, without its ending.
        text: a description, for readers who cannot see it.
    """

    name: str
    text: str
    figure: Figure


def plots(report: Report) -> list[Plot]:
    """All pictures for which there is something to show."""
    drawn = (draw(report) for draw in (relative_speed, ladder, latency_by_batch, throughput_by_length, share_of_floor))
    return [plot for plot in drawn if plot is not None]


def save(report: Report, folder: Path) -> list[Path]:
    """Writes every picture as PNG."""
    paths = []
    for plot in plots(report):
        paths.append(folder / f"{plot.name}.png")
        plot.figure.savefig(paths[-1], dpi=200)
    return paths


def _colour(provider: str) -> str:
    if provider == FASTCLS.name:
        return _OURS
    peers = [name for name in PROVIDERS if name not in OURS]
    return _COLOURS[peers.index(provider) % len(_COLOURS)] if provider in peers else "#f0b27a"


def _marker(provider: str) -> str:
    return _MARKERS[list(PROVIDERS).index(provider) % len(_MARKERS)]


def _timed(case: Case) -> list[str]:
    """The timed providers, in the order in which they are listed everywhere."""
    timed = {row.provider for row in case.rows if case.round_seconds(row.provider)}
    return [name for name in PROVIDERS if name in timed]


def _models(report: Report) -> list[Case]:
    return [case for case in report.cases if case.kind == "model" and _timed(case)]


def _most_contested(report: Report) -> list[Case]:
    """The models' cases, those with the most timed providers first."""
    return sorted(_models(report), key=lambda case: -len(_timed(case)))


def _figure(height: float) -> Figure:
    return Figure(figsize=(_WIDTH, height), layout="constrained", facecolor="white")


def _bare(axes: object) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)  # type: ignore[attr-defined]


def _bars(name: str, text: str, heading: str, groups: Sequence[tuple[str, Sequence[tuple[str, float, str]]]]) -> Plot:
    """Horizontal bars in groups, each bar with its own label."""
    count = sum(len(bars) for _, bars in groups) + 1.3 * len(groups)
    figure = _figure(0.5 + 0.235 * count)
    axes = figure.subplots()
    place, ticks, labels = 0.0, [], []
    longest = max(value for _, bars in groups for _, value, _ in bars)
    for group, bars in groups:
        axes.text(0, place, group, fontsize=9, fontweight="bold", va="center")
        for provider, value, words in bars:
            place += 1
            axes.barh(place, value, color=_colour(provider), height=0.8)
            axes.text(value + longest * 0.01, place, words, va="center", fontsize=9)
            ticks.append(place)
            labels.append(provider)
        place += 1.3
    axes.set_yticks(ticks, labels, fontsize=9)
    axes.set_ylim(place - 0.6, -0.8)
    axes.set_xlim(0, longest * 1.2)
    axes.set_title(heading, fontsize=11, loc="left")
    axes.set_xticks([])
    axes.tick_params(left=False)
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)
    return Plot(name, text, figure)


def _lines(
    name: str,
    text: str,
    heading: str,
    axis_names: tuple[str, str],
    series: dict[str, list[tuple[float, float]]],
    linear_y: bool = False,
) -> Plot:
    figure = _figure(3.9)
    axes = figure.subplots()
    for provider, points in series.items():
        xs, ys = zip(*sorted(points), strict=True)
        ours = provider == FASTCLS.name
        axes.plot(
            xs,
            ys,
            color=_colour(provider),
            marker=_marker(provider),
            markersize=5,
            linewidth=2.5 if ours else 1.5,
            label=provider,
            zorder=3 if ours else 2,
        )
    axes.set_xscale("log", base=2)
    places = sorted({x for points in series.values() for x, _ in points})
    axes.set_xticks(places, [f"{x:g}" for x in places])
    axes.minorticks_off()
    if linear_y:
        axes.set_ylim(bottom=0)
    else:
        axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}"))
    axes.set_xlabel(axis_names[0])
    axes.set_ylabel(axis_names[1])
    axes.set_title(heading, fontsize=11, loc="left")
    axes.grid(axis="y", color="#dddddd", linewidth=0.7)
    _bare(axes)
    axes.legend(fontsize=9, frameon=False)
    return Plot(name, text, figure)


def relative_speed(report: Report) -> Plot | None:
    """How many times faster than the baseline each provider is, for the cases with the most providers."""
    cases = [case for case in _most_contested(report) if len(_timed(case)) > 2]
    groups = []
    for case in cases[:4]:
        hidden = {*STEPS, INVARIANT.name} - {FASTCLS.name}
        groups.append((case.name, [_relative(case, name) for name in _timed(case) if name not in hidden]))
    if not groups:
        return None
    # Where several baselines meet, that of each case is the bar of length 1.
    baselines = {case.baseline for case in cases[:4]}
    baseline = baselines.pop() if len(baselines) == 1 else "transformers"
    text = f"Bars: how many times faster than {baseline} each provider is."
    return _bars("relative_speed", text, f"Times as fast as {baseline}", groups)


def _relative(case: Case, provider: str) -> tuple[str, float, str]:
    ratio = case.times_faster(provider) or 0.0
    within = provider != case.baseline and times(case, provider) == "none"
    return provider, ratio, f"{ratio:.2f}{' (noise)' if within else ''}"


def ladder(report: Report) -> Plot | None:
    """What each step of fastcls is worth."""
    cases = [case for case in _models(report) if {case.baseline, *STEPS} - {ABSORBED.name} <= set(_timed(case))]
    groups = []
    for case in cases[:4]:
        steps = [name for name in (case.baseline, *STEPS) if name in _timed(case)]
        seconds = {name: case.typical_seconds(name) or 0.0 for name in steps}
        # Each group has its own scale, or a small model's bars would vanish beside a large one's.
        longest = max(seconds.values())
        bars = [(name, each / longest, f"{duration(each)} ms") for name, each in seconds.items()]
        groups.append((case.name, bars))
    if not groups:
        return None
    return _bars("ladder", "Bars: time of each step from transformers to fastcls.", "What each step saves", groups)


def _sweep(
    report: Report,
    vary: Callable[[Case], float],
    keep: Callable[[Case], str | None],
    value: Callable[[Case, str], float],
) -> tuple[str, dict[str, list[tuple[float, float]]]] | None:
    """The largest group of cases that differ in only one thing, and its lines."""
    groups: dict[str, list[Case]] = {}
    for case in _models(report):
        kept = keep(case)
        if kept is not None:
            threads = f", threads: {case.threads}" if case.threads else ""
            groups.setdefault(f"{case.subject}, {kept}, {case.dtype}{threads}", []).append(case)
    name, cases = max(groups.items(), key=lambda group: len(group[1]), default=("", []))
    if len(cases) < 3:
        return None
    series: dict[str, list[tuple[float, float]]] = {}
    for case in cases:
        for provider in _timed(case):
            if provider not in OURS - {FASTCLS.name}:
                series.setdefault(provider, []).append((vary(case), value(case, provider)))
    # A line needs at least three points.
    return name, {provider: points for provider, points in series.items() if len(points) >= 3}


def latency_by_batch(report: Report) -> Plot | None:
    """Milliseconds per batch against its size."""
    found = _sweep(
        report,
        lambda case: case.batch_size,
        lambda case: f"texts of {case.workload.split(' x ')[1]}",
        lambda case, provider: 1e3 * (case.typical_seconds(provider) or 0.0),
    )
    if found is None:
        return None
    name, series = found
    return _lines(
        "latency_by_batch",
        "Lines: milliseconds a batch against the number of texts in it.",
        f"Latency by batch: {name}",
        ("texts in a batch", "ms a batch"),
        series,
    )


def throughput_by_length(report: Report) -> Plot | None:
    """Real tokens per second against the length of texts, all of one length."""

    def keep(case: Case) -> str | None:
        length = case.workload.split(" x ")[1]
        return f"{case.batch_size} texts" if length.isdigit() and length in LENGTHS else None

    found = _sweep(
        report,
        lambda case: float(case.workload.split(" x ")[1]),
        keep,
        lambda case, provider: (case.per_second(provider, case.real_tokens) or 0.0) / 1e3,
    )
    if found is None:
        return None
    name, series = found
    return _lines(
        "throughput_by_length",
        "Lines: thousands of tokens a second against the length of the texts.",
        f"Throughput by length, no padding: {name}",
        ("tokens in each text", "thousand tokens/s"),
        series,
        linear_y=True,
    )


def share_of_floor(report: Report) -> Plot | None:
    """How near to the machine's limit the baseline and fastcls come."""
    groups = []
    for case in _most_contested(report)[:8]:
        bars = []
        for provider in (case.baseline, FASTCLS.name):
            share = report.share_of_floor(case, provider)
            if share is not None:
                bars.append((provider, share, f"{share:.0%}"))
        if bars:
            groups.append((case.name, bars))
    if not groups:
        return None
    text = "Bars: the least time that the useful work takes on this machine, as a share of the time taken."
    return _bars("share_of_floor", text, "Share of the ceiling: useful work alone is 100 %", groups)
