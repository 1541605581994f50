"""A verification for people: tables in a terminal, and a picture."""

from __future__ import annotations

import math
from pathlib import Path

from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastcls_kernels.packed import explain_compiled

from .answers import Text
from .comparison import ALLOWANCE, FAR_OFF, Changed, Comparison
from .run import Verification

# How many of the kept changed answers are shown for a dtype that does not decide.
_SHOWN_REDUCED = 5
_TEXT_WIDTHS, _LABEL_WIDTH, _BAR_WIDTHS = (8, 60), 14, (2, 12)
# Room right of a bar, for a percentage after a space.
_PERCENT_WIDTH = 7
_ENDINGS = (".pdf", ".png", ".svg")
# Okabe and Ito's colours, which most colour-blind people can tell apart; fastcls gets the strong ones.
_COLOURS = {"fastcls": ("#d55e00", "#cc79a7", "#e69f00", "#009e73"), "original": ("#0072b2", "#56b4e9")}


def check_picture(path: Path) -> None:
    """Checks, before anything is computed, that a picture can be drawn and written.

    Raises:
        ValueError: another ending than .png, .pdf or .svg, a folder that does not exist, or no matplotlib.
    """
    if path.suffix.lower() not in _ENDINGS:
        raise ValueError(f"--plot must be a file that ends in {', '.join(_ENDINGS)}, got {path}")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"--plot must be a file in a folder that is there, got {path}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError("--plot needs matplotlib: pip install matplotlib") from error


def show(found: Verification, console: Console, *, strict: bool) -> None:
    """Prints the whole report, the verdict last."""
    console.print(
        f"[bold]{found.model_class}[/] ({found.task}), {found.dtype} on {found.device}: "
        f"{found.texts:,} texts, {found.tokens:,} tokens\n",
        highlight=False,
    )
    _show_agreement(found, console)
    _show_accuracy(found, console)
    _show_times(found, console)
    for index, comparison in enumerate(found.comparisons):
        if comparison.is_judged:
            _show_changed(comparison, console, None if index == 0 or strict else _SHOWN_REDUCED)
    _show_differences(found, console)
    _show_verdict(found, console, strict)


def draw(found: Verification, path: Path) -> None:
    """Writes a histogram of the differences, by powers of ten."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained", facecolor="white")
    axes = figure.subplots()
    colours = {name: iter(values) for name, values in _COLOURS.items()}
    for comparison in found.comparisons:
        bins = list(comparison.differences.bins())
        colour = next(colours[comparison.name])
        name = f"{comparison.name} {comparison.dtype}"
        if bins:
            shares = [100 * count / comparison.differences.count for *_, count in bins]
            edges = [low for low, *_ in bins] + [bins[-1][1]]
            axes.stairs(shares, edges, fill=comparison.name == "fastcls", alpha=0.6, color=colour, label=name)
        if comparison.rounding:
            axes.axvline(ALLOWANCE * comparison.rounding, color=colour, linestyle="--", linewidth=1)
    axes.set_xscale("log")
    axes.set_xlabel(f"difference from the original in {found.dtype}; dashed: what rounding explains")
    axes.set_ylabel("% of all numbers")
    axes.set_title(f"{found.model_class}, {found.texts:,} texts", loc="left", fontsize=10)
    if axes.has_data():
        figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=200)


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    table.add_column(headings[0])
    for heading in headings[1:]:
        table.add_column(heading, justify="right")
    return table


def _show_agreement(found: Verification, console: Console) -> None:
    has_labels = any(comparison.decisions for comparison in found.comparisons)
    has_cosines = found.comparisons[0].mean_cosine is not None
    headings = ["", *(["labels changed", "agree"] if has_labels else []), "beyond rounding", "largest", "mean"]
    table = _table(f"Against the original in {found.dtype}", *headings, *(["1 - cosine"] if has_cosines else []))
    for comparison in found.comparisons:
        row = [f"{comparison.name} {comparison.dtype}"]
        if has_labels:
            agree = 1 - comparison.changed / max(1, comparison.decisions)
            row += [f"{comparison.changed:,} of {comparison.decisions:,}", _percent(agree)]
        row.append("-" if comparison.rounding is None else f"{comparison.beyond_rounding:,}")
        differences = comparison.differences
        row.append("not finite" if differences.not_finite else f"{differences.largest:.1e}")
        row.append(f"{differences.mean:.1e}")
        if has_cosines:
            lowest = comparison.cosines[2]
            row.append(f"{1 - lowest:.1e}" if math.isfinite(lowest) else "not finite")
        table.add_row(*row)
    console.print(table)
    what = "states" if has_cosines else "scores" if not has_labels else "logits"
    notes = [f"Largest and mean: of the differences between {what}."]
    if has_cosines:
        notes.append("Cosines: of the first tokens' states, the lowest.")
    measured = ", ".join(
        f"{comparison.rounding:.1e} in {comparison.dtype}"
        for comparison in found.comparisons
        if comparison.rounding is not None
    )
    notes.append(f"The original's own rounding error is up to {measured}; fastcls may differ by {ALLOWANCE} times it.")
    if found.quantize is not None:
        notes.append(f"It does not judge {found.quantize}.")
    console.print(" ".join(notes) + "\n", highlight=False, style="dim")


def _show_accuracy(found: Verification, console: Console) -> None:
    first = found.comparisons[0].accuracy
    if first is None:
        return
    table = _table("Accuracy", "", "right", "accuracy", "difference")
    before, _ = first.percent
    table.add_row(f"original {found.dtype}", f"{first.original:,} of {first.texts:,}", f"{before:.2f}%", "")
    for comparison in found.comparisons:
        if (accuracy := comparison.accuracy) is not None:
            _, after = accuracy.percent
            right = f"{accuracy.compared:,} of {accuracy.texts:,}"
            table.add_row(f"{comparison.name} {comparison.dtype}", right, f"{after:.2f}%", f"{after - before:+.2f}")
    console.print(table)
    console.print("Difference: in percentage points, below 0 if accuracy was lost.\n", highlight=False, style="dim")


def _show_times(found: Verification, console: Console) -> None:
    table = _table("Time and weights", "", "texts a second", "times as fast", "weights, MB")
    baselines = {timed.dtype: timed for timed in found.timed if timed.name == "original"}
    for timed in found.timed:
        baseline = baselines.get(timed.dtype, found.timed[0])
        speed, base = timed.texts_per_second, baseline.texts_per_second
        shown = ("-", "-") if speed is None or base is None else (f"{speed:,.0f}", f"{speed / base:.2f}")
        table.add_row(f"{timed.name} {timed.dtype}", *shown, f"{timed.weight_bytes / 1e6:,.1f}")
    console.print(table)
    console.print(
        "Taken in passing, batch by batch in turns, without tokenizing. To measure, use fastcls bench.",
        highlight=False,
        style="dim",
    )
    runs, reason = explain_compiled(found.quantize or "float32")
    if found.quantize is not None and not runs:
        console.print(
            f"[yellow]Here optimize would leave {found.quantize} out:[/] the compiled kernels cannot compute it, "
            f"{reason}. Times are not those of machines where they run, and labels near a tie may be others.",
            highlight=False,
        )
    console.print()


def _show_changed(comparison: Comparison, console: Console, shown: int | None) -> None:
    changed = comparison.kept[:shown]
    if not changed:
        return
    title = f"Changed in {comparison.dtype}, {'largest margins' if len(changed) < comparison.changed else 'all'} first"
    headings = ["line", "text", "original", "fastcls", "margin", "explained"]
    if comparison.rounding is None:
        headings.pop()
    table = _table(title, *headings)
    rows = [_changed_row(entry)[: len(headings)] for entry in changed]
    for index, column in enumerate(table.columns):
        column.no_wrap = True
        column.justify = "left" if column.header in ("text", "original", "fastcls") else "right"
        # The text gets the width that the others leave: the line number identifies it, however little remains.
        if column.header != "text":
            column.width = max(len(str(column.header)), *(cell_len(row[index]) for row in rows))
    others = sum(column.width + 2 for column in table.columns if column.width is not None)
    table.columns[1].width = _between(console.width - others - 2, _TEXT_WIDTHS)
    for row, entry in zip(rows, changed, strict=True):
        table.add_row(*map(escape, row), style="red" if entry.beyond_rounding else "")
    console.print(table)
    if len(changed) < comparison.changed:
        console.print(f"and {comparison.changed - len(changed):,} more", highlight=False)
    console.print()


def _changed_row(entry: Changed) -> list[str]:
    place = "" if entry.place is None else f"{entry.place}: "
    named = [
        "" if name is None else f"{_shortened(name.label, _LABEL_WIDTH)} {name.score:.4f}"
        for name in (entry.original, entry.fastcls)
    ]
    numbers = [f"{number:.1e}" if math.isfinite(number) else "not finite" for number in (entry.margin, entry.explained)]
    return [str(entry.line), _shortened(place + _in_one(entry.text), _TEXT_WIDTHS[1]), *named, *numbers]


def _show_differences(found: Verification, console: Console) -> None:
    table = _table("Differences", "")
    table.columns[0].width = len("not finite") if any(each.differences.not_finite for each in found.comparisons) else 5
    left = console.width - table.columns[0].width - 2
    bar_width = _between(left // len(found.comparisons) - 2 - _PERCENT_WIDTH, _BAR_WIDTHS)
    columns: list[dict[int, int]] = []
    for comparison in found.comparisons:
        table.add_column(f"{comparison.name} {comparison.dtype}", width=bar_width + _PERCENT_WIDTH)
        decades: dict[int, int] = {}
        for low, _, count in comparison.differences.bins():
            decade = math.floor(math.log10(low) + 1e-9)
            decades[decade] = decades.get(decade, 0) + count
        columns.append(decades)
    decades_seen = [decade for column in columns for decade in column]
    rows = [("equal", [comparison.differences.equal for comparison in found.comparisons])]
    if decades_seen:
        rows += [
            (f"1e{decade:+03d}", [column.get(decade, 0) for column in columns])
            for decade in range(min(decades_seen), max(decades_seen) + 1)
        ]
    if any(comparison.differences.not_finite for comparison in found.comparisons):
        rows.append(("not finite", [comparison.differences.not_finite for comparison in found.comparisons]))
    for name, counts in rows:
        shares = [
            count / max(1, comparison.differences.count)
            for count, comparison in zip(counts, found.comparisons, strict=True)
        ]
        table.add_row(name, *(_bar(share, bar_width) for share in shares))
    console.print(table)
    console.print("Share of all numbers; 1e-06 is from there to ten times as much.\n", highlight=False, style="dim")


def _bar(share: float, width: int) -> str:
    return f"{'█' * round(share * width)}{'▏' if 0 < share * width < 0.5 else ''} {_percent(share)}" if share else ""


def _show_verdict(found: Verification, console: Console, strict: bool) -> None:
    if found.quantize is not None:
        _show_verdict_by_share(found.comparisons[0], found, console)
        if not strict:
            return
    judged = [each for each in found.comparisons if each.rounding is not None]
    decisive = judged[: None if strict else 1]
    beyond = {each.dtype: each.beyond_rounding for each in decisive if each.beyond_rounding}
    far_off = [each for each in decisive if each.far_off]
    not_finite = [each for each in decisive if each.not_finite]
    own = judged[0]
    what = "labels" if own.decisions else "answers"
    verdict: str | None
    if beyond:
        counts = ", ".join(f"{count:,} in {dtype}" for dtype, count in beyond.items())
        verdict = f"[bold red]Differs:[/] {what} changed by more than rounding explains: {counts}."
    elif far_off:
        counts = ", ".join(f"{each.far_off:,} in {each.dtype} (most in line {each.furthest})" for each in far_off)
        verdict = f"[bold red]Differs:[/] logits are off by more than {FAR_OFF} times what rounding explains: {counts}."
    elif not_finite:
        verdict = None
    elif own.changed:
        verdict = f"[bold green]Fine:[/] rounding explains every {what[:-1]} that changed in {own.dtype}."
    else:
        verdict = f"[bold green]Fine:[/] no {what[:-1]} changed in {own.dtype}."
    if verdict is not None:
        console.print(verdict, highlight=False)
    for each in not_finite:
        console.print(_not_finite(each, found.texts), highlight=False)
    allowed = ALLOWANCE * (own.rounding or 0.0)
    if not (beyond or far_off or not_finite) and (own.differences.not_finite or own.differences.largest > allowed):
        largest = "not finite" if own.differences.not_finite else f"{own.differences.largest:.1e}"
        console.print(
            f"[yellow]Look at the largest difference:[/] it is {largest}, and what the first texts show of rounding "
            f"explains {allowed:.1e}.",
            highlight=False,
        )


def _show_verdict_by_share(quantised: Comparison, found: Verification, console: Console) -> None:
    name, percent, allowed = quantised.dtype, quantised.changed_percent, quantised.max_changed
    if quantised.not_finite:
        console.print(_not_finite(quantised, found.texts), highlight=False)
    if percent is None or allowed is None:
        console.print(
            f"[bold yellow]No labels[/] that {name} could change: only numbers that are not finite are status 1. "
            "Whether the differences above are small enough is for you to say.",
            highlight=False,
        )
        return
    counts = f"{quantised.changed:,} of {quantised.decisions:,} labels changed in {name}, {percent:.3g}%"
    if quantised.beyond_share:
        console.print(f"[bold red]Differs:[/] {counts}; --max-changed allows {allowed:g}%.", highlight=False)
    elif not quantised.not_finite:
        console.print(f"[bold green]Fine:[/] {counts}; --max-changed allows {allowed:g}%.", highlight=False)
    console.print(
        f"With --quantize that share decides, not rounding, and not how far logits in {name} are off.", highlight=False
    )


def _not_finite(comparison: Comparison, texts: int) -> str:
    same = "the original gives the same, so it is the model itself"
    if comparison.other_than_original:
        same = f"for {comparison.other_than_original:,} of them the original gives something else"
    return (
        f"[bold red]Not numbers:[/] what {comparison.not_finite:,} of {texts:,} texts get in {comparison.dtype} is not "
        f"finite, the first in line {comparison.first_not_finite}; {same}."
    )


def _percent(share: float) -> str:
    # Rounded down, so that only all of it is 100%.
    return "100%" if share == 1 else f"{math.floor(share * 10_000) / 100:.2f}%"


def _in_one(text: Text) -> str:
    # Line breaks and tabs in a text become spaces in the table.
    return " ".join((text if isinstance(text, str) else " | ".join(text)).split())


def _between(number: int, bounds: tuple[int, int]) -> int:
    return max(bounds[0], min(bounds[1], number))


def _shortened(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
