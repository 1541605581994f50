"""The server as a process: a socket, the models, and uvicorn until it is told to stop."""

from __future__ import annotations

import socket
from collections.abc import Callable

import uvicorn
from starlette.types import ASGIApp

# Clients that keep a connection use it again after a pause, and must not find it closed under their request.
_KEEP_ALIVE = 75
# What was taken is answered by then, or its client does not read the answer.
_SECONDS_TO_STOP = 60


def bound(host: str, port: int) -> socket.socket:
    """A socket that has its address, and takes no connection before the server is ready.

    Raises:
        OSError: the address is taken, or none of this machine's.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    found = socket.socket(family, kind, protocol)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as error:
        found.close()
        raise OSError(f"--host and --port must be an address that is free here, got {host}:{port}: {error}") from error
    return found


def serve(app: ASGIApp, at: socket.socket, ready: Callable[[str], None]) -> None:
    """Serves until SIGTERM or Ctrl-C, and then answers what was taken.

    Args:
        app: see `create_app`.
        at: see `bound`.
        ready: called with the server's URL, once it takes requests.
    """
    config = uvicorn.Config(
        app,
        http="httptools",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=_SECONDS_TO_STOP,
    )
    _Server(config, ready).run(sockets=[at])


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, ready: Callable[[str], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and sockets:
            host, port = sockets[0].getsockname()[:2]
            self._ready(f"http://{f'[{host}]' if ':' in host else host}:{port}")
