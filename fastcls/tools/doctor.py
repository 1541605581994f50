"""`fastcls doctor`: what fastcls finds on this machine, and which path it will run."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time

import torch
from rich.console import Console
from rich.table import Table

import fastcls_kernels
from fastcls_kernels.runtime.tile_tables import arch_of, explain_tiles

from .. import __version__


def report(console: Console) -> None:
    """Prints what was found and which path would run, and why."""
    table = Table(
        title=f"fastcls {__version__}", title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0)
    )
    table.add_row("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    for package in ("torch", "triton", "transformers"):
        table.add_row(package, _version_of(package))
    table.add_row("CPU", f"{os.cpu_count()} cores seen, torch uses {torch.get_num_threads()} threads")
    table.add_row("  path", _cpu_path())
    gpus = torch.cuda.device_count()
    if not gpus:
        table.add_row("GPU", "none that torch can use")
    for index in range(gpus):
        device = torch.device("cuda", index)
        backend, reason = fastcls_kernels.explain_backend(device)
        properties = torch.cuda.get_device_properties(device)
        table.add_row(f"GPU {index}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB")
        path = "Triton kernels" if backend == "triton" else "plain PyTorch on packed data"
        table.add_row("  path", f"{path}: {reason}")
        if backend == "triton":
            table.add_row("  tiles", explain_tiles(arch_of(device)))
    console.print(table)
    default = "cuda" if gpus else "cpu"
    console.print(f"Without a choice of yours, fastcls runs on [bold]{default}[/].")


def warm(console: Console, model: str | None, device: str | None, dtype: str | None) -> None:
    """Compiles the kernels for a checkpoint, or for BERT-base, ahead of their first use.

    Raises:
        ValueError: an unknown device or dtype, or a checkpoint that does not fit.
        OSError, TypeError: as `load_model`.
    """
    # Not at the top, since the report must work even if transformers is broken.
    from transformers import BertConfig, BertForSequenceClassification

    from ..conversion import optimize
    from ..loading import load_model, parse_device, parse_dtype

    target, torch_dtype = parse_device(device), parse_dtype(dtype)
    backend, reason = fastcls_kernels.explain_backend(target)
    if backend != "triton":
        console.print(f"Nothing to compile: on {target} plain PyTorch runs ({reason}).")
        return
    if model is None:
        with target:
            # A BertConfig without arguments is BERT-base.
            made = BertForSequenceClassification(BertConfig()).eval()
        fast = optimize(made).to(torch_dtype or torch.bfloat16)
    else:
        fast = optimize(load_model(model, target, torch_dtype), release=True)
    start = time.perf_counter()
    with console.status("compiling"):
        fast.warm_up()
        torch.cuda.synchronize(target)
    seconds = time.perf_counter() - start
    console.print(f"Compiled for {model or 'BERT-base'} in {fast.dtype} on {target} in {seconds:.1f} s.")


def _version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu_path() -> str:
    if fastcls_kernels.uses_onednn(torch.empty(0)):
        products = "matrix products by oneDNN where it is the faster one"
    else:
        products = "matrix products by torch's BLAS: this build of torch has no oneDNN, which is often faster"
    return f"plain PyTorch on packed data, {products}"
