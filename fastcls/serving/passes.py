"""Requests to answers: a thread computes, passes that start the moment the model is free with what is there."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from ..texts import Item
from .errors import RequestError, overloaded
from .fair_queue import FairQueue, Waiting
from .metrics import Metrics
from .options import ServeOptions
from .served import Computing, Encoded, Input, Served, Side, Want

# A guess at a text's tokens before it is tokenized: English has some four characters a token, and two are special.
_CHARACTERS_A_TOKEN, _SPECIAL = 4, 2
# Requests of more characters are tokenized by a thread of their own: words without end take seconds.
_MANY_CHARACTERS = 100_000
# Requests whose texts are tokenized in one call.
_REQUESTS_AT_ONCE = 64
# Of what was measured before a pass so much still counts after it.
_KEPT = 0.9

_T = TypeVar("_T")
_log = logging.getLogger(__name__)


class Answer(NamedTuple):
    """What became of a request's texts.

    Attributes:
        results: of each text, what `Served.compute` gives.
        tokens: how many were computed.
        tokenization, queue, inference: seconds; the last two are means over the texts.
    """

    results: list[Any]
    tokens: int
    tokenization: float
    queue: float
    inference: float


@dataclass(eq=False, slots=True)
class _Request:
    """The texts of a request, on their way."""

    served: Served
    want: Want
    inputs: Sequence[Input]
    truncate: bool
    side: Side
    guess: float
    deadline: float
    future: asyncio.Future[Answer]
    waiting: list[Waiting] = field(default_factory=list)
    results: list[Any] = field(default_factory=list)
    error: Exception | None = None
    left: int = 0
    tokens: int = 0
    tokenized: float = 0.0
    tokenization: float = 0.0
    queue: float = 0.0
    inference: float = 0.0
    is_over: bool = False

    @property
    def is_untouched(self) -> bool:
        """Whether nothing was computed of it."""
        return self.left == len(self.results)

    @property
    def answer(self) -> Answer:
        count = len(self.results)
        return Answer(self.results, self.tokens, self.tokenization, self.queue / count, self.inference / count)


class _Pace:
    """How fast a model computes, by its passes, of which later ones and larger ones count for more."""

    def __init__(self) -> None:
        self._tokens = self._seconds = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        self._tokens = _KEPT * self._tokens + tokens
        self._seconds = _KEPT * self._seconds + seconds

    @property
    def seconds_a_token(self) -> float:
        return self._seconds / self._tokens if self._tokens else 0.0


class Passes:
    """Computes the texts of all requests on one device, a pass after the other.

    Args:
        models: those that are served.
        options: of the server.
        metrics: where passes are counted.

    Attributes:
        failure: why the last pass failed; None if it did not.
    """

    def __init__(self, models: Sequence[Served], options: ServeOptions, metrics: Metrics) -> None:
        self._models, self._options, self._metrics = models, options, metrics
        self._max_tokens = options.tokens_per_pass(models[0].device.type)
        self._queue, self._changed = FairQueue(), threading.Condition()
        self._untokenized: deque[_Request] = deque()
        self._untokenized_cost = 0.0
        self._pace: dict[tuple[Computing, Want], _Pace] = {}
        self._taken = 0
        self._is_closing = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self.failure: str | None = None
        # While a GPU computes a thread tokenizes. On a CPU the model takes all cores, and whoever tokenizes beside it
        # holds up one of them that the others then wait for: there the thread that computes does it between passes.
        self._tokenizes_between = models[0].device.type == "cpu"
        # A tokenizer keeps a state, so that one thread uses it; of texts that take long another one, with copies.
        self._tokenizing, self._tokenizing_long = ThreadPoolExecutor(1, "tokenizer"), ThreadPoolExecutor(1, "spare")
        self._computing = threading.Thread(target=self._compute_all, name="passes", daemon=True)

    def start(self, warm_up: Callable[[Served], Sequence[tuple[Want, list[Encoded]]]]) -> None:
        """Computes once, so that no request pays for it, and begins. Called in the event loop's thread.

        Args:
            warm_up: what is computed of a model, before any request.

        Raises:
            Exception: whatever a model raises.
        """
        self._loop = asyncio.get_running_loop()
        failed: list[BaseException] = []

        def begin() -> None:
            try:
                for served in self._models:
                    for want, texts in warm_up(served):
                        served.computing.compute(texts, want)
                        begun = time.monotonic()
                        served.computing.compute(texts, want)
                        pace = self._pace.setdefault((served.computing, want), _Pace())
                        pace.add(sum(len(text.ids) for text in texts), time.monotonic() - begun)
            except BaseException as error:
                failed.append(error)
            finally:
                ready.set()

        ready = threading.Event()
        self._begin = begin
        self._computing.start()
        ready.wait()
        if failed:
            self._is_closing = True
            raise failed[0]

    @property
    def _untokenized_here(self) -> bool:
        """Whether requests wait for the thread that computes to tokenize them."""
        return self._tokenizes_between and bool(self._untokenized)

    @property
    def is_alive(self) -> bool:
        """Whether the thread that computes still runs."""
        return self._computing.is_alive()

    @property
    def waiting(self) -> int:
        """How many texts wait for a pass, tokenized or not."""
        return self._queue.texts + sum(len(each.inputs) for each in list(self._untokenized) if not each.is_over)

    async def answer(
        self,
        served: Served,
        want: Want,
        inputs: Sequence[Input],
        *,
        truncate: bool,
        side: Side,
        gone: Callable[[], Any],
    ) -> Answer:
        """What is computed of a request's texts.

        Args:
            served: the model.
            want: what is computed.
            inputs: the texts, at least one.
            truncate, side: whether and where texts that are too long are cut.
            gone: a coroutine function that returns once the client has left.

        Raises:
            RequestError: too many requests, a text that cannot be computed, or a pass that failed.
            ClientGoneError: the client has left.
        """
        guess = self._admit(served, want, inputs)
        loop = asyncio.get_running_loop()
        now = time.monotonic()
        request = _Request(
            served, want, inputs, truncate, side, guess, now + self._options.deadline, loop.create_future()
        )
        self._taken += 1
        leaving = asyncio.ensure_future(gone())
        try:
            if _characters(inputs) > _MANY_CHARACTERS:
                self._tokenizing_long.submit(self._tokenize, [request], by_spare=True)
            else:
                self._add(request)
            await asyncio.wait((request.future, leaving), return_when=asyncio.FIRST_COMPLETED)
            if request.future.done():
                return request.future.result()
            raise ClientGoneError
        finally:
            self._taken -= 1
            leaving.cancel()
            if not request.future.done():
                self._drop(request)

    async def with_spare(self, call: Callable[[], _T]) -> _T:
        """What a function gives that uses spare tokenizers, in the thread that may."""
        return await asyncio.get_running_loop().run_in_executor(self._tokenizing_long, call)

    async def close(self) -> None:
        """Ends once all that was taken is computed."""
        loop = asyncio.get_running_loop()
        for each in (self._tokenizing, self._tokenizing_long):
            await loop.run_in_executor(None, each.shutdown)
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        await loop.run_in_executor(None, self._computing.join)

    def _add(self, request: _Request) -> None:
        with self._changed:
            self._untokenized.append(request)
            self._untokenized_cost += request.guess
            if self._tokenizes_between:
                self._changed.notify()
        if not self._tokenizes_between:
            self._tokenizing.submit(self._tokenize_all)

    def _admit(self, served: Served, want: Want, inputs: Sequence[Input]) -> float:
        """Refuses a request that would wait too long; a guess at the seconds that one takes which is not refused."""
        if self._is_closing:
            raise overloaded("the server is stopping")
        if self._taken >= self._options.max_concurrent_requests:
            raise overloaded(f"{self._taken} requests are being answered")
        pace = self._pace.get((served.computing, want))
        if pace is None:
            return 0.0
        tokens = sum(min(_tokens(each), served.limit) for each in inputs)
        seconds = tokens * pace.seconds_a_token
        # Its turn comes when all others have been given as much, or all that they asked for.
        cost, requests = self._queue.cost + self._untokenized_cost, self._queue.requests + len(self._untokenized)
        wait = min(cost, requests * seconds)
        if wait > self._options.deadline:
            raise overloaded(f"it would wait for {wait:.1f} s, and at most {self._options.deadline:g} s are allowed")
        return seconds

    def _tokenize_all(self) -> None:
        """Tokenizes the texts of the requests that have come, those alike in one call."""
        found: list[_Request] = []
        with self._changed:
            while self._untokenized and len(found) < _REQUESTS_AT_ONCE:
                request = self._untokenized.popleft()
                # Sums of floats drift.
                self._untokenized_cost = self._untokenized_cost - request.guess if self._untokenized else 0.0
                if not request.is_over:
                    found.append(request)
        alike: dict[tuple[Served, bool, Side], list[_Request]] = {}
        for request in found:
            alike.setdefault((request.served, request.truncate, request.side), []).append(request)
        for requests in alike.values():
            self._tokenize(requests)

    def _tokenize(self, requests: list[_Request], *, by_spare: bool = False) -> None:
        """Tokenizes the texts of requests to one model that are cut alike."""
        begun = time.monotonic()
        first = requests[0]
        inputs = [each for request in requests for each in request.inputs]
        try:
            encoded = first.served.encode(inputs, first.truncate, first.side, by_spare=by_spare)
        # A tokenizer in Rust that panics raises no Exception.
        except BaseException as error:
            for request in requests:
                self._fail(request, RequestError(f"the tokenizer failed: {type(error).__name__}", "Backend"))
            return
        now = time.monotonic()
        for request in requests:
            own, encoded = encoded[: len(request.inputs)], encoded[len(request.inputs) :]
            request.tokenized, request.tokenization = now, now - begun
            self._enqueue(request, own)

    def _enqueue(self, request: _Request, encoded: list[Encoded | RequestError]) -> None:
        errors = [each for each in encoded if isinstance(each, RequestError)]
        if errors:
            self._fail(request, errors[0])
            return
        group = (request.served.computing, request.want)
        seconds = self._pace.setdefault(group, _Pace()).seconds_a_token
        texts = [each for each in encoded if isinstance(each, Encoded)]
        request.results = [None] * len(texts)
        request.left = len(texts)
        request.tokens = sum(len(each.ids) for each in texts)
        request.waiting = [
            Waiting(request, group, len(each.ids), len(each.ids) * seconds, each, index)
            for index, each in enumerate(texts)
        ]
        with self._changed:
            if not request.is_over:
                self._queue.put(request.waiting)
                self._changed.notify()

    def _drop(self, request: _Request) -> None:
        """Leaves out what is not yet computed of a request."""
        request.is_over = True
        with self._changed:
            self._queue.drop(request.waiting)

    def _compute_all(self) -> None:
        """Passes, until closing. In a thread of its own."""
        self._begin()
        while True:
            with self._changed:
                while not self._queue.texts and not self._untokenized_here and not self._is_closing:
                    self._changed.wait()
            if self._untokenized_here:
                self._tokenize_all()
            with self._changed:
                taken = self._queue.next_pass(self._max_tokens, self._options.max_batch_requests)
                if not taken and not self._untokenized_here and self._is_closing:
                    return
            now = time.monotonic()
            # What was begun is ended.
            late = {each.owner for each in taken if each.owner.is_untouched and now > each.owner.deadline}
            for request in late:
                self._fail(request, overloaded(f"the request has waited for {self._options.deadline:g} s"))
            live = [each for each in taken if not each.owner.is_over]
            if live:
                self._pass(live)

    def _pass(self, texts: list[Waiting]) -> None:
        begun = time.monotonic()
        done = self._computed(texts)
        seconds = time.monotonic() - begun
        lengths = [each.tokens for each in texts]
        self._metrics.passed(len(texts), sum(lengths), max(lengths) * len(texts))
        if done:
            self._pace[texts[0].group].add(sum(lengths), seconds)
        for each in texts:
            request = each.owner
            request.left -= 1
            request.queue += begun - request.tokenized
            request.inference += seconds
        self._tell([request for request in {each.owner for each in texts} if not request.left])

    def _computed(self, texts: list[Waiting]) -> bool:
        """Computes texts; where that fails, those alone fail for whose sake it does. Whether all were computed."""
        computing, want = texts[0].group
        try:
            results = computing.compute([each.text for each in texts], want)
        except Exception as error:
            if len(texts) > 1:
                middle = len(texts) // 2
                parts = [self._computed(texts[:middle]), self._computed(texts[middle:])]
                return all(parts)
            self.failure = f"{type(error).__name__}: {error}"
            self._fail(texts[0].owner, RequestError("Inference failed", "Backend"))
            _log.error("a pass failed: %s", self.failure, exc_info=error)
            return False
        self.failure = None
        for each, result in zip(texts, results, strict=True):
            each.owner.results[each.index] = result
        return True

    def _fail(self, request: _Request, error: RequestError) -> None:
        request.error = error
        self._drop(request)
        self._tell([request])

    def _tell(self, requests: list[_Request]) -> None:
        """Hands answers and errors to the event loop."""
        if requests and self._loop is not None:
            self._loop.call_soon_threadsafe(_deliver, requests)


def _characters(inputs: Sequence[Input]) -> int:
    return sum(len(each.text) + len(each.pair or "") for each in inputs if isinstance(each, Item))


def _tokens(given: Input) -> float:
    """A guess at how many tokens a text has, before it is tokenized."""
    if not isinstance(given, Item):
        return len(given)
    return (len(given.text) + len(given.pair or "")) / _CHARACTERS_A_TOKEN + _SPECIAL


class ClientGoneError(Exception):
    """A client has left before it was answered."""


def _deliver(requests: list[_Request]) -> None:
    for request in requests:
        if request.future.done():
            continue
        if request.error is not None:
            request.future.set_exception(request.error)
        else:
            request.future.set_result(request.answer)
