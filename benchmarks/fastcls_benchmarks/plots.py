"""Pictures of a run: narrow and with few words, so that they are legible on a phone and in print."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from .providers import ABSORBED, FASTCLS, FULL, INVARIANT, OURS, SELECTED
from .results import Report
from .tables import HIGHLIGHTED, duration
from .workloads import LENGTHS

# Okabe and Ito's colours, which most colour-blind people can tell apart; ours is the strongest.
_COLOURS = [
    "#999999",
    "#0072b2",
    "#56b4e9",
    "#009e73",
    "#44aa99",
    "#e69f00",
    "#b8860b",
    "#cc79a7",
    "#882255",
    "#332288",
    "#117733",
    "#999933",
]
_OURS, _STEPS_COLOUR = "#d55e00", "#f0b27a"
_MARKERS = "os^vDPX*<>hp"
_WIDTH = 5.6
# The steps after the baseline; on a CPU the last two are one.
STEPS = (FULL.name, SELECTED.name, ABSORBED.name, FASTCLS.name)


class Plot(NamedTuple):
    """A picture: its file's name without ending, a description for readers who cannot see it, the figure."""

    name: str
    text: str
    figure: Figure


# A provider, the length of its bar, the label at its end.
Bar = tuple[str, float, str]


def plots(report: Report) -> list[Plot]:
    """All pictures for which there is something to show."""
    figures = report.figures()
    figures = figures[figures.seconds.notna()] if len(figures) else figures
    if figures.empty:
        return []
    models = figures[figures.kind == "model"]
    drawn = [
        text_to_score(figures[figures.kind == "text"]),
        relative_speed(models),
        ladder(models),
        _sweep("latency_by_batch", models),
        _sweep("throughput_by_length", models),
        share_of_floor(models),
    ]
    return [plot for plot in drawn if plot is not None]


def save(report: Report, folder: Path) -> list[Path]:
    """Writes every picture as PNG."""
    paths = []
    for plot in plots(report):
        paths.append(folder / f"{plot.name}.png")
        plot.figure.savefig(paths[-1], dpi=200)
    return paths


def _colour(provider: str, index: int) -> str:
    if provider in HIGHLIGHTED:
        return _OURS
    return _STEPS_COLOUR if provider in OURS or "fastcls" in provider else _COLOURS[index % len(_COLOURS)]


def _most_contested(models: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """The cases, those with the most timed providers first."""
    return sorted(models.groupby("case", sort=False), key=lambda each: -len(each[1]))


def _axes(height: float, heading: str, hidden: Sequence[str]) -> tuple[Figure, Any]:
    figure = Figure(figsize=(_WIDTH, height), layout="constrained", facecolor="white")
    axes: Any = figure.subplots()
    axes.set_title(heading, fontsize=11, loc="left")
    for side in hidden:
        axes.spines[side].set_visible(False)
    return figure, axes


def _bars(name: str, text: str, heading: str, groups: Sequence[tuple[str, Sequence[Bar]]]) -> Plot | None:
    """Horizontal bars in groups, each bar with its own label."""
    if not groups:
        return None
    count = sum(len(bars) for _, bars in groups) + 1.3 * len(groups)
    figure, axes = _axes(0.5 + 0.235 * count, heading, ("top", "right", "bottom"))
    longest = max(value for _, bars in groups for _, value, _ in bars)
    place, ticks, labels = 0.0, [], []
    for group, bars in groups:
        axes.text(0, place, group, fontsize=9, fontweight="bold", va="center")
        for index, (provider, value, label) in enumerate(bars):
            place += 1
            axes.barh(place, value, color=_colour(provider, index), height=0.8)
            axes.text(value + longest * 0.01, place, label, va="center", fontsize=9)
            ticks.append(place)
            labels.append(provider)
        place += 1.3
    axes.set_yticks(ticks, labels, fontsize=9)
    axes.set_ylim(place - 0.6, -0.8)
    axes.set_xlim(0, longest * 1.2)
    axes.set_xticks([])
    axes.tick_params(left=False)
    return Plot(name, text, figure)


def text_to_score(texts: pd.DataFrame) -> Plot | None:
    """Texts a second, from text to label, of the case with the most providers."""
    cases = _most_contested(texts)[:1]
    groups = [
        (name, [(each.provider, each.texts, f"{each.texts:,.0f}") for each in rows.sort_values("texts").itertuples()])
        for name, rows in cases
    ]
    text = "Bars: texts a second, from text to label, tokenizing and batching included."
    return _bars("text_to_label", text, "From text to label: texts a second", groups)


def relative_speed(models: pd.DataFrame) -> Plot | None:
    """How many times faster than the baseline each provider is, for the cases with the most providers."""
    groups, baselines = [], set()
    for name, rows in [each for each in _most_contested(models) if len(each[1]) > 2][:4]:
        shown = rows[~rows.provider.isin({*STEPS, INVARIANT.name} - {FASTCLS.name})]
        bars = []
        for each in shown.itertuples():
            noisy = each.provider != each.baseline and each.low <= 1 <= each.high
            bars.append((each.provider, each.times, f"{each.times:.2f}{' (noise)' if noisy else ''}"))
        groups.append((name, bars))
        baselines |= set(rows.baseline)
    # Where several baselines meet, that of each case is the bar of length 1.
    baseline = baselines.pop() if len(baselines) == 1 else "transformers"
    text = f"Bars: how many times faster than {baseline} each provider is."
    return _bars("relative_speed", text, f"Times as fast as {baseline}", groups)


def ladder(models: pd.DataFrame) -> Plot | None:
    """What each step of fastcls is worth."""
    groups = []
    for name, rows in _most_contested(models):
        found = rows.set_index("provider").seconds
        steps = [step for step in (rows.baseline.iloc[0], *STEPS) if step in found.index]
        if {FULL.name, SELECTED.name, FASTCLS.name} <= set(steps):
            # Each group has its own scale, or a small model's bars would vanish beside a large one's.
            longest = max(found[steps])
            groups.append((name, [(step, found[step] / longest, f"{duration(found[step])} ms") for step in steps]))
    text = "Bars: time of each step from transformers to fastcls."
    return _bars("ladder", text, "What each step saves", groups[:4])


def share_of_floor(models: pd.DataFrame) -> Plot | None:
    """How near to the machine's limit the baseline and fastcls come."""
    groups = []
    for name, rows in _most_contested(models)[:8]:
        ends = rows[
            ((rows.provider == rows.baseline) | (rows.provider == FASTCLS.name)) & rows.get("share", rows.floor).notna()
        ]
        if len(ends):
            groups.append((name, [(each.provider, each.share, f"{each.share:.0%}") for each in ends.itertuples()]))
    text = "Bars: the least time that the useful work takes on this machine, as a share of the time taken."
    return _bars("share_of_floor", text, "Share of the ceiling: useful work alone is 100 %", groups)


def _sweep(name: str, models: pd.DataFrame) -> Plot | None:
    """The largest group of at least three cases that differ in one thing, as lines: batch size, or equal lengths."""
    by_batch = name == "latency_by_batch"
    lengths = models.workload.str.split(" x ").str[1]
    shown = models[~models.provider.isin(OURS - {FASTCLS.name})].assign(lengths=lengths)
    if not by_batch:
        shown = shown[shown.lengths.isin([each for each in LENGTHS if each.isdigit()])]
    kept = ["subject", "lengths" if by_batch else "batch_size", "dtype"]
    groups = [(key, rows) for key, rows in shown.groupby(kept, sort=False) if rows.case.nunique() >= 3]
    if not groups:
        return None
    (subject, fixed, dtype), rows = max(groups, key=lambda each: each[1].case.nunique())
    about = f"texts of {fixed}" if by_batch else f"{fixed} texts"
    heading = "Latency by batch" if by_batch else "Throughput by length, no padding"
    figure, axes = _axes(3.9, f"{heading}: {subject}, {about}, {dtype}", ("top", "right"))
    points = rows.assign(
        x=rows.batch_size if by_batch else rows.lengths.astype(float),
        y=rows.seconds * 1e3 if by_batch else rows.tokens / 1e3,
    ).sort_values("x")
    for index, (provider, line) in enumerate(points.groupby("provider", sort=False)):
        ours = provider in HIGHLIGHTED
        style = {"color": _colour(provider, index), "marker": _MARKERS[index % len(_MARKERS)], "markersize": 5}
        axes.plot(line.x, line.y, linewidth=2.5 if ours else 1.5, label=provider, zorder=3 if ours else 2, **style)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(set(points.x)), [f"{x:g}" for x in sorted(set(points.x))])
    axes.minorticks_off()
    if by_batch:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}"))
    axes.set_xlabel("texts in a batch" if by_batch else "tokens in each text")
    axes.set_ylabel("ms a batch" if by_batch else "thousand tokens/s")
    axes.grid(axis="y", color="#dddddd", linewidth=0.7)
    axes.legend(fontsize=9, frameon=False)
    text = (
        "Lines: milliseconds a batch against the number of texts in it."
        if by_batch
        else "Lines: thousands of tokens a second against the length of the texts."
    )
    return Plot(name, text, figure)
