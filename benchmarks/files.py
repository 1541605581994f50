"""How fast files of texts become files of labels, beside the model alone, and in how much memory. On Linux.

python benchmarks/files.py --out files                # all parts: MiniLM on SST-2's sentences
python benchmarks/files.py --part speed --rows 20000  # files beside the model alone, transformers' pipeline, lists
python benchmarks/files.py --quick                    # all parts in miniature: such figures mean nothing

The parts are speed; duplicates (each text stands twice); documents (long ones, of which the model reads the beginning);
memory (of the command, in a process of its own, with the model of --demo); plan (what `fastcls plan` predicts).
All ways of a part take turns, round by round, in an order that changes, so that noise hits all alike; ratios are those
within a round. A way's answers are compared before it is timed. Loading the model is in no figure. The sentences lie in
the folder that FASTCLS_SST2 names and are repeated with their words in other orders, so that no text stands twice where
that is not meant; without them texts are of made-up words. The results hold no text.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

from fastcls.loading import parse_device
from fastcls_benchmarks import from_files, provenance
from fastcls_benchmarks.from_files import FILES, FORMS, MODEL, MODEL_AGAIN, ONCE, Bench, Memory, Sample, Sizes, say

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PARTS = {
    "speed": from_files.speed,
    "duplicates": from_files.duplicates,
    "documents": from_files.documents,
    "memory": from_files.memory,
    "plan": from_files.prediction,
}
# What a part's ways are compared with: of ratios above 1 the way is faster.
BASES = {"speed": MODEL, "duplicates": ONCE, "plan": FILES}
# Okabe and Ito's, as in the other pictures.
_COLOURS = ("#999999", "#0072b2", "#d55e00", "#009e73", "#e69f00", "#cc79a7")


def base_of(part: str, way: str) -> str:
    """The way whose texts a second are 1."""
    return f"{way.partition(',')[0]}, whole" if part == "documents" else BASES[part]


def quartiles(numbers: list[float]) -> list[float]:
    """Lower quartile, median, upper quartile."""
    return statistics.quantiles(numbers, n=4, method="inclusive") if len(numbers) > 1 else numbers * 3


def summary(samples: list[Sample]) -> list[dict[str, Any]]:
    """Of each way of each part its texts a second, and their ratio to the base's within a round, both in quartiles."""
    rates = {(each.part, each.precision, each.way, each.round): each.rows / each.seconds for each in samples}
    ways = dict.fromkeys(name[:3] for name in rates)
    rows = []
    for part, precision, way in ways:
        rounds = [index for *name, index in rates if name == [part, precision, way]]
        base = base_of(part, way)
        own = [rates[part, precision, way, index] for index in rounds]
        beside = [rates.get((part, precision, base, index)) for index in rounds]
        ratios = [one / other for one, other in zip(own, beside, strict=True) if other is not None]
        row = {"part": part, "precision": precision, "way": way, "rounds": len(own), "texts_per_second": quartiles(own)}
        rows.append({**row, "base": base, "ratio": quartiles(ratios) if ratios else None})
    return rows


def show(samples: list[Sample], memory: list[Memory]) -> None:
    """Prints the tables."""
    part = ""
    for row in summary(samples):
        if row["part"] != part:
            part = row["part"]
            print(f"\n{part:38} {'texts/s':>10} {'quartiles':>17}   ratio within a round, quartiles")
        low, middle, high = row["texts_per_second"]
        line = f"{row['precision']:8} {row['way']:29} {middle:10,.0f} {f'{low:,.0f}-{high:,.0f}':>17}"
        if row["ratio"] and row["way"] != row["base"]:
            low, middle, high = row["ratio"]
            noise = " (A/A)" if row["way"] == MODEL_AGAIN else ""
            line += f"   {middle:.3f} ({low:.3f}-{high:.3f}) x {row['base']}{noise}"
        print(line)
    if memory:
        print(f"\n{'memory':8} {'rows':>10} {'seconds':>8} {'peak MiB':>9}")
    for each in memory:
        print(f"{each.form:8} {each.rows:10,} {each.seconds:8.1f} {each.peak:9,.0f}")


def picture(memory: list[Memory]) -> Figure:
    """Resident memory over the share of each run's time."""
    # The other parts run without it.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 3.9), layout="constrained", facecolor="white")
    axes: Any = figure.subplots()
    axes.set_title("Memory of fastcls classify", fontsize=11, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    for index, each in enumerate(memory):
        x = [100 * at / each.seconds for at, _ in each.samples]
        label = f"{each.rows:,} rows of {each.form}"
        axes.plot(x, [mib for _, mib in each.samples], color=_COLOURS[index % len(_COLOURS)], label=label)
    axes.set(xlim=(0, 100), ylim=(0, None), xlabel="% of the run's time, loading included", ylabel="resident MiB")
    axes.grid(axis="y", color="#dddddd", linewidth=0.7)
    axes.legend(fontsize=9, frameon=False)
    return figure


def report(bench: Bench, parts: list[str], is_complete: bool) -> dict[str, Any]:
    """Everything that was measured, for files.json."""
    return {
        "kind": "files",
        "provenance": provenance.collect(bench.device),
        "parts": parts,
        "complete": is_complete,
        "sizes": vars(bench.sizes),
        "texts": bench.about,
        "summary": summary(bench.samples),
        "samples": [each._asdict() for each in bench.samples],
        "memory": [each._asdict() for each in bench.memory],
    }


def keep(bench: Bench, parts: list[str], is_complete: bool, out: Path | None) -> None:
    """Prints what was measured, and writes it."""
    print(f"{bench.about}.")
    show(bench.samples, bench.memory)
    if out is None:
        return
    out.mkdir(parents=True, exist_ok=True)
    results = json.dumps(report(bench, parts, is_complete), indent=1, allow_nan=False)
    (out / "files.json").write_text(results + "\n", encoding="utf-8")
    if bench.memory:
        picture(bench.memory).savefig(out / "files.png", dpi=200)


def some_of(option: str, given: str, known: Collection[str]) -> list[str]:
    """What an option names, with commas between.

    Raises:
        typer.BadParameter: something else than what is known.
    """
    names = given.split(",")
    if unknown := [name for name in names if name not in known]:
        raise typer.BadParameter(f"{option} must be some of {', '.join(known)}, got {unknown[0]}")
    return names


def main(
    part: Annotated[str, typer.Option(help="Which parts, with commas between.")] = ",".join(PARTS),
    rows: Annotated[int, typer.Option(min=1, help="Of speed.")] = 100_000,
    block: Annotated[int, typer.Option(min=1, help="Rows of a round of speed and plan.")] = 10_000,
    rounds: Annotated[int, typer.Option(min=1, help="Of duplicates, documents and plan.")] = 5,
    documents: Annotated[int, typer.Option(min=1, help="How many documents of 20,000 words.")] = 200,
    memory_rows: Annotated[str, typer.Option(help="Of memory's files.")] = "10000,100000,1000000",
    memory_forms: Annotated[str, typer.Option(help="Of memory's files: parquet, txt or both.")] = "parquet,txt",
    threads: Annotated[int | None, typer.Option(min=1, help="Of the CPU; by default torch's own number.")] = None,
    device: Annotated[str, typer.Option(help="cpu, in float32 and int8, or cuda, in float32 and float16.")] = "cpu",
    out: Annotated[Path | None, typer.Option(help="A folder for files.json and files.png.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="All in miniature, to see that it runs.")] = False,
) -> None:
    """Times files of texts to files of labels, beside the model alone."""
    parts, forms = some_of("--part", part, PARTS), some_of("--memory-forms", memory_forms, FORMS)
    try:
        memory_sizes = tuple(int(each) for each in memory_rows.split(","))
    except ValueError:
        raise typer.BadParameter(f"--memory-rows must be numbers with commas between, got {memory_rows}") from None
    if threads is not None:
        torch.set_num_threads(threads)
    sizes = Sizes(
        rows=rows,
        block=block,
        pipeline_rows=1000,
        duplicate_rows=min(rows, 5 * block),
        documents=documents,
        words=20_000,
        memory_rows=memory_sizes,
        memory_forms=tuple(forms),
        plan_seconds=20,
        rounds=rounds,
    )
    if quick:
        sizes = Sizes(
            rows=128,
            block=64,
            pipeline_rows=16,
            duplicate_rows=64,
            documents=2,
            words=2000,
            memory_rows=(1000,),
            memory_forms=tuple(forms),
            plan_seconds=0.1,
            rounds=2,
        )
    is_complete = False
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(sizes, parse_device(device), Path(folder))
        say(f"{bench.about}; {torch.get_num_threads()} threads")
        try:
            for each in parts:
                PARTS[each](bench)
            is_complete = True
        except KeyboardInterrupt:
            say("interrupted: what was measured is kept")
            sys.exit(130)
        finally:
            keep(bench, parts, is_complete, out)


if __name__ == "__main__":
    typer.run(main)
