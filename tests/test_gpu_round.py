"""The GPU round: every step runs, and a failure is told and stops nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gpu_round
import pytest
import typer
from gpu_round import ROOT, STEPS, Step
from typer.testing import CliRunner

from fastcls_kernels.runtime.tile_tables import CONFIGS, explain_tiles


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three steps that take no time; the second fails."""
    monkeypatch.setattr(
        gpu_round,
        "STEPS",
        {
            "first": Step("says where its packages are", ("-c", "import fastcls, sys; print(fastcls.__file__)")),
            "second": Step("fails", ("-c", "raise SystemExit(3)")),
            "third": Step("writes", ("-c", "open(r'{out}/third.json', 'w').write('1')")),
        },
    )


def run(*arguments: str) -> Any:
    app = typer.Typer()
    app.command()(gpu_round.main)
    return CliRunner().invoke(app, list(arguments))


@pytest.mark.usefixtures("steps")
def test_a_step_that_fails_is_told_and_stops_no_other(tmp_path: Path) -> None:
    done = run("--out", str(tmp_path / "new"))
    assert done.exit_code == 1
    assert "failed (3)" in done.output
    assert (tmp_path / "new" / "third.json").read_text() == "1"
    assert str(ROOT) in (tmp_path / "new" / "first.log").read_text()


@pytest.mark.usefixtures("steps")
def test_steps_can_be_chosen(tmp_path: Path) -> None:
    assert run("--out", str(tmp_path), "--step", "third").exit_code == 0
    assert {file.name for file in tmp_path.iterdir()} == {"third.log", "third.json"}
    refused = run("--out", str(tmp_path), "--step", "fourth")
    assert refused.exit_code == 2
    assert "must be one of first, second, third; got fourth" in " ".join(refused.output.replace("│", " ").split())


def test_a_step_that_takes_too_long_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Step("sleeps", ("-c", "import time; time.sleep(60)"))
    monkeypatch.setattr(gpu_round, "STEPS", {"slow": slow})
    done = run("--out", str(tmp_path), "--limit", "1")
    assert done.exit_code == 1
    assert "failed (124)" in done.output


def test_what_the_steps_run_is_there() -> None:
    scripts = [step.command[0] for step in STEPS.values() if step.command[0].endswith(".py")]
    assert scripts
    assert all((ROOT / script).is_file() for script in scripts)


def test_tables_say_whether_they_were_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    default = CONFIGS / "default.json"
    table = json.loads(default.read_text())
    for name, measured in (("default", None), ("sm_90", {"attention": {"chip": "a chip"}})):
        (tmp_path / f"{name}.json").write_text(json.dumps({**table, "measured": measured}))
    monkeypatch.setattr("fastcls_kernels.runtime.tile_tables.CONFIGS", tmp_path)
    assert explain_tiles("sm_90") == "sm_90.json, measured for attention"
    assert explain_tiles("sm_80") == "default.json, chosen by compiling, not measured yet"
