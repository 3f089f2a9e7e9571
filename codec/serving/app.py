"""The web application of `codec serve`: sessions, a page, health and metrics."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.resources
import logging
from collections.abc import AsyncIterator
from dataclasses import asdict
from pathlib import Path

from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse
from fastapi.staticfiles import StaticFiles
from fastapi.websockets import WebSocket, WebSocketDisconnect

from codec.models.interface import Codec
from codec.serving.config import ServeConfig
from codec.serving.engine import Engine
from codec.serving.metrics import CONTENT_TYPE, Metrics
from codec.serving.protocol import PATH, Close, SessionError
from codec.serving.session import Session, say_goodbye

PAGE = Path(str(importlib.resources.files("codec.serving"))) / "page"
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; media-src 'self' blob:; img-src 'self' data:; base-uri 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",  # an address may hold a token
    "Cache-Control": "no-cache",
}

logger = logging.getLogger(__name__)


class Service:
    """What all requests share: the engine, the sessions, and whether new ones are taken."""

    def __init__(self, codec: Codec, config: ServeConfig) -> None:
        self.config = config
        self.metrics = Metrics()
        self.engine = Engine(codec, self.metrics, max_sessions=config.max_sessions, failed=self._failed)
        self.sessions: set[Session] = set()
        self.is_draining = False
        self.failure: Exception | None = None

    @property
    def status(self) -> str:
        """In one word."""
        return "failed" if self.failure else "draining" if self.is_draining else "ok"

    async def drain(self) -> None:
        """Take no new sessions, wait for those that run, and end what is left after `drain_s`."""
        self.is_draining = True
        end = asyncio.get_running_loop().time() + self.config.drain_s
        while self.sessions and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(0.05)
        for session in list(self.sessions):
            session.finish(SessionError("the server shuts down", Close.UNAVAILABLE))
        while self.sessions:
            await asyncio.sleep(0.01)

    async def serve(self, socket: WebSocket) -> None:
        """One session, whatever becomes of it."""
        await socket.accept()
        try:
            await self._admitted(socket)
            async with asyncio.timeout(self.config.slow_reader_timeout_s):
                await socket.close(Close.DONE)
        except SessionError as error:
            self._count(error.code)
            let_go(socket)
            await say_goodbye(socket, error)
        except WebSocketDisconnect as gone:
            if gone.code == Close.TOO_BIG:  # the protocol's own limit
                self._count(gone.code)
        except TimeoutError:
            self._count(Close.SLOW_READER)
        finally:
            let_go(socket)

    async def _admitted(self, socket: WebSocket) -> None:
        self.config.check_access(socket.headers, socket.query_params)
        if self.is_draining or self.failure:
            raise SessionError("the server shuts down; try another one", Close.UNAVAILABLE)
        if len(self.sessions) >= self.config.max_sessions:
            raise SessionError(
                f"the server is full: all {self.config.max_sessions} sessions are taken; try later", Close.UNAVAILABLE
            )
        session = Session(socket, self.engine, self.config)
        self.sessions.add(session)
        try:
            await session.run(self._began)
        except (SessionError, WebSocketDisconnect):
            raise
        except Exception as error:
            logger.exception("a session failed")
            raise SessionError("the server failed", Close.FAILED) from error
        finally:
            self.sessions.discard(session)
            if session.kind != "opening":
                self.metrics.sessions_open.labels(session.kind).dec()

    def _count(self, code: int) -> None:
        self.metrics.errors.labels(Close(code).name.lower()).inc()

    def _began(self, kind: str) -> None:
        self.metrics.sessions.labels(kind).inc()
        self.metrics.sessions_open.labels(kind).inc()

    def _failed(self, error: Exception) -> None:
        logger.error("a step failed; no session goes on", exc_info=error)
        self.failure = error
        for session in list(self.sessions):
            session.finish(SessionError("the server failed", Close.FAILED))


def build_app(service: Service) -> FastAPI:
    """The routes. The engine starts and stops with the application."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.engine.start()
        yield
        service.engine.stop()

    app = FastAPI(openapi_url=None, lifespan=lifespan)

    @app.websocket(PATH)
    async def stream(socket: WebSocket) -> None:
        await service.serve(socket)

    @app.api_route("/health", methods=["GET", "HEAD"])
    async def health() -> Response:
        facts = {
            "status": service.status,
            "model": service.engine.facts.model,
            "num_sessions": len(service.sessions),
            "max_sessions": service.config.max_sessions,
        }
        return JSONResponse(facts, status_code=200 if service.status == "ok" else 503)

    @app.get("/model")
    async def model() -> Response:
        return JSONResponse(asdict(service.engine.facts))

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        try:
            service.config.check_access(request.headers, request.query_params)
        except SessionError as error:
            return PlainTextResponse(f"{error}\n", status_code=error.code % 1000)
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)

    @app.api_route("/", methods=["GET", "HEAD"])
    async def page() -> Response:
        return FileResponse(PAGE / "page.html", headers=PAGE_HEADERS)

    app.mount("/page", StaticFiles(directory=PAGE), name="page")
    return app


def let_go(socket: WebSocket) -> None:
    """Write to this client without waiting for it to read, and drop the connection soon; see `codec.serving.server`."""
    if release := socket.scope.get("state", {}).get("let_go"):
        release()
