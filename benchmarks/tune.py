"""Measures tiles on this machine's GPU and writes its chip's table, kernels/fastcls_kernels/configs/<chip>.json.

python benchmarks/tune.py --dry-run
python benchmarks/tune.py
python benchmarks/tune.py --operation linear_gelu --seconds 120 --out sm_90.json

Tiles run through the public operations. First each is compiled and checked, many at a time, in separate processes; the
correct ones are then timed in turn, and one replaces the present choice only if it is faster by more than the noise.
Problems that the table cannot tell apart count together.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

import fastcls_kernels as ours
from fastcls_benchmarks import machine, provenance, runner, timing
from fastcls_benchmarks.results import AGAIN, Case
from fastcls_benchmarks.tables import NONE, duration, plain_table
from fastcls_benchmarks.tile_candidates import OPERATIONS, Arguments, Facts, Problem, Random, Tile, suits
from fastcls_benchmarks.tile_rules import BITS, Winner, table_with, written
from fastcls_benchmarks.workloads import SEED
from fastcls_kernels.runtime import tile_tables

# The chip of a plan if there is no GPU.
PLANNED_ARCH = "sm_90"
# Checking may take this share of the time, in this number of processes.
CHECKING = 0.5
PROCESSES = max(1, min((os.cpu_count() or 1) - 1, 14))
# All are timed in one round; then this many of them, beside the present choice, in as many rounds as fit into the time.
FINALISTS = 3
ONE_ROUND = timing.Effort(0.0, min_rounds=1, max_rounds=1, visit_seconds=0.005, max_calls=5)
# Large problems have few input sets, and a CUDA graph of this many turns takes longer than it costs to replay.
MAX_TURNS = 10
# For plans: to compile and check a tile; to capture and time it once; to time it in another round.
CHECK_SECONDS, FIRST_SECONDS, ROUND_SECONDS = 1.5, 0.065, 0.045


class Point(NamedTuple):
    """Facts that the table tells apart, with the problems that it cannot tell apart."""

    operation: str
    facts: Facts
    problems: list[Problem]

    def candidates(self, arch: str) -> dict[str, Tile]:
        """The tiles to try by their labels, the table's present choice first."""
        present = tile_tables._first_fitting(arch, self.operation, {**BITS, **self.facts})
        has_tma = arch.startswith("sm_") and int(arch[3:]) >= 90
        tiles = (tile for tile in OPERATIONS[self.operation].tiles if suits(tile, self.problems[0], has_tma))
        return {label(tile): tile for tile in (present, *tiles)}


def points_of(name: str) -> list[Point]:
    """An operation's points, by shape and size."""
    operation = OPERATIONS[name]
    found: dict[tuple[int, ...], Point] = {}
    for shape, size in itertools.product(operation.shapes, operation.sizes):
        problem = Problem(name, shape, *size)
        facts = operation.facts(problem)
        found.setdefault(tuple(facts.values()), Point(name, facts, [])).problems.append(problem)
    return list(found.values())


_COUNTS = {"num_warps": "w", "num_stages": "s", "SPLITS": "splits"}


def label(tile: Tile) -> str:
    """A tile's name in tables."""
    blocks = "x".join(str(value) for name, value in tile.items() if "BLOCK" in name)
    counts = [f"{short}{tile[name]}" for name, short in _COUNTS.items() if name in tile]
    flags = [name for name, value in tile.items() if value is True]
    return " ".join(filter(None, [tile.get("BY"), blocks, *counts, *flags]))


# Checking


def shortfall(found: Tensor, eager: Tensor, exact: Tensor) -> str:
    """Why a result is not exact enough: over 1.1 times eager's error in RMS or 2 times at the worst; "" if it is."""
    # If eager happens to be better than its dtype can store, the rounded exact result is the measure.
    errors = [(each.double() - exact).abs() for each in (found, eager, exact.to(eager.dtype))]
    rms, worst = zip(*((float(each.square().mean().sqrt()), float(each.max())) for each in errors), strict=True)
    for what, (error, *bounds), factor in (("RMS", rms, 1.1), ("worst", worst, 2)):
        if not error <= factor * max(bounds):
            return f"{what} error {error:.1e}, more than {factor} times {max(bounds):.1e}"
    return ""


def _source(device: str, dtype: torch.dtype, seed: int) -> Random:
    generator = torch.Generator(device).manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, device=device, dtype=dtype)


def _run(problem: Problem, tile: Tile, arguments: Arguments) -> Tensor:
    with tile_tables.use_tile(problem.operation, tile):
        return OPERATIONS[problem.operation].run(*arguments)


def _define(problem: Problem, arguments: Arguments, dtype: torch.dtype) -> Tensor:
    return OPERATIONS[problem.operation].definition(
        *(each.to(dtype) if isinstance(each, Tensor) and each.is_floating_point() else each for each in arguments)
    )


def _spilled() -> set[str]:
    """The kernels of this process that spill registers."""
    modules = [module for name, module in sys.modules.items() if name.startswith("fastcls_kernels.")]
    caches = [getattr(each, "device_caches", {}) for module in modules for each in vars(module).values()]
    kernels = [kernel for each in caches for kernels, *_ in each.values() for kernel in kernels.values()]
    # A kernel that needs more memory than the chip has was never loaded, and has no count.
    return {kernel.hash for kernel in kernels if getattr(kernel, "n_spills", 0)}


@torch.inference_mode()
def verdict(problem: Problem, tile: Tile, device: str, dtype: torch.dtype) -> str:
    """Why a tile may not be timed; "" if it may."""
    # A rule of 16 bits is float16's, too. Compiled kernels err alike in both; a library's approximations may not.
    dtypes = (dtype,) if tile.get("BY", "triton") == "triton" else (dtype, torch.float16)
    small, before = problem.to_check(), _spilled()
    try:
        for each in dict.fromkeys(dtypes):
            # Each tile has its own numbers: memory that a kernel fails to write may hold another tile's result.
            random = _source(device, each, zlib.crc32(label(tile).encode()))
            arguments = OPERATIONS[problem.operation].make(random, small)
            found = _run(small, tile, arguments)
            wrong = shortfall(found, _define(small, arguments, each), _define(small, arguments, torch.float64))
            if wrong:
                return f"{str(each).removeprefix('torch.')}: {wrong}"
    except Exception as error:  # whatever is wrong with a tile is a line of the report, not the end of the run
        # Raises if this process has lost the GPU.
        machine.wait_for(torch.device(device))
        return runner.reason_of(error)
    # tests/test_aot.py would refuse it.
    return "it spills registers" if _spilled() - before else ""


def in_processes(judge: Callable[..., str], tasks: Iterable[tuple[Any, ...]], until: float) -> Iterator[str]:
    """The results of ``judge``, several at a time; if it raises, only its own process is given up."""
    own = threading.local()
    # This process alone handles Ctrl-C.
    options = (multiprocessing.get_context("spawn"), signal.signal, (signal.SIGINT, signal.SIG_IGN))
    with contextlib.ExitStack() as pools, ThreadPoolExecutor(PROCESSES) as threads:

        def in_own_process(task: tuple[Any, ...]) -> str:
            if time.monotonic() > until:
                return "there was no time to check it"
            if not hasattr(own, "pool"):
                own.pool = pools.enter_context(ProcessPoolExecutor(1, *options))
            try:
                return str(own.pool.submit(judge, *task).result())
            except Exception as error:
                del own.pool
                return runner.reason_of(error)

        yield from threads.map(in_own_process, tasks)


# Timing


class _Timed(NamedTuple):
    """Functions of one problem, with the number of calls in each."""

    case: Case
    functions: dict[str, timing.Function]
    calls: int

    def rounds(self, names: Iterable[str], effort: timing.Effort, device: torch.device) -> None:
        self.case.seconds.clear()
        timing.time_rounds(self.case, {name: self.functions[name] for name in names}, effort, device)
        for name, rounds in self.case.seconds.items():
            self.case.seconds[name] = [[seconds / self.calls for seconds in each] for each in rounds]


def choose(cases: Sequence[Case]) -> str:
    """The fastest over all cases among those faster than the baseline by more than the noise, or the baseline."""
    best, gain = cases[0].baseline, 1.0
    for name in cases[0].seconds.keys() - {best, best + AGAIN}:
        intervals = [interval for case in cases if (interval := case.interval(name))]
        faster = math.prod(each.median for each in intervals)
        if math.prod(max(each.low, 0.0) for each in intervals) > 1 and faster > gain:
            best, gain = name, faster
    return best


class Choice(NamedTuple):
    """The result at a point: the labels of the former and the chosen tile, and the times."""

    point: Point
    former: str
    chosen: str
    tile: Tile
    cases: list[Case]


def _subject(problem: Problem, name: str) -> str:
    return f"{problem.operation}, {problem.shape[0]} x {problem.shape[1]}: {name}"


def tasks_of(points: Iterable[Point], arch: str) -> dict[str, tuple[Problem, Tile]]:
    """The tiles to compile and check: each once for each shape."""
    return {
        _subject(problem, name): (problem, tile)
        for point in points
        for name, tile in point.candidates(arch).items()
        for problem in point.problems
    }


@dataclass
class Tuner:
    """Chooses on one device until the time is over; ``skipped`` says why tiles were not timed."""

    arch: str
    device: torch.device
    until: float
    judge: Callable[[list[tuple[Any, ...]]], Iterable[str]]
    dtype: torch.dtype = torch.bfloat16
    doing: Callable[[str], None] = lambda _: None
    skipped: dict[str, str] = field(default_factory=dict)

    def choices(self, points: Sequence[Point]) -> Iterator[Choice]:
        """One choice for each point with a correct tile."""
        tasks = tasks_of(points, self.arch)
        verdicts = self.judge([(*task, str(self.device), self.dtype) for task in tasks.values()])
        for subject, reason in zip(tasks, verdicts, strict=True):
            self.doing(f"checked {subject}")
            if reason:
                self.skipped[subject] = reason
        left = sum(len(point.problems) for point in points)
        for point in points:
            now = time.monotonic()
            if now > self.until:
                return
            self.doing(f"{point.operation}, {point.problems[0].name}")
            tiles = point.candidates(self.arch)
            wrong = {name for name in tiles for each in point.problems if _subject(each, name) in self.skipped}
            right = {name: tile for name, tile in tiles.items() if name not in wrong}
            try:
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
                cases = self.measure(point, right, now + (self.until - now) * len(point.problems) / left)
            except Exception as error:  # as in verdict
                self.skipped[f"{point.operation}, all of {point.facts}"] = runner.reason_of(error)
                cases = []
            left -= len(point.problems)
            if cases:
                chosen = choose(cases)
                yield Choice(point, next(iter(tiles)), chosen, tiles[chosen], cases)

    def measure(self, point: Point, tiles: Mapping[str, Tile], until: float) -> list[Case]:
        """A case for each of a point's problems, with the same tiles in all; the first that runs is the baseline."""
        timed = [self._prepare(problem, tiles) for problem in point.problems]
        names = [name for name in tiles if all(name in each.functions for each in timed)]
        if not names:
            return []
        for each in timed:
            each.case.baseline = names[0]
            each.rounds(names, ONE_ROUND, self.device)
        ranked = sorted(names, key=lambda name: math.prod(each.case.round_seconds(name)[0] for each in timed))
        finalists = dict.fromkeys([names[0], *ranked[:FINALISTS]])
        for number, each in enumerate(timed):
            seconds = max(until - time.monotonic(), 0) / (len(timed) - number)
            each.rounds(finalists, timing.Effort(seconds, visit_seconds=0.01, max_calls=10), self.device)
        return [each.case for each in timed]

    @torch.inference_mode()
    def _prepare(self, problem: Problem, tiles: Mapping[str, Tile]) -> _Timed:
        """On input sets that no cache holds together; on a GPU in a CUDA graph, so that launches do not count."""
        make, random = OPERATIONS[problem.operation].make, _source(str(self.device), self.dtype, SEED)
        sets = [make(random, problem)]
        size = sum(each.nbytes for each in sets[0] if isinstance(each, Tensor))
        count = min(max(math.ceil(runner.INPUT_BYTES / size), 2), runner.MAX_INPUT_SETS)
        sets += [make(random, problem) for _ in range(count - 1)]
        turns = min(math.ceil(runner.GRAPH_CALLS / count), MAX_TURNS)
        on_gpu = self.device.type == "cuda"
        functions = {}
        for name, tile in tiles.items():
            runs = [functools.partial(_run, problem, tile, each) for each in sets]
            try:
                functions[name] = runner.captured(runs, turns) if on_gpu else runner.in_turn(runs)
            except Exception as error:  # as in verdict
                self.skipped[f"{problem.operation}, {problem.name}: {name}"] = runner.reason_of(error)
        dtype = str(self.dtype).removeprefix("torch.")
        case = Case("kernel", problem.operation, problem.name, dtype, baseline="")
        return _Timed(case, functions, turns * count if on_gpu else 1)


def provenance_of(device: torch.device) -> dict[str, Any]:
    """The provenance of the figures behind a rule."""
    facts = provenance.collect(device)
    kept = ("chip", "driver", "commit", "dirty", "source_digest", "date")
    return {name: facts[name] for name in kept} | {name: facts["versions"][name] for name in ("torch", "triton")}


# The report


def plan_of(points: Sequence[Point], arch: str, seconds: float) -> Table:
    """The planned steps, and the least time that they take."""
    table = plain_table(f"Plan for {arch}, tiles checked in {PROCESSES} processes")
    for heading in ("operation", "shapes", "sizes", "tiles", "timings", "seconds"):
        table.add_column(heading, justify="left" if heading in ("operation", "shapes", "sizes") else "right")
    total = 0.0
    for name, group in itertools.groupby(points, key=lambda point: point.operation):
        own, operation = list(group), OPERATIONS[name]
        candidates = [(problem, point.candidates(arch)) for point in own for problem in point.problems]
        timings = sum(len(tiles) for _, tiles in candidates)
        least = len(tasks_of(own, arch)) * CHECK_SECONDS / PROCESSES + timings * FIRST_SECONDS
        least += len(candidates) * timing.Effort(0).min_rounds * (FINALISTS + 2) * ROUND_SECONDS
        total += least
        shapes = ", ".join(f"{a} x {b}" for a, b in operation.shapes)
        sizes = ", ".join(str(size[-1]) for size in operation.sizes)
        distinct = {tile for _, tiles in candidates for tile in tiles}
        table.add_row(name, shapes, sizes, str(len(distinct)), str(timings), f"{least:.0f}")
    table.caption = f"At least {total:.0f} seconds of {seconds:.0f}. What there is no time for stays as it is."
    return table


def result_of(choices: Sequence[Choice]) -> Table:
    """A row for each problem."""
    table = plain_table("Former and chosen tiles")
    for heading in ("operation", "problem", "former", "µs", "chosen", "µs", "faster"):
        table.add_column(heading, justify="right" if heading in ("µs", "faster") else "left")
    for choice in choices:
        for case in choice.cases:
            former, chosen = (duration(case.typical_seconds(name), "µs") for name in (choice.former, choice.chosen))
            ratio = case.times_faster(choice.chosen, choice.former)
            faster = NONE if ratio is None or choice.chosen == choice.former else f"{ratio:.2f} x"
            new = choice.chosen if choice.chosen != choice.former else "the same"
            table.add_row(case.subject, case.workload, choice.former, former, new, chosen, faster)
    return table


def chip() -> tuple[str | None, str]:
    """The chip that kernels run on here, or None and the reason."""
    if not torch.cuda.is_available():
        return None, "there is no GPU that torch can use"
    backend, why = ours.explain_backend("cuda")
    return (tile_tables.arch_of(torch.device("cuda")) if backend == "triton" else None), why


def main(
    operation: Annotated[list[str] | None, typer.Option(help="Only this one; may be repeated.")] = None,
    seconds: Annotated[float, typer.Option(min=1, help="How long it may take, compiling included.")] = 420,
    out: Annotated[Path | None, typer.Option(help="Write here instead of into the chip's own table.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be done; needs no GPU.")] = False,
) -> None:
    """Measures tiles on this GPU and writes the rules by which its kernels choose them."""
    began = time.monotonic()
    console, errors = Console(), Console(stderr=True)
    unknown = [name for name in operation or () if name not in OPERATIONS]
    if unknown:
        known = f"must be one of {', '.join(OPERATIONS)}; got {', '.join(unknown)}"
        raise typer.BadParameter(known, param_hint="--operation")
    if out is not None and not out.parent.is_dir():
        raise typer.BadParameter(f"there is no folder {out.parent}", param_hint="--out")
    points = [point for name in OPERATIONS if name in (operation or OPERATIONS) for point in points_of(name)]
    arch, why = chip()
    if dry_run:
        console.print(plan_of(points, arch or PLANNED_ARCH, seconds))
        return
    if arch is None:
        errors.print(f"tune.py needs a GPU: {why}. With --dry-run it needs none.", soft_wrap=True)
        raise typer.Exit(2)
    device = torch.device("cuda")
    measured = provenance_of(device)
    out = out or tile_tables.CONFIGS / f"{arch}.json"
    choices: list[Choice] = []
    with Progress(console=errors, transient=True, disable=not errors.is_terminal) as progress:
        task = progress.add_task("", total=seconds)

        def doing(what: str) -> None:
            progress.update(task, completed=time.monotonic() - began, description=escape(what))

        judge = functools.partial(in_processes, verdict, until=began + CHECKING * seconds)
        tuner = Tuner(arch, device, began + seconds, judge, doing=doing)
        try:
            for choice in tuner.choices(points):
                choices.append(choice)
                # At once, so that whatever ends the run loses no complete operation.
                keep(complete(points, choices), arch, measured, out)
                if not errors.is_terminal:
                    passed = time.monotonic() - began
                    errors.print(f"{passed:4.0f} s {choice.point.operation} {choice.point.facts}: {choice.chosen}")
        except KeyboardInterrupt:
            errors.print("Interrupted: what was complete is kept.", style="bold red")
    console.print(result_of(choices))
    if tuner.skipped:
        console.print(f"Not timed ({len(tuner.skipped)}):")
        for subject, reason in tuner.skipped.items():
            console.print(f"  {escape(subject)}: {escape(reason)}", highlight=False)
    winners = complete(points, choices)
    for name in dict.fromkeys(point.operation for point in points):
        if name not in winners:
            done = sum(choice.point.operation == name for choice in choices)
            wanted = sum(point.operation == name for point in points)
            console.print(f"{name} stays as it is: measured at {done} of {wanted} points.")
    if winners:
        console.print(f"Written to {out}: {', '.join(winners)}.")


def keep(winners: Mapping[str, Sequence[Winner]], arch: str, measured: dict[str, Any], out: Path) -> None:
    """Writes the table if it has new rules."""
    if winners:
        out.write_text(written(table_with(arch, winners, measured)), encoding="utf-8")


def complete(points: Sequence[Point], choices: Sequence[Choice]) -> dict[str, list[Winner]]:
    """The winners of the operations that were measured at all their points."""
    winners: dict[str, list[Winner]] = {}
    for name, group in itertools.groupby(points, key=lambda point: point.operation):
        own = [(choice.point.facts, choice.tile) for choice in choices if choice.point.operation == name]
        if len(own) == len(list(group)):
            winners[name] = own
    return winners


if __name__ == "__main__":
    typer.run(main)
