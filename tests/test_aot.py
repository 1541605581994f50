"""Every kernel, compiled ahead of time for each chip in the shapes and tiles that ship, is what was meant.

No GPU is needed: triton's wheel carries the compilers and a tool that reads what they made. Triton checks neither
shared memory nor spills when it compiles, and falls back from a matrix unit to a slower one without a word.
"""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
from collections import defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from aot_worker import ARCHS, launches, run_worker
from short_run import parameters_of

import fastcls_kernels
from fastcls_kernels.runtime import tile_tables

pytestmark = pytest.mark.skipif(not fastcls_kernels.HAS_TRITON, reason="triton is not installed")

# Registers that triton 3.9 spills there with tiles of any size and any number of warps.
MAY_SPILL = {("gfx942", "_disentangled_key_gradient_kernel"): 2}
# Bytes that one program may ask for.
SHARED_MEMORY = {
    "sm_80": 166_912,
    "sm_86": 101_376,
    "sm_89": 101_376,
    "sm_90": 232_448,
    "sm_100": 232_448,
    "sm_120": 101_376,
    "gfx942": 65_536,
}
# Columns of sm_100's memory beside the tensor cores.
TENSOR_MEMORY = 512

# The instruction of each chip for tiles of 64 rows and more, which those of sm_90 and sm_100 need, and for lower ones.
WIDE = {"sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}
NARROW = {"gfx942": "v_mfma"}
MULTIPLY = {
    "_absorb_query_kernel",
    "_attention_bias_gradient_kernel",
    "_attention_forward_kernel",
    "_attention_kernel",
    "_attention_key_gradient_kernel",
    "_attention_query_gradient_kernel",
    "_cls_attention_kernel",
    "_cls_output_kernel",
    "_column_gradient_kernel",
    "_disentangled_attention_kernel",
    "_disentangled_forward_kernel",
    "_disentangled_key_gradient_kernel",
    "_disentangled_query_gradient_kernel",
    "_linear_kernel",
    "_pooler_classifier_kernel",
    "_row_gradient_kernel",
    "_split_linear_kernel",
    "cls_flow_kernel",
    "cls_hidden_gradient_kernel",
    "cls_scores_kernel",
    "cls_sum_kernel",
}

# Chips with the instructions and the memory of one before.
TWINS = ("sm_89", "sm_120")
# The full run's alone, too: the short one compiles for one chip of each maker.
OTHERS = ("sm_80", "sm_86", "sm_100")


def on_chip(arch: str, *parameters: str) -> Any:
    """A chip's case; for some the full run alone compiles."""
    marks = [pytest.mark.full] if arch in TWINS + OTHERS else []
    return pytest.param(arch, *parameters, id=parameters[-1] if parameters else arch, marks=marks)


CHIPS = [on_chip(arch) for arch in ARCHS]
CASES = [on_chip(arch, case) for arch in ARCHS for case in launches(arch)]


def parts_of(case: Mapping[str, Any]) -> dict[str, str]:
    """What the short run wants once: every operation, and every dtype on its chips."""
    operation, _, arch, dtype, _ = case["case"].split("-")
    return {"operation": operation, "chip": f"{arch} {dtype}"}


def matrix_unit(arch: str, case: str, kernel: dict[str, Any]) -> str | None:
    """The instruction that a kernel's products are meant to be, or None where it has none."""
    if kernel["kernel"] not in MULTIPLY or ("-fp32-" in case and not arch.startswith("gfx")):
        # In float32 the products are IEEE's, which NVIDIA's matrix units do not compute.
        return None
    return (WIDE if kernel["tile_rows"] >= 64 else NARROW).get(arch, "mma.sync")


@pytest.fixture(scope="session")
def reports(request: pytest.FixtureRequest) -> Iterator[dict[str, Future[dict[str, Any]]]]:
    """What the worker of each chip reports of the cases that the selected tests ask about, two workers at a time."""
    asked: dict[str, set[str]] = defaultdict(set)
    for item in request.session.items:
        parameters = parameters_of(item) if "reports" in getattr(item, "fixturenames", ()) else {}
        if "case" in parameters:
            asked[parameters["arch"]].add(parameters["case"])
        elif parameters:
            # A test of all that there is: of one chip, or of those that follow a file.
            for arch in [parameters["arch"]] if "arch" in parameters else chips_of(parameters["file"]):
                asked[arch].update(launches(arch))
    with ThreadPoolExecutor(max_workers=2) as pool:
        yield {
            arch: pool.submit(run_worker, "aot_worker.py", arch, stdin=json.dumps(sorted(cases)))
            for arch, cases in asked.items()
        }


def chips_of(file: Path) -> list[str]:
    """The chips whose choices a table's rules are, without twins, which take the same."""
    return [arch for arch in ARCHS if arch not in TWINS and tile_tables.config_file(arch) == file]


@pytest.mark.covering(by=parts_of, alone=["operation", "chip"])
@pytest.mark.parametrize(("arch", "case"), CASES)
def test_launch_fits_its_chip_and_uses_the_matrix_unit_that_was_meant(
    reports: dict[str, Future[dict[str, Any]]], arch: str, case: str
) -> None:
    kernels = reports[arch].result()["cases"][case]
    assert isinstance(kernels, list), kernels
    for kernel in kernels:
        assert kernel["spills"] <= MAY_SPILL.get((arch, kernel["kernel"]), 0), kernel
        assert kernel["shared"] <= SHARED_MEMORY[arch], kernel
        assert kernel["tensor_memory"] <= TENSOR_MEMORY, kernel
        unit = matrix_unit(arch, case, kernel)
        assert (unit in kernel["matrix_units"]) if unit else not kernel["matrix_units"], (unit, kernel)
        assert kernel["fp_fusion"], kernel


@pytest.mark.full
@pytest.mark.parametrize("arch", CHIPS)
def test_every_kernel_is_compiled(reports: dict[str, Future[dict[str, Any]]], arch: str) -> None:
    defined = {
        name
        for module in pkgutil.walk_packages(fastcls_kernels.__path__, "fastcls_kernels.")
        for name, value in vars(importlib.import_module(module.name)).items()
        if name.endswith("_kernel") and not inspect.ismodule(value)
    }
    compiled = {kernel["kernel"] for kernels in reports[arch].result()["cases"].values() for kernel in kernels}
    assert compiled == defined


@pytest.mark.full
@pytest.mark.parametrize("file", sorted(tile_tables.CONFIGS.glob("*.json")), ids=lambda file: file.stem)
def test_every_rule_is_compiled(reports: dict[str, Future[dict[str, Any]]], file: Path) -> None:
    chips = chips_of(file)
    assert chips, f"none of {ARCHS} takes {file.name}"
    compiled = [rule for arch in chips for rule in reports[arch].result()["rules"]]
    rules = json.loads(file.read_text(encoding="utf-8"))["rules"]
    missing = [
        (operation, rule)
        for operation, each in rules.items()
        for rule in each
        if [operation, rule["tile"]] not in compiled
    ]
    assert not missing
