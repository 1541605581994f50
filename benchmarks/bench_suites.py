"""The quick suite's cases and single kernels by pytest-benchmark, each provider checked before it is timed."""

from __future__ import annotations

import functools

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from fastcls_benchmarks.kernels import KERNELS, Kernel, KernelProvider
from fastcls_benchmarks.provider import Model, Provider
from fastcls_benchmarks.runner import prepare_kernel
from fastcls_benchmarks.suites import Plan, default_dtype, suite
from fastcls_benchmarks.timing import seconds_of
from fastcls_benchmarks.verify import Reference
from fastcls_benchmarks.workloads import ModelInputs, Workload, build_model, class_of, config_of

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = default_dtype(DEVICE)
PLANS = [plan for plan in suite("quick", DEVICE).plans if plan.kind == "model"]


@pytest.mark.parametrize(
    ("kernel", "provider"),
    [
        pytest.param(kernel, provider, id=f"{kernel.name}, {provider.name}")
        for kernel in KERNELS.values()
        for provider in kernel.providers
    ],
)
@torch.inference_mode()
def test_kernel(kernel: Kernel, provider: KernelProvider, benchmark: BenchmarkFixture) -> None:
    inputs = kernel.inputs(Workload(32, "sst2"), DEVICE, DTYPE, 1)
    row, prepared = prepare_kernel(provider, kernel.check, inputs, DEVICE, DTYPE)
    if row.status == "unavailable":
        pytest.skip(row.detail)
    assert row.status == "timed", row.detail
    benchmark.group = kernel.name
    benchmark(seconds_of, prepared[0].run, DEVICE)


@functools.cache
def model_of(name: str) -> Model:
    return build_model(name, DEVICE, DTYPE)


@pytest.mark.benchmark(min_rounds=3, max_time=0.5)
@pytest.mark.parametrize(
    ("plan", "provider"),
    [
        pytest.param(plan, provider, id=f"{plan.subject}, {plan.workload.name}, {provider.name}")
        for plan in PLANS
        for provider in plan.providers
    ],
)
def test_forward(plan: Plan, provider: Provider, benchmark: BenchmarkFixture) -> None:
    missing = provider.missing(class_of(plan.subject), DEVICE, plan.dtype)
    if missing:
        pytest.skip(missing)
    (batch,) = plan.workload.batches(1, ModelInputs.of(class_of(plan.subject), config_of(plan.subject)))
    model = model_of(plan.subject)
    forward = provider.load(model).forward
    verdict = Reference(model, [batch]).check(provider, forward)
    assert verdict.passed, verdict.reason
    benchmark.group = f"{plan.subject}, {plan.workload.name}"
    benchmark(seconds_of, lambda: forward(batch), DEVICE)
