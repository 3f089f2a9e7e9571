"""Runs the application on a socket until a signal ends it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from codec.models.interface import Codec
from codec.serving.app import Service, build_app
from codec.serving.config import ServeConfig

# What the kernel may hold of a session's output: seconds of audio that no reset takes back, so not megabytes of it.
SEND_BUFFER_BYTES = 2**16
GOODBYE_S = 10.0  # how long a client that is let go may take to read why


class _WebSocket(WebSocketsSansIOProtocol):
    """uvicorn's WebSocket, able to let go of a client that does not read.

    Its `send` waits until the client reads, and its `close` until the rest is sent, for as long as that may take.
    """

    _is_let_go = False

    def handle_connect(self, event: Any) -> None:
        super().handle_connect(event)
        if hasattr(self, "scope"):  # else the handshake was refused
            self.scope.setdefault("state", {})["let_go"] = self._let_go

    def _let_go(self) -> None:
        self.writable.set()
        if not self._is_let_go:
            self._is_let_go = True
            self.loop.call_later(GOODBYE_S, self.transport.abort)


class CodecServer:
    """A server on a socket of its own: connections wait from the beginning, sessions from when it runs.

    ValueError for a codec that does not stream, OSError for an address that cannot be listened on.
    """

    def __init__(self, codec: Codec, config: ServeConfig) -> None:
        self.service = Service(codec, config)
        family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
        self._socket = socket.create_server((config.host, config.port), family=family, backlog=1024)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)  # what it accepts inherits it
        host, port = self._socket.getsockname()[:2]
        self.address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        settings = uvicorn.Config(
            build_app(self.service),
            ws=_WebSocket,
            # One message is judged by the session, which can say why; this is what memory is protected by.
            ws_max_size=4 * config.max_message_bytes,
            # Pings of ours would fail while input waits for room; sessions have time limits of their own.
            ws_ping_interval=None,
            ws_per_message_deflate=False,
            log_config=None,
            log_level="warning",
            access_log=False,  # addresses may hold tokens
            server_header=False,
            timeout_graceful_shutdown=5,
        )
        self._server = _Server(settings, self.service)

    def run(self, announce: Callable[[], None] = lambda: None) -> None:
        """Serve until a signal (in the main thread) or `drain`; `announce` is called once sessions are taken."""
        self._server.announce = announce
        with self._socket:
            self._server.run(sockets=[self._socket])

    def drain(self) -> None:
        """As the first SIGTERM: no new sessions, those that run may end, then `run` returns. From any thread."""
        self._server.drain()


class _Server(uvicorn.Server):
    """Signals drain it: the first begins, the second ends it at once."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.announce: Callable[[], None] = lambda: None
        self._service = service
        self._draining: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        self.announce()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._service.is_draining:
            self.should_exit = self.force_exit = True
        else:
            self.drain()

    def drain(self) -> None:
        self._service.is_draining = True
        self._loop.call_soon_threadsafe(self._begin_to_drain)

    def _begin_to_drain(self) -> None:
        async def drained() -> None:
            await self._service.drain()
            self.should_exit = True

        self._draining = self._loop.create_task(drained())
