"""The machine's best rates of products and of copies, on random data, measured in the same run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcls_kernels import linear

from .results import Rate
from .workloads import SEED

Product = Callable[[Tensor, Tensor, Tensor], Tensor]

# On a CPU fastcls_kernels.linear may go to oneDNN where torch's own linear does not.
PRODUCTS: dict[str, Product] = {"F.linear": F.linear, "fastcls_kernels.linear": linear}


def wait_for(device: torch.device) -> None:
    """Waits until the device has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(device: torch.device, dtype: torch.dtype, shapes: Sequence[tuple[int, int]], seconds: float) -> list[Rate]:
    """Rates of products and of copies of several sizes, each the median of repeated tries.

    Args:
        device: the device to measure.
        dtype: of the products.
        shapes: (out_features, in_features) of the models' own weights, measured in addition to square ones.
        seconds: how long to try, altogether.
    """
    generator = torch.Generator(device).manual_seed(SEED)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    on_gpu = device.type == "cuda"
    rows = 16384 if on_gpu else 512
    squares = (4096, 8192) if on_gpu else (1024, 2048)
    sizes = [*((rows, *shape) for shape in dict.fromkeys(shapes)), *((size, size, size) for size in squares)]
    megabytes = (256, 1024) if on_gpu else (64, 256)
    each = seconds / (len(sizes) * len(PRODUCTS) + len(megabytes))
    name = str(dtype).removeprefix("torch.")
    rates = []
    with torch.inference_mode():
        for num_rows, out_features, in_features in sizes:
            x, weight, bias = random(num_rows, in_features), random(out_features, in_features), random(out_features)
            # On a GPU both go to cuBLAS.
            for library, product in list(PRODUCTS.items())[: 1 if on_gpu else None]:
                typical = _typical_time(lambda: product(x, weight, bias), device, each)  # noqa: B023 (called at once)
                flops = 2 * num_rows * out_features * in_features
                what = f"{num_rows} x {in_features} by {in_features} x {out_features}, {library}"
                rates.append(Rate("product", what, name, flops / typical))
        for size in megabytes:
            source = random(size * 2**20 // dtype.itemsize)
            target = torch.empty_like(source)
            typical = _typical_time(lambda: target.copy_(source), device, each)  # noqa: B023 (called at once)
            rates.append(Rate("copy", f"{size} MiB, read and written", name, 2 * size * 2**20 / typical))
    return rates


def _typical_time(function: Callable[[], object], device: torch.device, seconds: float) -> float:
    """The median of at least three tries after one that is not counted."""
    function()
    wait_for(device)
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        start = time.perf_counter()
        function()
        wait_for(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)
