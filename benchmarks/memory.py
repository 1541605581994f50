"""Peak memory of one forward, in a fresh process, where nobody's leftovers hide it.

`measure` starts this module as a program, which prints a number of bytes.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer

from .providers import PROVIDERS
from .results import Memory
from .workloads import ROOT, WORKLOADS, largest, load_model

_PROC = Path("/proc/self")
# glibc's own starting value. Set, it no longer grows, and each tensor's memory goes back when the tensor does; left to
# grow, what is measured is how much freed memory the C library happens to keep, a different amount every time.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "131072"}


def measure(model: str, workload: str, provider: str, device: torch.device) -> Memory:
    """Peak memory on the workload's largest batch, with as many threads as here."""
    if device.type == "cpu" and not (_PROC / "clear_refs").exists():
        return Memory(model, workload, provider, None, "peak memory on the CPU is read from Linux's /proc")
    command = [sys.executable, "-m", "benchmarks.memory", model, workload, provider]
    command += ["--device", str(device), "--threads", str(torch.get_num_threads())]
    environment = os.environ | _MALLOC
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        return Memory(model, workload, provider, None, (done.stderr.strip().splitlines() or ["failed"])[-1])
    return Memory(model, workload, provider, int(done.stdout))


def main(
    model: str,
    workload: str,
    provider: str,
    device: Annotated[str, typer.Option()] = "cpu",
    threads: Annotated[int, typer.Option()] = 1,
) -> None:
    """Prints how many bytes one forward takes above what was held before it."""
    torch.set_num_threads(threads)
    place = torch.device(device)
    batch = largest(WORKLOADS[workload].batches())
    forward = PROVIDERS[provider].load(load_model(model, place)).forward
    # The first forward imports, starts threads and reads every weight; on one token it leaves little else behind.
    forward({name: tensor[:1, :1] for name, tensor in batch.items()})
    if place.type == "cuda":
        torch.cuda.reset_peak_memory_stats(place)
        before = torch.cuda.memory_allocated(place)
        forward(batch)
        peak = torch.cuda.max_memory_allocated(place)
    else:
        _give_back_freed_memory()
        # 5 resets the peak ("VmHWM") to what is resident now: man 5 proc.
        (_PROC / "clear_refs").write_text("5")
        before = _status("VmRSS")
        forward(batch)
        peak = _status("VmHWM")
    print(peak - before)


def _give_back_freed_memory() -> None:
    """Memory that the C library kept after loading would serve the forward and not be counted."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB$", (_PROC / "status").read_text(encoding="utf-8"), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"/proc/self/status has no {name}")
    return int(found[1]) * 1024


if __name__ == "__main__":
    typer.run(main)
