"""Numbers on their way to the CPU, while it does something else."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Underway(NamedTuple):
    """A model's numbers: from a GPU they have arrived once the second of both events has happened.

    Attributes:
        numbers: float32 on the CPU.
        events: before the model's first kernel and behind the copy, with their times; None on a CPU.
        seconds: how long a CPU computed.
    """

    numbers: Tensor
    events: tuple[torch.cuda.Event, torch.cuda.Event] | None
    seconds: float

    @classmethod
    def of(cls, compute: Callable[[], Tensor], device: torch.device) -> Underway:
        """Has a model compute on a device. A GPU does so while the CPU goes on."""
        start = time.perf_counter()
        if device.type != "cuda":
            return cls(compute().float().cpu(), None, time.perf_counter() - start)
        with torch.cuda.device(device):
            begun, arrived = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begun.record()
            numbers = compute().float().to("cpu", non_blocking=True)
            arrived.record()
        return cls(numbers, (begun, arrived), 0.0)

    def wait(self) -> tuple[Tensor, float]:
        """The numbers, and for how many seconds the model was busy."""
        if self.events is None:
            return self.numbers, self.seconds
        begun, arrived = self.events
        arrived.synchronize()
        return self.numbers, begun.elapsed_time(arrived) / 1000
