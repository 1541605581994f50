"""The server as an ASGI application, for uvicorn, Ray Serve and whatever else runs one."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import hmac
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route as Place
from starlette.types import Receive, Scope, Send

from .asking import Asking, Server
from .errors import RequestError
from .openapi import document
from .options import ServeOptions
from .request import ClientGoneError
from .routes import ROUTES, Route, answer_any, info
from .schemas import AnyRequest, DocumentsRequest, OpenAIRequest
from .served import Encoded, Served, Want
from .v1 import ALIASES
from .v1 import ROUTES as V1_ROUTES

_log = logging.getLogger(__name__)
_PAGE = Path(__file__).with_name("page.html")
# What is computed before the first request: texts of so many tokens, one, and a pass of them.
_WARM_LENGTH, _WARM_TEXTS = 16, 32
_CLIENT_GONE = 499
# Bytes of a text's answer that take a millisecond to write.
_LARGE = 200_000
# Of a request that is refused before its end so many bytes are read on, for so long, while there is no such silence.
_MOST_LEFT_ALONE, _SECONDS_TO_READ_ON, _SECONDS_OF_SILENCE = 100_000_000, 30.0, 2.0
_ANY = Route("/", AnyRequest, (), answer_any, "What suits the model: /predict, /rerank, /embed or /embed_sparse")


def create_app(models: Callable[[], Sequence[Served]], options: ServeOptions) -> Starlette:
    """The server.

    Args:
        models: gives those that are served, once the application starts: see `load_all`.
        options: of the server.

    Returns:
        An ASGI application. At its start it loads the models and computes once, at its end what it had taken.
        Meanwhile its `state.server` is the `Server`.
    """
    state = _State(models, options)
    computing = {route.path: route for route in (*ROUTES, *V1_ROUTES, _ANY)} | {**ALIASES, "/invocations": _ANY}
    computing |= {f"/models/{{model:path}}{route.path}": route for route in ROUTES}
    shown = {
        "/": state.page if options.ui else state.health,
        "/health": state.health,
        "/ping": state.health,
        "/metrics": state.metrics,
        "/info": state.info,
        "/models/{model:path}/info": state.info,
        "/v1/models": state.models,
        "/openapi.json": state.openapi,
        "/api-doc/openapi.json": state.openapi,
    }
    return Starlette(
        routes=[
            *(Place(path, state.answering(route), methods=["POST"]) for path, route in computing.items()),
            *(Place(path, show, methods=["GET"]) for path, show in shown.items()),
        ],
        lifespan=state.lifespan,
        exception_handlers={RequestError: _not_shown, HTTPException: _not_routed, Exception: _failed},
        middleware=[
            Middleware(
                CORSMiddleware,
                allow_origins=options.cors_allow_origin,
                allow_methods=["GET", "POST"],
                allow_headers=["content-type", "authorization"],
                expose_headers=["x-total-time", "x-queue-time", "x-inference-time", "x-compute-tokens"],
            )
        ],
    )


class _State:
    """What the routes share, once the application has started."""

    def __init__(self, models: Callable[[], Sequence[Served]], options: ServeOptions) -> None:
        self._load, self._options = models, options
        self._server: Server | None = None
        self._key = None if options.api_key is None else f"Bearer {options.api_key}".encode()

    @property
    def server(self) -> Server:
        assert self._server is not None, "the application has started"
        return self._server

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self._server = app.state.server = Server(self._load(), self._options)
        self.server.passes.start(_warm_up)
        # What is loaded stays: a look through all of it for garbage would stop every request for a fifth of a second.
        gc.collect()
        gc.freeze()
        yield
        await self.server.passes.close()

    def answering(self, route: Route) -> Callable[[Request], Awaitable[Response]]:
        """What answers a route that computes."""

        async def answer(request: Request) -> Response:
            asking = Asking(self.server, request)
            try:
                self._authorize(request)
                body = await asking.body(route.body)
                # Other bodies have no such field, but may have a key of the name, which means nothing there.
                in_body = body.model if isinstance(body, (OpenAIRequest, DocumentsRequest)) else None
                asking.served = self._model(route, request, in_body)
                asking.check_kind(route.kinds, route.path)
                content = await _in_parts(await route.answer(asking, body))
            except RequestError as error:
                self.server.metrics.failed(error.reason)
                response = _refused(error, route.path, reads_on=not asking.is_read)
            except ClientGoneError:
                self.server.metrics.failed("client_gone")
                response = Response(status_code=_CLIENT_GONE)
            except Exception as error:
                # Here, so that it is counted, and the connection stays.
                self.server.metrics.failed("internal")
                response = await _failed(request, error)
            else:
                times = asking.times()
                if asking.answers:
                    self.server.metrics.answered(is_batch=asking.is_batch, **times)
                response = _answer(content, headers=asking.headers(times))
            _logged(asking, response)
            return response

        return answer

    def _model(self, route: Route, request: Request, in_body: str | None) -> Served:
        in_path = request.path_params.get("model")
        return self.server.of_kind(route.kinds, in_body) if in_path is None else self.server.named(in_path)

    def _authorize(self, request: Request) -> None:
        given = request.headers.get("authorization", "").encode("latin-1")
        if self._key is not None and not hmac.compare_digest(given, self._key):
            raise RequestError("expected `Authorization: Bearer KEY` with the server's key", "Validation", 401)

    async def health(self, _: Request) -> Response:
        """Whether the models compute."""
        if await self.server.computes():
            return Response(status_code=200)
        return _refused(RequestError("unhealthy", "Unhealthy"), "/health")

    async def page(self, request: Request) -> Response:
        """A page for people; for all else what `health` says."""
        if "text/html" not in request.headers.get("accept", ""):
            return await self.health(request)
        return Response(_PAGE.read_bytes(), media_type="text/html")

    async def metrics(self, _: Request) -> Response:
        return Response(self.server.metrics.text(), headers={"content-type": self.server.metrics.content_type})

    async def info(self, request: Request) -> Response:
        self._authorize(request)
        named = request.path_params.get("model")
        return _json(info(self.server, self.server.models[0] if named is None else self.server.named(named)))

    async def models(self, request: Request) -> Response:
        self._authorize(request)
        listed = [
            {"id": each.name, "object": "model", "created": 0, "owned_by": "fastcls", "kind": each.kind}
            for each in self.server.models
        ]
        return _json({"object": "list", "data": listed})

    async def openapi(self, _: Request) -> Response:
        return _json(document((*ROUTES, *V1_ROUTES), has_key=self._key is not None))


def _warm_up(served: Served) -> list[tuple[Want, list[Encoded]]]:
    """Texts to compute before any request: one, and some."""
    ids = np.arange(min(_WARM_LENGTH, served.limit), dtype=np.int64) % served.model.spec.vocab_size
    text = Encoded(ids, np.zeros_like(ids))
    return [(want, [text] * count) for want in served.wants for count in (1, _WARM_TEXTS)]


def _json(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return _answer(orjson.dumps(content), status, headers)


def _answer(body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(body, status, headers, "application/json")


async def _in_parts(content: Any) -> bytes:
    """An answer's JSON, between whose texts other requests go on: a vector for each token makes millions of numbers."""
    if not isinstance(content, list):
        return orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)
    parts = []
    for each in content:
        parts.append(orjson.dumps(each, option=orjson.OPT_SERIALIZE_NUMPY))
        if len(parts[-1]) > _LARGE:
            await asyncio.sleep(0)
    return b"[" + b",".join(parts) + b"]"


class _ReadingOn(Response):
    """An answer that is there before its request: the rest is read, and left alone.

    A connection that is closed with bytes unread is reset, and many clients then have no answer.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        """Answers, and ends once the request has."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        left, more, until = _MOST_LEFT_ALONE, True, time.monotonic() + _SECONDS_TO_READ_ON
        while more and left > 0 and time.monotonic() < until:
            try:
                message = await asyncio.wait_for(receive(), _SECONDS_OF_SILENCE)
            except asyncio.TimeoutError:
                break
            left -= len(message.get("body", b""))
            more = message.get("more_body", False)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _refused(error: RequestError, path: str, *, reads_on: bool = False) -> Response:
    content: dict[str, Any] = {"error": error.message, "error_type": error.error_type}
    if path.startswith(("/v1/", "/v2/")):
        content = {
            "message": error.message,
            "code": error.status,
            "type": error.error_type,
            "error_type": error.error_type,
        }
    headers = {401: {"www-authenticate": "Bearer"}, 429: {"retry-after": "1"}}.get(error.status)
    made = _ReadingOn if reads_on else Response
    return made(orjson.dumps(content), error.status, headers, "application/json")


async def _not_shown(request: Request, error: Exception) -> Response:
    """A refusal by a route that computes nothing."""
    assert isinstance(error, RequestError)
    return _refused(error, _path_of(request))


async def _not_routed(request: Request, error: Exception) -> Response:
    """A route that there is not, or another method than it has."""
    assert isinstance(error, HTTPException)
    path = _path_of(request)
    response = _refused(
        RequestError(f"{error.detail}: {request.method} {path:.200}", "Validation", error.status_code), path
    )
    response.headers.update(error.headers or {})
    return response


async def _failed(request: Request, error: Exception) -> Response:
    """A defect of the server's own."""
    path = _path_of(request)
    _log.error("a request failed", exc_info=error, extra={"path": path})
    return _refused(RequestError("Internal error", "Backend", 500), path)


def _path_of(request: Request) -> str:
    """A request's path, which its URL has not where a client sends a Host that is none."""
    return str(request.scope["path"])


def _logged(asking: Asking, response: Response) -> None:
    if not _log.isEnabledFor(logging.INFO):
        return
    times = {f"{name}_ms": round(seconds * 1000, 1) for name, seconds in asking.times().items()}
    model = asking.served.name if asking.served else None
    counts = {"texts": asking.texts, "tokens": asking.tokens}
    fields = {"path": _path_of(asking.request), "status": response.status_code, "model": model, **counts, **times}
    _log.info("request", extra=fields)
