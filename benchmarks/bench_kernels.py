"""Single kernels by pytest-benchmark: on an SST-2-like batch, each provider checked before it is timed."""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from fastcls_benchmarks.kernels import KERNELS, Kernel, KernelProvider
from fastcls_benchmarks.machine import wait_for
from fastcls_benchmarks.runner import prepare_kernel
from fastcls_benchmarks.suites import default_dtype
from fastcls_benchmarks.workloads import Workload

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WORKLOAD = Workload(32, "sst2")
CASES = [(kernel, provider) for kernel in KERNELS.values() for provider in kernel.providers]


@pytest.mark.parametrize(
    ("kernel", "provider"), CASES, ids=[f"{kernel.name}, {provider.name}" for kernel, provider in CASES]
)
@torch.inference_mode()
def test_kernel(kernel: Kernel, provider: KernelProvider, benchmark: BenchmarkFixture) -> None:
    dtype = default_dtype(DEVICE)
    inputs = kernel.inputs(WORKLOAD, DEVICE, dtype, 1)
    row, prepared = prepare_kernel(provider, kernel.check, inputs, DEVICE, dtype)
    if row.status == "unavailable":
        pytest.skip(row.detail)
    assert row.status == "timed", row.detail
    benchmark.group = kernel.name

    def finished() -> None:
        prepared[0].run()
        wait_for(DEVICE)

    benchmark(finished)
