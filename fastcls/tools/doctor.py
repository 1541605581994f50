"""`fastcls doctor`: what fastcls finds on this machine, and which path it will run."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.table import Table

import fastcls_kernels
from fastcls_kernels.packed import explain_compiled
from fastcls_kernels.runtime.tile_tables import arch_of, explain_tiles

from .. import __version__

if TYPE_CHECKING:
    from ..models import FastModel

# Instructions that multiply numbers of a dtype faster than float32: of x86, and "bf16" of Arm.
_INT8 = ("avx512_vnni", "avx_vnni", "amx_int8")
_BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16")
_CPUINFO = Path("/proc/cpuinfo")


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
    table.add_row("  reduced", _cpu_reduced())
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
    """Compiles the kernels for a checkpoint, or for BERT-base, ahead of their first use; on a CPU packs.

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
    if backend != "triton" and target.type != "cpu":
        console.print(f"Nothing to compile: on {target} plain PyTorch runs ({reason}).")
        return
    if model is None:
        with target:
            # A BertConfig without arguments is BERT-base.
            made = BertForSequenceClassification(BertConfig()).eval()
        usual = torch.float32 if target.type == "cpu" else torch.bfloat16
        fast = optimize(made).to(torch_dtype or usual)
    else:
        fast = optimize(load_model(model, target, torch_dtype), release=True)
    if target.type == "cpu":
        _say_what_packing_takes(console, model or "BERT-base", fast)
        return
    start = time.perf_counter()
    with console.status("compiling"):
        fast.warm_up()
        torch.cuda.synchronize(target)
    seconds = time.perf_counter() - start
    console.print(f"Compiled for {model or 'BERT-base'} in {fast.dtype} on {target} in {seconds:.1f} s.")


def _say_what_packing_takes(console: Console, name: str, fast: FastModel) -> None:
    own, start = fast.get_memory_footprint(), time.perf_counter()
    fast.warm_up()
    seconds, packed = time.perf_counter() - start, fast.own_encoder.packed.nbytes
    if not packed:
        console.print(f"Nothing to compile or pack: for {name} in {fast.dtype} plain PyTorch runs.")
        return
    console.print(
        f"Nothing to compile. {name} in {fast.dtype} takes {own / 1e6:,.1f} MB, and its packed weights, made in "
        f"{seconds:.1f} s before a process's first call, {packed / 1e6:,.1f} MB more. "
        "pack_weights=False does without them."
    )


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
    torch_path = f"plain PyTorch on packed data, {products}"
    runs, reason = explain_compiled()
    if runs:
        return f"compiled kernels, {reason}; for what they do not compute, {torch_path}"
    return f"{torch_path}. Compiled kernels cannot run: {reason}"


def _cpu_reduced() -> str:
    """Which reduced precision is fast on the CPU, and by which instructions."""
    int8_is_fast, _ = explain_compiled("int8")
    instructions = _cpu_instructions()
    if instructions is None:
        return f"int8 is {'' if int8_is_fast else 'not '}fast here; nothing says what the CPU has for bfloat16"
    verdict = {
        (True, True): "int8 and bfloat16 are fast here",
        (True, False): "int8 is fast here, bfloat16 is not",
        (False, True): "bfloat16 is fast here, int8 is not",
        (False, False): "neither int8 nor bfloat16 is fast here",
    }[int8_is_fast, not instructions.isdisjoint(_BFLOAT16)]
    found = [name.upper() for name in (*_INT8, *_BFLOAT16) if name in instructions]
    needs = "" if int8_is_fast or instructions.isdisjoint(_INT8) else "; int8 needs the compiled kernels, too"
    return f"{verdict}: the CPU has {', '.join(found) or 'no VNNI, AVX512_BF16 or AMX'}{needs}"


def _cpu_instructions() -> set[str] | None:
    """Names of the CPU's instruction sets, in lower case; None if they cannot be found out."""
    # Older versions of torch do not have it.
    if (ask := getattr(torch.cpu, "get_capabilities", None)) is not None:
        found = {name for name, has in ask().items() if has is True}
    else:
        try:
            lines = _CPUINFO.read_text(encoding="utf-8").splitlines()
        except OSError:
            return None
        flags = next((line for line in lines if line.startswith(("flags", "Features"))), None)
        if flags is None:
            return None
        found = set(flags.split())
    if torch.backends.cpu.get_cpu_capability() == "AVX2":
        # ATEN_CPU_CAPABILITY leaves out what there is beyond.
        found = {name for name in found if not name.startswith(("avx512", "amx"))}
    return found
