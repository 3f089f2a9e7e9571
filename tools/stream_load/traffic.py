"""Frames that arrive in real time, and listeners that play what comes of them."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tools.stream_load.ways import Decoders

# Frames of every stream before time is taken: memory, caches, and what is tried out once.
_WARM_UP_FRAMES = 10


@dataclass(frozen=True)
class Load:
    """What N streams got; times in milliseconds."""

    way: str
    num_streams: int
    latency_p50_ms: float
    latency_p95_ms: float
    latency_p99_ms: float
    first_audio_p50_ms: float
    first_audio_worst_ms: float
    num_underruns: int
    num_frames: int
    busy_share: float
    state_kib_per_stream: float

    @property
    def is_real_time(self) -> bool:
        """Whether no listener ever waited."""
        return self.num_underruns == 0


def run(decoders: Decoders, way: str, *, num_streams: int, seconds: float, prebuffer_ms: float) -> Load:
    """Real time: it takes `seconds`."""
    frame_seconds = decoders.frame_seconds
    num_frames = max(2, round(seconds / frame_seconds))
    for _ in range(_WARM_UP_FRAMES):
        for stream in range(num_streams):
            decoders.push(stream)
        while decoders.work():
            pass
    decoders.begin()
    streams = range(num_streams)
    phases = [0.0 if decoders.in_step else stream / num_streams * frame_seconds for stream in streams]
    frames = itertools.product(streams, range(num_frames))
    arrivals = deque(sorted((phases[stream] + at * frame_seconds, stream) for stream, at in frames))
    waiting: list[deque[float]] = [deque() for _ in streams]
    listeners = [Listener(phases[stream], prebuffer_ms / 1000, decoders.sample_rate_hz) for stream in streams]
    latencies: list[float] = []
    busy = 0.0
    started = time.perf_counter()
    while arrivals or any(waiting):
        now = time.perf_counter() - started
        while arrivals and arrivals[0][0] <= now:
            arrived, stream = arrivals.popleft()
            waiting[stream].append(arrived)
            decoders.push(stream)
        begun = time.perf_counter()
        moved = decoders.work()
        ended = time.perf_counter()
        if not moved:
            if not arrivals:
                break
            time.sleep(max(0.0, min(0.001, arrivals[0][0] - (ended - started))))
            continue
        busy += ended - begun
        for stream, num_done, num_samples in moved:
            latencies += [ended - started - waiting[stream].popleft() for _ in range(num_done)]
            listeners[stream].hear(ended - started, num_samples)
        if ended - started > 4 * seconds + 10:
            break  # far behind: what is left would not be heard either
    took = time.perf_counter() - started
    num_unheard = sum(map(len, waiting)) + len(arrivals)
    return load_of(
        way,
        listeners,
        latencies,
        num_unheard=num_unheard,
        busy_share=busy / took,
        state_bytes_per_stream=decoders.state_bytes_per_stream,
    )


def load_of(
    way: str,
    listeners: Sequence[Listener],
    latencies: Sequence[float],
    *,
    num_unheard: int,
    busy_share: float,
    state_bytes_per_stream: int,
) -> Load:
    """What there is to tell of these listeners; latencies in seconds."""
    first = [1000 * heard for listener in listeners if (heard := listener.first_audio) is not None] or [math.inf]
    p50, p95, p99 = (1000 * float(value) for value in np.quantile(latencies or [math.inf], (0.5, 0.95, 0.99)))
    return Load(
        way=way,
        num_streams=len(listeners),
        latency_p50_ms=p50,
        latency_p95_ms=p95,
        latency_p99_ms=p99,
        first_audio_p50_ms=statistics.median(first),
        first_audio_worst_ms=max(first),
        num_underruns=sum(listener.num_underruns for listener in listeners) + num_unheard,
        num_frames=len(latencies),
        busy_share=busy_share,
        state_kib_per_stream=state_bytes_per_stream / 1024,
    )


class Listener:
    """Plays what a stream gives, from `prebuffer_seconds` after the first of it."""

    def __init__(self, began: float, prebuffer_seconds: float, sample_rate_hz: int) -> None:
        self._began, self._prebuffer_seconds, self._rate_hz = began, prebuffer_seconds, sample_rate_hz
        self._playing_since = 0.0
        self._num_samples = 0
        self.first_audio: float | None = None  # seconds after the first frame arrived
        self.num_underruns = 0

    def hear(self, now: float, num_samples: int) -> None:
        """So many samples more are there now, by the clock by which it began."""
        if num_samples == 0:
            return
        if self.first_audio is None:
            self.first_audio = now - self._began
            self._playing_since = now + self._prebuffer_seconds
        late = now - (self._playing_since + self._num_samples / self._rate_hz)
        if late > 0:
            self.num_underruns += 1
            self._playing_since += late
        self._num_samples += num_samples
