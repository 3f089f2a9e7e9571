"""The same traffic over sockets: a `codec serve`, and clients in another process that push a frame when it arrives."""

from __future__ import annotations

import asyncio
import subprocess
import tempfile
import time
from collections import deque
from pathlib import Path

from codec.models.interface import StreamableCodec
from codec.serving.client import DecodeSession
from codec.streaming import StreamPool
from tools.stream_load.server import cpu_seconds, running_server
from tools.stream_load.traffic import Listener, Load, load_of
from tools.stream_load.ways import Codes


def run_served(model: str, codec: StreamableCodec, *, num_streams: int, seconds: float, prebuffer_ms: float) -> Load:
    """Real time. The clients' own time counts, too: they share the machine. `busy_share` is the server's CPU time."""
    with (
        tempfile.TemporaryDirectory() as scratch,
        running_server(model, num_streams, Path(scratch) / "log") as (process, url),
    ):
        clients = [_Client(url, codec, prebuffer_ms / 1000) for _ in range(num_streams)]
        busy = asyncio.run(_all(clients, process, codec, seconds))
    return load_of(
        "served",
        [client.listener for client in clients],
        [latency for client in clients for latency in client.latencies],
        num_unheard=sum(len(client.waiting) for client in clients),
        busy_share=busy,
        state_bytes_per_stream=StreamPool(codec, "decode", capacity=1).state_bytes_per_stream,
    )


class _Client:
    """One session."""

    def __init__(self, url: str, codec: StreamableCodec, prebuffer_seconds: float) -> None:
        self._url, self._codec = url, codec
        self._prebuffer_seconds = prebuffer_seconds
        self.waiting: deque[float] = deque()
        self.latencies: list[float] = []
        self.listener = Listener(0.0, prebuffer_seconds, codec.sample_rate_hz)

    async def run(self, codes: Codes, stream: int, first_at: float, num_frames: int, opened: asyncio.Barrier) -> None:
        codec = self._codec
        voice = None if codes.voice is None else codes.voice.numpy()
        async with DecodeSession(self._url, global_codes=voice) as session:
            await opened.wait()
            began = time.perf_counter() + first_at
            self.listener = Listener(began, self._prebuffer_seconds, codec.sample_rate_hz)
            hearing = asyncio.ensure_future(self._hear(session))
            for at in range(num_frames):
                due = began + at * codec.hop_length / codec.sample_rate_hz
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                # The first ones come out with those after them.
                if at >= -(-codec.decode_delay_samples // codec.hop_length):
                    self.waiting.append(due)
                await session.push(codes.frames(stream, at, at + 1).numpy())
            await session.end()
            await hearing

    async def _hear(self, session: DecodeSession) -> None:
        num_samples = num_frames = 0
        async for audio in session:
            now = time.perf_counter()
            self.listener.hear(now, audio.shape[1])
            num_samples += audio.shape[1]
            while self.waiting and num_frames < num_samples // self._codec.hop_length:
                self.latencies.append(now - self.waiting.popleft())
                num_frames += 1


async def _all(
    clients: list[_Client], process: subprocess.Popen[bytes], codec: StreamableCodec, seconds: float
) -> float:
    """All sessions at once; the share of a core that the server took meanwhile."""
    frame_seconds = codec.hop_length / codec.sample_rate_hz
    codes, opened = Codes(codec, len(clients)), asyncio.Barrier(len(clients))
    num_frames = max(2, round(seconds / frame_seconds))
    before, started = cpu_seconds(process), time.perf_counter()
    running = [
        client.run(codes, stream, 0.1 + stream / len(clients) * frame_seconds, num_frames, opened)
        for stream, client in enumerate(clients)
    ]
    await asyncio.gather(*running)
    return (cpu_seconds(process) - before) / (time.perf_counter() - started)
