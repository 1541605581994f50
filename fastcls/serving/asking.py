"""A request on its way: its body, its model, what was computed for it, and the headers of its answer."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from pydantic import ValidationError
from starlette.requests import ClientDisconnect, Request

from .errors import RequestError, overloaded
from .metrics import Metrics
from .options import ServeOptions
from .passes import Passes
from .request import Answer, ClientGoneError, characters_of
from .schemas import Body
from .served import Input, Kind, Served, Side, Want

_B = TypeVar("_B", bound=Body)
_T = TypeVar("_T")


class Server:
    """What all requests share.

    Args:
        models: those that are served, the first one of a kind for requests that name none.
        options: of the server.
    """

    def __init__(self, models: Sequence[Served], options: ServeOptions) -> None:
        self.models, self.options = list(models), options
        self.metrics = Metrics(lambda: self.passes.waiting)
        self.passes = Passes(self.models, options, self.metrics)
        # Bodies that are on their way, each of which may be as large as is allowed.
        self.bodies = 0
        self._trying: asyncio.Task[None] | None = None

    async def computes(self) -> bool:
        """Whether the models compute. One whose last pass failed tries a text of one token."""
        if self.passes.is_alive and self.passes.failing:
            # Once for all who ask meanwhile.
            if self._trying is None or self._trying.done():
                self._trying = asyncio.ensure_future(self._try())
            await asyncio.shield(self._trying)
        return self.passes.is_alive and not self.passes.failing

    async def _try(self) -> None:
        """Computes a text of one token of each model whose last pass failed."""
        for served in self.models:
            if served.computing in self.passes.failing:
                with contextlib.suppress(RequestError):
                    await self.passes.answer(
                        served, served.wants[0], [(0,)], truncate=True, side="right", gone=_never, admitted=True
                    )

    def named(self, name: str) -> Served:
        """The model of a name.

        Raises:
            RequestError: with status 404, there is none.
        """
        for served in self.models:
            if served.name == name:
                return served
        known = ", ".join(served.name for served in self.models)
        raise RequestError(f"model must be one of {known}, got {name!r:.80}", "Validation", 404, reason="model")

    def of_kind(self, kinds: Sequence[Kind], named: str | None = None) -> Served:
        """The first model of one of these kinds, or where several are, the one that a body names.

        Raises:
            RequestError: with status 404, several are, and none of them has the name.
        """
        fitting = [served for served in self.models if not kinds or served.kind in kinds]
        if named is not None and len(fitting) > 1:
            return self.named(named)
        return (fitting or self.models)[0]


class Asking:
    """One request.

    Args:
        server: what it shares with others.
        request: the request itself.

    Attributes:
        served: the model, once it is known.
        answers: what was computed.
        texts, characters: how many there were.
        raw: the body's bytes, once they are read.
        is_read: whether they are.
    """

    def __init__(self, server: Server, request: Request) -> None:
        self.server, self.request = server, request
        self.begun = time.monotonic()
        self.served: Served | None = None
        self.answers: list[Answer] = []
        self.texts = self.characters = 0
        self.is_batch = False
        self.raw, self.is_read = b"", False

    async def read(self) -> bytes:
        """The body.

        Raises:
            RequestError: it is too large, comes too slowly, or is not said to be JSON.
            ClientGoneError: the client has left before its end.
        """
        options, headers = self.server.options, self.request.headers
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
            raise RequestError("expected a request with `Content-Type: application/json`", "Validation", 415)
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > options.payload_limit:
            raise _too_large(options.payload_limit)
        if self.server.bodies >= options.max_concurrent_requests:
            raise overloaded(f"{self.server.bodies} bodies are being read")
        self.server.bodies += 1
        try:
            return await asyncio.wait_for(self._parts(options.payload_limit), options.body_timeout)
        except asyncio.TimeoutError:
            message = f"the body must come within {options.body_timeout:g} s"
            raise RequestError(message, "Validation", 408, reason="body") from None
        except ClientDisconnect:
            raise ClientGoneError from None
        finally:
            self.server.bodies -= 1

    async def _parts(self, limit: int) -> bytes:
        body = bytearray()
        async for part in self.request.stream():
            body += part
            if len(body) > limit:
                raise _too_large(limit)
        return bytes(body)

    async def body(self, kind: type[_B]) -> _B:
        """The body, checked.

        Raises:
            RequestError: with status 400, it is no JSON; with 422, it has other types; and as `read`.
        """
        self.raw, self.is_read = await self.read(), True
        return parsed(kind, self.raw)

    @property
    def model(self) -> Served:
        """The model, once it is known."""
        assert self.served is not None, "a route first finds its model"
        return self.served

    def check_kind(self, kinds: Sequence[Kind], route: str) -> None:
        """Refuses what a model of this kind does not compute.

        Raises:
            RequestError: as text-embeddings-inference, with status 424.
        """
        if kinds and self.model.kind not in kinds:
            raise RequestError(
                f"{route} must have a model of the kind {' or '.join(kinds)}, got {self.model.name}, which is of the "
                f"kind {self.model.kind}",
                "Backend",
                reason="model_type",
            )

    def check_batch(self, count: int, name: str = "inputs") -> None:
        """Refuses a batch without texts, or with too many.

        Raises:
            RequestError: as text-embeddings-inference.
        """
        most = self.server.options.max_client_batch_size
        if not count:
            raise RequestError(f"`{name}` cannot be empty", "Empty")
        if count > most:
            raise RequestError(
                f"batch size {count} > maximum allowed batch size {most}", "Validation", reason="batch_size"
            )

    async def compute(
        self, want: Want, inputs: Sequence[Input], *, truncate: bool | None, side: Side, is_batch: bool
    ) -> list[Any]:
        """What the model gives of each text.

        Raises:
            RequestError, ClientGoneError: see `Passes.answer`.
        """
        self.server.metrics.came(is_batch=is_batch)
        self.is_batch = is_batch
        self.texts += len(inputs)
        self.characters += characters_of(inputs)
        answer = await self.server.passes.answer(
            self.model,
            want,
            inputs,
            truncate=self.server.options.auto_truncate if truncate is None else truncate,
            side=side,
            gone=self._gone,
        )
        self.answers.append(answer)
        return answer.results

    async def with_spare(self, call: Callable[[], _T]) -> _T:
        """What a function gives that uses spare tokenizers.

        Raises:
            RequestError, ClientGoneError: see `Passes.with_spare`.
        """
        return await self.server.passes.with_spare(call, self._gone)

    async def _gone(self) -> None:
        while (await self.request.receive())["type"] != "http.disconnect":
            pass

    @property
    def tokens(self) -> int:
        """How many were computed."""
        return sum(answer.tokens for answer in self.answers)

    def times(self) -> dict[str, float]:
        """Seconds: in all, of tokenization, in the queue, of inference."""
        total = time.monotonic() - self.begun
        if not self.answers:
            return {"total": total}
        return {
            "total": total,
            "tokenization": sum(answer.tokenization for answer in self.answers),
            "queue": sum(answer.queue for answer in self.answers),
            "inference": sum(answer.inference for answer in self.answers),
        }

    def headers(self, times: dict[str, float]) -> dict[str, str]:
        """Those of text-embeddings-inference, in milliseconds."""
        if self.served is None or not self.answers:
            return {}
        found = {f"x-{name}-time": str(round(seconds * 1000)) for name, seconds in times.items()}
        return found | {
            "x-compute-type": self.served.device.type,
            "x-compute-time": found["x-total-time"],
            "x-compute-characters": str(self.characters),
            "x-compute-tokens": str(self.tokens),
        }


def parsed(kind: type[_B], body: bytes) -> _B:
    """A body as what it should be.

    Raises:
        RequestError: it is something else.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        # Without the input: it may be long, somebody's own, or no valid Unicode.
        found = error.errors(include_url=False, include_context=False, include_input=False)[0]
    if found["type"] == "json_invalid":
        raise RequestError(f"failed to parse the body as JSON: {found['msg']}", "Validation", 400, reason="json")
    field = str(found["loc"][0]) if found["loc"] else "body"
    place = "".join(f"[{part}]" if isinstance(part, int) else "" for part in found["loc"][1:])
    must = f"must be {kind.expected[field]}" if field in kind.expected else f"{place}: {found['msg']}".lstrip(": ")
    raise RequestError(f"failed to read the body: `{field}` {must}", "Validation", 422, reason="types")


def _too_large(limit: int) -> RequestError:
    return RequestError(f"the body must have at most {limit} bytes", "Validation", reason="payload")


async def _never() -> None:
    await asyncio.Event().wait()
