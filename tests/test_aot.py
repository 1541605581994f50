"""Every kernel, compiled ahead of time for each chip in the shapes and tiles that ship, is what was meant.

No GPU is needed: triton's wheel carries the compilers and the disassembler. Triton checks neither shared memory nor
spills when it compiles, and falls back from a matrix unit to a slower one without a word.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from aot_worker import ARCHS, LAUNCHES, MAX_SEQLENS, MODELS, ROWS, case_id

import fastcls_kernels
from fastcls_kernels.tuning import attention_tile, linear_tile

pytestmark = pytest.mark.skipif(not fastcls_kernels.HAS_TRITON, reason="triton is not installed")

# Bytes that one program may ask for.
SHARED_MEMORY = {"sm_80": 166_912, "sm_86": 101_376, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
# Columns of sm_100's memory beside the tensor cores.
TENSOR_MEMORY = 512

WIDE_PRODUCT = {
    "sm_80": ["HMMA"],
    "sm_86": ["HMMA"],
    "sm_90": ["HGMMA"],
    "sm_100": ["UTCHMMA", "tcgen05.mma"],
    "gfx942": ["v_mfma"],
}
# The instructions of sm_90 and sm_100 take at least 64 rows, and the [CLS] pass has 16 heads.
NARROW_PRODUCT = {**WIDE_PRODUCT, "sm_90": ["HMMA"], "sm_100": ["HMMA"]}
MATRIX_UNITS = {
    "_attention_kernel": WIDE_PRODUCT,
    "_linear_gelu_kernel": WIDE_PRODUCT,
    "_cls_attention_kernel": NARROW_PRODUCT,
}

CASES = [
    pytest.param(arch, case, id=case)
    for (operation, variant), model, arch in itertools.product(LAUNCHES, MODELS, ARCHS)
    for case in [case_id(operation, model, arch, variant)]
]


def run_worker(arch: str) -> dict[str, Any]:
    # Without the interpreter there is a compiler; and fusion that is off by default, as it will be from triton 3.10 on,
    # shows which launch forgot to ask for it.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "TRITON_DEFAULT_FP_FUSION": "0"}
    command = [sys.executable, str(Path(__file__).with_name("aot_worker.py")), arch]
    worker = subprocess.run(command, env=environment, capture_output=True, text=True)
    if worker.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{worker.stderr}")
    return dict(json.loads(worker.stdout))


@pytest.fixture(scope="session")
def reports(request: pytest.FixtureRequest) -> Iterator[dict[str, Future[dict[str, Any]]]]:
    """What the worker of each chip that the selected tests ask about reports, two workers at a time."""
    asked = {item.callspec.params.get("arch") for item in request.session.items if hasattr(item, "callspec")}
    with ThreadPoolExecutor(max_workers=2) as pool:
        yield {arch: pool.submit(run_worker, arch) for arch in ARCHS if arch in asked}


@pytest.mark.parametrize(("arch", "case"), CASES)
def test_launch_fits_its_chip_and_uses_the_matrix_unit_that_was_meant(
    reports: dict[str, Future[dict[str, Any]]], arch: str, case: str
) -> None:
    kernels = reports[arch].result()[case]
    assert isinstance(kernels, list), kernels
    assert kernels
    for kernel in kernels:
        assert kernel["spills"] == 0, kernel
        assert kernel["shared"] <= SHARED_MEMORY[arch], kernel
        assert kernel["tensor_memory"] <= TENSOR_MEMORY, kernel
        assert kernel["matrix_units"] == MATRIX_UNITS.get(kernel["kernel"], {}).get(arch, []), kernel
        assert kernel["fp_fusion"], kernel


@pytest.mark.parametrize("arch", ARCHS)
def test_every_kernel_is_compiled(reports: dict[str, Future[dict[str, Any]]], arch: str) -> None:
    defined = {
        name
        for module in pkgutil.iter_modules(fastcls_kernels.__path__, "fastcls_kernels.")
        for name in vars(importlib.import_module(module.name))
        if name.endswith("_kernel")
    }
    compiled = {kernel["kernel"] for kernels in reports[arch].result().values() for kernel in kernels}
    assert compiled == defined


@pytest.mark.parametrize("arch", ARCHS)
def test_every_tile_is_compiled(arch: str) -> None:
    for model in MODELS.values():
        attention = {attention_tile(arch, torch.bfloat16, model.head_dim, seqlen) for seqlen in range(1, 8193)}
        assert attention == {attention_tile(arch, torch.bfloat16, model.head_dim, n) for n in MAX_SEQLENS.values()}
    linear = {linear_tile(arch, torch.bfloat16, rows) for rows in range(1, 8193)}
    assert linear == {linear_tile(arch, torch.bfloat16, rows) for rows in ROWS.values()}
