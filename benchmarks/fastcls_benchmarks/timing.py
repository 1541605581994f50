"""Timing in rounds: in each all functions take turns, in an order that changes from round to round."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch

from .machine import wait_for
from .results import AGAIN, Case
from .workloads import SEED

# Computes something on the input set with the given number.
Function = Callable[[int], object]


@dataclass(frozen=True)
class Effort:
    """How much is measured for one case.

    Attributes:
        seconds: rounds go on until this time has passed since the first began.
        min_rounds, max_rounds: limits on the number of rounds, whatever the time.
        visit_seconds: in each round a function is called for about this time, if `max_calls` allows.
        min_calls, max_calls: limits on a function's calls in one round.
    """

    seconds: float
    min_rounds: int = 3
    max_rounds: int = 40
    visit_seconds: float = 0.1
    min_calls: int = 1
    max_calls: int = 20


# Before each function's turn, and after one whose threads spin on: ONNX Runtime's do for up to 100 ms, and would slow
# the next provider by a third.
_PAUSE_SECONDS = 0.02
_SETTLE_SECONDS = 0.15


# A call this long gains nothing from being called once before it is timed.
_LONG_SECONDS = 0.05
_WARM_UP_SECONDS = 0.01


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

    Args:
        case: its baseline must be among the functions, or nothing is timed.
        functions: by provider.
        effort: how long to time them.
        device: the device to wait for.
        progress: is called with the round and the provider that is timed.
        spinning: providers whose threads go on for a while after their turn.
    """
    timed = dict(functions)
    if case.baseline not in timed:
        return
    timed[case.baseline + AGAIN] = timed[case.baseline]
    one_call = _seconds_of(timed[case.baseline], 0, device)
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
            first = number * calls
            _warm_up(timed[name], first - 1, one_call, device)
            this_round[name] = [_seconds_of(timed[name], first + call, device) for call in range(calls)]
            if name in spinning:
                time.sleep(_SETTLE_SECONDS)
        for name, seconds in this_round.items():
            case.seconds.setdefault(name, []).append([float(f"{each:.5g}") for each in seconds])


def _warm_up(function: Function, index: int, one_call: float, device: torch.device) -> None:
    """Makes calls that do not count, so that no function pays for the one before it."""
    if one_call > _LONG_SECONDS:
        return
    end = time.perf_counter() + _WARM_UP_SECONDS
    while True:
        _seconds_of(function, index, device)
        if time.perf_counter() > end:
            return


def _seconds_of(function: Function, index: int, device: torch.device) -> float:
    wait_for(device)
    start = time.perf_counter()
    function(index)
    wait_for(device)
    return time.perf_counter() - start
