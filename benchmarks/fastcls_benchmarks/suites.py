"""The cases of each suite, with their providers and times."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from .kernels import KERNELS
from .peers import ONNXRUNTIME, ONNXRUNTIME_INT8, ONNXRUNTIME_RESTING, OPENVINO, OPENVINO_DEFAULT, OPENVINO_INT8
from .provider import Provider
from .providers import (
    ABSORBED,
    AUTOTUNED,
    BFLOAT16,
    COMPILED,
    EAGER,
    FASTCLS,
    FLASH,
    FULL,
    INT8,
    INVARIANT,
    PACKED,
    PACKED_COMPILED,
    PROVIDERS,
    SDPA,
    SELECTED,
    baseline_of,
)
from .timing import Effort
from .workloads import Workload, class_of

LATENCY_CALLS = 100


@dataclass(frozen=True)
class ModelPlan:
    """A model on a workload by some providers, the baseline among them; by torch's own number of threads if None."""

    model: str
    workload: Workload
    dtype: torch.dtype
    providers: tuple[Provider, ...]
    seconds: float
    threads: int | None = None

    @property
    def effort(self) -> Effort:
        if self.workload.batch_size == 1:
            # 20 calls in each of at least 5 rounds.
            rounds = LATENCY_CALLS // 20
            return Effort(self.seconds, min_rounds=rounds, min_calls=20, max_calls=20)
        return Effort(self.seconds)


@dataclass(frozen=True)
class KernelPlan:
    """A kernel on a workload, by every provider that can run it."""

    kernel: str
    workload: Workload
    dtype: torch.dtype
    seconds: float

    @property
    def effort(self) -> Effort:
        return Effort(self.seconds, visit_seconds=0.02, min_calls=2, max_calls=50)


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
    models: tuple[ModelPlan, ...]
    kernels: tuple[KernelPlan, ...] = ()
    first_calls: tuple[FirstCallPlan, ...] = ()
    machine_seconds: float = 2.0


_CORE = (SDPA, ONNXRUNTIME, FASTCLS)
_LADDER = (FULL, SELECTED, FASTCLS)
_GPU_LADDER = (FULL, SELECTED, ABSORBED, FASTCLS)


def default_dtype(device: torch.device) -> torch.dtype:
    """The usual dtype: float32 on a CPU, bfloat16 on a GPU."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def suite(name: str, device: torch.device) -> Suite:
    """One of `names` on a kind of device."""
    return _suites(device)[name]()


def names(device: torch.device) -> tuple[str, ...]:
    """The suites that there are for a kind of device."""
    return tuple(_suites(device))


def custom(
    name: str,
    device: torch.device,
    models: Sequence[str],
    batch_sizes: Sequence[int],
    lengths: Sequence[str],
    providers: Sequence[Provider],
    dtypes: Sequence[torch.dtype],
) -> Suite:
    """Every given model on every workload of ``--model``, ``--batch-size`` and ``--lengths``.

    The suite ``name`` gives its first model and workload for options that are left out, and the time for each case.
    """
    like = suite(name, device).models[0]
    chosen = tuple(providers) or like.providers
    grid = itertools.product(
        models or (like.model,),
        dtypes or (like.dtype,),
        batch_sizes or (like.workload.batch_size,),
        lengths or (like.workload.lengths,),
    )
    plans = tuple(
        ModelPlan(model, Workload(batch_size, length), dtype, _with_baseline(model, chosen), like.seconds)
        for model, dtype, batch_size, length in grid
    )
    return Suite("custom", plans)


def _with_baseline(model: str, providers: Sequence[Provider]) -> tuple[Provider, ...]:
    """The providers and the model's baseline; eager replaces sdpa if transformers does not have it."""
    baseline = baseline_of(class_of(model))
    rest = [each for each in providers if each is not SDPA or baseline is SDPA]
    return tuple(rest) if baseline in rest else (baseline, *rest)


def _plans(
    model: str, dtype: torch.dtype, seconds: float, providers: tuple[Provider, ...], *workloads: tuple[int, str]
) -> tuple[ModelPlan, ...]:
    return tuple(ModelPlan(model, Workload(*each), dtype, providers, seconds) for each in workloads)


def _kernel_plans(dtype: torch.dtype, seconds: float, *workloads: tuple[int, str]) -> tuple[KernelPlan, ...]:
    return tuple(KernelPlan(kernel, Workload(*each), dtype, seconds) for each in workloads for kernel in KERNELS)


_ON_CPU = (EAGER, SDPA, COMPILED, PACKED, PACKED_COMPILED, ONNXRUNTIME, OPENVINO, *_LADDER)
# Compiling takes longer than all the rest of a small suite on a CPU.
_ON_CPU_WITHOUT_COMPILING = (EAGER, SDPA, PACKED, ONNXRUNTIME, OPENVINO, *_LADDER)


def _cpu_quick() -> Suite:
    single = torch.float32
    return Suite(
        "quick",
        _plans("minilm-l6", single, 9, (SDPA, ONNXRUNTIME, *_LADDER), (32, "sst2"))
        + _plans("minilm-l6", single, 5, _CORE, (8, "128"), (1, "sst2")),
        machine_seconds=1.0,
    )


def _cpu_default() -> Suite:
    single = torch.float32
    return Suite(
        "default",
        _plans("minilm-l6", single, 25, (COMPILED, *_ON_CPU_WITHOUT_COMPILING), (32, "sst2"))
        + _plans("minilm-l6", single, 15, (SDPA, PACKED, ONNXRUNTIME, *_LADDER), (8, "128"))
        + _plans("minilm-l6", single, 9, _CORE, (1, "sst2"), (8, "sst2"), (32, "mnli"))
        + _plans("minilm-l6", single, 9, _CORE, (8, "16"), (8, "64"), (8, "512"))
        + _plans("bert-base", single, 40, (SDPA, FASTCLS), (32, "sst2")),
        _kernel_plans(single, 1.0, (32, "sst2")),
        tuple(FirstCallPlan("minilm-l6", Workload(32, "sst2"), single, each) for each in (SDPA, FASTCLS)),
    )


# A model with its lengths, number of texts and seconds on a CPU. Families that are not here compute what one of these
# does, but for embeddings and heads, or have no model that a suite has time for.
_FAMILIES = (
    ("bert-base-fill", "sst2", 32, 22),
    ("roberta-base", "sst2", 8, 5),
    ("distilbert", "sst2", 32, 12),
    ("electra-base", "sst2", 8, 5),
    ("albert-base-v2", "sst2", 8, 5),
    ("mpnet-base", "sst2", 8, 5),
    ("modernbert-base", "sst2", 32, 25),
    ("deberta-base", "sst2", 32, 16),
    ("deberta-v3-base", "sst2", 32, 22),
    ("gte-multilingual-base", "sst2", 32, 20),
    ("nomic-embed-text-v1.5", "sst2", 32, 20),
    ("jina-embeddings-v3", "sst2", 8, 14),
    ("eurobert-210m", "sst2", 32, 20),
    ("esm2-35m", "proteins", 8, 24),
)


def _cpu_families() -> Iterator[ModelPlan]:
    for model, lengths, texts, seconds in _FAMILIES:
        baseline = baseline_of(class_of(model))
        yield from _plans(model, torch.float32, seconds, (baseline, FASTCLS), (texts, lengths))


def _gpu_families() -> Iterator[ModelPlan]:
    for model, lengths, _, _ in _FAMILIES:
        model_class = class_of(model)
        providers = (baseline_of(model_class), *([] if FLASH.takes(model_class) else [FLASH]), FASTCLS)
        yield from _plans(model, torch.bfloat16, 1, providers, (32, lengths))


def _cpu_release() -> Suite:
    single = torch.float32
    return Suite(
        "release",
        _plans("minilm-l6", single, 16, _ON_CPU, (32, "sst2"))
        + _plans("minilm-l6", single, 8, (SDPA, ONNXRUNTIME, *_LADDER), (8, "128"))
        + _plans("minilm-l6", single, 5, _CORE, (1, "sst2"), (8, "sst2"), (32, "mnli"))
        + _plans("minilm-l6", single, 4, _CORE, (8, "16"), (8, "64"), (8, "256"), (8, "squad"), (8, "mixed-512"))
        + _plans("bert-base", single, 32, (SDPA, PACKED, ONNXRUNTIME, *_LADDER, INVARIANT), (32, "sst2"))
        + _plans("bert-base", single, 20, _CORE, (8, "128"))
        + _plans("bert-base", single, 13, (*_CORE, INVARIANT), (1, "sst2"))
        + _plans("bert-large", single, 10, (SDPA, FASTCLS), (8, "sst2"))
        + tuple(_cpu_families()),
        _kernel_plans(single, 0.6, (32, "sst2")),
        tuple(FirstCallPlan("bert-base", Workload(32, "sst2"), single, each) for each in (SDPA, FASTCLS)),
    )


_ON_GPU = (EAGER, SDPA, FLASH, COMPILED, AUTOTUNED, PACKED_COMPILED, ONNXRUNTIME, *_GPU_LADDER)
# Tuning takes longer than all the rest of a small suite.
_GPU_WITHOUT_TUNING = tuple(each for each in _ON_GPU if each is not AUTOTUNED)
_GPU_CORE = (SDPA, FLASH, COMPILED, PACKED_COMPILED, ONNXRUNTIME, FASTCLS)


def _gpu_quick() -> Suite:
    half = torch.bfloat16
    return Suite(
        "quick",
        _plans("bert-base", half, 4, (SDPA, FLASH, *_GPU_LADDER), (32, "sst2"), (32, "128"), (1, "128")),
    )


def _gpu_default() -> Suite:
    half = torch.bfloat16
    return Suite(
        "default",
        _plans("bert-base", half, 5, _GPU_WITHOUT_TUNING, (32, "128"), (128, "mixed-512"))
        + _plans("bert-base", half, 4, (SDPA, FLASH, *_GPU_LADDER), (1, "128"), (1, "sst2"))
        + _plans("bert-base", half, 4, _GPU_CORE, (32, "sst2"), (8, "sst2"), (128, "sst2"))
        + _plans("bert-base", half, 4, _GPU_CORE, (32, "mnli"), (32, "squad"))
        + _plans("bert-base", half, 4, _GPU_CORE, (32, "16"), (32, "64"), (32, "256"), (32, "512")),
        _kernel_plans(half, 1.0, (32, "sst2"), (32, "128")),
        tuple(FirstCallPlan("bert-base", Workload(32, "sst2"), half, each) for each in (SDPA, FASTCLS)),
    )


def _gpu_release() -> Suite:
    half = torch.bfloat16
    return Suite(
        "release",
        _plans("bert-base", half, 5, _ON_GPU, (32, "128"), (128, "mixed-512"), (128, "512"))
        + _plans("bert-base", half, 3, (SDPA, FLASH, AUTOTUNED, *_GPU_LADDER), (1, "128"))
        + _plans("bert-base", half, 4, (SDPA, FLASH, FASTCLS, INVARIANT), (1, "sst2"))
        + _plans("bert-base", half, 3, (*_GPU_CORE, INVARIANT), (32, "sst2"), (8, "sst2"), (128, "sst2"))
        + _plans("bert-base", half, 4, _GPU_CORE, (32, "mnli"), (32, "squad"))
        + _plans("bert-base", half, 3, _GPU_CORE, (32, "16"), (32, "64"), (32, "256"), (32, "512"))
        + _plans("bert-base", torch.float16, 3, (SDPA, FLASH, ONNXRUNTIME, FASTCLS), (32, "128"), (128, "mixed-512"))
        + _plans("bert-large", half, 4, (SDPA, FLASH, PACKED, FASTCLS), (32, "squad"), (32, "128"))
        + _plans("minilm-l6", half, 3, (SDPA, FLASH, PACKED, FASTCLS), (32, "sst2"), (1, "sst2"))
        + tuple(_gpu_families()),
        _kernel_plans(half, 0.8, (32, "128"), (128, "mixed-512")),
        tuple(
            FirstCallPlan("bert-base", workload, half, each)
            for workload in (Workload(32, "128"), Workload(128, "mixed-512"))
            for each in (SDPA, FASTCLS)
        ),
        machine_seconds=1.0,
    )


def _cpu_peers() -> Suite:
    peers = (ONNXRUNTIME_RESTING, ONNXRUNTIME_INT8, OPENVINO_DEFAULT, OPENVINO, OPENVINO_INT8)
    providers = (SDPA, FASTCLS, BFLOAT16, INT8, *peers)
    plans = [
        replace(plan, threads=threads)
        for model, seconds in (("minilm-l6-sst2", 12), ("bert-base", 30))
        for threads in (1, 2)
        if threads <= torch.get_num_threads()
        for plan in _plans(model, torch.float32, seconds, providers, (1, "sst2"), (32, "sst2"), (8, "128"))
    ]
    return Suite("cpu", tuple(plans))


_CPU = {"quick": _cpu_quick, "default": _cpu_default, "release": _cpu_release, "cpu": _cpu_peers}
_GPU = {"quick": _gpu_quick, "default": _gpu_default, "release": _gpu_release}


def _suites(device: torch.device) -> dict[str, Callable[[], Suite]]:
    return _GPU if device.type == "cuda" else _CPU


def with_providers(chosen: Suite, names: Sequence[str]) -> Suite:
    """The same models and workloads with only the given providers and the baseline: no longer that suite."""
    providers = [PROVIDERS[name] for name in dict.fromkeys(names)]
    models = tuple(replace(plan, providers=_with_baseline(plan.model, providers)) for plan in chosen.models)
    return Suite("custom", models, machine_seconds=chosen.machine_seconds)
