"""How many processes with a model a cluster has room for, and what each of them asks of Ray."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from ..texts import read_count


class Share(NamedTuple):
    """What is asked of Ray.

    Attributes:
        actors: how many processes.
        cpus: what each of them reserves.
    """

    actors: int
    cpus: float


def shares(resources: Mapping[str, float], actors: int | None, threads: int, gpus: float = 0) -> Share:
    """How many actors a cluster has room for, with a CPU left for the tasks that read and write.

    Actors that reserve every CPU would wait for ever for the rows that nobody has a CPU to read. So actors of one
    thread reserve less than a CPU each.

    Args:
        resources: of the cluster, "CPU" and "GPU".
        actors: how many are asked for; None for as many as fit.
        threads: of each.
        gpus: of each.

    Raises:
        ValueError: no such number; more than fit.
    """
    read_count("threads", threads)
    gpus = float(gpus)
    if actors is not None:
        read_count("actors", actors)
    if not (gpus >= 0 and (gpus <= 1 or gpus.is_integer())):
        raise ValueError(f"gpus must be 0, a fraction of one, or a whole number, got {gpus:g}")
    cpus, found_gpus = resources.get("CPU", 0.0), resources.get("GPU", 0.0)
    by_gpus = math.floor(found_gpus / gpus + 1e-9) if gpus else None
    by_cpus = math.floor(cpus / threads)
    count = actors if actors is not None else max(1, by_cpus if by_gpus is None else min(by_gpus, by_cpus))
    if by_gpus is not None and count > by_gpus:
        raise ValueError(
            f"actors must fit the cluster's {found_gpus:g} GPUs at {gpus:g} each, got {count}: Ray would wait for more"
        )
    left = cpus - max(1.0, cpus / 16)
    # Ray takes fractions of one CPU, and whole ones.
    each = math.floor(min(float(threads), left / count) * 100) / 100
    each = float(math.floor(each)) if each > 1 else each
    if count * threads > max(cpus, 1) or each <= 0:
        raise ValueError(
            f"actors must fit the cluster's {cpus:g} CPUs, of which one reads, with {threads} "
            f"{'thread' if threads == 1 else 'threads'} each, got {count}"
        )
    return Share(count, each)
