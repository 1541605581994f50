"""What the pytest benchmarks share: where they run, and how a function is timed there."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from .workloads import SEED, dtype_on

Timed = Callable[[Callable[[], Tensor]], None]


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def dtype(device: torch.device) -> torch.dtype:
    return dtype_on(device)


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture
def random(device: torch.device, dtype: torch.dtype) -> Callable[..., Tensor]:
    """Seeded normal numbers of a given shape."""
    generator = torch.Generator(device).manual_seed(SEED)

    def make(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    return make


@pytest.fixture
def timed(benchmark: BenchmarkFixture, device: torch.device) -> Timed:
    """Times a function, waiting for the GPU to finish."""

    def run(function: Callable[[], Tensor]) -> None:
        def finished() -> Tensor:
            out = function()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            return out

        benchmark(finished)

    return run
