"""Many streams in one batch, each with the bits that it has alone."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from codec.models.interface import Codec, streamable
from codec.streaming.arena import StateArena, Stepper
from codec.streaming.queued import DecoderStream, EncoderStream, PoolFull, QueuedStream, StreamClosed

DIRECTIONS = ("decode", "encode")
# A step advances streams by so many frames at once: few sizes, so that a GPU can keep one recording of each.
STEP_SIZES = (16, 4, 1)
# Streams times frames that are computed at once: enough to read the weights seldom, few enough for the cache.
TILE_FRAMES = 64


class StreamPool:
    """A fixed number of places for streams of one codec, all encoders or all decoders, that advance together.

    Streams come and go at any time, and each gets input whenever there is some. A `step` advances all that have any by
    at most `step_frames` frames, so nobody waits long for a neighbour who sent minutes at once. What a stream gets out
    is what `StreamingDecoder` or `StreamingEncoder` give it alone; bit for bit where `codec.is_bit_exact`.

    One thread steps, in a loop; any thread may do the rest at any time. Nothing but `fork` and a second `step` waits
    while a step computes.

    A stream may have `max_pending_frames` frames waiting; more are refused with `PoolFull`, which is how a sender is
    slowed down. On a GPU, steps are recorded as CUDA graphs (`uses_cuda_graphs` says whether that worked). `compile`
    may be `torch.compile`, or a partial of it; compiled steps are rounded differently, so the bits are then those of
    this pool only.

    >>> from codec.testing import tiny_codec
    >>> codec = tiny_codec()
    >>> pool = StreamPool(codec, "decode", capacity=8)
    >>> anna, bert = pool.open(), pool.open()
    >>> pool.push(anna, torch.zeros(3, 5, dtype=torch.int64))
    >>> pool.end(anna)
    >>> pool.push(bert, torch.zeros(3, 2, dtype=torch.int64))
    >>> audio = pool.step()
    >>> audio[anna].shape[1] // codec.hop_length, pool.is_open(anna), pool.is_open(bert)
    (5, False, True)
    """

    def __init__(
        self,
        codec: Codec,
        direction: str,
        *,
        capacity: int = 64,
        step_frames: int = 16,
        max_pending_frames: int = 500,
        compile: Callable[[Callable[..., object]], Callable[..., object]] | None = None,
    ) -> None:
        """ValueError for a codec that does not stream, an unknown direction, or sizes below 1."""
        self.codec = streamable(codec)
        if direction not in DIRECTIONS:
            raise ValueError(f"direction={direction!r} is not one of {DIRECTIONS}")
        for name, value in (
            ("capacity", capacity),
            ("step_frames", step_frames),
            ("max_pending_frames", max_pending_frames),
        ):
            if value < 1:
                raise ValueError(f"{name} must be positive, got {value}")
        self.direction = direction
        self.capacity = capacity
        self.step_frames = step_frames
        self.max_pending_frames = max_pending_frames
        self._device = codec.quantizer.device
        self._kind: type[QueuedStream] = DecoderStream if direction == "decode" else EncoderStream
        self._arena = StateArena(self._kind.steady_state(self.codec), capacity)
        self._stepper = Stepper(self._kind.step_function(self.codec), self._arena, compile)
        self._streams: dict[int, QueuedStream] = {}
        self._numbers = itertools.count()
        self._free = list(reversed(range(capacity)))
        # Held for moments, by everybody; `_stepping` for a whole step, by whoever computes on states.
        self._lock = threading.Condition()
        self._stepping = threading.Lock()

    # What any thread may do.

    def open(self, *, num_quantizers: int | None = None, global_codes: Tensor | None = None) -> int:
        """A new stream: its number, never used twice. PoolFull where all places are taken.

        `num_quantizers`: how many rows of codes an encoder gives, all if None. `global_codes` [L] or [1, L]: the voice,
        which decoders of codecs with global codes need. ValueError where these are none of the codec's.
        """
        stream = self._kind(self.codec, num_quantizers=num_quantizers, global_codes=global_codes)
        with self._lock:
            return self._add(stream)

    def push(self, stream: int, piece: Tensor) -> None:
        """Input for a stream: codes int64 [K', F] of any valid prefix, or audio float [C, n] of any length.

        It is copied. ValueError for anything else, StreamClosed, or PoolFull where the stream's queue has not room for
        it; the stream then is as before.
        """
        piece = self._kind.checked(self.codec, piece)
        with self._lock:
            opened = self._accepting(stream)
            self._check_room(opened, opened.num_frames_of(piece))
            opened.push(piece)
            self._lock.notify_all()

    def conceal(self, stream: int, num_frames: int) -> None:
        """So many frames were lost: as `StreamingDecoder.conceal`, in turn with what is pushed. Errors as `push`."""
        if self.direction != "decode":
            raise ValueError("only decoders conceal: an encoder hears silence where audio is missing")
        if num_frames < 0:
            raise ValueError(f"num_frames must not be negative, got {num_frames}")
        with self._lock:
            opened = self._accepting(stream)
            self._check_room(opened, num_frames)
            assert isinstance(opened, DecoderStream)
            opened.lose(num_frames)
            self._lock.notify_all()

    def end(self, stream: int) -> None:
        """No more input comes. What waits is still worked off; the last piece, with the tail, closes the stream."""
        with self._lock:
            self._accepting(stream).end()
            self._lock.notify_all()

    def close(self, stream: int) -> None:
        """Drop a stream and what waits for it. StreamClosed where it is closed already."""
        with self._lock:
            self._remove(stream)

    def reset(self, stream: int) -> None:
        """Begin a new recording, with the same voice; what waits is dropped."""
        with self._lock:
            old = self._opened(stream)
            fresh = old.fresh()
            fresh.place = old.place
            self._streams[stream] = fresh

    def fork(self, stream: int) -> int:
        """Another stream in the same place of the recording, with the same input waiting. Waits for a step to end."""
        with self._stepping, self._lock:
            opened = self._opened(stream)
            other = opened.fork()
            number = self._add(other)
            if other.state is None:
                old, new = self._arena.places([opened.place]), self._arena.places([other.place])
                self._arena.put(new, self._arena.get(old))
            return number

    def is_open(self, stream: int) -> bool:
        """Whether it is neither closed nor worked off after its end."""
        return stream in self._streams

    def room(self, stream: int) -> int:
        """How many frames may still be pushed."""
        with self._lock:
            return self.max_pending_frames - self._opened(stream).num_pending

    def global_codes(self, stream: int) -> Tensor | None:
        """The voice of an encoder's recording, int64 [L]: as `StreamingEncoder.global_codes`."""
        with self._lock:
            voice = self._opened(stream).voice
        return voice.global_codes

    @property
    def num_open(self) -> int:
        """How many streams there are."""
        return len(self._streams)

    @property
    def num_pending_frames(self) -> int:
        """How many frames wait, of all streams together."""
        with self._lock:
            return sum(stream.num_pending for stream in self._streams.values())

    @property
    def state_bytes_per_stream(self) -> int:
        """What a stream needs beside its queue."""
        return self._arena.bytes_per_row

    @property
    def uses_cuda_graphs(self) -> bool:
        """Whether steps are replayed from recordings; False before the first step, and on a CPU."""
        return self._stepper.uses_cuda_graphs

    def wait(self, timeout_seconds: float | None = None) -> bool:
        """Sleep until a `step` has something to do, or the time is over; whether there is something."""
        with self._lock:
            return self._lock.wait_for(self._has_work, timeout_seconds)

    # What the one thread does.

    @torch.inference_mode()
    def step(self) -> dict[int, Tensor]:
        """Advance each stream that has whole frames waiting: number -> audio [C, n], or codes [K, F], on the CPU.

        A stream that ended is there once more with its last piece, even where that is empty.
        """
        with self._stepping:
            with self._lock:
                moved = {number: stream for number, stream in self._streams.items() if stream.has_work}
                due = {number: min(self.step_frames, stream.num_pending) for number, stream in moved.items()}
            pieces: dict[int, list[Tensor]] = {number: [] for number in moved}
            for size in STEP_SIZES:
                while ready := [number for number in moved if due[number] >= size]:
                    self._advance([moved[number] for number in ready], size, [pieces[number] for number in ready])
                    for number in ready:
                        due[number] -= size
            self._finish(moved, pieces)
            return self._delivered(moved, pieces)

    def _advance(self, streams: Sequence[QueuedStream], num_frames: int, pieces: Sequence[list[Tensor]]) -> None:
        """So many frames of each of these streams, tile by tile."""
        tile_rows = TILE_FRAMES // num_frames
        for first in range(0, len(streams), tile_rows):
            tile = streams[first : first + tile_rows]
            with self._lock:
                inputs = [stream.take(num_frames) for stream in tile]
            for stream, output, so_far in zip(
                tile, self._stepped(tile, inputs, tile_rows), pieces[first:], strict=False
            ):
                so_far.append(stream.emitted(output))

    def _stepped(self, streams: Sequence[QueuedStream], inputs: Sequence[Tensor], tile_rows: int) -> list[Tensor]:
        """The outputs of one tile: of its rows in the arena together, of what does not fit there one by one."""
        self._settle(streams)
        outputs = {}
        settled = [i for i, stream in enumerate(streams) if stream.state is None]
        if settled:
            together = torch.stack([inputs[i] for i in settled])
            rows = self._stepper.step(together, [streams[i].place for i in settled], tile_rows)
            outputs = dict(zip(settled, rows, strict=True))
        for i, stream in enumerate(streams):
            if stream.state is not None:
                row, stream.state = self._stepper.function(inputs[i][None].to(self._device), stream.state)
                outputs[i] = row[0].cpu()
        return [outputs[i] for i in range(len(streams))]

    def _settle(self, streams: Sequence[QueuedStream]) -> None:
        """Put states that streams still have themselves into the arena, where they fit there."""
        for stream in streams:
            if stream.state is not None and self._arena.fits(stream.state):
                self._arena.put(self._arena.places([stream.place]), stream.state)
                stream.state = None

    def _finish(self, moved: dict[int, QueuedStream], pieces: dict[int, list[Tensor]]) -> None:
        """The tails of the streams that have nothing more to come."""
        with self._lock:
            ended = {number: stream for number, stream in moved.items() if stream.is_over}
        self._settle(list(ended.values()))
        settled = {number: stream.place for number, stream in ended.items() if stream.state is None}
        tails = {}
        if settled:
            states = self._arena.get(self._arena.places(list(settled.values())))
            tails = dict(zip(settled, self._kind.flushed(self.codec, states).cpu(), strict=True))
        for number, stream in ended.items():
            tail = tails[number] if stream.state is None else self._kind.flushed(self.codec, stream.state)[0].cpu()
            pieces[number].append(stream.tail(tail))

    def _delivered(self, moved: dict[int, QueuedStream], pieces: dict[int, list[Tensor]]) -> dict[int, Tensor]:
        """The outputs of those that nobody closed or reset meanwhile."""
        outputs = {}
        with self._lock:
            for number, stream in moved.items():
                if self._streams.get(number) is not stream:
                    continue
                # Copied by `cat`: a view would keep the memory of the whole tile.
                output = torch.cat(pieces[number], dim=1) if pieces[number] else stream.nothing()
                if stream.is_over:
                    self._remove(number)
                if output.shape[1] or stream.is_over:
                    outputs[number] = output
        return outputs

    # Under the lock.

    def _add(self, stream: QueuedStream) -> int:
        if not self._free:
            raise PoolFull(f"all {self.capacity} places of this pool are taken")
        stream.place = self._free.pop()
        number = next(self._numbers)
        self._streams[number] = stream
        return number

    def _remove(self, number: int) -> None:
        self._free.append(self._opened(number).place)
        del self._streams[number]

    def _opened(self, number: int) -> QueuedStream:
        if number not in self._streams:
            raise StreamClosed(f"stream {number} is closed, or never was open")
        return self._streams[number]

    def _accepting(self, number: int) -> QueuedStream:
        stream = self._opened(number)
        if stream.is_ending:
            raise StreamClosed(f"stream {number} was ended: it takes no more input")
        return stream

    def _check_room(self, stream: QueuedStream, num_frames: int) -> None:
        room = self.max_pending_frames - stream.num_pending
        if num_frames > self.max_pending_frames:
            raise ValueError(f"{num_frames} frames at once are more than max_pending_frames={self.max_pending_frames}")
        if num_frames > room:
            raise PoolFull(f"{num_frames} frames do not fit in the queue of this stream, which has room for {room}")

    def _has_work(self) -> bool:
        return any(stream.has_work for stream in self._streams.values())
