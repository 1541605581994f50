"""Requests to answers: a thread computes, passes that start the moment the model is free with what is there."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from .errors import RequestError, overloaded
from .fair_queue import FairQueue, Waiting
from .metrics import Metrics
from .options import ServeOptions
from .request import Answer, ClientGoneError, Pace, PassSize, Request, characters_of, tokens_of
from .served import Computing, Encoded, Input, Served, Side, Want

# Requests of more characters are tokenized by a thread of their own: words without end take seconds.
_MANY_CHARACTERS = 100_000
# Requests whose texts are tokenized in one call.
_REQUESTS_AT_ONCE = 64
# Between passes other work is done, too, so that a wait turns out longer than the passes before it; and who is taken is
# to be answered within the deadline.
_SHARE_OF_DEADLINE = 0.5
# No pass takes as long: the device or its driver hangs.
_SECONDS_OF_ANY_PASS = 120.0
# Between looks at whether the last pass has ended.
_SECONDS_TO_LOOK = 0.01

_T = TypeVar("_T")
_log = logging.getLogger(__name__)


class Passes:
    """Computes the texts of all requests on one device, a pass after the other.

    Args:
        models: those that are served.
        options: of the server.
        metrics: where passes are counted.

    Attributes:
        failing: models whose last pass failed.
    """

    def __init__(self, models: Sequence[Served], options: ServeOptions, metrics: Metrics) -> None:
        self._models, self._options, self._metrics = models, options, metrics
        self._size = PassSize(options.tokens_per_pass(models[0].device.type))
        self._queue, self._changed = FairQueue(), threading.Condition()
        self._untokenized: deque[Request] = deque()
        self._pace: dict[tuple[Computing, Want], Pace] = {}
        self._pending: set[Request] = set()
        self._by_spare: set[Future[Any]] = set()
        # First no further requests are taken, then what was taken is computed, then the thread ends.
        self._takes_more, self._is_closing = True, False
        self._loop: asyncio.AbstractEventLoop | None = None
        self.failing: set[Computing] = set()
        self._pass_begun: float | None = None
        # While a GPU computes a thread tokenizes. On a CPU the model takes all cores, and whoever tokenizes beside it
        # holds up one of them that the others then wait for: there the thread that computes does it between passes.
        self._tokenizes_between = models[0].device.type == "cpu"
        # A tokenizer keeps a state, so that one thread uses it; of texts that take long another one, with copies.
        self._tokenizing, self._tokenizing_long = ThreadPoolExecutor(1, "tokenizer"), ThreadPoolExecutor(1, "spare")
        self._computing: threading.Thread | None = None

    def start(self, warm_up: Callable[[Served], Sequence[tuple[Want, list[Encoded]]]]) -> None:
        """Computes once, so that no request pays for it, and begins. Called in the event loop's thread.

        Args:
            warm_up: what is computed of a model, before any request.

        Raises:
            Exception: whatever a model raises.
        """
        self._loop = asyncio.get_running_loop()
        failed: list[BaseException] = []

        def run() -> None:
            try:
                for served in self._models:
                    for want, texts in warm_up(served):
                        served.computing.compute(texts, want)
                        begun = time.monotonic()
                        served.computing.compute(texts, want)
                        pace = self._pace.setdefault((served.computing, want), Pace())
                        pace.add(sum(len(text.ids) for text in texts), time.monotonic() - begun)
            except BaseException as error:
                failed.append(error)
            finally:
                ready.set()
            if not failed:
                self._compute_all()

        ready = threading.Event()
        self._computing = threading.Thread(target=run, name="passes", daemon=True)
        self._computing.start()
        ready.wait()
        if failed:
            raise failed[0]

    @property
    def _untokenized_here(self) -> bool:
        """Whether requests wait for the thread that computes to tokenize them."""
        return self._tokenizes_between and bool(self._untokenized)

    @property
    def is_alive(self) -> bool:
        """Whether the thread that computes still runs, and does not hang in a pass."""
        begun = self._pass_begun
        is_stuck = begun is not None and time.monotonic() - begun > _SECONDS_OF_ANY_PASS
        return self._computing is not None and self._computing.is_alive() and not is_stuck

    @property
    def taken(self) -> int:
        """How many requests are being answered."""
        return len(self._pending) + len(self._by_spare)

    @property
    def waiting(self) -> int:
        """How many texts wait for a pass, tokenized or not."""
        with self._changed:
            return self._queue.texts + sum(len(each.inputs) for each in self._untaken)

    @property
    def _untaken(self) -> list[Request]:
        """Requests that are not in the queue yet. In the event loop's thread, with the lock."""
        return [each for each in self._pending if not each.tokenized and not each.is_over]

    async def answer(
        self,
        served: Served,
        want: Want,
        inputs: Sequence[Input],
        *,
        truncate: bool,
        side: Side,
        gone: Callable[[], Any],
        admitted: bool = False,
    ) -> Answer:
        """What is computed of a request's texts.

        Args:
            served: the model.
            want: what is computed.
            inputs: the texts, at least one.
            truncate, side: whether and where texts that are too long are cut.
            gone: a coroutine function that returns once the client has left.
            admitted: whether it is taken however many others are.

        Raises:
            RequestError: too many requests, a text that cannot be computed, or a pass that failed.
            ClientGoneError: the client has left.
        """
        self._check_takes_more(anyway=admitted)
        guess = 0.0 if admitted else self._admit(served, want, inputs)
        loop = asyncio.get_running_loop()
        request = Request(
            served, want, inputs, truncate, side, guess, time.monotonic() + self._options.deadline, loop.create_future()
        )
        self._pending.add(request)
        try:
            if characters_of(inputs) > _MANY_CHARACTERS:
                self._tokenizing_long.submit(self._tokenize, [request], by_spare=True)
            else:
                self._add(request)
            return await self._awaited(request.future, lambda: request.is_begun, gone)
        finally:
            self._pending.discard(request)
            if not request.future.done():
                self._drop(request)
                # Nobody awaits it, whatever becomes of it.
                request.future.cancel()

    async def with_spare(self, call: Callable[[], _T], gone: Callable[[], Any]) -> _T:
        """What a function gives that uses spare tokenizers, in the thread that may.

        Raises:
            RequestError: too many requests, or a wait beyond the deadline; and as the function.
            ClientGoneError: the client has left, see `answer`.
        """
        self._check_takes_more()
        submitted = self._tokenizing_long.submit(call)
        self._by_spare.add(submitted)
        # Not where its client leaves: a call that has begun goes on.
        submitted.add_done_callback(self._by_spare.discard)
        found = asyncio.wrap_future(submitted)
        try:
            return await self._awaited(found, lambda: submitted.running() or submitted.done(), gone)
        finally:
            found.cancel()

    async def _awaited(self, found: asyncio.Future[_T], is_begun: Callable[[], bool], gone: Callable[[], Any]) -> _T:
        """What a future gives, which has its deadline until it is begun.

        Raises:
            RequestError: it was not begun by then; and as the future.
            ClientGoneError: the client has left.
        """
        leaving = asyncio.ensure_future(gone())
        both = (found, leaving)
        try:
            await asyncio.wait(both, timeout=self._options.deadline, return_when=asyncio.FIRST_COMPLETED)
            if not found.done() and not leaving.done():
                if not is_begun():
                    raise self._late()
                await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if not found.done():
                raise ClientGoneError
            return found.result()
        finally:
            leaving.cancel()

    async def close(self) -> None:
        """Ends once all that was taken is computed, or the device hangs."""
        self._takes_more = False
        loop = asyncio.get_running_loop()
        for each in (self._tokenizing, self._tokenizing_long):
            await loop.run_in_executor(None, each.shutdown)
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        while self.is_alive:
            await asyncio.sleep(_SECONDS_TO_LOOK)
        if self._computing is not None and self._computing.is_alive():
            # It hangs. One that has ended has told all that it computed, which may be on its way.
            self._fail_all()

    def _check_takes_more(self, *, anyway: bool = False) -> None:
        if not self._takes_more:
            raise overloaded("the server is stopping")
        if not self.is_alive:
            raise RequestError("unhealthy: the thread that computes has ended", "Unhealthy")
        if not anyway and self.taken >= self._options.max_concurrent_requests:
            raise overloaded(f"{self.taken} requests are being answered")

    def _late(self) -> RequestError:
        return overloaded(f"the request cannot be answered within {self._options.deadline:g} s")

    def _add(self, request: Request) -> None:
        with self._changed:
            self._untokenized.append(request)
            if self._tokenizes_between:
                self._changed.notify()
        if not self._tokenizes_between:
            self._tokenizing.submit(self._tokenize_all)

    def _admit(self, served: Served, want: Want, inputs: Sequence[Input]) -> float:
        """Refuses a request that would wait too long; a guess at the seconds that one takes which is not refused."""
        pace = self._pace.get((served.computing, want))
        if pace is None:
            return 0.0
        tokens = sum(min(tokens_of(each), served.limit) for each in inputs)
        seconds = tokens * pace.seconds_a_token
        # Its turn comes when all others have been given as much, or all that they asked for.
        with self._changed:
            untaken = self._untaken
            cost = self._queue.cost + sum(each.guess for each in untaken)
            requests = self._queue.requests + len(untaken)
        wait = min(cost, requests * seconds)
        if wait > _SHARE_OF_DEADLINE * self._options.deadline:
            raise overloaded(f"it would wait for some {wait:.1f} s, and {self._options.deadline:g} s are allowed")
        return seconds

    def _tokenize_all(self) -> None:
        """Tokenizes the texts of the requests that have come, those alike in one call."""
        found: list[Request] = []
        with self._changed:
            characters = 0
            while self._untokenized and len(found) < _REQUESTS_AT_ONCE and characters < _MANY_CHARACTERS:
                request = self._untokenized.popleft()
                if not request.is_over:
                    found.append(request)
                    characters += characters_of(request.inputs)
        alike: dict[tuple[Served, bool, Side], list[Request]] = {}
        for request in found:
            alike.setdefault((request.served, request.truncate, request.side), []).append(request)
        for requests in alike.values():
            self._tokenize(requests)

    def _tokenize(self, requests: list[Request], *, by_spare: bool = False) -> None:
        """Tokenizes the texts of requests to one model that are cut alike."""
        requests = [each for each in requests if not each.is_over]
        if not requests:
            return
        begun = time.monotonic()
        first = requests[0]
        inputs = [each for request in requests for each in request.inputs]
        try:
            encoded = first.served.encode(inputs, first.truncate, first.side, by_spare=by_spare)
        # A tokenizer in Rust that panics raises no Exception.
        except BaseException as error:
            if len(requests) > 1:
                for request in requests:
                    self._tokenize([request], by_spare=by_spare)
                return
            # Without its message, which may hold a text.
            places = traceback.format_list(traceback.extract_tb(error.__traceback__))
            _log.error("a text was not tokenized: %s\n%s", type(error).__name__, "".join(places).rstrip())
            self._fail(first, RequestError(f"`inputs` cannot be tokenized: {type(error).__name__}", "Tokenizer"))
            return
        now = time.monotonic()
        for request in requests:
            own, encoded = encoded[: len(request.inputs)], encoded[len(request.inputs) :]
            request.waited, request.tokenization = begun - request.came, now - begun
            self._enqueue(request, own, now)

    def _enqueue(self, request: Request, encoded: list[Encoded | RequestError], now: float) -> None:
        errors = [each for each in encoded if isinstance(each, RequestError)]
        if errors:
            self._fail(request, errors[0])
            return
        group = (request.served.computing, request.want)
        seconds = self._pace.setdefault(group, Pace()).seconds_a_token
        texts = [each for each in encoded if isinstance(each, Encoded)]
        request.results = [None] * len(texts)
        request.left = len(texts)
        request.tokens = sum(len(each.ids) for each in texts)
        waiting = [
            Waiting(request, group, len(each.ids), len(each.ids) * seconds, each, index)
            for index, each in enumerate(texts)
        ]
        with self._changed:
            if not request.is_over:
                request.tokenized, request.waiting = now, waiting
                self._queue.put(waiting)
                self._changed.notify()

    def _drop(self, request: Request) -> None:
        """Leaves out what is not yet computed of a request."""
        with self._changed:
            request.is_over = True
            self._queue.drop(request.waiting)

    def _compute_all(self) -> None:
        """Passes, until closing. In a thread of its own."""
        try:
            self._compute_until_closing()
        except BaseException as error:
            _log.critical("the thread that computes has ended", exc_info=error)
            self._in_loop(self._fail_all)

    def _fail_all(self) -> None:
        """Answers those that nobody will compute. In the event loop's thread."""
        for request in list(self._pending):
            if not request.future.done():
                request.future.set_exception(RequestError("Inference failed", "Backend"))

    def _compute_until_closing(self) -> None:
        while True:
            with self._changed:
                while not self._queue.texts and not self._untokenized_here and not self._is_closing:
                    self._changed.wait()
            if self._untokenized_here:
                self._tokenize_all()
            with self._changed:
                taken = self._queue.next_pass(self._size.tokens, self._options.max_batch_requests)
                if not taken and not self._untokenized_here and self._is_closing:
                    return
            # What was begun is ended. A model that takes longer than a deadline for a pass computes all the same.
            pass_ends = time.monotonic() + min(sum(each.cost for each in taken), self._options.deadline / 2)
            for request in {each.owner for each in taken if not each.owner.is_begun}:
                if pass_ends > request.deadline:
                    self._fail(request, self._late())
            live = [each for each in taken if not each.owner.is_over]
            for each in live:
                each.owner.is_begun = True
            if live:
                self._pass(live)

    def _pass(self, texts: list[Waiting]) -> None:
        """Computes texts; where that fails, those alone fail for whose sake it does."""
        computing, want = texts[0].group
        begun = self._pass_begun = time.monotonic()
        is_done = is_too_large = False
        try:
            results = computing.compute([each.text for each in texts], want)
            is_done = True
        except Exception as error:
            is_too_large = isinstance(error, torch.OutOfMemoryError)
            if len(texts) == 1:
                self.failing.add(computing)
                self._fail(texts[0].owner, RequestError("Inference failed", "Backend"))
                _log.error("a pass failed", exc_info=error)
        seconds, tokens = time.monotonic() - begun, sum(each.tokens for each in texts)
        # Here, where no exception holds what the failed pass had on the device.
        if is_too_large:
            torch.cuda.empty_cache()
        self._pass_begun = None
        if not is_done:
            middle = len(texts) // 2
            if is_too_large and middle:
                self._size.did_not_fit(tokens)
                _log.warning("%d tokens do not fit into memory: a pass has %d for now", tokens, self._size.tokens)
            for part in (texts[:middle], texts[middle:]) if middle else ():
                self._pass(part)
            return
        self.failing.discard(computing)
        self._size.fitted()
        self._metrics.passed(len(texts), tokens, max(each.tokens for each in texts) * len(texts))
        self._pace[texts[0].group].add(tokens, seconds)
        for each, result in zip(texts, results, strict=True):
            request = each.owner
            request.results[each.index] = result
            request.left -= 1
            request.queue += begun - request.tokenized
            request.inference += seconds
        self._tell([request for request in {each.owner for each in texts} if not request.left])

    def _fail(self, request: Request, error: RequestError) -> None:
        request.error = error
        self._drop(request)
        self._tell([request])

    def _tell(self, requests: list[Request]) -> None:
        """Hands answers and errors to the event loop."""
        if requests:
            self._in_loop(_deliver, requests)

    def _in_loop(self, call: Callable[..., None], *args: Any) -> None:
        # An event loop that has ended, after a device that hung, has nobody left to tell.
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(call, *args)


def _deliver(requests: list[Request]) -> None:
    for request in requests:
        if request.future.done():
            continue
        if request.error is not None:
            request.future.set_exception(request.error)
        else:
            request.future.set_result(request.answer)
