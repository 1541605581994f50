"""A provider's first call and its peak memory, in a fresh process, where no earlier work hides them.

`measure` starts this module as a program, which prints one line of JSON.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

# Nothing here may import torch: its import is timed, too.
if TYPE_CHECKING:
    from .results import FirstCall
    from .suites import FirstCallPlan

_PROC = Path("/proc/self")
# glibc's M_MMAP_THRESHOLD and its own starting value. Once set it no longer grows, and each tensor's memory goes back
# with the tensor; if it grew, the measurement would be how much freed memory the C library happens to keep.
_MMAP_THRESHOLD = (-3, 131072)


def measure(plan: FirstCallPlan, device: str, threads: int) -> FirstCall:
    """Runs the plan with ``threads`` threads."""
    from .results import FirstCall

    dtype = str(plan.dtype).removeprefix("torch.")
    result = FirstCall(plan.model, plan.workload.name, dtype, plan.provider.name)
    work = {
        "model": plan.model,
        "batch_size": plan.workload.batch_size,
        "lengths": plan.workload.lengths,
        "dtype": dtype,
        "provider": plan.provider.name,
        "device": device,
        "threads": threads,
    }
    command = [sys.executable, "-m", __name__, json.dumps(work)]
    path = os.pathsep.join(each for each in sys.path if each)
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        result.detail = (done.stderr.strip().splitlines() or ["failed"])[-1]
        return result
    for name, value in json.loads(lines[-1]).items():
        setattr(result, name, value)
    return result


def main(work: dict[str, str | int]) -> dict[str, float | int | str | None]:
    """The seconds of each step and the bytes of one more forward."""
    start = time.perf_counter()
    import torch

    for library in ("fastcls", "onnxruntime", "openvino"):
        if str(work["provider"]).startswith(library):
            importlib.import_module(library)
    from .workloads import ModelInputs, Workload, build_model, class_of, config_of, padded_tokens

    # `import transformers` puts this import off until a model is asked for.
    name = str(work["model"])
    model_class = class_of(name)
    imported = time.perf_counter()

    from .providers import PROVIDERS
    from .timing import wait_for

    torch.set_num_threads(int(work["threads"]))
    device, dtype = torch.device(str(work["device"])), getattr(torch, str(work["dtype"]))
    inputs = ModelInputs.of(model_class, config_of(name))
    batches = Workload(int(work["batch_size"]), str(work["lengths"])).batches(4, inputs)
    provider = PROVIDERS[str(work["provider"])]
    missing = provider.missing(model_class, device, dtype)
    if missing:
        return {"detail": missing}
    prepared = time.perf_counter()
    model = build_model(name, device, dtype)
    loaded = time.perf_counter()
    forward = provider.load(model).forward
    converted = time.perf_counter()
    forward(batches[0])
    wait_for(device)
    answered = time.perf_counter()

    largest = max(batches, key=padded_tokens)
    result: dict[str, float | int | str | None] = {
        "import_seconds": imported - start,
        "load_seconds": loaded - prepared,
        "convert_seconds": converted - loaded,
        "first_seconds": answered - converted,
    }
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        forward(largest)
        return result | {"peak_bytes": torch.cuda.max_memory_allocated(device) - before}
    if not (_PROC / "clear_refs").exists():
        return result | {"detail": "peak memory on the CPU is read from Linux's /proc"}
    _give_back_freed_memory()
    # 5 resets the peak ("VmHWM") to the memory resident now: man 5 proc.
    (_PROC / "clear_refs").write_text("5")
    before = _status("VmRSS")
    forward(largest)
    return result | {"peak_bytes": _status("VmHWM") - before}


def _give_back_freed_memory() -> None:
    """Frees the memory that the C library keeps, now and from now on: the forward would use it uncounted."""
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.mallopt(*_MMAP_THRESHOLD)
        library.malloc_trim(0)


def _status(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB$", (_PROC / "status").read_text(encoding="utf-8"), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"/proc/self/status has no {name}")
    return int(found[1]) * 1024


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
