"""What `fastcls plan` says: a measurement, what it means for so many texts, and what that rests on."""

from __future__ import annotations

import math
import statistics
from fractions import Fraction
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from .throughput import Measured

# Of all cores: with more for others than this a machine is not alone.
_SHARE_OF_OTHERS = 0.05
# So many texts at most are handed to a process at once, as a window of `fastcls.flow` holds.
_HANDED_OUT = 4096


class Need(NamedTuple):
    """What a number of texts needs.

    Attributes:
        seconds: on one machine.
        machines: so many do it before the deadline; None without one, or if a single text takes longer than it.
        cost: of the seconds, whoever of the machines computes them; None without a price.
    """

    seconds: float
    machines: int | None
    cost: float | None


class Sample(NamedTuple):
    """Texts drawn from a file, each line as likely as another.

    Attributes:
        texts: in the file's order.
        lines: how many the file has.
        seconds: how long reading it took.
        mean_bytes: of a line in UTF-8, over the texts drawn.
    """

    texts: list[str]
    lines: int
    seconds: float
    mean_bytes: float


class Found(NamedTuple):
    """A measurement, and what was asked of it."""

    model: str
    machine: dict[str, Any]
    sample: Sample | None
    like: str | None
    mean_tokens: float | None
    measured: Measured
    tokens_per_second: tuple[float, float, float]
    loading: float
    texts: int
    hours: float | None
    price: float | None

    @property
    def computed_tokens(self) -> float:
        """Tokens of a text after cutting, on average."""
        return statistics.fmean(self.measured.lengths.tokens)

    @property
    def texts_per_second(self) -> tuple[float, float, float]:
        """Lower quartile, median, upper quartile."""
        low, middle, high = (rate / self.computed_tokens for rate in self.tokens_per_second)
        return low, middle, high

    @property
    def tokenizing(self) -> float:
        """The tokenizer's own time as a share of all; on a GPU it runs beside the model."""
        return self.measured.lengths.seconds * self.texts_per_second[1]


def needs(texts: int, texts_per_second: float, hours: float | None = None, price: float | None = None) -> Need:
    """The arithmetic, exact but for the last division into floats.

    Args:
        texts: how many.
        texts_per_second: of one machine.
        hours: the deadline.
        price: of a machine for an hour.
    """
    rate = Fraction(texts_per_second)
    seconds = texts / rate
    machines = cost = None
    if hours is not None:
        # As it was written: 0.3 is not the float next to it. A text is not split between machines.
        of_each = math.floor(rate * 3600 * Fraction(str(hours)))
        machines = -(-texts // of_each) if of_each else None
    if price is not None:
        cost = float(seconds / 3600 * Fraction(str(price)))
    return Need(float(seconds), machines, cost)


def to_json(found: Found) -> dict[str, Any]:
    """The report for machines: seconds, bytes, shares of 1; null for what was not asked or is not known."""
    low, middle, high = found.texts_per_second
    known = len(found.measured.blocks) > 1
    need = needs(found.texts, middle, found.hours, found.price)
    lengths, tokens = found.measured.lengths, found.tokens_per_second
    return {
        "model": found.model,
        "machine": found.machine,
        "measured": {
            "texts_from": found.like or "made up",
            "texts_per_second": middle,
            "texts_per_second_quartiles": [low, high] if known else None,
            "tokens_per_second": tokens[1],
            "tokens_per_second_quartiles": [tokens[0], tokens[2]] if known else None,
            "blocks": len(found.measured.blocks),
            "seconds": sum(block.seconds for block in found.measured.blocks),
            "mean_tokens": lengths.mean,
            "mean_tokens_computed": found.computed_tokens,
            "tokens_limit": lengths.limit,
            "cut_share": lengths.cut / len(lengths.tokens),
            "tokenizer_texts_per_second": 1 / lengths.seconds,
            "tokenizer_share": found.tokenizing,
            "loading_seconds": found.loading,
            "starting_seconds": found.measured.starting,
            "peak_memory_bytes": found.measured.memory,
        },
        "plan": {
            "texts": found.texts,
            "machine_seconds": need.seconds,
            "machine_hours": need.seconds / 3600,
            "machine_hours_quartiles": [found.texts / rate / 3600 for rate in (high, low)] if known else None,
            "deadline_hours": found.hours,
            "machines": need.machines,
            "price_per_hour": found.price,
            "cost": need.cost,
            "texts_per_second_handed_out": middle * (need.machines or 1),
        },
        "assumptions": assumptions(found),
    }


def assumptions(found: Found) -> list[str]:
    """What the figures rest on, a line each."""
    return [*_of_texts(found), *_of_time(found), *_of_machines(found)]


def _of_texts(found: Found) -> list[str]:
    lengths, count = found.measured.lengths, len(found.measured.lengths.tokens)
    if found.sample is None:
        lines = [
            f"Lengths are made up: a gamma distribution with mean {found.mean_tokens:g} tokens, special ones included, "
            "and coefficient of variation 0.5. --like takes those of your texts.",
            "Texts are random words of the vocabulary, a token each. Tokenizing real text can take another time.",
        ]
    else:
        error = statistics.stdev(lengths.tokens) / math.sqrt(count) / found.computed_tokens
        drawn_from = "all" if count == found.sample.lines else f"{count:,} drawn from the"
        lines = [
            f"All texts are like {drawn_from} {found.sample.lines:,} lines of {found.like}: {lengths.mean:.1f} tokens "
            f"on average, with a standard error of {error:.1%} of the computed ones."
        ]
    if lengths.limit is None:
        lines.append("The model takes texts of any length: none is cut.")
    elif lengths.cut:
        lines.append(
            f"{lengths.cut / count:.1%} of the texts are longer than {lengths.limit} tokens and are cut there: "
            f"{found.computed_tokens:.1f} tokens a text are computed, of {lengths.mean:.1f}."
        )
    else:
        lines.append(f"Texts are cut at {lengths.limit} tokens; none of those measured is longer.")
    return [*lines, "Each text is computed, even if it is a copy of another."]


def _of_time(found: Found) -> list[str]:
    blocks, whole = len(found.measured.blocks), sum(block.seconds for block in found.measured.blocks)
    if blocks == 1:
        spread = (
            f"The speed rests on one block of {whole:.1f} s, so its spread is not known: measure for more --seconds."
        )
    else:
        spread = (
            f"The speed is the median of {blocks} blocks in {whole:.1f} s and stays the same for all the time; "
            "+- is half of what lies between their quartiles."
        )
    reading = "Reading texts and writing labels is not in these figures"
    if found.sample is not None:
        reading += (
            f"; {found.like} was read at {found.sample.lines / found.sample.seconds:,.0f} lines a second, and its "
            f"texts must arrive at {found.texts_per_second[1] * found.sample.mean_bytes / 1e6:,.2f} MB a second"
        )
    loading = f"Loading the model is not in these figures: it took {found.loading:.1f} s here, and each machine does it"
    if (starting := found.measured.starting) is not None:
        loading += f" once; a process that starts and maps what was loaded took up to {starting:.1f} s"
    return [spread, f"{reading}.", f"{loading}."]


def _of_machines(found: Found) -> list[str]:
    machine = found.machine
    one = _processes(machine)
    if machine["gpu"]:
        one = f"one process on {machine['device']} (of {machine['gpus']} GPUs)"
    lines = [f"Each machine is as this one and does nothing else: {one}. Other devices and settings were not measured."]
    others, cores = machine["cores_of_others"], machine["cores"]
    if others is None:
        lines.append("Whether anything else ran here meanwhile is not known.")
    elif others > _SHARE_OF_OTHERS * cores:
        lines.append(
            f"NOT MET: anything else took {others:.1f} of {cores} cores meanwhile. Alone this machine is faster, "
            "perhaps several times as fast: measure again when it is idle."
        )
    else:
        lines.append(f"So it was while this was measured: anything else took {others:.2f} of {cores} cores.")
    if found.hours is not None:
        lines.append("The texts are split evenly, all machines start at once, and none fails.")
    lines += _of_handing_out(found)
    if found.price is not None:
        lines.append(f"Only hours of computing are paid, at {found.price:g} each, to the second.")
    return lines


def _of_handing_out(found: Found) -> list[str]:
    """Of what several processes wait for."""
    rate = found.texts_per_second[1]
    machines = needs(found.texts, rate, found.hours).machines or 1
    count = machines * found.machine["processes"]
    if count == 1:
        return []
    of_each = found.texts / count
    share = min(1.0, _HANDED_OUT / of_each)
    more = f"up to {share:.2%}" if share >= 1e-4 else "less than 0.01%"
    return [
        f"Texts are handed out in blocks of up to {_HANDED_OUT:,}, {of_each:,.0f} in all to each process. The "
        f"processes do not end together: the last blocks may take {more} of the time more.",
        "The network and the one driver that hands texts out are not in these figures: it must give "
        f"{_digits(rate * machines)} texts a second to {_counted(machines, 'machine')}. That was not measured.",
    ]


def _processes(machine: dict[str, Any]) -> str:
    count, threads = machine["processes"], _counted(machine["threads"], "thread")
    return f"one process with {threads}" if count == 1 else f"{count:,} processes with {threads} each"


def show(found: Found, console: Console) -> None:
    """Prints the report."""
    machine, lengths = found.machine, found.measured.lengths
    low, middle, high = found.texts_per_second
    half = (high - low) / 2 / middle
    spread = f" (+- {half:.1%})" if len(found.measured.blocks) > 1 else ""
    products = f", {machine['quantize']} products" if machine["quantize"] else ""
    where = f"{machine['gpu']}, beside " if machine["gpu"] else ""
    console.print(
        f"[bold]{escape(found.model)}[/] on {escape(where + machine['cpu'])}, {_counted(machine['cores'], 'core')}, "
        f"{_processes(machine)}; {machine['device']}, {machine['dtype']}{products}\n",
        highlight=False,
        soft_wrap=True,
    )
    tokenizing = f"{found.tokenizing:.0%} of the time"
    if machine["gpu"]:
        tokenizing = f"{1 / lengths.seconds:,.0f} texts a second, beside the GPU"
    memory = ", ".join(
        f"{size / 2**30:.2f} GiB{' of the GPU' if kind == 'device' else ''}"
        for kind, size in found.measured.memory.items()
    )
    _table(
        console,
        "Measured here",
        ("texts a second", f"{_digits(middle)}{spread}"),
        ("tokens a second", _digits(found.tokens_per_second[1])),
        ("tokens a text", f"{lengths.mean:.1f}" + (f", cut to {found.computed_tokens:.1f}" if lengths.cut else "")),
        ("tokenizing", tokenizing),
        (f"memory{' of a process' if machine['processes'] > 1 else ''}, at most", memory or "not known"),
    )
    need = needs(found.texts, middle, found.hours, found.price)
    rows = [("one machine", _duration(need.seconds) + _range(found))]
    if found.hours is not None:
        rows.append(
            (
                f"in {found.hours:g} h",
                "not possible: one text takes longer" if need.machines is None else _counted(need.machines, "machine"),
            )
        )
    if need.cost is not None:
        rows.append(("cost", f"{need.cost:,.2f}"))
    _table(console, _counted(found.texts, "text"), *rows)
    console.print("[bold]What this rests on[/]")
    for line in assumptions(found):
        console.print(f"- {escape(line)}", highlight=False, soft_wrap=True)


def _table(console: Console, title: str, *rows: tuple[str, str]) -> None:
    table = Table(
        title=title, title_justify="left", title_style="bold", show_header=False, box=None, padding=(0, 2, 0, 0)
    )
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print()


def _range(found: Found) -> str:
    low, _, high = found.texts_per_second
    if len(found.measured.blocks) == 1:
        return ""
    return f", {_duration(found.texts / high)} to {_duration(found.texts / low)} by the quartiles"


def _counted(count: int, name: str) -> str:
    return f"{count:,} {name}" if count == 1 else f"{count:,} {name}s"


def _digits(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.3g} s"
    if seconds < 7200:
        return f"{seconds / 60:.1f} min"
    hours = seconds / 3600
    return f"{hours:,.1f} h" if hours < 100 else f"{hours:,.0f} h ({hours / 24:,.0f} days)"
