"""The cases of each suite (suites.toml), with their providers and times."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from .kernels import KERNELS
from .provider import Provider
from .providers import FASTCLS, PROVIDERS, SDPA, baseline_of
from .results import Kind
from .texts import CLASSIFIER, PIPELINE, TEXT_PROVIDERS
from .timing import Effort
from .training import TRAINING_PROVIDERS
from .workloads import Workload, class_of, data

LATENCY_CALLS = 100
_DATA = data("suites.toml")


@dataclass(frozen=True)
class Plan:
    """A case to measure."""

    kind: Kind
    subject: str  # a model or, of kind "kernel", a kernel, which has providers of its own
    workload: Workload
    dtype: torch.dtype
    providers: tuple[Provider, ...]  # the baseline among them
    seconds: float  # how long it is timed
    threads: int | None = None  # torch's own number if None
    resident: bool = False  # inputs lie on the device before the clock starts
    goal: float | None = None  # the seconds to reach
    published: float | None = None  # texts a second, by somebody else

    @property
    def effort(self) -> Effort:
        if self.kind == "kernel":
            return Effort(self.seconds, visit_seconds=0.02, min_calls=2, max_calls=50)
        if self.kind == "model" and self.workload.batch_size == 1:
            # 20 calls in each of at least 5 rounds.
            return Effort(self.seconds, min_rounds=LATENCY_CALLS // 20, min_calls=20, max_calls=20)
        return Effort(self.seconds)


@dataclass(frozen=True)
class FirstCallPlan:
    """One provider's first call, in its own process; ``seconds`` is about how long it takes."""

    model: str
    workload: Workload
    dtype: torch.dtype
    provider: Provider
    training: bool = False
    seconds: float = 9.0


@dataclass(frozen=True)
class Suite:
    """The plans to measure, in this order; successive plans for one model load it once."""

    name: str
    plans: tuple[Plan, ...]
    first_calls: tuple[FirstCallPlan, ...] = ()
    machine_seconds: float = 2.0  # how long each measurement of the machine's rates takes


def default_dtype(device: torch.device) -> torch.dtype:
    """The usual dtype: float32 on a CPU, bfloat16 on a GPU."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def _of(device: torch.device) -> dict[str, Any]:
    return _DATA["cuda" if device.type == "cuda" else "cpu"]


def names(device: torch.device) -> tuple[str, ...]:
    """The suites that there are for a kind of device."""
    return tuple(_of(device))


def _flat(names: Sequence[str]) -> Iterator[str]:
    for name in names:
        yield from _flat(_DATA["groups"][name]) if name in _DATA["groups"] else [name]


def providers_of(kind: Kind, model: str, names: Sequence[str]) -> tuple[Provider, ...]:
    """Providers and groups of them, by name, each once, the baseline before all others if it is not named.

    Of training it is always the first: the others' gradients may be off by so much more than its own.
    """
    known = {"text": TEXT_PROVIDERS, "train": TRAINING_PROVIDERS}.get(kind, PROVIDERS)
    baseline = PIPELINE if kind == "text" else known[baseline_of(class_of(model)).name]
    found = dict.fromkeys({**known, "baseline": baseline}[name] for name in _flat(names))
    if kind != "text" and baseline.name != SDPA.name:
        found.pop(known[SDPA.name], None)
    return tuple(dict.fromkeys((baseline, *found)) if kind == "train" or baseline not in found else found)


def _plans(kind: Kind, entry: dict[str, Any], dtype: torch.dtype, resident: bool) -> Iterator[Plan]:
    of, providers = entry["of"], providers_of(kind, entry["of"], entry["by"])
    dtype = getattr(torch, entry["dtype"]) if "dtype" in entry else dtype
    threads = [each for each in entry.get("threads", ()) if each <= torch.get_num_threads()] or [None]
    aims = {"goal": entry["goal_ms"] / 1e3 if "goal_ms" in entry else None, "published": entry.get("published")}
    for count, name in itertools.product(threads, entry["on"]):
        yield Plan(kind, of, Workload.named(name), dtype, providers, entry["seconds"], count, resident, **aims)


def suite(name: str, device: torch.device) -> Suite:
    """One of `names` on a kind of device."""
    entry, dtype = _of(device)[name], default_dtype(device)
    resident = entry.get("resident", False)
    kinds: tuple[tuple[Kind, str], ...] = (("text", "texts"), ("model", "cases"), ("train", "training"))
    plans = [p for kind, of in kinds for each in entry.get(of, ()) for p in _plans(kind, each, dtype, resident)]
    nothing: dict[str, Any] = {"on": ()}
    kernels, first = entry.get("kernels", nothing), entry.get("first_calls", nothing)
    for on, kernel in itertools.product(map(Workload.named, kernels["on"]), KERNELS):
        plans.append(Plan("kernel", kernel, on, dtype, (), kernels["seconds"]))
    known, training = (TRAINING_PROVIDERS, True) if "training" in entry else (PROVIDERS, False)
    pairs = itertools.product(map(Workload.named, first["on"]), (known[SDPA.name], known[FASTCLS.name]))
    calls = tuple(FirstCallPlan(first["of"], on, dtype, provider, training) for on, provider in pairs)
    return Suite(name, tuple(plans), calls, entry.get("machine_seconds", 2.0))


def custom(
    like: Suite,
    models: Sequence[str],
    batch_sizes: Sequence[int],
    lengths: Sequence[str],
    providers: Sequence[str],
    dtypes: Sequence[torch.dtype],
) -> Suite:
    """Every given model on every given workload; a suite gives what is left out, and the time for each case.

    With providers alone, they take the places of the suite's own.
    """
    own = [plan for plan in like.plans if plan.kind in ("model", "train")]
    if not own:
        raise ValueError(f"--suite {like.name} has no cases of batches, and --model, --provider and so on change these")
    if not (models or batch_sizes or lengths or dtypes):
        plans = tuple(replace(plan, providers=providers_of(plan.kind, plan.subject, providers)) for plan in own)
        return Suite("custom", plans, machine_seconds=like.machine_seconds)
    first = own[0]
    # Each once, however often it is given.
    grid = itertools.product(
        dict.fromkeys(models or [first.subject]),
        dict.fromkeys(dtypes or [first.dtype]),
        dict.fromkeys(batch_sizes or [first.workload.batch_size]),
        dict.fromkeys(lengths or [first.workload.lengths]),
    )
    chosen = list(providers) or [each.name for each in first.providers]
    kind = first.kind
    plans = tuple(
        Plan(kind, model, Workload(size, length), dtype, providers_of(kind, model, chosen), first.seconds)
        for model, dtype, size, length in grid
    )
    return Suite("custom", plans)


def with_server(given: Suite, server: Provider) -> Suite:
    """The same cases from text to scores, by the baseline, fastcls and a server; no others.

    Raises:
        ValueError: the suite has none.
    """
    chosen = (PIPELINE, CLASSIFIER, server)
    plans = tuple(replace(plan, providers=chosen) for plan in given.plans if plan.kind == "text")
    if not plans:
        raise ValueError(f"--server is measured from texts to scores, and --suite {given.name} has no such case")
    return Suite("custom", plans, (), given.machine_seconds)
