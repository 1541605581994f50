"""Passes of a server: fair shares, one pass for many requests, none fails its neighbours, nobody waits too long."""

from __future__ import annotations

import asyncio
import functools
import threading
import time
import weakref
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("prometheus_client", reason="a server needs the extra serve")

from fastcls.serving.errors import RequestError
from fastcls.serving.fair_queue import FairQueue, Waiting
from fastcls.serving.metrics import Metrics
from fastcls.serving.options import ServeOptions
from fastcls.serving.passes import Passes
from fastcls.serving.request import Answer, ClientGoneError
from fastcls.serving.served import Encoded, Served
from fastcls.texts import Item

Test = Callable[..., Coroutine[Any, Any, None]]


def in_a_loop(test: Test) -> Callable[..., None]:
    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        asyncio.run(asyncio.wait_for(test(*args, **kwargs), 60))

    return run


def texts_of(owner: str, *tokens: int, group: str = "model") -> list[Waiting]:
    return [Waiting(owner, group, count, float(count), None, index) for index, count in enumerate(tokens)]


def owners(taken: Sequence[Waiting]) -> list[tuple[str, int]]:
    return [(each.owner, each.index) for each in taken]


def test_a_small_request_goes_before_the_rest_of_a_large_one() -> None:
    queue = FairQueue()
    queue.put(texts_of("large", *[100] * 20))
    assert owners(queue.next_pass(300)) == [("large", 0), ("large", 1), ("large", 2)]
    queue.put(texts_of("small", 10))
    # Whoever has waited longest has a place in each pass.
    assert owners(queue.next_pass(120)) == [("large", 3), ("small", 0)]
    assert queue.texts == 16
    assert queue.cost == 1600


def test_a_large_request_gets_its_share_however_many_small_ones_come() -> None:
    queue = FairQueue()
    queue.put(texts_of("large", *[100] * 10))
    for passes in range(1, 20):
        for number in range(20):
            queue.put(texts_of(f"small {passes} {number}", 10))
        if ("large", 9) in owners(queue.next_pass(300)):
            break
    assert ("large", 9) not in owners(queue.next_pass(300))
    assert 4 < passes < 19


def test_texts_that_fill_a_pass_each_hold_up_a_small_one_by_a_pass() -> None:
    queue = FairQueue()
    queue.put(texts_of("large", *[8192] * 32))
    assert owners(queue.next_pass(1024)) == [("large", 0)]
    queue.put(texts_of("small", 10))
    assert ("small", 0) in owners(queue.next_pass(1024)) + owners(queue.next_pass(1024))


def test_a_pass_holds_one_group_and_no_more_tokens_or_texts_than_allowed() -> None:
    queue = FairQueue()
    queue.put(texts_of("one", 5, 5, 5, group="a"))
    queue.put(texts_of("two", 5, 5, group="b"))
    assert owners(queue.next_pass(14)) == [("one", 0), ("one", 1)]
    assert owners(queue.next_pass(100, max_texts=1)) == [("one", 2)], "the oldest, every second time"
    assert owners(queue.next_pass(100, max_texts=1)) == [("two", 0)]
    assert owners(queue.next_pass(100)) == [("two", 1)]
    assert queue.next_pass(100) == []
    queue.put(texts_of("long", 500, 1))
    assert owners(queue.next_pass(100)) == [("long", 0)], "a text that alone has more is computed alone"


def test_a_large_request_for_one_model_does_not_hold_up_another_model() -> None:
    queue = FairQueue()
    queue.put(texts_of("large", *[100] * 20, group="a"))
    assert owners(queue.next_pass(200)) == [("large", 0), ("large", 1)]
    queue.put(texts_of("small", 10, group="b"))
    assert owners(queue.next_pass(200)) + owners(queue.next_pass(200)) == [("large", 2), ("large", 3), ("small", 0)]
    for number in range(10):
        queue.put(texts_of(f"small {number}", 10, group="b"))
        queue.next_pass(200)
    assert queue.cost < 1000, "neither do small ones hold up the large one"


def test_what_was_never_put_can_be_dropped() -> None:
    queue = FairQueue()
    queue.put(texts_of("stays", 5))
    queue.drop(texts_of("gone", 5, 5))
    assert (queue.texts, queue.cost, queue.requests) == (1, 5.0, 1)


def test_what_is_dropped_is_not_computed() -> None:
    queue = FairQueue()
    gone, stays = texts_of("gone", 5, 5, 5), texts_of("stays", 5)
    queue.put(gone)
    queue.put(stays)
    assert owners(queue.next_pass(5)) == [("gone", 0)]
    queue.drop(gone)
    assert (queue.texts, queue.cost, queue.requests) == (1, 5.0, 1)
    assert owners(queue.next_pass(100)) == [("stays", 0)]
    assert (queue.texts, queue.cost, queue.requests) == (0, 0.0, 0)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.lists(st.integers(1, 40), min_size=1, max_size=6)), max_size=12),
    st.integers(1, 100),
    st.lists(st.integers(0, 11), max_size=4),
)
def test_every_text_is_taken_once(requests: list[tuple[str, list[int]]], max_tokens: int, dropped: list[int]) -> None:
    queue = FairQueue()
    waiting = [texts_of(str(row), *tokens, group=group) for row, (group, tokens) in enumerate(requests)]
    for each in waiting:
        queue.put(each)
    gone = {row for row in dropped if row < len(waiting)}
    for row in gone:
        queue.drop(waiting[row])
    taken: list[Waiting] = []
    while part := queue.next_pass(max_tokens):
        assert len({each.group for each in part}) == 1
        assert len(part) == 1 or sum(each.tokens for each in part) <= max_tokens
        taken += part
    expected = [text for row, texts in enumerate(waiting) if row not in gone for text in texts]
    assert sorted(map(id, taken)) == sorted(map(id, expected))
    assert (queue.texts, queue.cost, queue.requests) == (0, 0.0, 0)


class Panic(BaseException):
    """What ends a tokenizer."""


class Model:
    """In place of a model: a text's answer is its number of tokens.

    7 tokens fail, 8 have the tokenizer refuse, and 9 have it panic.
    """

    name, kind, limit = "model", "classifier", 512
    wants = ("logits",)

    def __init__(self, seconds: float = 0.0, device: str = "cuda") -> None:
        self.device = torch.device(device)
        self.passes: list[list[int]] = []
        self.tokenized: list[int] = []
        self.may_end = threading.Event()
        self.may_end.set()
        self.may_tokenize = threading.Event()
        self.seconds = seconds

    @property
    def computing(self) -> Model:
        return self

    def encode(
        self, inputs: Sequence[Any], truncate: bool, side: str, *, by_spare: bool
    ) -> list[Encoded | RequestError]:
        del truncate, side
        self.tokenized.append(len(inputs))
        if by_spare:
            assert self.may_tokenize.wait(30)
        if 9 in map(len, (each.text for each in inputs)):
            # As tokenizers in Rust raise what is no Exception.
            raise Panic
        lengths = [len(each.text) for each in inputs]
        return [
            RequestError("eight", "Tokenizer")
            if length == 8
            else Encoded(np.ones(length, np.int64), np.zeros(0, np.int64))
            for length in lengths
        ]

    def compute(self, texts: Sequence[Encoded], want: str) -> list[int]:
        del want
        lengths = [len(text.ids) for text in texts]
        self.passes.append(lengths)
        self.may_end.wait(30)
        time.sleep(self.seconds * sum(lengths))
        if 7 in lengths:
            raise RuntimeError("seven")
        return lengths


async def never() -> None:
    await asyncio.Event().wait()


class Running:
    """Passes over a model in place of one, begun and ended."""

    def __init__(self, model: Model, **options: Any) -> None:
        self.model = model
        self.metrics = Metrics(lambda: self.passes.waiting)
        self.passes = Passes([cast(Served, model)], ServeOptions(**options), self.metrics)

    async def __aenter__(self) -> Running:
        ids = np.ones(10, np.int64)
        self.passes.start(lambda _: [("logits", [Encoded(ids, ids)])])
        self.model.passes.clear()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.model.may_end.set()
        await self.passes.close()

    async def held(self) -> asyncio.Task[Answer]:
        """A request of a text of three tokens, whose pass does not end before the model may."""
        self.model.may_end.clear()
        first = asyncio.create_task(self.ask("abc"))
        await until(lambda: self.model.passes == [[3]])
        return first

    async def ask(self, *texts: str, gone: Callable[[], Any] = never, admitted: bool = False) -> Answer:
        items = [Item(text, None) for text in texts]
        return await self.passes.answer(
            cast(Served, self.model), "logits", items, truncate=True, side="right", gone=gone, admitted=admitted
        )


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


# While a GPU computes another thread tokenizes; on a CPU the same one, between passes.
both = pytest.mark.parametrize("device", ["cpu", "cuda"])


@both
@in_a_loop
async def test_requests_share_a_pass_which_waits_for_nobody(device: str) -> None:
    model = Model(device=device)
    async with Running(model) as running:
        first = await running.held()
        others = [asyncio.create_task(running.ask("a" * length, "b")) for length in (1, 2)]
        # On a GPU they are tokenized meanwhile.
        await until(lambda: running.passes.waiting == 4 and (device == "cpu" or running.passes._queue.texts == 4))
        model.may_end.set()
        assert (await first).results == [3]
        assert [(await other).results for other in others] == [[1, 1], [2, 1]]
        assert len(model.passes) == 2
        answer = await running.ask("abcd", "ab")
        assert (answer.results, answer.tokens) == ([4, 2], 6)
        assert answer.inference > 0
    metrics = running.metrics.text().decode()
    assert "fastcls_texts 7.0" in metrics
    assert "fastcls_computed_tokens 14.0" in metrics
    assert "te_batch_next_tokens_sum 14.0" in metrics


@both
@in_a_loop
async def test_one_bad_text_fails_its_own_request_alone(device: str) -> None:
    model = Model(device=device)
    async with Running(model) as running:
        first = await running.held()
        asked = [("ok",), ("a", "sevenxx", "b"), ("fine",), ("eightxxx", "c")]
        others = [asyncio.create_task(running.ask(*texts)) for texts in asked]
        # Of the six texts the tokenizer refuses one, and with it a request of two.
        await until(lambda: running.passes.waiting == (7 if device == "cpu" else 5))
        model.may_end.set()
        found = await asyncio.gather(first, *others, return_exceptions=True)
        assert [each.results for each in found if isinstance(each, Answer)] == [[3], [2], [4]]
        failed, refused = found[2], found[4]
        assert isinstance(failed, RequestError)
        assert (failed.status, failed.message) == (424, "Inference failed")
        assert isinstance(refused, RequestError)
        assert (refused.status, refused.message) == (422, "eight")
        assert [7] in model.passes
        assert running.passes.is_alive


@in_a_loop
async def test_a_failure_is_known_until_a_pass_succeeds() -> None:
    async with Running(Model()) as running:
        with pytest.raises(RequestError):
            await running.ask("sevenxx")
        assert running.passes.failing == {running.model}
        await running.ask("ok")
        assert not running.passes.failing
    assert "fastcls_texts 1.0" in running.metrics.text().decode(), "what failed was not computed"


@in_a_loop
async def test_a_pass_that_does_not_fit_is_halved_and_so_are_those_after_it() -> None:
    model, held, fits = Model(), list[weakref.ref[torch.Tensor]](), 10

    def within_memory(texts: Sequence[Encoded], want: str) -> list[int]:
        assert not any(each() is not None for each in held), "what a failed pass held is free before its parts"
        if sum(len(text.ids) for text in texts) > fits:
            on_device = torch.zeros(1)
            held.append(weakref.ref(on_device))
            raise torch.OutOfMemoryError
        return Model.compute(model, texts, want)

    model.compute = within_memory  # type: ignore[method-assign]
    async with Running(model) as running:
        assert (await running.ask(*["abcd"] * 5)).results == [4] * 5
        assert len(held) == 2, "20 tokens, and 12 of them"
        assert (await running.ask(*["ab"] * 20)).results == [2] * 20
        assert len(held) == 2, "passes are small for a while"
        fits = 10_000
        for _ in range(64):
            await running.ask("a")
        model.passes.clear()
        assert (await running.ask(*["ab"] * 20)).results == [2] * 20
        assert model.passes == [[2] * 20], "and as large as before once they have fitted"


@in_a_loop
async def test_a_text_that_never_fits_makes_no_pass_smaller_or_larger() -> None:
    model = Model()

    def within_memory(texts: Sequence[Encoded], want: str) -> list[int]:
        if sum(len(text.ids) for text in texts) > 100:
            raise torch.OutOfMemoryError
        return Model.compute(model, texts, want)

    model.compute = within_memory  # type: ignore[method-assign]
    async with Running(model, max_batch_tokens=20) as running:
        with pytest.raises(RequestError, match="failed"):
            await running.ask("a" * 200)
        await running.ask(*["abcd"] * 10)
        assert model.passes == [[4] * 5] * 2


@both
@in_a_loop
async def test_a_wait_to_be_tokenized_is_a_wait_in_the_queue(device: str) -> None:
    model = Model(device=device)
    async with Running(model) as running:
        first = await running.held()
        second = asyncio.create_task(running.ask("abcd"))
        await asyncio.sleep(0.3)
        model.may_end.set()
        await first
        assert (await second).queue >= 0.1


@in_a_loop
async def test_health_is_asked_for_however_many_wait() -> None:
    model = Model()
    async with Running(model, max_concurrent_requests=1) as running:
        first = await running.held()
        with pytest.raises(RequestError, match="1 requests"):
            await running.ask("a")
        health = asyncio.create_task(running.ask("a", admitted=True))
        await until(lambda: running.passes.waiting == 1)
        model.may_end.set()
        assert ((await first).results, (await health).results) == ([3], [1])


@both
@in_a_loop
async def test_what_a_client_left_behind_is_not_computed(device: str) -> None:
    model = Model(device=device)
    async with Running(model) as running:
        first = await running.held()
        leave = asyncio.Event()
        gone = asyncio.create_task(running.ask("xx", "xx", gone=leave.wait))
        cancelled = asyncio.create_task(running.ask("yyyy"))
        stays = asyncio.create_task(running.ask("z"))
        await until(lambda: running.passes.waiting == 4)
        leave.set()
        cancelled.cancel()
        with pytest.raises(ClientGoneError):
            await gone
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        assert running.passes.waiting == 1
        model.may_end.set()
        assert ((await first).results, (await stays).results) == ([3], [1])
        assert model.passes == [[3], [1]]


@both
@in_a_loop
async def test_a_tokenizer_that_panics_fails_one_request_alone(device: str) -> None:
    model = Model(device=device)
    async with Running(model) as running:
        first = await running.held()
        others = [asyncio.create_task(running.ask(text)) for text in ("ok", "nine char", "fine")]
        await asyncio.sleep(0.01)
        model.may_end.set()
        found = await asyncio.gather(first, *others, return_exceptions=True)
        assert [each.results for each in found if isinstance(each, Answer)] == [[3], [2], [4]]
        assert isinstance(found[2], RequestError)
        assert (found[2].status, found[2].message) == (422, "`inputs` cannot be tokenized: Panic")


@in_a_loop
async def test_what_waits_for_the_spare_tokenizer_counts_and_is_dropped() -> None:
    model = Model()
    async with Running(model, max_concurrent_requests=3) as running:
        long = asyncio.create_task(running.ask("a" * 100_001))
        await until(lambda: model.tokenized == [1])
        leave, called = asyncio.Event(), list[int]()
        gone = asyncio.create_task(running.ask("b" * 100_001, gone=leave.wait))
        counted = asyncio.create_task(running.passes.with_spare(lambda: called.append(1), leave.wait))
        await until(lambda: running.passes.taken == 3)
        assert running.passes.waiting == 2
        with pytest.raises(RequestError, match="3 requests"):
            await running.passes.with_spare(lambda: None, never)
        leave.set()
        for each in (gone, counted):
            with pytest.raises(ClientGoneError):
                await each
        await until(lambda: running.passes.taken == 1)
        model.may_tokenize.set()
        assert (await long).results == [100_001]
        assert await running.passes.with_spare(lambda: 5, never) == 5
        assert model.tokenized == [1]
        assert called == []


@in_a_loop
async def test_a_call_of_a_spare_tokenizer_has_a_deadline_until_it_begins_and_counts_until_it_ends() -> None:
    begun, may_end = threading.Event(), threading.Event()

    def call() -> int:
        begun.set()
        assert may_end.wait(30)
        return 5

    async with Running(Model(), deadline=1.0) as running:
        first = asyncio.create_task(running.passes.with_spare(call, never))
        await until(begun.is_set)
        with pytest.raises(RequestError, match="answered within 1 s") as refused:
            await running.passes.with_spare(call, never)
        assert refused.value.status == 429
        assert not first.done(), "what has begun is ended"
        may_end.set()
        assert await first == 5
    begun.clear()
    may_end.clear()
    async with Running(Model()) as running:
        leave = asyncio.Event()
        left = asyncio.create_task(running.passes.with_spare(call, leave.wait))
        await until(begun.is_set)
        leave.set()
        with pytest.raises(ClientGoneError):
            await left
        assert running.passes.taken == 1
        may_end.set()
        await until(lambda: running.passes.taken == 0)


@in_a_loop
async def test_a_device_that_hangs_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    running = Running(Model())
    async with running:
        first = await running.held()
        monkeypatch.setattr("fastcls.serving.passes._SECONDS_OF_ANY_PASS", 0.01)
        await until(lambda: not running.passes.is_alive)
        await running.passes.close()
        with pytest.raises(RequestError, match="stopping"):
            await running.ask("a")
        with pytest.raises(RequestError, match="failed"):
            await first


@in_a_loop
async def test_a_thread_that_ends_leaves_nobody_without_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    running = Running(Model())
    async with running:

        def fail(*_: object) -> list[Waiting]:
            raise MemoryError

        monkeypatch.setattr(FairQueue, "next_pass", fail)
        with pytest.raises(RequestError, match="Inference failed"):
            await running.ask("abc")
        await until(lambda: not running.passes.is_alive)
        with pytest.raises(RequestError, match="has ended") as refused:
            await running.ask("abc")
        assert refused.value.status == 503


@in_a_loop
async def test_a_text_that_is_tokenized_for_long_holds_up_no_other() -> None:
    model = Model()
    async with Running(model) as running:
        long = asyncio.create_task(running.ask("a" * 100_001))
        await until(lambda: model.tokenized == [1])
        assert (await running.ask("abc")).results == [3]
        assert not long.done()
        model.may_tokenize.set()
        assert (await long).results == [100_001]


@in_a_loop
async def test_too_many_requests_are_refused_at_once() -> None:
    model = Model()
    async with Running(model, max_concurrent_requests=2) as running:
        model.may_end.clear()
        taken = [asyncio.create_task(running.ask("abc")) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(RequestError, match="2 requests are being answered") as refused:
            await running.ask("abc")
        assert refused.value.status == 429
        model.may_end.set()
        await asyncio.gather(*taken)
        assert (await running.ask("abc")).results == [3]


@both
@in_a_loop
async def test_who_would_wait_longer_than_the_deadline_is_refused_at_once(device: str) -> None:
    # So slow it is while it warms up, which says how long others will take.
    model = Model(device=device, seconds=0.02)
    async with Running(model, deadline=3.0) as running:
        model.seconds = 0.0
        first = await running.held()
        second = asyncio.create_task(running.ask("a" * 400))
        await until(lambda: running.passes.waiting == 1)
        # It waits for what the second one takes, or for as much as it takes itself; a short text for next to nothing.
        with pytest.raises(RequestError, match=r"would wait for some \d\.\d s, and 3 s") as refused:
            await running.ask("a" * 1000)
        assert refused.value.status == 429
        short = asyncio.create_task(running.ask("a"))
        await until(lambda: running.passes.waiting == 2)
        model.may_end.set()
        assert [each.results for each in await asyncio.gather(first, second, short)] == [[3], [400], [1]]


@both
@in_a_loop
async def test_who_has_waited_longer_than_the_deadline_is_not_computed(device: str) -> None:
    model = Model(device=device)
    async with Running(model, deadline=1.0) as running:
        first = await running.held()
        late = asyncio.create_task(running.ask("ab"))
        await until(lambda: running.passes.waiting == 1)
        await asyncio.sleep(1.1)
        model.may_end.set()
        assert (await first).results == [3]
        with pytest.raises(RequestError, match="answered within 1 s") as refused:
            await late
        assert refused.value.status == 429
        assert model.passes == [[3]]


@both
@in_a_loop
async def test_closing_answers_what_was_taken_and_takes_no_more(device: str) -> None:
    model = Model(device=device)
    running = Running(model)
    async with running:
        model.may_end.clear()
        taken = [asyncio.create_task(running.ask("abc", "d")) for _ in range(20)]
        await until(lambda: bool(model.passes))
        threading.Timer(0.05, model.may_end.set).start()
    assert [(await each).results for each in taken] == [[3, 1]] * 20
    with pytest.raises(RequestError, match="stopping"):
        await running.ask("abc")


@in_a_loop
async def test_a_model_that_cannot_be_warmed_up_ends_the_start() -> None:
    running = Running(Model())
    with pytest.raises(RuntimeError, match="seven"):
        running.passes.start(lambda _: [("logits", [Encoded(np.ones(7, np.int64), np.zeros(0, np.int64))])])
