"""A Python client of `codec serve`: `DecodeSession` and `EncodeSession`, and `decode` and `encode` that block.

Needs numpy and the package `websockets`, no torch. Shapes: audio [C, n], codes [K, F].

    async with DecodeSession("ws://127.0.0.1:8765", num_quantizers=8) as session:
        await session.push(codes)            # integers [8, F], as often as some are there
        await session.end()
        async for audio in session:          # int16 [C, n], as soon as it is known; usually in a task of its own
            play(audio)
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit, urlunsplit

import numpy as np
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidURI

from codec.serving.protocol import PATH, Close, Opening, SessionError, Welcome


class _Session:
    """What both directions share. Outputs are taken off the socket as they come, so pushing never waits for them."""

    kind = ""

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        num_quantizers: int | None = None,
        global_codes: Sequence[int] | np.ndarray | None = None,
        sample_format: str = "pcm16",
        token: str | None = None,
    ) -> None:
        """`url`: ws://HOST:PORT, or http. `model`: the name or the codec id expected. Others: see `Opening`."""
        self._url = stream_url(url)
        voice = None if global_codes is None else tuple(int(code) for code in global_codes)
        self._opening = Opening(self.kind, model, num_quantizers, voice, sample_format)
        self._headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self._outputs: asyncio.Queue[np.ndarray | SessionError | None] = asyncio.Queue()
        self._resets: list[asyncio.Future[None]] = []
        self.done: dict[str, int] | None = None  # what the server counted: {"num_frames": F, "num_samples": T}
        self.global_codes: np.ndarray | None = None  # encode: the voice, once it is known; int64 [L]
        self._error = ""  # what the server says before it closes; the close frame has room for its beginning only

    async def __aenter__(self) -> Self:
        """Connect and open. SessionError where the server refuses, OSError where there is none."""
        try:
            # No pings: a server that waits for room answers none. No limit: the server's pieces are small.
            self._socket: ClientConnection = await connect(
                self._url, additional_headers=self._headers, ping_interval=None, max_size=None, compression=None
            )
        except (InvalidHandshake, InvalidURI) as error:
            raise SessionError(f"{self._url} takes no sessions: {error}", Close.UNAVAILABLE) from error
        try:
            try:
                await self._socket.send(self._opening.to_text())
                said = _read(await self._socket.recv())
                if "error" in said:
                    self._hear(said)
                    await self._socket.recv()  # there is only the close
            except ConnectionClosed as error:
                raise self._closed(error) from None
            self.welcome = Welcome.from_object(said)
        except BaseException:
            await self._socket.close()
            raise
        self._receiving = asyncio.ensure_future(self._receive())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Hang up. What did not come yet is lost."""
        self._receiving.cancel()
        await asyncio.gather(self._receiving, return_exceptions=True)
        await self._socket.close()

    async def push(self, piece: np.ndarray) -> None:
        """Input: codes [K, F], or audio [C, n] as int16 or float. Waits where the server has no room for it yet.

        ValueError for another shape, SessionError where the server ended the session.
        """
        limit = self.welcome.max_message_bytes
        row_bytes, message = self._packed(np.asarray(piece))
        step = max(1, limit // row_bytes) * row_bytes
        for first in range(0, len(message), step):
            await self._sent(message[first : first + step])

    async def end(self) -> None:
        """No more input comes; what is still due follows, then the iteration ends."""
        await self._sent(json.dumps({"end": True}))

    async def reset(self) -> None:
        """Begin a new recording. What was not taken of the old one, or not heard yet, is dropped."""
        answered = asyncio.get_running_loop().create_future()
        self._resets.append(answered)
        await self._sent(json.dumps({"reset": True}))
        await answered

    async def __aiter__(self) -> AsyncIterator[np.ndarray]:
        """Outputs as they come, until the end. SessionError where the server ended the session before that."""
        while (output := await self._outputs.get()) is not None:
            if isinstance(output, SessionError):
                self._outputs.put_nowait(output)
                raise output
            yield output
        self._outputs.put_nowait(None)

    async def _sent(self, message: str | bytes) -> None:
        try:
            await self._socket.send(message)
        except ConnectionClosed as error:
            raise self._closed(error) from None

    async def _receive(self) -> None:
        """Everything that comes, into a queue; at last an error, or None."""
        last: SessionError | None = None
        try:
            async for message in self._socket:
                if isinstance(message, bytes):
                    self._outputs.put_nowait(self._unpacked(message))
                else:
                    self._hear(_read(message))
            if self.done is None:
                last = SessionError("the server ended the session before it was done", Close.FAILED)
        except ConnectionClosed as error:
            last = self._closed(error)
        except (SessionError, ValueError) as error:
            last = SessionError(f"the server says what it should not: {error}", Close.FAILED)
        self._outputs.put_nowait(last)
        for waiting in self._resets:
            waiting.set_exception(last or SessionError("the session is over", Close.BAD_INPUT))

    def _hear(self, said: dict[str, Any]) -> None:
        if "error" in said:
            self._error = str(said["error"])
        elif "done" in said:
            self.done = said["done"]
        elif "global_codes" in said:
            self.global_codes = np.array(said["global_codes"], np.int64)
        elif "reset" in said:
            while not self._outputs.empty():
                self._outputs.get_nowait()
            self._resets.pop(0).set_result(None)

    def _closed(self, error: ConnectionClosed) -> SessionError:
        """Why the server closed the connection."""
        if error.rcvd is None:
            return SessionError(self._error or "the connection was lost", Close.FAILED)
        return SessionError(self._error or error.rcvd.reason or "the server closed the session", error.rcvd.code)

    def _packed(self, piece: np.ndarray) -> tuple[int, bytes]:
        """Bytes of the smallest part that a message may hold, and all of the piece."""
        raise NotImplementedError

    def _unpacked(self, message: bytes) -> np.ndarray:
        raise NotImplementedError


class DecodeSession(_Session):
    """Codes to audio: iterating gives [C, n], int16, or float32 with `sample_format="float32"`."""

    kind = "decode"

    async def lost(self, num_frames: int) -> None:
        """So many frames never came: the decoder conceals them."""
        await self._sent(json.dumps({"lost": num_frames}))

    def _packed(self, codes: np.ndarray) -> tuple[int, bytes]:
        num_rows = self.welcome.num_quantizers
        if codes.ndim != 2 or codes.shape[0] != num_rows or not np.issubdtype(codes.dtype, np.integer):
            raise ValueError(f"codes must be integers [{num_rows}, F], got {codes.dtype} {codes.shape}")
        sizes = np.array(self.welcome.codebook_sizes[:num_rows])[:, None]
        if ((codes < 0) | (codes >= sizes)).any():
            raise ValueError(f"codes must be 0 or more, and below {sizes[:, 0].tolist()}")
        return self.welcome.bytes_per_frame, self.welcome.pack_codes(codes)

    def _unpacked(self, message: bytes) -> np.ndarray:
        return self.welcome.unpack_audio(message)


class EncodeSession(_Session):
    """Audio to codes: iterating gives int64 [K, F]. Audio is at `welcome.sample_rate_hz`."""

    kind = "encode"

    def _packed(self, audio: np.ndarray) -> tuple[int, bytes]:
        num_channels = self.welcome.num_channels
        if (
            audio.ndim != 2
            or audio.shape[0] != num_channels
            or not (audio.dtype == np.int16 or np.issubdtype(audio.dtype, np.floating))
        ):
            raise ValueError(f"audio must be int16 or float [{num_channels}, n], got {audio.dtype} {audio.shape}")
        return self.welcome.bytes_per_sample, self.welcome.pack_audio(audio)

    def _unpacked(self, message: bytes) -> np.ndarray:
        return self.welcome.unpack_codes(message)


def decode(url: str, codes: np.ndarray, **options: Any) -> np.ndarray:
    """Codes [K, F] -> audio [C, F * hop], by one session. Options as of `DecodeSession`; K is its `num_quantizers`."""
    return asyncio.run(_through(DecodeSession(url, num_quantizers=len(codes), **options), codes))


def encode(url: str, audio: np.ndarray, **options: Any) -> np.ndarray:
    """Audio [C, n] -> codes [K, ceil(n / hop)], by one session. Options as of `EncodeSession`."""
    return asyncio.run(_through(EncodeSession(url, **options), audio))


async def _through(session: _Session, piece: np.ndarray) -> np.ndarray:
    async with session:
        await session.push(piece)
        await session.end()
        outputs = [output async for output in session]
    return np.concatenate([session._unpacked(b""), *outputs], axis=1)


def stream_url(url: str) -> str:
    """Where sessions are, of a server's address.

    >>> stream_url("http://127.0.0.1:8765")
    'ws://127.0.0.1:8765/stream'
    """
    parts = urlsplit(url)
    scheme = {"http": "ws", "https": "wss"}.get(parts.scheme, parts.scheme)
    if scheme not in {"ws", "wss"} or not parts.netloc:
        raise ValueError(f"{url!r} is no address of a server; ws://127.0.0.1:8765 is one")
    return urlunsplit((scheme, parts.netloc, parts.path.rstrip("/") + PATH, parts.query, ""))


def _read(message: str | bytes) -> dict[str, Any]:
    """What a server said."""
    said = json.loads(message)
    if not isinstance(said, dict):
        raise ValueError("this is no server of codecs: it answers something else")
    return said
