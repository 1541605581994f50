"""Measures tiles on this machine's GPU and writes its chip's table, kernels/fastcls_kernels/configs/<chip>.json.

python benchmarks/tune.py --dry-run
python benchmarks/tune.py --operation linear_gelu --seconds 120 --out sm_90.json

Tiles run through the public operations. First each is compiled and checked, many at a time, in separate processes; the
correct ones are then timed in turn, and one replaces the present choice only if it is faster by more than the noise.
Problems that the table cannot tell apart count together.
"""

from __future__ import annotations

import contextlib
import functools
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
from rich.table import Table
from torch import Tensor

from fastcls_benchmarks import provenance, timing
from fastcls_benchmarks.kernels import OPERATIONS, Arguments, random_numbers
from fastcls_benchmarks.provider import reason_of
from fastcls_benchmarks.results import AGAIN, Case
from fastcls_benchmarks.tables import NONE, duration, plain_table
from fastcls_benchmarks.tiles import CANDIDATES, Point, Problem, Tile, Winner, label, points_of, table_with, written
from fastcls_kernels import explain_backend
from fastcls_kernels.runtime import tile_tables

PLANNED_ARCH = "sm_90"  # if there is no GPU
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


def shortfall(found: Tensor, eager: Tensor, exact: Tensor) -> str:
    """Why a result is not exact enough: over 1.1 times eager's error in RMS or 2 times at the worst; "" if it is."""
    # If eager happens to be better than its dtype can store, the rounded exact result is the measure.
    errors = [(each.double() - exact).abs() for each in (found, eager, exact.to(eager.dtype))]
    rms, worst = [float(each.square().mean().sqrt()) for each in errors], [float(each.max()) for each in errors]
    for what, (error, *bounds), factor in (("RMS", rms, 1.1), ("worst", worst, 2)):
        if not error <= factor * max(bounds):
            return f"{what} error {error:.1e}, more than {factor} times {max(bounds):.1e}"
    return ""


def _run(problem: Problem, tile: Tile, arguments: Arguments) -> Tensor:
    with tile_tables.use_tile(problem.operation, tile):
        return OPERATIONS[problem.operation].run(*arguments)


def _spilled() -> set[str]:
    """The kernels of this process that spill registers."""
    modules = [module for name, module in sys.modules.items() if name.startswith("fastcls_kernels.")]
    caches = [getattr(each, "device_caches", {}) for module in modules for each in vars(module).values()]
    kernels = [kernel for each in caches for compiled, *_ in each.values() for kernel in compiled.values()]
    # A kernel that needs more memory than the chip has was never loaded, and has no count.
    return {kernel.hash for kernel in kernels if getattr(kernel, "n_spills", 0)}


@torch.inference_mode()
def verdict(problem: Problem, tile: Tile, device: str, dtype: torch.dtype) -> str:
    """Why a tile may not be timed; "" if it may."""
    # A rule of 16 bits is float16's, too. Compiled kernels err alike in both; a library's approximations may not.
    dtypes = (dtype,) if tile.get("BY", "triton") == "triton" else (dtype, torch.float16)
    operation, small, before = OPERATIONS[problem.operation], problem.to_check(), _spilled()
    try:
        for each in dict.fromkeys(dtypes):
            # Each tile has its own numbers: memory that a kernel fails to write may hold another tile's result.
            random = random_numbers(device, each, zlib.crc32(label(tile).encode()))
            arguments = operation.make(random, small.shape, small.layout(device))
            found = _run(small, tile, arguments)
            wrong = shortfall(found, operation.define(arguments, each), operation.define(arguments, torch.float64))
            if wrong:
                return f"{str(each).removeprefix('torch.')}: {wrong}"
    except Exception as error:  # whatever is wrong with a tile is a line of the report, not the end of the run
        # Raises if this process has lost the GPU.
        timing.wait_for(torch.device(device))
        return reason_of(error)
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
                return reason_of(error)

        yield from threads.map(in_own_process, tasks)


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
    """The tiles to compile and check, each once for each shape, by what to call them."""
    tried = [(problem, point[0].candidates(arch)) for point in points for problem in point]
    return {_subject(problem, name): (problem, tile) for problem, tiles in tried for name, tile in tiles.items()}


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
        left = sum(map(len, points))
        for point in points:
            now, problem = time.monotonic(), point[0]
            if now > self.until:
                return
            self.doing(f"{problem.operation}, {problem.name}")
            tiles = problem.candidates(self.arch)
            wrong = {name for name in tiles for each in point if _subject(each, name) in self.skipped}
            right = {name: tiles[name] for name in tiles if name not in wrong}
            cases = []
            try:
                cases = self.measure(point, right, now + (self.until - now) * len(point) / left)
            except Exception as error:  # as in verdict
                self.skipped[f"{problem.operation}, all of {problem.facts}"] = reason_of(error)
            left -= len(point)
            if cases:
                chosen = choose(cases)
                yield Choice(point, next(iter(tiles)), chosen, tiles[chosen], cases)

    def measure(self, point: Point, tiles: Mapping[str, Tile], until: float) -> list[Case]:
        """A case for each of a point's problems, with the same tiles in all; the first that runs is the baseline."""
        torch.cuda.empty_cache()
        prepared = [self._prepare(problem, tiles) for problem in point]
        names = [name for name in tiles if all(name in functions for functions, _ in prepared)]
        if not names:
            return []
        dtype = str(self.dtype).removeprefix("torch.")
        cases = [Case("kernel", problem.operation, problem.name, dtype, names[0]) for problem in point]

        for case, (functions, _) in zip(cases, prepared, strict=True):
            timing.time_rounds(case, {name: functions[name] for name in names}, ONE_ROUND, self.device)
        ranked = sorted(names, key=lambda name: math.prod(case.round_seconds(name)[0] for case in cases))
        finalists = dict.fromkeys([names[0], *ranked[:FINALISTS]])
        for left, case, (functions, calls) in zip(range(len(cases), 0, -1), cases, prepared, strict=True):
            case.seconds.clear()
            effort = timing.Effort(max(until - time.monotonic(), 0) / left, visit_seconds=0.01, max_calls=10)
            timing.time_rounds(case, {name: functions[name] for name in finalists}, effort, self.device)
            for name, rounds in case.seconds.items():
                case.seconds[name] = [[each / calls for each in one_round] for one_round in rounds]
        return cases

    @torch.inference_mode()
    def _prepare(self, problem: Problem, tiles: Mapping[str, Tile]) -> tuple[dict[str, timing.Function], int]:
        """Functions by labels, and the calls in each: on a GPU a CUDA graph, so that launches do not count."""
        make, shape, layout = OPERATIONS[problem.operation].make, problem.shape, problem.layout(self.device)
        random = random_numbers(self.device, self.dtype)
        # Input sets that no cache holds together.
        sets = [make(random, shape, layout)]
        size = sum(each.nbytes for each in sets[0] if isinstance(each, Tensor))
        count = min(max(math.ceil(timing.INPUT_BYTES / size), 2), timing.MAX_INPUT_SETS)
        sets += [make(random, shape, layout) for _ in range(count - 1)]
        turns = min(math.ceil(timing.GRAPH_CALLS / count), MAX_TURNS)
        on_gpu = self.device.type == "cuda"
        functions = {}
        for name, tile in tiles.items():
            runs = [functools.partial(_run, problem, tile, each) for each in sets]
            try:
                functions[name] = timing.captured(runs, turns) if on_gpu else timing.in_turn(runs)
            except Exception as error:  # as in verdict
                self.skipped[f"{problem.operation}, {problem.name}: {name}"] = reason_of(error)
        return functions, turns * count if on_gpu else 1


def plan_of(names: Iterable[str], arch: str, seconds: float) -> Table:
    """The planned steps, and the least time that they take."""
    table = plain_table(f"Plan for {arch}, tiles checked in {PROCESSES} processes")
    for heading in ("operation", "shapes", "sizes", "tiles", "timings", "seconds"):
        table.add_column(heading, justify="left" if heading in ("operation", "shapes", "sizes") else "right")
    total = 0.0
    for name in names:
        points = points_of(name)
        candidates = [problem.candidates(arch) for point in points for problem in point]
        timings = sum(map(len, candidates))
        rounds = len(candidates) * timing.Effort(0).min_rounds * (FINALISTS + 2)
        checks = len(tasks_of(points, arch)) / PROCESSES
        least = checks * CHECK_SECONDS + timings * FIRST_SECONDS + rounds * ROUND_SECONDS
        total += least
        shapes, sizes = (", ".join(f"{a} x {b}" for a, b in CANDIDATES[name][each]) for each in ("shapes", "sizes"))
        table.add_row(name, shapes, sizes, str(len(set().union(*candidates))), str(timings), f"{least:.0f}")
    table.caption = f"At least {total:.0f} seconds of {seconds:.0f}. What there is no time for stays as it is."
    return table


def result_of(choices: Sequence[Choice]) -> Table:
    """A row for each problem."""
    table = plain_table("Former and chosen tiles")
    for heading in ("operation", "problem", "former", "µs", "chosen", "µs", "faster"):
        table.add_column(heading, justify="right" if heading in ("µs", "faster") else "left")
    for _, former, chosen, _, cases in choices:
        for case in cases:
            before, after = (duration(case.typical_seconds(name), "µs") for name in (former, chosen))
            ratio = None if chosen == former else case.times_faster(chosen, former)
            new, faster = "the same" if chosen == former else chosen, NONE if ratio is None else f"{ratio:.2f} x"
            table.add_row(case.subject, case.workload, former, before, new, after, faster)
    return table


def main(
    operation: Annotated[list[str] | None, typer.Option(help="Only this one; may be repeated.")] = None,
    seconds: Annotated[float, typer.Option(min=1, help="How long it may take, compiling included.")] = 420,
    out: Annotated[Path | None, typer.Option(help="Write here instead of into the chip's own table.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be done; needs no GPU.")] = False,
) -> None:
    """Measures tiles on this GPU and writes the rules by which its kernels choose them."""
    began = time.monotonic()
    console, errors = Console(), Console(stderr=True)
    if unknown := [name for name in operation or () if name not in CANDIDATES]:
        known = f"must be one of {', '.join(CANDIDATES)}; got {', '.join(unknown)}"
        raise typer.BadParameter(known, param_hint="--operation")
    if out is not None and not out.parent.is_dir():
        raise typer.BadParameter(f"there is no folder {out.parent}", param_hint="--out")
    names = [name for name in CANDIDATES if name in (operation or CANDIDATES)]
    here = torch.cuda.is_available()
    backend, why = explain_backend("cuda") if here else ("torch", "there is no GPU that torch can use")
    arch = tile_tables.arch_of(torch.device("cuda")) if backend == "triton" else PLANNED_ARCH
    if dry_run:
        console.print(plan_of(names, arch, seconds))
        return
    if backend != "triton":
        errors.print(f"tune.py needs a GPU: {why}. With --dry-run it needs none.", soft_wrap=True)
        raise typer.Exit(2)
    out = out or tile_tables.CONFIGS / f"{arch}.json"
    facts = provenance.collect(torch.device("cuda"))
    measured = {name: facts[name] for name in ("chip", "driver", "commit", "dirty", "source_digest", "date")}
    measured |= {name: facts["versions"][name] for name in ("torch", "triton")}
    judge = functools.partial(in_processes, verdict, until=began + CHECKING * seconds)
    tuner = Tuner(arch, torch.device("cuda"), began + seconds, judge)
    points = {name: points_of(name) for name in names}
    choices: dict[str, list[Choice]] = {name: [] for name in names}
    winners: dict[str, list[Winner]] = {}
    with errors.status("") as status:
        tuner.doing = lambda what: status.update(f"{time.monotonic() - began:4.0f} s {escape(what)}")
        try:
            for choice in tuner.choices([point for own in points.values() for point in own]):
                name, facts = choice.point[0].operation, choice.point[0].facts
                choices[name].append(choice)
                if not errors.is_terminal:
                    errors.print(f"{time.monotonic() - began:4.0f} s {name} {facts}: {choice.chosen}")
                if len(choices[name]) == len(points[name]):
                    # At once, so that whatever ends the run loses no complete operation.
                    winners[name] = [(each.point[0].facts, each.tile) for each in choices[name]]
                    out.write_text(written(table_with(arch, winners, measured)), encoding="utf-8")
        except KeyboardInterrupt:
            errors.print("Interrupted: what was complete is kept.", style="bold red")
    console.print(result_of([choice for own in choices.values() for choice in own]))
    if tuner.skipped:
        console.print(f"Not timed ({len(tuner.skipped)}):")
    for subject, reason in tuner.skipped.items():
        console.print(f"  {escape(subject)}: {escape(reason)}", highlight=False)
    for name in names:
        stays = f"{name} stays as it is: measured at {len(choices[name])} of {len(points[name])} points."
        console.print(f"{name} is written to {out}." if name in winners else stays)


if __name__ == "__main__":
    typer.run(main)
