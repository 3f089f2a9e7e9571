"""Ways of decoding many streams at once."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from codec.layers.causal import leaves
from codec.models.interface import UNLIMITED, StreamableCodec
from codec.streaming import StreamingDecoder, StreamPool
from codec.tokens import Tokens
from tools.stream_load.moshi_peer import moshi_loaders

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


class Codes:
    """Random codes of every stream, the same for each way of decoding. They lie on the CPU, where they arrive."""

    def __init__(self, codec: StreamableCodec, num_streams: int) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (num_streams, _NUM_CODES)
        rows = [torch.randint(0, size, shape, generator=generator) for size in codec.codebook_sizes]
        self._codes = torch.stack(rows, dim=1)
        size = codec.num_global_codes
        self.voice = torch.zeros(size, dtype=torch.int64) if size else None

    def frames(self, stream: int, first: int, last: int) -> Tensor:
        """Codes [K, last - first]; they begin again when they are over."""
        if last <= _NUM_CODES:
            return self._codes[stream, :, first:last]
        return self._codes[stream][:, torch.arange(first, last) % _NUM_CODES]


class Pool:
    """A `StreamPool`."""

    in_step = False

    def __init__(self, codec: StreamableCodec, num_streams: int, codes: Codes) -> None:
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
        moved = []
        for stream, number in enumerate(self._numbers):
            done = self._num_pushed[stream] - (_MAX_PENDING - self._pool.room(number))
            if done > self._num_done[stream]:
                num_samples = outputs[number].shape[1] if number in outputs else 0
                moved.append(Done(stream, done - self._num_done[stream], num_samples))
                self._num_done[stream] = done
        return moved


class OneByOne:
    """A `StreamingDecoder` for each stream; frames wait in one queue."""

    in_step = False

    def __init__(self, codec: StreamableCodec, num_streams: int, codes: Codes) -> None:
        self.frame_seconds, self.sample_rate_hz = _frame_seconds(codec), codec.sample_rate_hz
        self._codec, self._device = codec, codec.quantizer.device
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
        codes = self._codes.frames(stream, at, at + 1).to(self._device)
        return self._decoders[stream].push(codes).cpu().shape[1]


class Recompute(OneByOne):
    """No state: as many frames are decoded again as a new sample depends on."""

    def __init__(self, codec: StreamableCodec, num_streams: int, codes: Codes) -> None:
        if not self.can_decode(codec):
            raise ValueError("this codec hears everything before a frame, so a window of frames cannot be decoded")
        super().__init__(codec, num_streams, codes)
        self._delay_frames = -(-codec.decode_delay_samples // codec.hop_length)
        self._window_frames = codec.decode_frames_before + 1 + self._delay_frames
        self.state_bytes_per_stream = self._window_frames * len(codec.codebook_sizes) * 8

    @staticmethod
    def can_decode(codec: StreamableCodec) -> bool:
        """Whether a sample depends on a limited number of frames."""
        return codec.decode_frames_before < UNLIMITED

    def _decoded(self, stream: int, at: int) -> int:
        codes = self._codes.frames(stream, max(0, at + 1 - self._window_frames), at + 1).to(self._device)
        num_samples = torch.tensor([codes.shape[1] * self._codec.hop_length], device=self._device)
        self._codec.decode(Tokens(codes[None], num_samples, self._codec.codec_id)).cpu()
        return self._codec.hop_length if at >= self._delay_frames else 0


class Mimi:
    """The decoder of the `moshi` package, all streams in one batch. ValueError where that is not installed."""

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


def _frame_seconds(codec: StreamableCodec) -> float:
    return codec.hop_length / codec.sample_rate_hz
