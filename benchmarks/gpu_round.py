"""All checks and measurements that need a GPU, in one command: tests, the table of tiles, floors, the release suite.

python benchmarks/gpu_round.py --out round
python benchmarks/gpu_round.py --out round --step tests --step floors

A checkout need not be installed. Each step is its own process, whose output goes to a file beside its results; if one
fails or takes longer than its limit, the others still run. The last two steps measure with the table of tiles in
kernels/fastcls_kernels/configs/: put the new one there, and commit it, before.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import typer
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
# Where a checkout that is not installed keeps its packages.
PACKAGES = (".", "kernels", "benchmarks")


class Step(NamedTuple):
    """One part: its purpose, and python's arguments, in which {out} is the folder of results."""

    about: str
    command: tuple[str, ...]


STEPS = {
    "tests": Step("every kernel and the model to their bounds", ("-m", "pytest", "-m", "gpu", "--full", "-q", "tests")),
    "tune": Step("a table of tiles for this chip", ("benchmarks/tune.py", "--out", "{out}/tiles.json")),
    "floors": Step(
        "times from ids to logits, beside the floors",
        ("benchmarks/floors.py", "--measure", "--out", "{out}/floors.json"),
    ),
    "release": Step(
        "the suite that is published", ("-m", "fastcls", "bench", "--suite", "release", "--out", "{out}/release")
    ),
}


class Outcome(NamedTuple):
    """How a step ended."""

    status: int
    seconds: float
    log: Path


# The exit status of `timeout` for a program that took too long.
TOO_LONG = 124


def run(name: str, out: Path, limit: float | None = None) -> Outcome:
    """Runs one step, for at most ``limit`` seconds; its output goes to ``<out>/<name>.log``."""
    command = [sys.executable, *(part.format(out=out) for part in STEPS[name].command)]
    packages = [str(ROOT / package) for package in PACKAGES]
    path = os.pathsep.join([*packages, *filter(None, [os.environ.get("PYTHONPATH")])])
    log = out / f"{name}.log"
    start = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    with log.open("w", encoding="utf-8") as file:
        try:
            status = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, timeout=limit
            ).returncode
        except subprocess.TimeoutExpired:
            status = TOO_LONG
    return Outcome(status, time.monotonic() - start, log)


def round_of(names: Sequence[str], out: Path, limit: float | None, console: Console) -> dict[str, Outcome]:
    """Runs the steps in turn, and prints how each ended."""
    outcomes: dict[str, Outcome] = {}
    for name in names:
        console.print(f"{name}: {STEPS[name].about} ...")
        outcomes[name] = run(name, out, limit)
        ended = "done" if outcomes[name].status == 0 else f"FAILED, status {outcomes[name].status}"
        console.print(f"{name}: {ended} in {outcomes[name].seconds:.0f} s", highlight=False)
    return outcomes


def main(
    out: Annotated[Path, typer.Option(help="Folder for logs and results; made if need be.")],
    limit: Annotated[float | None, typer.Option(min=1, help="End a step after so many seconds.")] = None,
    step: Annotated[list[str] | None, typer.Option(help=f"Only this: {', '.join(STEPS)}; may be repeated.")] = None,
) -> None:
    """Tests, tunes and measures on this machine's GPU; exit status 1 if a step failed."""
    unknown = [name for name in step or () if name not in STEPS]
    if unknown:
        raise typer.BadParameter(f"must be one of {', '.join(STEPS)}; got {', '.join(unknown)}", param_hint="--step")
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    console = Console()
    outcomes = round_of([name for name in STEPS if name in (step or STEPS)], out, limit, console)
    table = Table(box=None)
    for heading in ("step", "status", "seconds", "log"):
        table.add_column(heading, justify="right" if heading == "seconds" else "left")
    for name, outcome in outcomes.items():
        status = "done" if outcome.status == 0 else f"failed ({outcome.status})"
        table.add_row(name, status, f"{outcome.seconds:.0f}", str(outcome.log))
    console.print(table)
    if any(outcome.status for outcome in outcomes.values()):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
