"""Timing in rounds: in each all functions take turns, in an order that changes from round to round."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch

from .provider import reason_of
from .results import AGAIN, Case
from .workloads import SEED

# Computes something on the input set with the given number.
Function = Callable[[int], object]
# A kernel's sets of inputs hold more than any cache together, so that each call finds its own in main memory.
INPUT_BYTES = 256 * 2**20
MAX_INPUT_SETS = 64
# A captured CUDA graph makes at least this many calls of a kernel, so that replaying it costs little beside them.
GRAPH_CALLS = 100
# Before each function's turn, and after one whose threads spin on: ONNX Runtime's do for up to 100 ms, and would slow
# the next provider by a third.
_PAUSE_SECONDS, _SETTLE_SECONDS = 0.02, 0.15
# A call as long as the first gains nothing from being called once before it is timed.
_LONG_SECONDS, _WARM_UP_SECONDS = 0.05, 0.01


@dataclass(frozen=True)
class Effort:
    """How much is measured for one case."""

    seconds: float  # rounds go on until this time has passed since the first began
    min_rounds: int = 3
    max_rounds: int = 40
    visit_seconds: float = 0.1  # in each round a function is called for about this time, within the next limits
    min_calls: int = 1
    max_calls: int = 20


def wait_for(device: torch.device) -> None:
    """Waits until the device has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(function: Callable[[], object], device: torch.device) -> float:
    """The time of one call."""
    wait_for(device)
    start = time.perf_counter()
    function()
    wait_for(device)
    return time.perf_counter() - start


@torch.inference_mode()
def time_rounds(
    case: Case,
    functions: Mapping[str, Function],
    effort: Effort,
    device: torch.device,
    progress: Callable[[str], None] = lambda _: None,
    spinning: Collection[str] = (),
) -> None:
    """Fills ``case.seconds``, one complete round at a time; the baseline is timed twice, under two names.

    Without it nothing is timed. Another one that breaks is timed no more: its row of the case says why. The threads of
    ``spinning`` providers go on for a while after their turn.
    """
    if case.baseline not in functions:
        return
    timed = {**functions, case.baseline + AGAIN: functions[case.baseline]}

    def call(name: str, index: int) -> float:
        return seconds_of(lambda: timed[name](index), device)

    one_call = call(case.baseline, 0)
    calls = min(max(round(effort.visit_seconds / one_call), effort.min_calls), effort.max_calls)
    order = random.Random(SEED)
    began = time.perf_counter()
    for number in range(effort.max_rounds):
        passed = time.perf_counter() - began
        # The next round begins only if at least half of it will fit.
        if number >= effort.min_rounds and passed * (number + 0.5) / number > effort.seconds:
            break
        this_round = {}
        for name in order.sample(list(timed), len(timed)):
            progress(f"{case.name}: round {number + 1}, {name}")
            time.sleep(_PAUSE_SECONDS)
            first, end = number * calls, time.perf_counter() + _WARM_UP_SECONDS
            try:
                # Calls that do not count, so that no function pays for the one before it.
                while one_call <= _LONG_SECONDS:
                    call(name, first - 1)
                    if time.perf_counter() > end:
                        break
                this_round[name] = [call(name, first + each) for each in range(calls)]
            except Exception as error:
                row = case.row(name)
                if row is None or name == case.baseline:
                    raise
                row.status, row.detail = "failed", reason_of(error)
                del timed[name]
                case.seconds.pop(name, None)
            if name in spinning:
                time.sleep(_SETTLE_SECONDS)
        for name, seconds in this_round.items():
            case.seconds.setdefault(name, []).append([float(f"{each:.5g}") for each in seconds])


def in_turn(functions: Sequence[Callable[[], object]]) -> Function:
    return lambda index: functions[index % len(functions)]()


def captured(functions: Sequence[Callable[[], object]], repeats: int) -> Function:
    """All functions, several times, as one CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for function in functions:
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for function in [*functions] * repeats:
            function()

    def replay(_: int, kept: object = functions) -> None:
        # The CUDA graph reads inputs that only the functions keep alive.
        del kept
        graph.replay()

    return replay
