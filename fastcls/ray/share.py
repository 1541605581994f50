"""How many processes with a model a cluster has room for, and what each of them asks of Ray."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ..texts import read_count


class Share(NamedTuple):
    """What is asked of Ray.

    Attributes:
        processes: how many.
        cpus: what each of them reserves.
    """

    processes: int
    cpus: float


def shares(
    machines: Sequence[Mapping[str, float]],
    processes: int | None,
    threads: int,
    gpus: float = 0,
    names: tuple[str, str] = ("actors", "gpus"),
) -> Share:
    """How many processes a cluster has room for, with a CPU left for the tasks that read and write.

    Processes that reserve every CPU would wait for ever for the rows that nobody has a CPU to read. So those of one
    thread reserve less than a CPU each.

    Args:
        machines: "CPU" and "GPU" of each.
        processes: how many are asked for; None for as many as fit.
        threads: of each.
        gpus: of each.
        names: what the caller calls ``processes`` and ``gpus``, for messages.

    Raises:
        ValueError: no such number; more than fit, for which Ray would wait without a word.
    """
    read_count("threads", threads)
    gpus = float(gpus)
    if processes is not None:
        read_count(names[0], processes)
    if not (gpus >= 0 and (gpus <= 1 or gpus.is_integer())):
        raise ValueError(f"{names[1]} must be 0, a fraction of one, or a whole number, got {gpus:g}")
    cpus = [machine.get("CPU", 0.0) for machine in machines]
    room = sum(math.floor(count / threads) for count in cpus)
    if gpus:
        # A GPU is shared whole: two of 0.6 do not fit on one, and none lies on two.
        each = [math.floor(machine.get("GPU", 0.0)) for machine in machines]
        by_gpus = sum(math.floor(count / gpus) if gpus >= 1 else count * math.floor(1 / gpus + 1e-9) for count in each)
        if by_gpus < (processes or 1):
            raise ValueError(
                f"{names[0]} must fit the cluster's {sum(each)} GPUs at {gpus:g} each, got {processes or 1}: there is "
                f"room for {by_gpus}"
            )
        room = min(room, by_gpus)
    count = processes or max(room, 1)
    # What is left to reading: a CPU, and of many some more.
    reserved = math.floor(min(float(threads), (sum(cpus) - max(1.0, sum(cpus) / 16)) / count) * 100) / 100
    if reserved > 1:
        # Ray takes fractions of one CPU, and whole ones.
        reserved = float(math.floor(reserved))
    if count > room or reserved <= 0:
        raise ValueError(
            f"{names[0]} must fit the cluster's {sum(cpus):g} CPUs on {len(cpus)} "
            f"{'machine' if len(cpus) == 1 else 'machines'}, one of which reads, with {threads} "
            f"{'thread' if threads == 1 else 'threads'} each, got {count}: there is room for {room}"
        )
    return Share(count, reserved)
