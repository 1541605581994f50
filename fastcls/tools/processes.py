"""Processes that measure at the same time, as a machine is used whose every core has a process of its own."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import signal
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

from ..classifier import Classifier
from ..predicting.machine import read_mapped, write_mapped
from ..predicting.predictor import set_threads
from .throughput import WANTED_BLOCKS, Block, Lengths, Measured, lengths_of, measure, others_seconds, peak_memory

# How often a progress bar moves.
_TICK_SECONDS = 0.2


class Part(NamedTuple):
    """What one process measured.

    Attributes:
        lengths: as its tokenizer, with its threads and beside the others, makes them.
        blocks: one after another without gaps.
        began: when the first of them did, on the clock that all processes share.
        computing: the process's own time on all cores, while it measured.
        memory: what it held at most.
    """

    lengths: Lengths
    blocks: list[Block]
    began: float
    computing: float
    memory: dict[str, int]


class _Work(NamedTuple):
    """What each process is given: the model's file, texts, how long it measures and with how many threads."""

    model: Path
    texts: list[str]
    seconds: float
    threads: int


class _Failure(NamedTuple):
    """An error in a process."""

    summary: str
    trace: str


class _Member(NamedTuple):
    """A process, and the way to it."""

    name: str
    process: BaseProcess
    connection: Any

    def received(self) -> Any:
        """The process's next message.

        Raises:
            RuntimeError: its error.
            ValueError: it was ended.
        """
        try:
            message = self.connection.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            code = self.process.exitcode or 0
            how = f"by signal {-code}, as systems do whose memory is full" if code < 0 else f"with status {code}"
            raise ValueError(f"{self.name} was ended {how}: nothing was measured") from None
        if isinstance(message, _Failure):
            raise RuntimeError(f"{self.name} failed: {message.summary}\n\n{message.trace}")
        return message


def measure_together(
    classifier: Classifier,
    texts: list[str],
    seconds: float,
    processes: int,
    threads: int,
    progress: Callable[[float], None],
) -> Measured:
    """Has so many processes stream the texts at once, and adds up what they do in the same stretch of time.

    They map one copy of the weights, as those of Ray and Spark do.

    Args:
        classifier: on a CPU.
        texts, seconds, progress: see `measure`.
        processes: how many.
        threads: of each.

    Raises:
        RuntimeError: an error in a process, by its name.
        ValueError: a process that was ended, by its name.
    """
    with tempfile.TemporaryDirectory(prefix="fastcls-plan-") as folder:
        work = _Work(Path(folder, "model"), texts, seconds, threads)
        write_mapped(classifier, work.model)
        with _started(processes, work) as members:
            starting = max(member.received() for member in members)
            for member in members:
                # Its tokens are counted.
                member.received()
            others, began = others_seconds(), time.perf_counter()
            for member in members:
                member.connection.send(None)
            for member in members:
                while not member.connection.poll(_TICK_SECONDS):
                    progress(min(seconds, time.perf_counter() - began))
                # Its seconds are over; it goes on, so that the others are not measured with a core to spare.
                member.received()
            for member in members:
                member.connection.send(None)
            parts: list[Part] = [member.received() for member in members]
            took, others_after = time.perf_counter() - began, others_seconds()
    busy = None
    if others is not None and others_after is not None:
        busy = max(0.0, (others_after - others - sum(part.computing for part in parts)) / took)
    # Of the whole machine, whose processes tokenize side by side.
    tokenizing = statistics.fmean(part.lengths.seconds for part in parts) / processes
    memory = {kind: max(part.memory[kind] for part in parts) for kind in parts[0].memory}
    return Measured(parts[0].lengths._replace(seconds=tokenizing), added_up(parts), busy, memory, starting)


def added_up(parts: Sequence[Part]) -> list[Block]:
    """What all did together while each of them was measured, in pieces of the same length.

    No piece is shorter than a block, within which a process is taken to be steady.
    """
    began = max(part.began for part in parts)
    ended = min(part.began + sum(block.seconds for block in part.blocks) for part in parts)
    longest = max(block.seconds for part in parts for block in part.blocks)
    count = min(WANTED_BLOCKS, max(1, math.floor((ended - began) / longest)))
    step = (ended - began) / count
    done = [_done_until(parts, began + step * number) for number in range(count + 1)]
    return [
        Block(texts - texts_before, tokens - tokens_before, step)
        for (texts_before, tokens_before), (texts, tokens) in pairwise(done)
    ]


def _done_until(parts: Sequence[Part], moment: float) -> tuple[float, float]:
    """Texts and tokens that all have done by then."""
    texts = tokens = 0.0
    for part in parts:
        start = part.began
        for block in part.blocks:
            share = min(1.0, max(0.0, (moment - start) / block.seconds))
            texts, tokens = texts + share * block.texts, tokens + share * block.tokens
            start += block.seconds
    return texts, tokens


@contextlib.contextmanager
def _started(count: int, work: _Work) -> Iterator[list[_Member]]:
    """So many processes, none of which is left afterwards, whatever happens."""
    context = multiprocessing.get_context("spawn")
    members: list[_Member] = []
    try:
        # They inherit it: Ctrl-C reaches every process of a terminal, and this one ends the others.
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            for number in range(1, count + 1):
                ours, theirs = context.Pipe()
                process = context.Process(target=_run, args=(theirs, work, time.perf_counter()), daemon=True)
                process.start()
                # Theirs alone is open now, so that this end hears when the process is gone.
                theirs.close()
                members.append(_Member(f"process {number} of {count}", process, ours))
        finally:
            signal.signal(signal.SIGINT, handler)
        yield members
    finally:
        for member in members:
            member.process.terminate()
        for member in members:
            member.process.join()
            member.connection.close()


def _run(connection: Connection[Any, Any], work: _Work, asked: float) -> None:
    """What a process does: `measure_together` says what it sends, and what it is sent."""
    try:
        _measure(connection, work, asked)
    except (EOFError, ConnectionError):
        # Whoever started it is gone.
        return
    except Exception as error:
        connection.send(_Failure(f"{type(error).__name__}: {error}", traceback.format_exc()))


def _measure(connection: Connection[Any, Any], work: _Work, asked: float) -> None:
    set_threads(work.threads)
    classifier = read_mapped(work.model)
    connection.send(time.perf_counter() - asked)
    lengths = lengths_of(classifier, work.texts)
    connection.send(None)
    connection.recv()
    ends: list[float] = []
    is_told = False

    def ended(_: float) -> None:
        ends.append(time.perf_counter())
        if not is_told and connection.poll():
            # Nothing is sent until it has told that its seconds are over, but the end of whoever started it.
            connection.recv()

    def is_over() -> bool:
        nonlocal is_told
        if not is_told:
            connection.send(None)
            is_told = True
        return connection.poll()

    computing = time.process_time()
    blocks = measure(classifier, work.texts, lengths.tokens, work.seconds, ended, is_over)
    computing = time.process_time() - computing
    memory = peak_memory(classifier.model.device)
    connection.send(Part(lengths, blocks, ends[0] - blocks[0].seconds, computing, memory))
