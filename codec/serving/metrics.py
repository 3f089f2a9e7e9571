"""What a server tells Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)


class Metrics:
    """The numbers of one server, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.sessions_open = Gauge("codec_sessions_open", "Sessions now.", ["kind"], registry=self._registry)
        self.sessions = Counter("codec_sessions", "Sessions that began.", ["kind"], registry=self._registry)
        self.errors = Counter(
            "codec_session_errors",
            "Sessions that were refused or ended by an error, by the name of the close code.",
            ["reason"],
            registry=self._registry,
        )
        self.frames = Counter("codec_frames_encoded", "Frames that came out.", ["kind"], registry=self._registry)
        self.audio_seconds = Counter(
            "codec_audio_decoded_seconds", "Seconds of audio that came out.", ["kind"], registry=self._registry
        )
        self.step_seconds = Histogram(
            "codec_step_seconds",
            "What a step of all streams of a direction takes.",
            ["direction"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.answer_seconds = Histogram(
            "codec_answer_seconds",
            "From input to the next output of its session, queues included. Audio later than a frame lasts underruns.",
            ["kind"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._pending = Gauge("codec_pending_frames", "Frames that wait for a step.", registry=self._registry)

    def watch_pending_frames(self, count: Callable[[], int]) -> None:
        """Ask for the length of the queues whenever somebody reads the metrics."""
        self._pending.set_function(count)

    def text(self) -> bytes:
        """All of them, as Prometheus reads them."""
        return generate_latest(self._registry)
