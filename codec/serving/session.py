"""One session: a WebSocket and its stream."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import deque
from typing import Any

import numpy as np
import torch
from starlette.websockets import WebSocket, WebSocketDisconnect

from codec.serving.config import ServeConfig
from codec.serving.engine import Engine, Output, Stream
from codec.serving.protocol import Close, Control, Opening, SessionError, Welcome, close_reason, error_text
from codec.streaming import PoolFull

# Of outputs that wait for the client to read them; beyond, its input waits, too.
MAX_UNSENT_BYTES = 2**20


class Session:
    """From the opening to the close. `run` does all of it; `finish` ends it from outside."""

    def __init__(self, socket: WebSocket, engine: Engine, config: ServeConfig) -> None:
        self.kind = "opening"
        self._socket = socket
        self._engine = engine
        self._config = config
        self._stream: Stream | None = None
        self._unsent: deque[Output] = deque()
        self._num_unsent_bytes = 0
        self._has_output = asyncio.Event()
        self._active_at = asyncio.get_running_loop().time()
        self._finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def finish(self, error: SessionError) -> None:
        """End it with this error."""
        if not self._finished.done():
            self._finished.set_exception(error)

    async def run(self, began: Any) -> None:
        """SessionError for what the client should hear, WebSocketDisconnect where it has gone.

        `began(kind)` is called once the opening was fine.
        """
        work = asyncio.ensure_future(self._work(began))
        try:
            done, _ = await asyncio.wait(
                {work, self._finished}, timeout=self._config.max_duration_s, return_when=asyncio.FIRST_COMPLETED
            )
            if not done:
                raise SessionError(f"sessions may take {self._config.max_duration_s:g} s", Close.TOO_LONG)
            done.pop().result()
        finally:
            await _cancelled(work)
            if not self._finished.cancel():
                self._finished.exception()  # or asyncio complains that nobody asked
            if self._stream is not None:
                self._stream.close()

    async def _work(self, began: Any) -> None:
        stream = self._stream = self._opened(await self._opening())
        self.kind = stream.welcome.kind
        began(self.kind)
        await self._send(stream.welcome.to_text())
        reader = asyncio.ensure_future(self._take_all(stream))
        writer = asyncio.ensure_future(self._send_all(stream))
        try:
            # The reader ends by an error only, for it looks out for input after the end.
            done, _ = await asyncio.wait({reader, writer}, return_when=asyncio.FIRST_COMPLETED)
            for task in (writer, reader):
                if task in done:
                    task.result()
                    break
        finally:
            await _cancelled(reader, writer)

    async def _opening(self) -> Opening:
        message = await self._receive()
        if not isinstance(message, str):
            raise SessionError('a session opens with a JSON text such as {"kind": "decode"}', Close.BAD_INPUT)
        return Opening.from_text(message)

    def _opened(self, opening: Opening) -> Stream:
        welcome = Welcome.to(
            opening,
            self._engine.facts,
            max_message_bytes=self._config.max_message_bytes,
            idle_timeout_s=self._config.idle_timeout_s,
        )
        voice = None if opening.global_codes is None else torch.tensor(opening.global_codes, dtype=torch.int64)
        try:
            return Stream(self._engine, welcome, voice, self._received_output)
        except ValueError as error:
            raise SessionError(str(error), Close.BAD_INPUT) from error
        except PoolFull as error:
            raise SessionError(str(error), Close.UNAVAILABLE) from error

    # What comes in.

    async def _take_all(self, stream: Stream) -> None:
        welcome = stream.welcome
        while True:
            message = await self._receive(waits_for_output=stream.is_ended)
            if stream.is_ended:
                raise SessionError("this session was ended; nothing may follow", Close.BAD_INPUT)
            if isinstance(message, bytes):
                await self._push(
                    stream,
                    welcome.unpack_codes(message) if welcome.kind == "decode" else welcome.unpack_audio(message),
                )
            else:
                await self._steer(stream, Control.from_text(message))
            self._active_at = asyncio.get_running_loop().time()

    async def _push(self, stream: Stream, piece: np.ndarray) -> None:
        with _told_to_the_client():
            while piece.shape[1]:
                taken = min(await self._room(stream), piece.shape[1])
                stream.push(piece[:, :taken])
                piece = piece[:, taken:]

    async def _steer(self, stream: Stream, control: Control) -> None:
        if control.end:
            stream.end()
        elif control.reset:
            stream.reset()
            self._unsent.clear()
            self._num_unsent_bytes = 0
            self._received_output(Output(json.dumps({"reset": True})))
        elif stream.welcome.kind != "decode":
            raise SessionError("frames can only be lost on the way to a decoder", Close.BAD_INPUT)
        else:
            missing = control.lost
            while missing:
                taken = min(await self._room(stream), missing)
                stream.conceal(taken)
                missing -= taken

    async def _room(self, stream: Stream) -> int:
        """How much may be pushed, as soon as that is anything."""
        while self._num_unsent_bytes > MAX_UNSENT_BYTES or not stream.room:
            await self._engine.progress()
        return stream.room

    async def _receive(self, *, waits_for_output: bool = False) -> str | bytes:
        """The next message. SessionError where there is none for too long, and all that came was answered."""
        clock = asyncio.get_running_loop().time
        while True:
            left = self._active_at + self._config.idle_timeout_s - clock()
            try:
                async with asyncio.timeout(None if waits_for_output or self._unsent else max(0.0, left)):
                    message = await self._socket.receive()
                    break
            except TimeoutError:
                # Something may have been sent meanwhile.
                if clock() >= self._active_at + self._config.idle_timeout_s:
                    raise SessionError(f"nothing came for {self._config.idle_timeout_s:g} s", Close.IDLE) from None
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message.get("code", 1006), message.get("reason"))
        data: str | bytes = message["text"] if message.get("bytes") is None else message["bytes"]
        if len(data) > self._config.max_message_bytes:
            raise SessionError(
                f"a message of {len(data)} bytes is larger than the {self._config.max_message_bytes} that one may have",
                Close.TOO_BIG,
            )
        return data

    # What goes out.

    def _received_output(self, output: Output) -> None:
        self._unsent.append(output)
        self._num_unsent_bytes += len(output.message)
        self._has_output.set()

    async def _send_all(self, stream: Stream) -> None:
        """Outputs as they come, up to the last one."""
        while True:
            while not self._unsent:
                self._has_output.clear()
                await self._has_output.wait()
            output = self._unsent.popleft()
            self._num_unsent_bytes -= len(output.message)
            stream.num_frames += output.num_frames
            stream.num_samples += output.num_samples
            if output.message:
                await self._send(output.message)
            self._engine.nudge()  # whoever waits for room here
            if output.is_last:
                done = {"num_frames": stream.num_frames, "num_samples": stream.num_samples}
                await self._send(json.dumps({"done": done}))
                return

    async def _send(self, message: str | bytes) -> None:
        try:
            async with asyncio.timeout(self._config.slow_reader_timeout_s):
                if isinstance(message, str):
                    await self._socket.send_text(message)
                else:
                    await self._socket.send_bytes(message)
        except TimeoutError:
            raise SessionError(
                f"nothing of the output was read for {self._config.slow_reader_timeout_s:g} s", Close.SLOW_READER
            ) from None
        self._active_at = asyncio.get_running_loop().time()


@contextlib.contextmanager
def _told_to_the_client() -> Any:
    """What a pool says of wrong input is what the client should hear."""
    try:
        yield
    except ValueError as error:
        raise SessionError(str(error), Close.BAD_INPUT) from error


async def _cancelled(*tasks: asyncio.Future[None]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def say_goodbye(socket: WebSocket, error: SessionError) -> None:
    """Tell the client why, and close. It may have gone, or not read; that is its own affair."""
    with contextlib.suppress(WebSocketDisconnect, RuntimeError, OSError):
        await socket.send_text(error_text(str(error)))
        await socket.close(error.code, close_reason(str(error)))
