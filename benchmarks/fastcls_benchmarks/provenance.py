"""The provenance of figures: chip, threads, versions, commit, date, and torch's own report on its environment."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch
from torch.utils.collect_env import get_pretty_env_info

import fastcls
import fastcls_kernels

PACKAGES = ("torch", "triton", "transformers", "sentence-transformers", "onnxruntime", "openvino", "nncf", "flash-attn")
_SOURCES = tuple(Path(each).resolve().parent for each in (fastcls.__file__, fastcls_kernels.__file__, __file__))
_CODE = (".py", ".c", ".h", ".toml", ".json")
_FOLDER = _SOURCES[0].parent


def version_of(package: str) -> str | None:
    """That is installed; None for none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def output_of(*command: str) -> str | None:
    """A command's output, or None if it fails or does not exist."""
    try:
        return subprocess.run(command, cwd=_FOLDER, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def source_digest() -> str:
    """SHA-256 of the code that runs, and of its data, which identifies its commit if there is no git."""
    digest = hashlib.sha256()
    for folder in _SOURCES:
        for path in sorted(each for each in folder.rglob("*") if each.suffix in _CODE):
            digest.update(f"{folder.name}/{path.relative_to(folder).as_posix()}\n".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def collect(device: torch.device) -> dict[str, Any]:
    """The whole provenance of a run's figures."""
    lines = [line for line in get_pretty_env_info().splitlines() if not line.startswith(("Vulnerability", "Flags"))]
    told = {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cpu = told.get("Model name") or platform.processor() or platform.machine()
    on_gpu, capability = device.type == "cuda", torch.backends.cpu.get_cpu_capability()
    # Else git's answers are about the folder of an installed copy, and not about the code that runs.
    top = output_of("git", "rev-parse", "--show-toplevel") if (_FOLDER / "pyproject.toml").is_file() else None
    in_checkout = top is not None and Path(top).resolve() == _FOLDER
    # What publishing a run writes does not count.
    written = (":!benchmarks/results", ":!README.md", ":!docs/performance.md")
    changes = ("git", "status", "--porcelain", "--", ".", *written)
    return {
        "chip": torch.cuda.get_device_name(device) if on_gpu else f"{cpu} with {capability}, {cores} cores",
        "device": device.type,
        "driver": told.get("Nvidia driver version") if on_gpu else None,
        "cuda": torch.version.cuda if on_gpu else None,
        "cpu": cpu,
        "cpu_capability": capability,
        "cores": cores,
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "fastcls": fastcls.__version__,
        "versions": {package: version_of(package) for package in PACKAGES},
        "commit": output_of("git", "rev-parse", "HEAD") if in_checkout else None,
        "dirty": bool(output_of(*changes)) if in_checkout else None,
        "source_digest": source_digest(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "environment": "\n".join(lines),
    }


def slug(chip: str) -> str:
    """A chip's name as a folder's: letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", chip.lower()).strip("-")
