"""What a figure depends on besides the code: chip, threads, versions, commit, date."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from .workloads import ROOT

_PACKAGES = ("torch", "triton", "transformers", "onnxruntime", "onnx")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    """What a command prints, or None where it fails or does not exist."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        name = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(encoding="utf-8"), re.MULTILINE)
        if name:
            return name[1].strip()
    return platform.processor() or platform.machine()


def _cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def is_dirty() -> bool | None:
    """Whether the code differs from its commit; None without git. What a run itself changes does not count."""
    changes = _output("git", "status", "--porcelain", "--", ".", ":!benchmarks/results", ":!README.md")
    return None if changes is None else bool(changes)


def collect(device: torch.device) -> dict[str, Any]:
    """Everything that belongs beside a figure."""
    cores = _cores()
    on_gpu = device.type == "cuda"
    return {
        "chip": torch.cuda.get_device_name(device) if on_gpu else f"{_cpu_model()}, {cores} cores",
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if on_gpu else None,
        "cuda": torch.version.cuda if on_gpu else None,
        "cpu": _cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in _PACKAGES},
        "commit": _output("git", "rev-parse", "HEAD"),
        "dirty": is_dirty(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def slug(chip: str) -> str:
    """A chip's name as a folder's: letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", chip.lower()).strip("-")
