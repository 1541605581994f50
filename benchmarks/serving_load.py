"""Requests to a server, from a process of their own, and what is read from their times.

In a closed loop each of so many clients asks again as soon as it has its answer. In an open loop requests come at
random times of a given rate (Poisson), whether earlier ones were answered or not: latencies count from the time at
which a request was meant to be sent, so one that waits in the generator has waited, too. Each answer is checked as it
comes.

`python benchmarks/serving_load.py` reads an `Order` as JSON from stdin, and writes the times to the file it names.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np
from httptools import HttpResponseParser

# Another label is no mistake where the best score is this near to a half, nor is a score that is so near.
TIE = 1e-4
# Statuses beside those of HTTP: no answer at all, and one that says something else.
NO_ANSWER, WRONG = 0, -1
REFUSED = 429
_ANSWERED = 200
_COLUMNS = ("intended", "sent", "done", "status")
_SECONDS_TO_ANSWER = 60
# A server that is gone is not asked as fast as the loop can.
_SECONDS_AFTER_NO_ANSWER = 0.05
_CLIENTS_OF_A_CHECK = 32
# So many requests in a row tell whether latencies are the calm ones again; one of them may be late.
_IN_A_ROW, _LATE = 20, 1


@dataclass(frozen=True, kw_only=True)
class Order:
    """What is asked of a server.

    Attributes:
        url: of the route.
        texts, expected: the sentences, and transformers' label and score of each.
        clients: of a closed loop; 0 is an open one.
        seconds, warm_up: of a closed loop. With no seconds each text is asked once.
        phases: of an open loop, each of requests a second and seconds.
        seed: of the order of texts and of the times.
    """

    url: str
    texts: list[str]
    expected: list[tuple[str, float]]
    clients: int = 0
    seconds: float | None = None
    warm_up: float = 0.0
    phases: list[tuple[float, float]] = field(default_factory=list)
    seed: int = 0


class Log(NamedTuple):
    """Every request, in seconds from the end of the warm-up: [requests] each.

    Attributes:
        intended, sent, done: when it was meant to be sent, when it was, and when its answer was there.
        status: HTTP's, `NO_ANSWER` or `WRONG`.
        cores: that the generator took, as an average.
        problem: the first answer that was neither right nor a refusal.
    """

    intended: Any
    sent: Any
    done: Any
    status: Any
    cores: float
    problem: str

    def where(self, chosen: Any) -> Log:
        """The requests that a mask chooses."""
        columns = {name: getattr(self, name)[chosen] for name in _COLUMNS}
        return self._replace(**columns)

    @property
    def latencies(self) -> Any:
        """Seconds of those that were answered rightly."""
        return (self.done - self.intended)[self.status == _ANSWERED]


def best(content: bytes) -> tuple[str, float]:
    """The label with the highest score in an answer: a label, a list of labels, or a list of such lists, of one text.

    Raises:
        ValueError, LookupError, TypeError: something else.
    """
    found = json.loads(content)
    while isinstance(found, list):
        found = max(found, key=lambda each: each["score"]) if isinstance(found[0], dict) else found[0]
    return found["label"], float(found["score"])


def is_right(content: bytes, expected: tuple[str, float]) -> bool:
    """Whether an answer is transformers' own."""
    try:
        label, score = best(content)
    except (ValueError, LookupError, TypeError):
        return False
    return abs(score - expected[1]) <= TIE and (label == expected[0] or expected[1] <= 0.5 + TIE)


def percentiles(latencies: Any) -> dict[str, float | None]:
    """p50, p90, p99 and the maximum, in milliseconds; None of no answers."""
    names = {"p50_ms": 50, "p90_ms": 90, "p99_ms": 99, "max_ms": 100}
    return {name: 1e3 * float(np.percentile(latencies, at)) if len(latencies) else None for name, at in names.items()}


def counts(log: Log) -> dict[str, int]:
    """Requests by what became of them."""
    answered, refused = int(np.sum(log.status == _ANSWERED)), int(np.sum(log.status == REFUSED))
    errors = len(log.status) - answered - refused
    return {"requests": len(log.status), "answered": answered, "refused": refused, "errors": errors}


def generator(log: Log) -> dict[str, float]:
    """How busy the generator was, and how late it sent."""
    lags = 1e3 * (log.sent - log.intended)
    late = {"lag_p99_ms": float(np.percentile(lags, 99)), "lag_max_ms": float(lags.max())} if len(lags) else {}
    return {"cores": log.cores, **late}


def closed_summary(log: Log, seconds: float) -> dict[str, Any]:
    """A closed loop's rate and latencies: of the requests whose answers came within the time."""
    inside = log.where((log.done >= 0) & (log.done < seconds))
    answered = inside.done[inside.status == _ANSWERED]
    by_second = np.bincount(answered.astype(int), minlength=int(seconds))[: int(seconds)].tolist()
    rate = {"requests_per_second": len(answered) / seconds, "by_second": by_second}
    return {**counts(inside), **rate, **percentiles(inside.latencies), "generator": generator(inside)}


def open_summary(log: Log) -> dict[str, Any]:
    """An open loop's latencies, from the times at which requests were meant to be sent."""
    return {**counts(log), **percentiles(log.latencies), "generator": generator(log)}


def overload_summary(log: Log, phases: list[tuple[float, float]]) -> dict[str, Any]:
    """What a server did before, in and after an overload: the three phases.

    ``recovered_seconds`` passed until a request was answered within the calm p99 again, and of the twenty from there on
    at most one was not. None: that did not happen.
    """
    begins = [0.0, *itertools.accumulate(seconds for _, seconds in phases)]
    parts = [log.where((log.intended >= start) & (log.intended < end)) for start, end in itertools.pairwise(begins)]
    calm, over, after = (open_summary(part) for part in parts)
    end, found = begins[2], parts[2]
    # Requests are kept as they end.
    order = np.argsort(found.intended)
    limit = np.inf if calm["p99_ms"] is None else calm["p99_ms"] / 1e3
    soon = ((found.done - found.intended <= limit) & (found.status == _ANSWERED))[order]
    width = min(_IN_A_ROW, len(soon))
    runs = np.convolve(soon, np.ones(width), "valid") >= width - _LATE if width else np.zeros(0, bool)
    runs &= soon[: len(runs)]
    recovered = float(found.intended[order][int(np.argmax(runs))] - end) if runs.any() else None
    next_second = (log.done >= end) & (log.done < end + 1) & (log.status == _ANSWERED)
    return {
        "calm": calm,
        "overload": {**over, "share_refused": over["refused"] / over["requests"] if over["requests"] else None},
        "after": after,
        "recovered_seconds": recovered,
        "answered_in_the_next_second": int(next_second.sum()),
        "sent_in_the_next_second": int(((log.intended >= end) & (log.intended < end + 1)).sum()),
    }


def run(order: Order) -> Log:
    """Asks in a process of its own, which ends with this call."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "log.npz"
        command = [sys.executable, __file__, str(target)]
        # Ctrl-C is for the process that started it.
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        ) as process:
            try:
                said = process.communicate(json.dumps(asdict(order)))[1]
            finally:
                process.kill()
        if process.returncode:
            raise RuntimeError(f"the load generator failed: {said[-2000:]}")
        with np.load(target) as found:
            columns = {name: found[name] for name in _COLUMNS}
            return Log(**columns, cores=float(found["cores"]), problem=str(found["problem"]))


class _Connection(asyncio.Protocol):
    """A connection that is used again: one request, then its answer.

    Nothing but a parser in C stands behind it: what the generator takes of the cores, the server has not.
    """

    def __init__(self) -> None:
        self._answer: asyncio.Future[tuple[int, bytes]] | None = None
        self._body = bytearray()
        self.is_open = False

    def connection_made(self, transport: Any) -> None:
        self._transport, self.is_open = transport, True

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_open = False
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(exc or ConnectionResetError("the server has closed the connection"))

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_body(self, data: bytes) -> None:
        self._body += data

    def on_message_complete(self) -> None:
        self.is_open = self.is_open and self._parser.should_keep_alive()
        if self._answer is not None and not self._answer.done():
            self._answer.set_result((self._parser.get_status_code(), bytes(self._body)))

    def ask(self, request: bytes) -> asyncio.Future[tuple[int, bytes]]:
        self._answer, self._parser = asyncio.get_running_loop().create_future(), HttpResponseParser(self)
        self._body.clear()
        self._transport.write(request)
        return self._answer

    def close(self) -> None:
        self._transport.close()


class Connections:
    """As many connections to a server as there are requests on their way.

    Args:
        url: of the route, http://HOST:PORT/PATH.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "", parts.port or 80
        self._head = f"POST {parts.path or '/'} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
        self._idle: list[_Connection] = []

    async def post(self, body: bytes) -> tuple[int, bytes]:
        """The status and the body of an answer.

        Raises:
            OSError, TimeoutError: there is none.
        """
        while self._idle and not self._idle[-1].is_open:
            self._idle.pop()
        if self._idle:
            connection = self._idle.pop()
        else:
            loop = asyncio.get_running_loop()
            _, connection = await loop.create_connection(_Connection, self._host, self._port)
        request = f"{self._head}Content-Length: {len(body)}\r\n\r\n".encode() + body
        try:
            found = await asyncio.wait_for(connection.ask(request), _SECONDS_TO_ANSWER)
        except BaseException:
            connection.close()
            raise
        self._idle.append(connection)
        return found

    def close(self) -> None:
        for connection in self._idle:
            connection.close()


class Generator:
    """Asks, and keeps the times of each request."""

    def __init__(self, order: Order, connections: Connections) -> None:
        self.order, self.connections = order, connections
        self.bodies = [json.dumps({"inputs": text}).encode() for text in order.texts]
        # Numbers, which the garbage collector does not walk over: intended, sent, done, status.
        self.times, self.problem = array("d"), ""
        self.start = time.perf_counter() + order.warm_up

    async def ask(self, intended: float, index: int) -> int:
        """Sends one text and keeps what became of it."""
        sent, content, why = self._clock(), b"", ""
        try:
            status, content = await self.connections.post(self.bodies[index])
            if status == _ANSWERED and not is_right(content, self.order.expected[index]):
                status, why = WRONG, f"sentence {index} has {self.order.expected[index]}, got "
        except Exception as error:
            status, why = NO_ANSWER, repr(error)
        if status not in (_ANSWERED, REFUSED):
            self.problem = self.problem or f"{why or f'status {status}: '}{content[:300].decode(errors='replace')}"
        self.times.extend((intended, sent, self._clock(), status))
        return status

    async def closed(self) -> None:
        order, whole = self.order, iter(range(len(self.bodies)))

        async def client(number: int) -> None:
            for index in whole if order.seconds is None else self._draw(number):
                if order.seconds is not None and self._clock() >= order.seconds:
                    break
                if await self.ask(self._clock(), index) == NO_ANSWER:
                    await asyncio.sleep(_SECONDS_AFTER_NO_ANSWER)

        await asyncio.gather(*map(client, range(order.clients)))

    async def open(self) -> None:
        draw, asked = random.Random(self.order.seed), set[asyncio.Task[int]]()
        texts, begin = self._draw(0), 0.0
        for rate, seconds in self.order.phases:
            at = begin + draw.expovariate(rate)
            while at < begin + seconds:
                if (early := at - self._clock()) > 0:
                    await asyncio.sleep(early)
                task = asyncio.create_task(self.ask(at, next(texts)))
                asked.add(task)
                task.add_done_callback(asked.discard)
                at += draw.expovariate(rate)
            begin += seconds
        await asyncio.gather(*asked)

    def _draw(self, number: int) -> Iterator[int]:
        """A client's texts, in an order of its own."""
        draw, count = random.Random(1000 * self.order.seed + number), len(self.bodies)
        while True:
            yield draw.randrange(count)

    def _clock(self) -> float:
        return time.perf_counter() - self.start


async def _asked(order: Order) -> Log:
    connections = Connections(order.url)
    generator = Generator(order, connections)
    gc.collect()
    gc.freeze()
    began, used = time.perf_counter(), time.process_time()
    await (generator.closed() if order.clients else generator.open())
    cores = (time.process_time() - used) / (time.perf_counter() - began)
    connections.close()
    intended, sent, done, status = np.array(generator.times).reshape(-1, len(_COLUMNS)).T
    return Log(intended, sent, done, status.astype(int), cores, generator.problem)


def check(name: str, url: str, texts: list[str], expected: list[tuple[str, float]]) -> None:
    """Asks each text once, many at a time, and refuses a server that answers otherwise.

    Raises:
        ValueError: another answer than transformers', or none.
    """
    log = run(Order(url=url, texts=texts, expected=expected, clients=min(_CLIENTS_OF_A_CHECK, len(texts))))
    wrong = int((log.status != _ANSWERED).sum())
    if wrong:
        why = log.problem or f"status {REFUSED}"
        raise ValueError(f"{name} answers {wrong} of {len(texts)} sentences otherwise than transformers: {why}")


def main() -> None:
    """What the process of `run` does."""
    # It ends with the process that started it, and not before.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        import uvloop
    except (ImportError, OSError, ValueError):
        runner: Any = asyncio.run
    else:
        runner = uvloop.run
    given = json.load(sys.stdin)
    given["expected"] = [tuple(each) for each in given["expected"]]
    given["phases"] = [tuple(each) for each in given["phases"]]
    log = runner(_asked(Order(**given)))
    np.savez(sys.argv[1], **log._asdict())


if __name__ == "__main__":
    main()
