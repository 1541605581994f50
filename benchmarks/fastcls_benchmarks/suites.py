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
from .workloads import Workload, class_of, data

LATENCY_CALLS = 100
_DATA = data("suites.toml")


@dataclass(frozen=True)
class Plan:
    """A case to measure.

    Attributes:
        subject: a model or, of kind "kernel", a kernel, which has providers of its own.
        providers: the baseline among them.
        seconds: how long it is timed.
        threads: torch's own number if None.
        resident: inputs lie on the device before the clock starts.
        goal: the seconds to reach; published: texts a second, by somebody else.
    """

    kind: Kind
    subject: str
    workload: Workload
    dtype: torch.dtype
    providers: tuple[Provider, ...]
    seconds: float
    threads: int | None = None
    resident: bool = False
    goal: float | None = None
    published: float | None = None

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
    seconds: float = 9.0


@dataclass(frozen=True)
class Suite:
    """The plans to measure, in this order; successive plans for one model load it once.

    Attributes:
        machine_seconds: how long each measurement of the machine's rates takes.
    """

    name: str
    plans: tuple[Plan, ...]
    first_calls: tuple[FirstCallPlan, ...] = ()
    machine_seconds: float = 2.0


def default_dtype(device: torch.device) -> torch.dtype:
    """The usual dtype: float32 on a CPU, bfloat16 on a GPU."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def names(device: torch.device) -> tuple[str, ...]:
    """The suites that there are for a kind of device."""
    return tuple(_DATA["cuda" if device.type == "cuda" else "cpu"])


def _flat(names: Sequence[str]) -> Iterator[str]:
    for name in names:
        yield from _flat(_DATA["groups"][name]) if name in _DATA["groups"] else [name]


def providers_of(kind: Kind, model: str, names: Sequence[str]) -> tuple[Provider, ...]:
    """Providers and groups of them, by name, each once, the baseline before all others if it is not named."""
    baseline = PIPELINE if kind == "text" else baseline_of(class_of(model))
    known = TEXT_PROVIDERS if kind == "text" else {**PROVIDERS, "baseline": baseline}
    found = dict.fromkeys(known[name] for name in _flat(names))
    if kind == "model" and baseline is not SDPA:
        found.pop(SDPA, None)
    return tuple(found if baseline in found else (baseline, *found))


def _plans(kind: Kind, entry: dict[str, Any], dtype: torch.dtype, resident: bool) -> Iterator[Plan]:
    providers = providers_of(kind, entry["of"], entry["by"])
    dtype = getattr(torch, entry["dtype"]) if "dtype" in entry else dtype
    threads = [each for each in entry.get("threads", ()) if each <= torch.get_num_threads()] or [None]
    goal, published = entry.get("goal_ms"), entry.get("published")
    for count, name in itertools.product(threads, entry["on"]):
        yield Plan(
            *(kind, entry["of"], Workload.named(name), dtype, providers, entry["seconds"], count, resident),
            *(goal and goal / 1e3, published),
        )


def suite(name: str, device: torch.device) -> Suite:
    """One of `names` on a kind of device."""
    entry, dtype = _DATA["cuda" if device.type == "cuda" else "cpu"][name], default_dtype(device)
    resident, kernels, first = entry.get("resident", False), entry.get("kernels"), entry.get("first_calls")
    plans = [plan for each in entry.get("texts", ()) for plan in _plans("text", each, dtype, resident)]
    plans += [plan for each in entry.get("cases", ()) for plan in _plans("model", each, dtype, resident)]
    if kernels:
        pairs = itertools.product(map(Workload.named, kernels["on"]), KERNELS)
        plans += [Plan("kernel", kernel, on, dtype, (), kernels["seconds"]) for on, kernel in pairs]
    calls = [
        FirstCallPlan(first["of"], Workload.named(on), dtype, provider)
        for on in (first or {}).get("on", ())
        for provider in (SDPA, FASTCLS)
    ]
    return Suite(name, tuple(plans), tuple(calls), entry.get("machine_seconds", 2.0))


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
    first = next((plan for plan in like.plans if plan.kind == "model"), like.plans[0])
    if not (models or batch_sizes or lengths or dtypes):
        kept = [plan for plan in like.plans if plan.kind == "model"]
        plans = [replace(plan, providers=providers_of("model", plan.subject, providers)) for plan in kept]
        return Suite("custom", tuple(plans), machine_seconds=like.machine_seconds)
    grid = itertools.product(
        models or (first.subject,),
        dtypes or (first.dtype,),
        batch_sizes or (first.workload.batch_size,),
        lengths or (first.workload.lengths,),
    )
    chosen = list(providers) or [each.name for each in first.providers]
    return Suite(
        "custom",
        tuple(
            Plan("model", model, Workload(size, length), dtype, providers_of("model", model, chosen), first.seconds)
            for model, dtype, size, length in grid
        ),
    )


def with_server(given: Suite, server: Provider) -> Suite:
    """The same cases from text to scores, by the baseline, fastcls and a server; no others.

    Raises:
        ValueError: the suite has none.
    """
    plans = [plan for plan in given.plans if plan.kind == "text"]
    if not plans:
        raise ValueError(f"--server is measured from texts to scores, and --suite {given.name} has no such case")
    chosen = (PIPELINE, CLASSIFIER, server)
    return Suite("custom", tuple(replace(plan, providers=chosen) for plan in plans), (), given.machine_seconds)
