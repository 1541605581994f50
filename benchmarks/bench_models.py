"""Whole models by pytest-benchmark: the cases of the quick suite, each provider checked before it is timed."""

from __future__ import annotations

import functools

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from fastcls_benchmarks.machine import wait_for
from fastcls_benchmarks.provider import Model, Provider
from fastcls_benchmarks.suites import ModelPlan, suite
from fastcls_benchmarks.verify import Reference
from fastcls_benchmarks.workloads import ModelInputs, build_model, class_of, config_of

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = [(plan, provider) for plan in suite("quick", DEVICE).models for provider in plan.providers]


@functools.cache
def model_of(name: str, dtype: torch.dtype) -> Model:
    return build_model(name, DEVICE, dtype)


@pytest.mark.benchmark(min_rounds=3, max_time=0.5)
@pytest.mark.parametrize(
    ("plan", "provider"),
    CASES,
    ids=[f"{plan.model}, {plan.workload.name}, {provider.name}" for plan, provider in CASES],
)
def test_forward(plan: ModelPlan, provider: Provider, benchmark: BenchmarkFixture) -> None:
    missing = provider.missing(class_of(plan.model), DEVICE, plan.dtype)
    if missing:
        pytest.skip(missing)
    (batch,) = plan.workload.batches(1, ModelInputs.of(class_of(plan.model), config_of(plan.model)))
    model = model_of(plan.model, plan.dtype)
    forward = provider.load(model).forward
    verdict = Reference(model, [batch]).check(provider, forward)
    assert verdict.passed, verdict.reason
    benchmark.group = f"{plan.model}, {plan.workload.name}"

    def finished() -> None:
        forward(batch)
        wait_for(DEVICE)

    benchmark(finished)
