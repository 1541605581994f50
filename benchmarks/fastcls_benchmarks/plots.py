"""Pictures of a run: narrow and with few words, so that they are legible on a phone and in print."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from .providers import ABSORBED, FASTCLS, FULL, INVARIANT, OURS, PROVIDERS, SDPA, SELECTED
from .results import Report
from .tables import HIGHLIGHTED, duration
from .texts import PIPELINE

# Okabe and Ito's colours, which most colour-blind people can tell apart; ours is the strongest.
_COLOURS = ["#999999", "#0072b2", "#56b4e9", "#009e73", "#44aa99", "#e69f00", "#b8860b", "#cc79a7"]
_COLOURS += ["#882255", "#332288", "#117733", "#999933"]
_OURS, _STEPS_COLOUR = "#d55e00", "#f0b27a"
_MARKERS = "os^vDPX*<>hp"
# In the order of their colours: no two of the first twelve look alike, and these meet most often.
_PEERS = [SDPA.name, "onnxruntime", "openvino", PIPELINE.name, "sentence-transformers", "torch packed"]
_PEERS += ["onnxruntime int8", "openvino default", "openvino int8", "torch.compile", "transformers eager"]
_PEERS += [name for name in PROVIDERS if name not in {*OURS, *_PEERS}]
# After the baseline; on a CPU the last two are one.
STEPS = (FULL.name, SELECTED.name, ABSORBED.name, FASTCLS.name)


class Plot(NamedTuple):
    """A picture: its file's name without ending, a description for readers who cannot see it, the figure."""

    name: str
    text: str
    figure: Figure


def plots(report: Report) -> list[Plot]:
    """All pictures for which there is something to show."""
    figures = report.figures().dropna(subset="seconds")
    texts, models = (figures[figures.kind == kind] for kind in ("text", "model"))
    batches = figures[figures.kind.isin(("model", "train"))]
    bars = [_text_to_label(texts), _relative_speed(batches), _ladder(models)]
    sweeps = [_sweep("latency_by_batch", models), _sweep("throughput_by_length", models)]
    return [plot for plot in (*bars, *sweeps, _share_of_floor(models)) if plot is not None]


def save(report: Report, folder: Path) -> list[Path]:
    """Writes every picture as PNG."""
    drawn = {folder / f"{plot.name}.png": plot.figure for plot in plots(report)}
    for path, figure in drawn.items():
        figure.savefig(path, dpi=200)
    return list(drawn)


def _place(provider: str) -> int:
    """The same for a provider in every picture, from text or not."""
    # A server is in no list.
    return [*_PEERS, provider.removesuffix(", sorted")].index(provider.removesuffix(", sorted"))


def _colour(provider: str) -> str:
    if provider in HIGHLIGHTED:
        return _OURS
    return _STEPS_COLOUR if "fastcls" in provider else _COLOURS[_place(provider) % len(_COLOURS)]


def _most_contested(models: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """The cases, first those with the most providers."""
    return sorted(models.groupby("case", sort=False), key=lambda each: -len(each[1]))


def _axes(height: float, heading: str, hidden: Sequence[str]) -> tuple[Figure, Any]:
    figure = Figure(figsize=(5.6, height), layout="constrained", facecolor="white")
    axes: Any = figure.subplots()
    axes.set_title(heading, fontsize=11, loc="left")
    axes.spines[hidden].set_visible(False)
    return figure, axes


def _bars(name: str, text: str, heading: str, groups: Sequence[tuple[str, pd.DataFrame]]) -> Plot | None:
    """Horizontal bars in groups: rows with ``provider``, the bar's ``length`` and the ``label`` at its end."""
    if not groups:
        return None
    figure, axes = _axes(0.5 + 0.235 * sum(len(bars) + 1.3 for _, bars in groups), heading, ["top", "right", "bottom"])
    longest = max(bars.length.max() for _, bars in groups)
    place, ticks = 0.0, dict[float, str]()
    for group, bars in groups:
        axes.text(0, place, group, fontsize=9, fontweight="bold", va="center")
        for bar in bars.itertuples():
            place += 1
            ticks[place] = bar.provider
            axes.barh(place, bar.length, color=_colour(bar.provider), height=0.8)
            axes.text(bar.length + longest * 0.01, place, bar.label, va="center", fontsize=9)
        place += 1.3
    axes.set_yticks(list(ticks), ticks.values(), fontsize=9)
    axes.set(xlim=(0, longest * 1.2), ylim=(place - 0.6, -0.8), xticks=[])
    axes.tick_params(left=False)
    return Plot(name, text, figure)


def _text_to_label(texts: pd.DataFrame) -> Plot | None:
    """Of the case with the most providers."""
    bars = texts.assign(length=texts.texts, label=texts.texts.map("{:,.0f}".format)).sort_values("texts")
    groups = [(name, bars[bars.case == name]) for name, _ in _most_contested(texts)[:1]]
    text = "Bars: texts a second, from text to label, tokenizing and batching included."
    return _bars("text_to_label", text, "From text to label: texts a second", groups)


def _relative_speed(models: pd.DataFrame) -> Plot | None:
    """How many times faster than the baseline each provider is, for the cases with the most providers."""
    noisy = (models.provider != models.baseline) & (models.low <= 1) & (models.high >= 1)
    said = (models.times.map("{:.2f}".format), noisy.map({True: " (noise)", False: ""}))
    # Of no rows pandas makes numbers, which it cannot join where pyarrow is installed.
    label = said[0].astype(str) + said[1].astype(str)
    bars = models.assign(length=models.times, label=label)
    bars = bars[~bars.provider.isin({*STEPS, INVARIANT.name} - {FASTCLS.name})]
    names = [name for name, rows in _most_contested(models) if len(rows) > 2][:4]
    baselines = models.baseline[models.case.isin(names)].unique()
    # Where several baselines meet, that of each case is the bar of length 1.
    baseline = baselines[0] if len(baselines) == 1 else "transformers"
    text = f"Bars: how many times faster than {baseline} each provider is."
    groups = [(name, bars[bars.case == name]) for name in names]
    return _bars("relative_speed", text, f"Times as fast as {baseline}", groups)


def _ladder(models: pd.DataFrame) -> Plot | None:
    groups = []
    for name, rows in _most_contested(models):
        found = rows.set_index("provider", drop=False)
        steps = found.loc[[step for step in (rows.baseline.iloc[0], *STEPS) if step in found.index]]
        if {FULL.name, SELECTED.name, FASTCLS.name} <= set(steps.index):
            # Each group has its own scale, or a small model's bars would vanish beside a large one's.
            length, label = steps.seconds / steps.seconds.max(), steps.seconds.map(duration) + " ms"
            groups.append((name, steps.assign(length=length, label=label)))
    text = "Bars: time of each step from transformers to fastcls."
    return _bars("ladder", text, "What each step saves", groups[:4])


def _share_of_floor(models: pd.DataFrame) -> Plot | None:
    ends = models[(models.provider == FASTCLS.name) | (models.provider == models.baseline)].dropna(subset="share")
    bars = ends.assign(length=ends.share, label=ends.share.map("{:.0%}".format))
    groups = [(name, bars[bars.case == name]) for name, _ in _most_contested(models)[:8] if name in set(bars.case)]
    text = "Bars: the least time that the useful work takes on this machine, as a share of the time taken."
    return _bars("share_of_floor", text, "Share of the ceiling: useful work alone is 100 %", groups)


def _sweep(name: str, models: pd.DataFrame) -> Plot | None:
    """The largest group of at least three cases that differ in one thing, as lines: batch size, or equal lengths."""
    by_batch = name == "latency_by_batch"
    shown = models[~models.provider.isin(OURS - {FASTCLS.name})]
    shown = shown.assign(lengths=shown.workload.str.split(" x ").str[1])
    if by_batch:
        shown = shown.assign(x=shown.batch_size, y=shown.seconds * 1e3)
        heading, fixed, x_label, y_label = "Latency by batch", "texts of {}", "texts in a batch", "ms a batch"
        text = "Lines: milliseconds a batch against the number of texts in it."
    else:
        shown = shown[shown.lengths.str.isdigit()]
        shown = shown.assign(x=shown.lengths.astype(float), y=shown.tokens / 1e3)
        heading, fixed = "Throughput by length, no padding", "{} texts"
        x_label, y_label = "tokens in each text", "thousand tokens/s"
        text = "Lines: thousands of tokens a second against the length of the texts."
    alike = ["subject", "lengths" if by_batch else "batch_size", "dtype", "threads"]
    groups = shown.groupby(alike, sort=False, dropna=False)
    key, points = max(groups, key=lambda each: each[1].case.nunique(), default=("", shown))
    if points.case.nunique() < 3:
        return None
    figure, axes = _axes(3.9, f"{heading}: {key[0]}, {fixed.format(key[1])}, {key[2]}", ["top", "right"])
    for provider, line in points.sort_values("x").groupby("provider", sort=False):
        if len(line) < 3:
            continue
        ours = provider in HIGHLIGHTED
        style: dict[str, Any] = {
            "color": _colour(provider),
            "marker": _MARKERS[_place(provider) % len(_MARKERS)],
            "markersize": 5,
        }
        axes.plot(line.x, line.y, linewidth=2.5 if ours else 1.5, label=provider, zorder=3 if ours else 2, **style)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks := sorted(set(points.x)), [f"{x:g}" for x in ticks])
    axes.minorticks_off()
    axes.set(**{"yscale": "log"} if by_batch else {"ylim": (0, None)}, xlabel=x_label, ylabel=y_label)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}"))
    axes.grid(axis="y", color="#dddddd", linewidth=0.7)
    axes.legend(fontsize=9, frameon=False)
    return Plot(name, text, figure)
