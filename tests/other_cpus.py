"""Runs the tests as other CPUs would, with other seeds, and says which of them move. Started by hand:

    python tests/other_cpus.py [--seeds 5] [--setting NAME ...] [--product] [-- pytest arguments]

Which code a library runs depends on the instructions of the CPU, and so do the last bits of what it gives. Variables of
the environment hide newer instructions from the libraries; none makes up those that a CPU lacks.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
# NumPy's names, from 2.4 on; others warn of them.
AVX512 = "X86_V4 AVX512_ICL AVX512_SPR"


class Setting(NamedTuple):
    """What an environment says of the CPU: to PyTorch, oneDNN, MKL, NumPy's OpenBLAS, and (what it lacks) to NumPy."""

    aten: str
    onednn: str
    mkl: str
    openblas: str
    not_numpy: str

    def variables(self) -> dict[str, str]:
        libraries = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "OPENBLAS_CORETYPE")
        return dict(zip((*libraries, "NPY_DISABLE_CPU_FEATURES"), self, strict=True))


SETTINGS: dict[str, dict[str, str]] = {
    "as it is": {},
    "avx2": Setting("avx2", "AVX2", "AVX2", "Haswell", AVX512).variables(),
    "sse4.2": Setting("default", "SSE41", "SSE4_2", "Nehalem", f"X86_V3 {AVX512}").variables(),
    "avx512": Setting("avx512", "AVX512_CORE", "AVX512", "SkylakeX", "").variables(),
    # How a sum is shared out is the number of cores' doing.
    "2 threads": {"OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2"},
}


class Run(NamedTuple):
    """One run of the tests, and the first line of what each failed test said."""

    setting: str
    seed: int
    failures: dict[str, str]

    @property
    def name(self) -> str:
        return f"{self.setting}, seed {self.seed}"


def settings_of_this_cpu() -> list[str]:
    """Names of the settings that run here: a library told of instructions that a CPU lacks may crash."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return ["as it is", "2 threads"]
    environment = {name: value for name, value in os.environ.items() if name != "ATEN_CPU_CAPABILITY"}
    code = "import torch; print(torch.backends.cpu.get_cpu_capability())"
    asked = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    lacking = {"AVX512": (), "AVX2": ("avx512",)}.get(asked.stdout.strip(), ("avx512", "avx2"))
    return [name for name in SETTINGS if name not in lacking]


def run_tests(setting: str, seed: int, arguments: list[str]) -> Run:
    """Runs pytest once, and prints a line about it and two about what failed: minutes pass before the table."""
    environment = {**os.environ, **SETTINGS[setting], "FASTCLS_SEED": str(seed)}
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report, log = Path(folder, "report.xml"), Path(folder, "log.txt")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *arguments]
        with log.open("w") as output:
            child = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
            try:
                status = child.wait()
            except KeyboardInterrupt:
                child.terminate()
                child.wait()
                raise
        cases = list(ET.parse(report).iter("testcase")) if report.exists() else []
        lines = log.read_text(errors="replace").strip().splitlines()
    failures = {}
    for case in cases:
        problem = next((part for part in case if part.tag in ("failure", "error")), None)
        if problem is not None:
            place = case.get("classname", "").replace(".", "/")
            failures[f"{place}.py::{case.get('name')}"] = problem.get("message", "").partition("\n")[0]
    if status not in (0, 1) or (status == 1 and not failures):
        failures["pytest itself"] = f"exit status {status}: {lines[-1] if lines else 'no output'}"
    skipped = sum(case.find("skipped") is not None for case in cases)
    run = Run(setting, seed, failures)
    passed = len(cases) - skipped - len(failures.keys() - {"pytest itself"})
    print(f"{run.name}: {time.monotonic() - started:.0f} s, {passed:,} passed, {len(failures):,} failed", flush=True)
    for test, message in failures.items():
        print(f"  {test}\n    {message}", flush=True)
    return run


def print_table(runs: list[Run]) -> None:
    """Which tests failed: in every run, and in some, with what one of those said."""
    tests = sorted({test for run in runs for test in run.failures})
    failing = {test: [run for run in runs if test in run.failures] for test in tests}
    everywhere = [test for test in tests if len(failing[test]) == len(runs)]
    moving = [test for test in tests if test not in everywhere]
    for heading, names in (("Failed in some runs", moving), ("Failed in every run", everywhere)):
        if names:
            print(f"\n{heading} (of {len(runs)}):")
        for test in names:
            print(f"  {test}\n    {failing[test][0].failures[test]}")
            if test in moving:
                print(f"    in {'; '.join(run.name for run in failing[test])}")
    if runs and not tests:
        print(f"\nNothing failed in {len(runs)} runs.")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--seeds", type=int, default=5, help="how many seeds, 1 or more, from 0 on (default: %(default)s)"
    )
    parser.add_argument("--setting", action="append", choices=list(SETTINGS), help="one to run under; all if not given")
    parser.add_argument("--product", action="store_true", help="each seed under each setting, not each under one")
    parser.add_argument("arguments", nargs="*", help="handed on to pytest")
    options = parser.parse_args()
    if options.seeds < 1:
        parser.error(f"--seeds is {options.seeds}; it must be 1 or more")
    possible = settings_of_this_cpu()
    settings = options.setting or possible
    if unknown := [setting for setting in settings if setting not in possible]:
        parser.error(f"this CPU cannot run {', '.join(unknown)}; it runs {', '.join(possible)}")
    if not options.product and (left_out := settings[options.seeds :]):
        print(f"Not run: {', '.join(left_out)}. Each seed runs under one setting; --product runs it under all.")
    runs: list[Run] = []
    try:
        for seed in range(options.seeds):
            for setting in settings if options.product else [settings[seed % len(settings)]]:
                runs.append(run_tests(setting, seed, options.arguments))
    except KeyboardInterrupt:
        print("\nInterrupted.")
    print_table(runs)
    return 1 if any(run.failures for run in runs) else 0


if __name__ == "__main__":
    raise SystemExit(main())
