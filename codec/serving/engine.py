"""The pools of a server and the thread that steps them; sessions get at them through a `Stream`.

    event loop:  Stream.push -> pool                                    Stream.receive <- event loop
    stepping thread:            pool.step -> packed into messages -> posted to the event loop

A loopback stream has a place in both pools: what the encoders give, the stepping thread pushes to the decoders.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from codec.models.interface import Codec
from codec.models.voice import VoicedCodec
from codec.serving.metrics import Metrics
from codec.serving.protocol import Facts, Welcome
from codec.streaming import StreamClosed, StreamPool

STEP_INTERVAL_S = 0.01  # from one step to the next, at least, where no more than a frame of each stream waits
MAX_PENDING_FRAMES = 500  # of a stream; what is beyond stays with the client


@dataclass(frozen=True)
class Output:
    """A piece of what a session is to send. The last one says so, and may be empty."""

    message: bytes | str
    num_frames: int = 0
    num_samples: int = 0
    is_last: bool = False


_Owner = tuple["Stream", int]  # and its recording
_Delivery = tuple["Stream", int, Output]


class Stream:
    """One session's place in the pools. All is for the event loop; `receive` is called there, with each output."""

    def __init__(
        self, engine: Engine, welcome: Welcome, global_codes: Tensor | None, receive: Callable[[Output], None]
    ):
        """ValueError where the global codes are none of the codec's, or some are needed; PoolFull."""
        self.welcome = welcome
        self.receive = receive
        self.num_frames = self.num_samples = 0  # of this recording; in a loopback, those that came out
        self.is_ended = False
        self.recording = 0  # grows whenever outputs that are under way must not arrive any more
        self._engine = engine
        self._global_codes = global_codes
        self._open()

    def _open(self) -> None:
        engine, kind = self._engine, self.welcome.kind
        self.encoder: int | None = None
        self.decoder: int | None = None
        self.held: list[Tensor] = []  # loopback: codes that wait for the voice
        self.voice_is_due = kind != "decode" and engine.is_voiced and self._global_codes is None
        self.input_since: float | None = None
        try:
            if kind != "encode" and not self.voice_is_due:
                self.decoder = engine.decoders.open(global_codes=self._global_codes)
            if kind != "decode":
                self.encoder = engine.encoders.open(
                    num_quantizers=self.welcome.num_quantizers, global_codes=self._global_codes
                )
        except BaseException:
            self.close()
            raise
        engine.add(self)

    @property
    def room(self) -> int:
        """How many frames of codes, or samples of audio, may be pushed now."""
        if self.encoder is None:
            return self._engine.decoders.room(self._decoder)
        return self._engine.encoders.room(self.encoder) * self.welcome.hop_length

    def push(self, piece: np.ndarray) -> None:
        """Codes int64 [K, F], or audio int16 or float32 [C, n], no more than there is room for. ValueError if wrong."""
        if self.encoder is None:
            self._engine.decoders.push(self._decoder, torch.from_numpy(piece))
            self.num_frames += piece.shape[1]
        else:
            if piece.dtype == np.int16:
                piece = piece.astype(np.float32) / np.float32(32768)
            self._engine.encoders.push(self.encoder, torch.from_numpy(piece))
            if self.welcome.kind == "encode":
                self.num_samples += piece.shape[1]
        self._touched()

    def conceal(self, num_frames: int) -> None:
        """So many frames were lost, no more than there is room for."""
        self._engine.decoders.conceal(self._decoder, num_frames)
        self.num_frames += num_frames
        self._touched()

    def end(self) -> None:
        """No more input: outputs go on, up to one that is the last."""
        self.is_ended = True
        self._engine.end(self)

    def reset(self) -> None:
        """Begin a new recording; no output of the old one comes any more."""
        with self._engine.lock:
            self.close()
            self.num_frames = self.num_samples = 0
            self._open()

    def close(self) -> None:
        """Give the places back. Harmless the second time."""
        self._engine.remove(self)

    @property
    def _decoder(self) -> int:
        assert self.decoder is not None
        return self.decoder

    def _touched(self) -> None:
        self.input_since = self.input_since or time.perf_counter()
        self._engine.wake()


class Engine:
    """A pool of encoders and one of decoders, and their thread.

    `failed` is called in the event loop with what made a step fail, after which nothing moves any more.
    """

    def __init__(
        self, codec: Codec, metrics: Metrics, *, max_sessions: int, failed: Callable[[Exception], None]
    ) -> None:
        """ValueError for a codec that does not stream."""
        self.facts = Facts.of(codec)
        self.is_voiced = isinstance(codec, VoicedCodec)
        self.encoders, self.decoders = (
            StreamPool(codec, direction, capacity=max_sessions, max_pending_frames=MAX_PENDING_FRAMES)
            for direction in ("encode", "decode")
        )
        # Whoever opens or closes a stream, or hands on from pool to pool, holds it: a reset then is one moment.
        self.lock = threading.RLock()
        self._metrics = metrics
        self._failed = failed
        self._codec = codec
        self._owners: dict[tuple[str, int], _Owner] = {}
        self._ending: deque[_Owner] = deque()
        self._waiting: set[asyncio.Event] = set()
        self._wake = threading.Event()
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="codec-steps", daemon=True)
        metrics.watch_pending_frames(lambda: self.encoders.num_pending_frames + self.decoders.num_pending_frames)

    # From the event loop.

    def start(self) -> None:
        """Warm up, so that the first session does not wait for it, and start the thread."""
        self._warm_up()
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the step that it is in."""
        self._is_stopping = True
        self.wake()
        self._thread.join()

    def wake(self) -> None:
        """There is something to do."""
        self._wake.set()

    async def progress(self) -> None:
        """Sleep until a step is over, or `nudge`."""
        event = asyncio.Event()
        self._waiting.add(event)
        try:
            await event.wait()
        finally:
            self._waiting.discard(event)

    def nudge(self) -> None:
        """Wake all that sleep in `progress`."""
        for event in self._waiting:
            event.set()

    def add(self, stream: Stream) -> None:
        """Outputs of its places in the pools go to it."""
        with self.lock:
            for direction, number in (("encode", stream.encoder), ("decode", stream.decoder)):
                if number is not None:
                    self._owners[direction, number] = stream, stream.recording

    def remove(self, stream: Stream) -> None:
        """Nothing more comes to it."""
        with self.lock:
            for pool, number in ((self.encoders, stream.encoder), (self.decoders, stream.decoder)):
                if number is not None:
                    self._owners.pop((pool.direction, number), None)
                    with contextlib.suppress(StreamClosed):  # it ended by itself
                        pool.close(number)
            stream.encoder = stream.decoder = None
            stream.recording += 1

    def end(self, stream: Stream) -> None:
        """End it in the stepping thread, which can ask for the voice before the stream is gone."""
        self._ending.append((stream, stream.recording))
        self.wake()

    # In the stepping thread.

    def _run(self) -> None:
        torch.set_num_threads(torch.get_num_threads())  # OpenMP keeps the number by thread
        try:
            while not self._is_stopping:
                self._wake.wait()
                self._wake.clear()
                while not self._is_stopping and (self._ending or self.encoders.wait(0) or self.decoders.wait(0)):
                    began = time.perf_counter()
                    outputs = self._cycle()
                    self._loop.call_soon_threadsafe(self._deliver, outputs)
                    if not self._is_behind:
                        # A step of few streams costs almost what one of many does: let some more arrive.
                        time.sleep(max(0.0, STEP_INTERVAL_S - (time.perf_counter() - began)))
        except Exception as error:
            self._loop.call_soon_threadsafe(self._failed, error)

    @property
    def _is_behind(self) -> bool:
        """Whether more waits than about a frame of each stream."""
        pools = (self.encoders, self.decoders)
        return sum(pool.num_pending_frames for pool in pools) > sum(pool.num_open for pool in pools)

    def _cycle(self) -> list[_Delivery]:
        """A step of both pools. Outputs name the recording that they are from: its stream may have begun another."""
        outputs: list[_Delivery] = []
        self._end_some(outputs)
        for number, codes in self._step(self.encoders).items():
            if owner := self._owners.get(("encode", number)):
                self._encoded(owner, codes, outputs, is_last=not self.encoders.is_open(number))
        for number, audio in self._step(self.decoders).items():
            if owner := self._owners.get(("decode", number)):
                welcome, num_samples = owner[0].welcome, audio.shape[1]
                message = welcome.pack_audio(audio.cpu().numpy())
                is_last = not self.decoders.is_open(number)
                outputs.append((*owner, Output(message, num_samples=num_samples, is_last=is_last)))
                self._metrics.audio_seconds.labels(welcome.kind).inc(num_samples / welcome.sample_rate_hz)
        return outputs

    def _step(self, pool: StreamPool) -> dict[int, Tensor]:
        if not pool.wait(0):
            return {}
        started = time.perf_counter()
        outputs = pool.step()
        self._metrics.step_seconds.labels(pool.direction).observe(time.perf_counter() - started)
        return outputs

    def _end_some(self, outputs: list[_Delivery]) -> None:
        while self._ending:
            stream, recording = self._ending.popleft()
            with self.lock:
                if recording != stream.recording:
                    continue
                if stream.encoder is not None:
                    self.encoders.end(stream.encoder)
                    self._hear_voice(stream, outputs)
                elif stream.decoder is not None:
                    self.decoders.end(stream.decoder)

    def _encoded(self, owner: _Owner, codes: Tensor, outputs: list[_Delivery], *, is_last: bool) -> None:
        """Codes that a stream's encoder gave: sent, or heard again."""
        stream, recording = owner
        num_frames, kind = codes.shape[1], stream.welcome.kind
        packed = codes.cpu().numpy()
        self._metrics.frames.labels(kind).inc(num_frames)
        with self.lock:
            if recording != stream.recording:
                return
            if not is_last:
                self._hear_voice(stream, outputs)
            if kind == "encode":
                message = stream.welcome.pack_codes(packed)
                outputs.append((*owner, Output(message, num_frames=num_frames, is_last=is_last)))
                return
            if num_frames:
                outputs.append((*owner, Output(json.dumps({"codes": packed.T.tolist()}), num_frames=num_frames)))
                stream.held.append(codes)
            if stream.decoder is not None:
                for held in stream.held:
                    self.decoders.push(stream.decoder, held)
                stream.held = []
                if is_last:
                    self.decoders.end(stream.decoder)

    def _hear_voice(self, stream: Stream, outputs: list[_Delivery]) -> None:
        """Tell the voice of a recording once it is known; a loopback decodes with it."""
        if not stream.voice_is_due or stream.encoder is None:
            return
        voice = self.encoders.global_codes(stream.encoder)
        if voice is None:
            return
        stream.voice_is_due = False
        outputs.append((stream, stream.recording, Output(json.dumps({"global_codes": voice.tolist()}))))
        if stream.welcome.kind == "loopback":
            stream.decoder = self.decoders.open(global_codes=voice)
            self.add(stream)

    def _deliver(self, outputs: list[_Delivery]) -> None:
        """In the event loop: outputs go to their streams, but for those of recordings that were dropped meanwhile."""
        now = time.perf_counter()
        for stream, recording, output in outputs:
            if recording != stream.recording:
                continue
            if stream.input_since is not None and output.message:
                self._metrics.answer_seconds.labels(stream.welcome.kind).observe(now - stream.input_since)
                stream.input_since = None
            stream.receive(output)
        self.nudge()

    def _warm_up(self) -> None:
        """A few frames through both pools: what happens once only happens here."""
        facts = self.facts
        silence = torch.zeros(facts.num_channels, facts.hop_length * 17)
        codes = torch.zeros(len(facts.codebook_sizes), 17, dtype=torch.int64)
        voice = torch.zeros(facts.num_global_codes, dtype=torch.int64) if self.is_voiced else None
        for pool, piece in ((self.encoders, silence), (self.decoders, codes)):
            number = pool.open(global_codes=voice)
            pool.push(number, piece)
            pool.end(number)
            while pool.is_open(number):
                pool.step()
