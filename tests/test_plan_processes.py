"""fastcls plan --processes: what is added up, what it rests on, and that no process is left or fails unnamed."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import inside, model

from fastcls import Classifier, loading
from fastcls.flow import MAX_ROWS
from fastcls.tools import plan_report, processes, throughput
from fastcls.tools.demo import sample_texts
from fastcls.tools.plan_report import needs
from fastcls.tools.processes import Part, added_up, measure_together
from fastcls.tools.throughput import Block, Lengths, Measured

__all__ = ["model"]

MEAN = ("--mean-tokens", "20")
LENGTHS = Lengths([20] * 4, 20.0, None, 0, 1e-4)


@pytest.fixture(autouse=True)
def wide_and_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages stand on one line, and few texts are made up."""
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr(throughput, "TEXTS", 512)


def part(began: float, *blocks: Block) -> Part:
    return Part(LENGTHS, list(blocks), began, 1.0, {"host": 1})


def test_what_all_did_in_the_same_stretch_is_added_up() -> None:
    steady = part(10.0, *[Block(10, 100, 2.0)] * 5)
    # It begins later and ends later, and its first block is half as fast.
    other = part(11.0, Block(4, 20, 4.0), *[Block(8, 40, 4.0)] * 2)
    # From 11 to 20: two pieces of 4.5 s, since of less than the 4 s of a block nothing is known.
    assert added_up([steady, other]) == [
        Block(22.5 + 4 + 1, 225 + 20 + 5, 4.5),
        Block(22.5 + 9, 225 + 45, 4.5),
    ]


def test_the_stretch_has_ten_pieces_at_most_and_one_at_least() -> None:
    quick = part(0.0, *[Block(1, 8, 0.5)] * 100)
    assert added_up([quick, quick]) == [Block(20, 160, 5.0)] * 10
    slow = part(1.0, Block(64, 512, 32.0))
    assert added_up([quick, slow]) == [Block(64 + 64, 512 + 512, 32.0)]


@pytest.mark.parametrize("count", ["0", "-1", "1025"])
def test_numbers_of_processes_that_cannot_be_are_refused(count: str) -> None:
    done = inside("plan", "nowhere/at/all", "--texts", "9", *MEAN, "--processes", count)
    assert (done.exit_code, done.stdout) == (2, "")
    assert f"--processes must be from 1 to 1,024, got {count}" in done.stderr


def test_processes_on_a_gpu_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "parse_device", lambda _: torch.device("cuda:0"))
    done = inside("plan", "nowhere/at/all", "--texts", "9", *MEAN, "--processes", "2")
    assert done.exit_code == 2
    assert "--processes is for CPUs, got 2 on cuda:0: use --device cpu, or leave it out" in done.stderr


def test_blocks_are_as_large_as_windows() -> None:
    assert plan_report._HANDED_OUT == MAX_ROWS


@pytest.fixture
def in_two(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Stands in for a measurement by two processes: 30 texts a second."""
    given: list[Any] = []

    def together(classifier: Classifier, texts: list[str], seconds: float, *rest: Any) -> Measured:
        given.extend((type(classifier), len(texts), seconds, *rest[:2]))
        blocks = [Block(1, tokens, 2.0) for tokens in (800, 1600, 400, 1200, 2000)]
        return Measured(LENGTHS, blocks, 0.0, {"host": 2**31}, 9.0)

    monkeypatch.setattr(processes, "measure_together", together)
    return given


def report(model: Path, *options: str) -> str:
    done = inside("plan", model, *MEAN, "--device", "cpu", "--seconds", "3", *options)
    assert (done.exit_code, done.stderr) == (0, "")
    return done.stdout


def test_the_report_says_what_processes_rest_on(model: Path, in_two: list[Any]) -> None:
    threads = torch.get_num_threads()
    try:
        said = report(model, "--texts", "216_000", "--hours", "0.5", "--processes", "2")
    finally:
        torch.set_num_threads(threads)
    assert in_two == [Classifier, 512, 3.0, 2, 1], "a thread each, if nothing else is said"
    for line in (
        # 30 a second on a machine are 54,000 in half an hour, so that four machines have eight processes.
        "2 processes with 1 thread each; cpu",
        "memory of a process, at most  2.00 GiB",
        "Each machine is as this one and does nothing else: 2 processes with 1 thread each.",
        "each machine does it once; a process that starts and maps what was loaded took up to 9.0 s.",
        "blocks of up to 4,096, 27,000 in all to each process.",
        "the last blocks may take up to 15.17% of the time more",
        "it must give 120 texts a second to 4 machines. That was not measured.",
    ):
        assert line in said


def test_the_last_blocks_share_is_of_a_process(model: Path, in_two: list[Any]) -> None:
    threads = str(torch.get_num_threads())
    for texts, share in (("1e3", "up to 100.00%"), ("8.192e5", "up to 1.00%"), ("1e9", "less than 0.01%")):
        assert f"may take {share} of the time" in report(
            model, "--texts", texts, "--processes", "2", "--threads", threads
        )
    assert in_two[4] == int(threads)


def test_one_process_on_one_machine_waits_for_none(model: Path) -> None:
    quick = ("plan", model, "--texts", "1e3", *MEAN, "--seconds", "0.05", "--device", "cpu")
    alone = inside(*quick).stdout
    assert "one process with" in alone
    for part in ("handed out", "driver", "maps", "of a process"):
        assert part not in alone
    found = json.loads(inside(*quick, "--hours", "1e-4", "--json").stdout)
    assert found["machine"]["processes"] == 1
    assert found["measured"]["starting_seconds"] is None
    if found["plan"]["machines"] > 1:
        assert any("driver" in line for line in found["assumptions"])


@pytest.mark.full
def test_two_processes_measure_at_once(model: Path) -> None:
    threads = torch.get_num_threads()
    try:
        options = ("--seconds", "0.2", "--device", "cpu", "--processes", "2", "--hours", "1", "--json")
        done = inside("plan", model, "--texts", "1e9", *MEAN, *options)
    finally:
        torch.set_num_threads(threads)
    assert (done.exit_code, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    taken, planned = found["measured"], found["plan"]
    assert (found["machine"]["processes"], found["machine"]["threads"]) == (2, 1)
    assert taken["seconds"] >= 0.2
    assert taken["starting_seconds"] > 0
    assert taken["peak_memory_bytes"]["host"] > 2**20
    assert (taken["mean_tokens"], taken["tokens_limit"]) == (20, 96)
    assert taken["texts_per_second"] == taken["tokens_per_second"] / taken["mean_tokens_computed"]
    assert planned["machines"] == needs(10**9, taken["texts_per_second"], 1.0).machines
    assert planned["texts_per_second_handed_out"] == taken["texts_per_second"] * planned["machines"]
    assert multiprocessing.active_children() == []


@pytest.fixture
def classifier(model: Path) -> Classifier:
    return Classifier.from_pretrained(model, device="cpu")


@pytest.mark.full
def test_an_error_in_a_process_is_raised_by_its_name(classifier: Classifier) -> None:
    with pytest.raises(RuntimeError, match=r"^process 1 of 2 failed: IndexError: .*\n\nTraceback"):
        measure_together(classifier, [], 0.1, 2, 1, lambda _: None)
    assert multiprocessing.active_children() == []


def begun(then: Callable[[], None]) -> Callable[[float], None]:
    """Does something once processes have been measuring for a second."""

    def progress(done: float) -> None:
        if done > 1:
            then()

    return progress


@pytest.mark.full
@pytest.mark.skipif(os.name == "nt", reason="no signals")
def test_a_process_that_is_ended_is_named(classifier: Classifier) -> None:
    def kill() -> None:
        if len(children := multiprocessing.active_children()) == 2:
            children[0].kill()

    with pytest.raises(ValueError, match=r"^process [12] of 2 was ended by signal 9, .*: nothing was measured$"):
        measure_together(classifier, sample_texts(), 4.0, 2, 1, begun(kill))
    assert multiprocessing.active_children() == []


@pytest.mark.full
@pytest.mark.skipif(os.name == "nt", reason="no signals")
def test_ctrl_c_ends_the_processes_which_do_not_take_it_themselves(classifier: Classifier, capfd: Any) -> None:
    # What starts pytest in the background may have it ignore the signal.
    handler, kept = signal.getsignal(signal.SIGINT), list[Any]()

    def interrupt() -> None:
        if not kept:
            kept.extend(multiprocessing.active_children())
            for process in kept:
                assert process.pid
                os.kill(process.pid, signal.SIGINT)
            return
        assert all(process.is_alive() for process in kept)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_together(classifier, sample_texts(), 600.0, 2, 1, begun(interrupt))
    assert len(kept) == 2
    assert not any(process.is_alive() for process in kept)
    assert multiprocessing.active_children() == []
    assert signal.getsignal(signal.SIGINT) is handler
    assert "Traceback" not in capfd.readouterr().err
