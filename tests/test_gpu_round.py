"""The GPU round: calls keep to their limits, go on where they ended, and tell a failure, which stops nothing."""

from __future__ import annotations

import fcntl
import gzip
import json
import re
import time
import zipfile
from pathlib import Path
from typing import Any

import files
import gpu_round
import pytest
import torch
import typer
from gpu_round import ROOT, STEPS, Step
from typer.testing import CliRunner

from fastcls_benchmarks.kernels import OPERATIONS
from fastcls_kernels.runtime.tile_tables import CONFIGS, explain_tiles

WHERE = "import os; print('packages', os.environ['PYTHONPATH'])"
FOLDER = "import os; os.makedirs('{out}/{name}/plots'); open('{out}/{name}/results.json', 'w').write('1')"


@pytest.fixture(autouse=True)
def steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three steps that take no time, and a GPU that is asked for nothing; the second step fails."""
    codes = {"first": (1, WHERE), "second": (1, "print('why'); raise SystemExit(3)"), "third": (2, FOLDER)}
    monkeypatch.setattr(gpu_round, "STEPS", {name: Step(call, ("-c", code)) for name, (call, code) in codes.items()})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a chip")


def run(out: Path, *arguments: str) -> Any:
    app = typer.Typer()
    app.command()(gpu_round.main)
    return CliRunner().invoke(app, ["--out", str(out), *arguments])


def ran(done: Any) -> list[str]:
    return re.findall(r"^(\S+), at most", done.output, re.MULTILINE)


def test_a_step_that_fails_is_told_and_stops_no_other(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert (done.exit_code, ran(done), "\nwhy\n" in done.output) == (1, ["first", "second", "third"], True)
    table = done.output.splitlines()[-4:]
    assert [line.split()[1].strip(",") for line in table] == ["status", "done", "failed", "done"]
    assert all(len(line) <= 100 for line in table)
    # A checkout that is not installed finds its packages.
    assert f"packages {ROOT}:{ROOT / 'kernels'}:" in (tmp_path / "call-1.log").read_text()
    # A folder of results is one file.
    assert {file.name for file in tmp_path.iterdir()} == {"round.json", "call-1.log", "call-2.log", "third.tar.gz"}
    assert b"third/results.json" in gzip.decompress((tmp_path / "third.tar.gz").read_bytes())


def test_what_is_done_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path / "one")
    assert ran(run(tmp_path / "one")) == ["second"]
    assert ran(run(tmp_path / "two", "--record", str(tmp_path / "one" / "round.json"))) == ["second"]
    assert ran(run(tmp_path / "two", "--call", "2", "--again")) == ["third"]
    assert json.loads((tmp_path / "two" / "round.json").read_text()).keys() == {"first", "second", "third"}
    monkeypatch.setitem(gpu_round.STEPS, "first", Step(1, ("-c", "print('other')")))
    assert ran(run(tmp_path / "one")) == ["first", "second"]


def test_steps_can_be_chosen(tmp_path: Path) -> None:
    assert ran(run(tmp_path, "--step", "third")) == ["third"]
    refused = run(tmp_path, "--call", "1", "--step", "third")
    words = " ".join(refused.output.replace("│", " ").split())
    assert (refused.exit_code, "must be one of first, second; got third" in words) == (2, True)


@pytest.mark.full
def test_a_step_ends_at_its_limit_with_all_its_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Ctrl-C may come while a busy machine still starts it.
    slow = """try:
    import fcntl, subprocess, sys; fcntl.flock(1, fcntl.LOCK_EX)
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]).wait()
except KeyboardInterrupt: print("kept")"""
    monkeypatch.setattr(gpu_round, "STEPS", {"slow": Step(1, ("-c", slow))})
    assert "slow         no time left" in run(tmp_path, "--limit", "30").output
    monkeypatch.setattr(gpu_round, "LEAST", 0)
    start, done = time.monotonic(), run(tmp_path, "--limit", str(gpu_round.RESERVE + gpu_round.GRACE + 8))
    assert re.search(r"\nkept\n\n.*\n.*\nslow +out of time \(124\)", done.output)
    # The lock is the step's own process's, too.
    with (tmp_path / "call-1.log").open() as log:
        fcntl.flock(log, fcntl.LOCK_EX)
    assert time.monotonic() - start < 55


def test_a_rehearsal_runs_nothing_and_says_what_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_round, "STEPS", STEPS)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run(tmp_path).exit_code == 2
    # What was rehearsed is not done.
    for seconds, status, more in ((40.0, 0, ()), (80.0, 1, ("--record", str(tmp_path / "rehearsal.json")))):
        monkeypatch.setattr(gpu_round, "planned_seconds", lambda _suite, seconds=seconds: seconds)
        done = run(tmp_path, "--rehearse", *more)
        assert (done.exit_code, ran(done)[:2]) == (status, ["tests", "floors"])
    assert {file.name for file in tmp_path.iterdir()} == {"rehearsal.json"}


@pytest.mark.full
def test_two_checkouts_are_measured_in_turn_with_the_wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    about = {"METADATA": "Metadata-Version: 2.1\nName: peer\nVersion: 1", "WHEEL": "Wheel-Version: 1.0", "RECORD": ""}
    with zipfile.ZipFile(tmp_path / "peer-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("peer.py", "print('peer', __import__('os').getcwd())")
        for name, text in about.items():
            wheel.writestr(f"peer-1.dist-info/{name}", text)
    monkeypatch.setattr(gpu_round, "_BENCH", ("-m", "peer"))
    options = ("--call", "4", "--before", str(tmp_path), "--wheels", str(tmp_path))
    assert [run(tmp_path, *each).exit_code for each in (options[:2], options)] == [2, 0]
    assert re.findall("peer (.+)", (tmp_path / "call-4.log").read_text()) == [str(tmp_path), str(ROOT)] * 2
    # Before and after are compared within one call.
    assert len(ran(run(tmp_path, *options))) == 4


def test_what_the_steps_run_is_there() -> None:
    assert (ROOT / STEPS["tune"].command[0]).is_file()
    assert ROOT / STEPS["files"].command[0] == Path(str(files.__file__))
    app = typer.Typer()
    app.command()(files.main)
    shown = CliRunner().invoke(app, [*STEPS["files"].command[1:], "--help"])
    assert shown.exit_code == 0, shown.output
    assert set(STEPS["files"].command[1].removeprefix("--part=").split(",")) <= files.PARTS.keys()
    assert {part[12:] for part in STEPS["tune"].command if part.startswith("--operation=")} <= OPERATIONS.keys()
    assert gpu_round.planned_seconds("quick") > gpu_round.SUITE_MORE


def test_tables_say_whether_they_were_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    table = json.loads((CONFIGS / "default.json").read_text())
    for name, measured in (("default", None), ("sm_90", {"attention": {"chip": "a chip"}})):
        (tmp_path / f"{name}.json").write_text(json.dumps({**table, "measured": measured}))
    monkeypatch.setattr("fastcls_kernels.runtime.tile_tables.CONFIGS", tmp_path)
    assert explain_tiles("sm_90") == "sm_90.json, measured for attention"
    assert explain_tiles("sm_80") == "default.json, chosen by compiling, not measured yet"
