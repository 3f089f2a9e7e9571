"""How many streams are decoded in real time: `python -m tools.benchmark streams`.

Every stream gets one frame of codes as often as a frame is long, as from a language model that speaks; the streams
begin at times spread evenly over a frame. One loop takes what has arrived and computes, so a frame that comes while
others are computed waits. Each way of decoding gets the same traffic, one after another:

- `pool`: a `StreamPool`;
- `one by one`: a `StreamingDecoder` for each stream;
- `recompute`: no state; for each frame the last frames are decoded again, as many as a sample depends on, and all but
  the new samples are thrown away: how codecs without streams are served;
- `mimi` (`--mimi`): the decoder of the `moshi` package, random weights of its published shape and 8 rows of codes,
  all streams in one batch in step with each other; its frames are of 80 ms.

A frame's latency is the time from its arrival to its audio. A listener starts `--prebuffer-ms` after the first audio;
an underrun is a piece of audio that was not there when its turn came, which then delays the rest. The first audio is
counted from the first frame's arrival, and waits for as many frames as the decoder is late.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from codec.layers.causal import leaves
from codec.models.interface import UNLIMITED, StreamableCodec, streamable
from codec.pretrained import load
from codec.streaming import StreamingDecoder, StreamPool
from codec.token_format import DEFAULT_MODEL
from codec.tokens import Tokens
from tools.moshi_peer import moshi_loaders

WAYS = ("pool", "one by one", "recompute")
# Frames of every stream before time is taken: memory, caches, and what is tried out once.
_WARM_UP_FRAMES = 10
_MAX_PENDING = 10**6  # so that a pool that is too slow shows in latencies
_NUM_CODES = 500  # frames of every stream; then they come again


class Done(NamedTuple):
    """What one stream got."""

    stream: int
    num_frames: int
    num_samples: int


class Decoders(Protocol):
    """A way of decoding N streams at once."""

    frame_seconds: float
    sample_rate_hz: int
    state_bytes_per_stream: int
    in_step: bool  # all streams get their frames at the same time

    def begin(self) -> None:
        """A new recording in each stream."""
        ...

    def push(self, stream: int) -> None:
        """The next frame of a stream has arrived."""
        ...

    def work(self) -> list[Done]:
        """Decode some of what has arrived."""
        ...


class _Codes:
    """Random codes of every stream, the same for each way of decoding."""

    def __init__(self, codec: StreamableCodec, num_streams: int) -> None:
        device = codec.quantizer.device
        self.is_cuda = device.type == "cuda"
        generator = torch.Generator().manual_seed(0)
        shape = (num_streams, _NUM_CODES)
        rows = [torch.randint(0, size, shape, generator=generator) for size in codec.codebook_sizes]
        self._codes = torch.stack(rows, dim=1).to(device)
        size = codec.num_global_codes
        self.voice = torch.zeros(size, dtype=torch.int64, device=device) if size else None

    def frames(self, stream: int, first: int, last: int) -> Tensor:
        """Codes [K, last - first]; they begin again when they are over."""
        if last <= _NUM_CODES:
            return self._codes[stream, :, first:last]
        return self._codes[stream][:, torch.arange(first, last, device=self._codes.device) % _NUM_CODES]


class _Pool:
    in_step = False

    def __init__(self, codec: StreamableCodec, num_streams: int, codes: _Codes) -> None:
        self.frame_seconds, self.sample_rate_hz = _frame_seconds(codec), codec.sample_rate_hz
        self._pool = StreamPool(codec, "decode", capacity=num_streams, max_pending_frames=_MAX_PENDING)
        self.state_bytes_per_stream = self._pool.state_bytes_per_stream
        self._numbers = [self._pool.open(global_codes=codes.voice) for _ in range(num_streams)]
        self._codes = codes
        self.begin()

    def begin(self) -> None:
        for number in self._numbers:
            self._pool.reset(number)
        self._num_pushed, self._num_done = [0] * len(self._numbers), [0] * len(self._numbers)

    def push(self, stream: int) -> None:
        at = self._num_pushed[stream]
        self._pool.push(self._numbers[stream], self._codes.frames(stream, at, at + 1))
        self._num_pushed[stream] += 1

    def work(self) -> list[Done]:
        outputs = self._pool.step()
        if self._codes.is_cuda:
            torch.cuda.synchronize()
        moved = []
        for stream, number in enumerate(self._numbers):
            done = self._num_pushed[stream] - (_MAX_PENDING - self._pool.room(number))
            if done > self._num_done[stream]:
                num_samples = outputs[number].shape[1] if number in outputs else 0
                moved.append(Done(stream, done - self._num_done[stream], num_samples))
                self._num_done[stream] = done
        return moved


class _OneByOne:
    in_step = False

    def __init__(self, codec: StreamableCodec, num_streams: int, codes: _Codes) -> None:
        self.frame_seconds, self.sample_rate_hz = _frame_seconds(codec), codec.sample_rate_hz
        state = codec.decode_init(1, None if codes.voice is None else codes.voice[None])
        self.state_bytes_per_stream = sum(leaf.numel() * leaf.element_size() for leaf in leaves(state))
        self._decoders = [StreamingDecoder(codec, global_codes=codes.voice) for _ in range(num_streams)]
        self._codes, self._num_decoded = codes, [0] * num_streams
        self._waiting: deque[int] = deque()

    def begin(self) -> None:
        for decoder in self._decoders:
            decoder.reset()
        self._num_decoded = [0] * len(self._decoders)

    def push(self, stream: int) -> None:
        self._waiting.append(stream)

    def work(self) -> list[Done]:
        if not self._waiting:
            return []
        stream = self._waiting.popleft()
        at = self._num_decoded[stream]
        self._num_decoded[stream] += 1
        return [Done(stream, 1, self._decoded(stream, at))]

    def _decoded(self, stream: int, at: int) -> int:
        return self._decoders[stream].push(self._codes.frames(stream, at, at + 1)).shape[1]


class _Recompute(_OneByOne):
    def __init__(self, codec: StreamableCodec, num_streams: int, codes: _Codes) -> None:
        if codec.decode_frames_before >= UNLIMITED:
            raise ValueError("this codec hears everything before a frame, so a window of frames cannot be decoded")
        super().__init__(codec, num_streams, codes)
        self._codec = codec
        self._delay_frames = -(-codec.decode_delay_samples // codec.hop_length)
        self._window_frames = codec.decode_frames_before + 1 + self._delay_frames
        self.state_bytes_per_stream = self._window_frames * len(codec.codebook_sizes) * 8

    def _decoded(self, stream: int, at: int) -> int:
        codes = self._codes.frames(stream, max(0, at + 1 - self._window_frames), at + 1)
        num_samples = torch.tensor([codes.shape[1] * self._codec.hop_length])
        self._codec.decode(Tokens(codes[None], num_samples, self._codec.codec_id))
        return self._codec.hop_length if at >= self._delay_frames else 0


class _Mimi:
    in_step = True
    frame_seconds, sample_rate_hz = 0.08, 24000

    def __init__(self, num_streams: int) -> None:
        try:
            loaders = moshi_loaders()
        except ImportError as error:
            raise ValueError(str(error)) from error
        self._mimi = loaders.get_mimi(None, num_codebooks=8)
        self._num_streams = num_streams
        with torch.inference_mode():
            self._mimi.streaming_forever(num_streams)
        self._codes = torch.zeros(num_streams, 8, 1, dtype=torch.int64)
        self._num_waiting = 0
        # Keys and values of 250 frames, of 8 layers, 512 wide; what its convolutions keep is little beside that.
        self.state_bytes_per_stream = 2 * 250 * 512 * 8 * 4

    def begin(self) -> None:
        with torch.inference_mode():
            self._mimi.reset_streaming()

    def push(self, stream: int) -> None:
        self._num_waiting += 1

    @torch.inference_mode()
    def work(self) -> list[Done]:
        if self._num_waiting < self._num_streams:
            return []
        self._num_waiting -= self._num_streams
        audio = self._mimi.decode(self._codes)
        return [Done(stream, 1, audio.shape[2]) for stream in range(self._num_streams)]


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
    listeners = [_Listener(phases[stream], prebuffer_ms / 1000, decoders.sample_rate_hz) for stream in streams]
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
    latencies = latencies or [float("inf")]
    first = [1000 * listener.first_audio for listener in listeners if listener.first_audio is not None] or [
        float("inf")
    ]
    p50, p95, p99 = (1000 * float(value) for value in np.quantile(latencies, (0.5, 0.95, 0.99)))
    return Load(
        way=way,
        num_streams=num_streams,
        latency_p50_ms=p50,
        latency_p95_ms=p95,
        latency_p99_ms=p99,
        first_audio_p50_ms=statistics.median(first),
        first_audio_worst_ms=max(first),
        num_underruns=sum(listener.num_underruns for listener in listeners) + num_unheard,
        num_frames=len(latencies),
        busy_share=busy / took,
        state_kib_per_stream=decoders.state_bytes_per_stream / 1024,
    )


class _Listener:
    """Plays what a stream gives, from `prebuffer_seconds` after the first of it."""

    def __init__(self, began: float, prebuffer_seconds: float, sample_rate_hz: int) -> None:
        self._began, self._prebuffer_seconds, self._rate_hz = began, prebuffer_seconds, sample_rate_hz
        self._playing_since = 0.0
        self._num_samples = 0
        self.first_audio: float | None = None  # seconds after the first frame arrived
        self.num_underruns = 0

    def hear(self, now: float, num_samples: int) -> None:
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


def _frame_seconds(codec: StreamableCodec) -> float:
    return codec.hop_length / codec.sample_rate_hz


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 10, 20, 40, 60, 80], metavar="N")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement (default: 10)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY", help=", ".join(WAYS))
    parser.add_argument("--mimi", action="store_true", help="Mimi of the moshi package as well, which must be there")
    parser.add_argument("--prebuffer-ms", type=float, default=40.0, help="that a listener waits (default: 40)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)


def measured(codec: StreamableCodec, args: argparse.Namespace) -> Iterator[Load]:
    """Each way with each number of streams, until it falls behind."""
    torch.set_num_threads(args.threads)
    ways: dict[str, Callable[[int], Decoders]] = {
        "pool": lambda n: _Pool(codec, n, _Codes(codec, n)),
        "one by one": lambda n: _OneByOne(codec, n, _Codes(codec, n)),
        "recompute": lambda n: _Recompute(codec, n, _Codes(codec, n)),
    }
    chosen = {way: ways[way] for way in args.ways} | ({"mimi": _Mimi} if args.mimi else {})
    for way, build in chosen.items():
        for num_streams in sorted(args.streams):
            if num_streams < 1:
                raise ValueError(f"--streams {num_streams} must be positive")
            load_ = run(
                build(num_streams), way, num_streams=num_streams, seconds=args.seconds, prebuffer_ms=args.prebuffer_ms
            )
            yield load_
            if not load_.is_real_time:
                break


def command(args: argparse.Namespace) -> None:
    """Measure and print."""
    codec = streamable(load(args.model or DEFAULT_MODEL)).to(args.device)
    if not args.json:
        print(
            f"{'':12}{'streams':>8}{'p50':>9}{'p95':>9}{'p99':>9}{'first audio':>16}{'underruns':>11}"
            f"{'busy':>7}{'state':>10}"
        )
    results = []
    for result in measured(codec, args):
        results.append(asdict(result))
        if not args.json:
            print(
                f"{result.way:12}{result.num_streams:8}{result.latency_p50_ms:6.1f} ms{result.latency_p95_ms:6.1f} ms"
                f"{result.latency_p99_ms:6.1f} ms{result.first_audio_p50_ms:6.1f}/{result.first_audio_worst_ms:.1f} ms"
                f"{result.num_underruns:11}{result.busy_share:7.0%}{result.state_kib_per_stream:6.0f} KiB",
                flush=True,
            )
    if args.json:
        print(json.dumps({"model": codec.name, "torch": torch.__version__, "loads": results}))
