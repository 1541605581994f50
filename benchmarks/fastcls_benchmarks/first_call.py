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
from typing import TYPE_CHECKING, Any

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

    subject = (plan.model, plan.workload.name, str(plan.dtype).removeprefix("torch."), plan.provider.name)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(each for each in sys.path if each)}
    command = [sys.executable, "-m", __name__, json.dumps([*subject, device, threads, plan.training])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        return FirstCall(*subject, detail=(done.stderr.strip().splitlines() or ["failed"])[-1])
    return FirstCall(*subject, **json.loads(lines[-1]))


def main(
    name: str, workload: str, dtype_name: str, provider_name: str, place: str, threads: int, training: bool
) -> dict[str, Any]:
    """The seconds of each step and the bytes of one more forward, or in training of a whole step."""
    start = time.perf_counter()
    import torch

    for library in ("fastcls", "onnxruntime", "openvino"):
        if provider_name.startswith(library):
            importlib.import_module(library)
    from .workloads import ModelInputs, Workload, build_model, class_of, config_of, padded_tokens

    # `import transformers` puts this import off until a model is asked for.
    model_class = class_of(name)
    imported = time.perf_counter()

    from .providers import PROVIDERS
    from .timing import wait_for
    from .training import TRAINING_PROVIDERS
    from .training import batches as with_labels

    torch.set_num_threads(threads)
    device, dtype = torch.device(place), getattr(torch, dtype_name)
    provider = (TRAINING_PROVIDERS if training else PROVIDERS)[provider_name]
    given = Workload.named(workload)
    batches = (
        with_labels(name, given, 4) if training else given.batches(4, ModelInputs.of(model_class, config_of(name)))
    )
    if missing := provider.missing(model_class, device, dtype):
        return {"detail": missing}
    prepared = time.perf_counter()
    model = build_model(name, device, dtype)
    loaded = time.perf_counter()
    forward = provider.load(model).forward
    converted = time.perf_counter()
    forward(batches[0])
    wait_for(device)
    answered = time.perf_counter()
    result = {"import_seconds": imported - start, "load_seconds": loaded - prepared}
    result |= {"convert_seconds": converted - loaded, "first_seconds": answered - converted}
    largest = max(batches, key=padded_tokens)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        forward(largest)
        return result | {"peak_bytes": torch.cuda.max_memory_allocated(device) - before}
    if not (_PROC / "clear_refs").exists():
        return result | {"detail": "peak memory on the CPU is read from Linux's /proc"}
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        # The forward would use memory that the C library keeps, uncounted: it frees that, now and from now on.
        libc.mallopt(*_MMAP_THRESHOLD)
        libc.malloc_trim(0)
    # 5 resets the peak ("VmHWM") to the memory resident now: man 5 proc.
    (_PROC / "clear_refs").write_text("5")
    before = _status("VmRSS")
    forward(largest)
    return result | {"peak_bytes": _status("VmHWM") - before}


def _status(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB$", (_PROC / "status").read_text(encoding="utf-8"), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"/proc/self/status has no {name}")
    return int(found[1]) * 1024


if __name__ == "__main__":
    print(json.dumps(main(*json.loads(sys.argv[1]))))
