"""The report of floors: what it counts, and that nobody is timed who is wrong."""

from __future__ import annotations

from typing import Any

import floors
import pytest
import torch
import typer
from floors import GOALS, Goal, Rates, floor_of, measure
from rich.console import Console
from support import tiny_bert
from typer.testing import CliRunner

from fastcls_benchmarks.providers import FASTCLS, PACKED_COMPILED, SDPA
from fastcls_benchmarks.workloads import Workload

QUIET = Console(quiet=True)


def test_the_floor_is_the_useful_work() -> None:
    width, texts, length, layers = 768, 32, 128, 12
    tokens = texts * length
    full_layer = 2 * 12 * width**2 * tokens + 4 * width * texts * length**2
    last_layer = 4 * 12 * width * tokens + 2 * 12 * width**2 * texts
    pooler = 2 * width**2 * texts
    floor = floor_of(Goal("bert-base", Workload(texts, str(length))), Rates(1e15, 1e15))
    assert floor.tokens == tokens
    assert floor.flops == (layers - 1) * full_layer + last_layer + pooler
    assert floor.seconds == pytest.approx(floor.flops / 1e15)


def test_of_one_text_the_floor_is_reading_the_weights() -> None:
    floor = floor_of(Goal("bert-base", Workload(1, "128")), Rates(790e12, 4.3e12))
    assert floor.seconds == pytest.approx(12 * 12 * 768**2 * 2 / 4.3e12)


def test_no_goal_lies_below_its_floor() -> None:
    for goal in GOALS:
        floor = floor_of(goal, Rates(790e12, 4.3e12))
        assert goal.milliseconds is None or floor.seconds * 1e3 < goal.milliseconds


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model that a CPU times at once, without the peer that has to be compiled."""

    def no_compiler(_self: object) -> Any:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(floors.Resident, "packed_compiled", no_compiler)
    return tiny_bert(vocab_size=30522, num_labels=2)


def test_who_is_right_is_timed_and_who_breaks_is_named(small: Any) -> None:
    case, failed = measure(Goal("tiny", Workload(4, "sst2")), small, 0.01, QUIET)
    assert {SDPA.name, FASTCLS.name} <= set(case.seconds)
    assert failed == {PACKED_COMPILED.name: "RuntimeError: no compiler"}


def test_who_is_wrong_is_not_timed(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floors, "unpack_rows", lambda _parts: torch.zeros(4, 2))
    case, failed = measure(Goal("tiny", Workload(4, "sst2")), small, 0.01, QUIET)
    assert FASTCLS.name not in case.seconds
    assert "logits differ by" in failed[FASTCLS.name]


def run(*arguments: str) -> Any:
    app = typer.Typer()
    app.command()(floors.main)
    return CliRunner().invoke(app, list(arguments))


def test_the_report_needs_no_gpu() -> None:
    report = run("--tflops", "395")
    assert report.exit_code == 0
    assert "bert-base" in report.output
    assert "Rates assumed: 395 TFLOP/s" in report.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_measuring_without_a_gpu_is_refused() -> None:
    refused = run("--measure")
    assert refused.exit_code == 2
    assert "needs a GPU" in refused.output
    assert run("--out", "x.json").exit_code == 2
