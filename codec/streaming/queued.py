"""One stream of a pool: what waits for it, where its state is, and what of its output is due."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from typing import Self

import numpy as np
import torch
from torch import Tensor

from codec.layers.causal import State
from codec.models.interface import StreamableCodec
from codec.streaming.arena import StepFunction, form_of
from codec.streaming.concealment import Concealer
from codec.streaming.voice import VoiceListener, one_voice

# A state has the form in which it stays once two steps of so many frames leave it in that form.
_PROBED_FRAMES = 16


class PoolFull(RuntimeError):
    """There is no place for another stream, or no room in a stream's queue. Try again later."""


class StreamClosed(ValueError):
    """The stream was closed, or ended where it was to take input."""


class QueuedStream(ABC):
    """What encoders and decoders share. A pool calls all of it under its lock, but `emitted`, `tail` and `state`.

    What waits, and what comes out, lies on the CPU, wherever the codec is: a tile goes to a GPU and back in one copy
    each, instead of one for every stream.
    """

    def __init__(
        self, codec: StreamableCodec, *, num_quantizers: int | None = None, global_codes: Tensor | None = None
    ) -> None:
        """ValueError where a stream of this codec cannot have these."""
        self._codec = codec
        self._num_quantizers = num_quantizers
        self._global_codes = None if global_codes is None else one_voice(codec, global_codes)
        self.voice = VoiceListener(codec, self._global_codes)
        self.place = -1  # its row in the arena
        # Its state, a batch of one, where that is not in the arena: before the first step, and as long as the codec
        # withholds its first frames, when states have other shapes.
        self.state: State | None = self._first_state()
        self.num_pending = 0  # whole frames
        self.is_ending = False

    @property
    def has_work(self) -> bool:
        return self.num_pending > 0 or self.is_ending

    @property
    def is_over(self) -> bool:
        """Ended, and nothing waits."""
        return self.is_ending and self.num_pending == 0

    @abstractmethod
    def _first_state(self) -> State:
        """Of one stream, before any input."""

    def fresh(self) -> Self:
        """The same stream at the beginning of another recording."""
        return type(self)(self._codec, num_quantizers=self._num_quantizers, global_codes=self._global_codes)

    @abstractmethod
    def fork(self) -> Self:
        """Another one in the same place of the recording."""

    @abstractmethod
    def num_frames_of(self, piece: Tensor) -> int:
        """How many whole frames there will be more with this piece."""

    @abstractmethod
    def push(self, piece: Tensor) -> None:
        """Take a checked piece, of which nobody else holds the memory."""

    def end(self) -> None:
        """Take no more."""
        self.is_ending = True

    @abstractmethod
    def take(self, num_frames: int) -> Tensor:
        """The next frames for a step function; there are so many."""

    @abstractmethod
    def emitted(self, output: Tensor) -> Tensor:
        """Of what a step gave for what was taken last, that which the stream is to give."""

    @abstractmethod
    def tail(self, output: Tensor) -> Tensor:
        """Likewise, of what a flush gave."""

    @abstractmethod
    def nothing(self) -> Tensor:
        """An output without samples or frames."""

    @staticmethod
    @abstractmethod
    def checked(codec: StreamableCodec, piece: Tensor) -> Tensor:
        """A copy of the piece as `push` takes it; ValueError where it is none of the codec's.

        By numpy: every operation of torch lets other threads run, and then waits until the one that steps lets go.
        """

    @staticmethod
    @abstractmethod
    def step_function(codec: StreamableCodec) -> StepFunction:
        """Inputs [B, ...] of whole frames and states to outputs and states; inputs may be absent codes or zeros."""

    @staticmethod
    @abstractmethod
    def flushed(codec: StreamableCodec, state: State) -> Tensor:
        """What is still due from these states, [B, ...]."""

    @staticmethod
    @abstractmethod
    def steady_state(codec: StreamableCodec) -> State:
        """A state, of one stream, in the form in which it stays."""


class DecoderStream(QueuedStream):
    """Codes in, audio out."""

    def __init__(
        self, codec: StreamableCodec, *, num_quantizers: int | None = None, global_codes: Tensor | None = None
    ) -> None:
        if num_quantizers is not None:
            raise ValueError("num_quantizers is for encoders: a decoder takes any valid number of rows")
        super().__init__(codec, global_codes=global_codes)
        self._queue: deque[Tensor | int] = deque()  # codes [K, n], or a number of frames that were lost
        self._concealer = Concealer.of(codec)
        self._num_trimmed = 0
        self._has_begun = False

    @torch.inference_mode()
    def _first_state(self) -> State:
        return self._codec.decode_init(1, None if self._global_codes is None else self._global_codes[None])

    def fork(self) -> DecoderStream:
        other = copy.copy(self)
        other._queue = deque(self._queue)
        return other

    def num_frames_of(self, piece: Tensor) -> int:
        return piece.shape[1]

    def push(self, piece: Tensor) -> None:
        if piece.shape[1]:
            self._queue.append(piece)
            self.num_pending += piece.shape[1]

    def lose(self, num_frames: int) -> None:
        """These frames will never come."""
        if num_frames:
            self._queue.append(num_frames)
            self.num_pending += num_frames

    def take(self, num_frames: int) -> Tensor:
        self._has_begun = True
        self.num_pending -= num_frames
        taken = []
        while num_frames:
            first = self._queue.popleft()
            there = first if isinstance(first, int) else first.shape[1]
            if there > num_frames:
                self._queue.appendleft(first - num_frames if isinstance(first, int) else first[:, num_frames:])
            num_taken = min(there, num_frames)
            if isinstance(first, int):
                codes, self._concealer = self._concealer.lost(num_taken)
                missing = len(self._codec.codebook_sizes) - codes.shape[0]
                codes = torch.nn.functional.pad(codes.cpu(), (0, 0, 0, missing), value=-1)
            else:
                codes = first[:, :num_taken]
                self._concealer = self._concealer.heard(codes)
            taken.append(codes)
            num_frames -= num_taken
        return taken[0] if len(taken) == 1 else torch.cat(taken, dim=1)

    def emitted(self, output: Tensor) -> Tensor:
        cut = min(self._codec.decode_delay_samples - self._num_trimmed, output.shape[1])
        self._num_trimmed += cut
        output, self._concealer = self._concealer.shape(output[:, cut:])
        return output

    def tail(self, output: Tensor) -> Tensor:
        output = self.emitted(output)
        return output if self._has_begun else output[:, :0]

    def nothing(self) -> Tensor:
        return torch.zeros(self._codec.num_channels, 0)

    @staticmethod
    def checked(codec: StreamableCodec, piece: Tensor) -> Tensor:
        if piece.dim() != 2 or piece.dtype != torch.int64:
            raise ValueError(f"codes must be int64 [K, F], got {piece.dtype} {tuple(piece.shape)}")
        codes = piece.numpy(force=True)
        num_rows = codec.quantizer.check_num_quantizers(len(codes))
        sizes = np.array(codec.codebook_sizes)
        if ((codes < -1) | (codes >= sizes[:num_rows, None])).any():
            raise ValueError(f"codes must lie in -1..{sizes[:num_rows].max() - 1}, got {codes.min()}..{codes.max()}")
        # With rows of absent codes, so that streams of any rates fit in one batch.
        copied = np.full((len(sizes), codes.shape[1]), -1)
        copied[:num_rows] = codes
        return torch.from_numpy(copied)

    @staticmethod
    def step_function(codec: StreamableCodec) -> StepFunction:
        return codec.decode_step

    @staticmethod
    def flushed(codec: StreamableCodec, state: State) -> Tensor:
        return codec.decode_flush(state)

    @staticmethod
    @torch.inference_mode()
    def steady_state(codec: StreamableCodec) -> State:
        device, num_rows = codec.quantizer.device, len(codec.codebook_sizes)
        voice = torch.zeros(1, codec.num_global_codes, dtype=torch.int64, device=device)
        absent = torch.full((1, num_rows, _PROBED_FRAMES), -1, device=device)
        state = codec.decode_init(1, voice if codec.num_global_codes else None)
        return _steady(lambda state: codec.decode_step(absent, state)[1], state)


class EncoderStream(QueuedStream):
    """Audio in, codes out."""

    def __init__(
        self, codec: StreamableCodec, *, num_quantizers: int | None = None, global_codes: Tensor | None = None
    ) -> None:
        num_rows = codec.quantizer.check_num_quantizers(num_quantizers)
        super().__init__(codec, num_quantizers=num_rows, global_codes=global_codes)
        self._num_rows = num_rows
        self._queue: deque[Tensor] = deque()
        self._num_samples = 0  # that wait

    @torch.inference_mode()
    def _first_state(self) -> State:
        return self._codec.encode_init(1)

    def fork(self) -> EncoderStream:
        other = copy.copy(self)
        other._queue = deque(self._queue)
        other.voice = self.voice.fork()
        return other

    def num_frames_of(self, piece: Tensor) -> int:
        return (self._num_samples + piece.shape[1]) // self._codec.hop_length - self.num_pending

    def push(self, piece: Tensor) -> None:
        if piece.shape[1]:
            self.voice.hear(piece)
            self._append(piece)

    def end(self) -> None:
        super().end()
        self.voice.end()
        missing = -self._num_samples % self._codec.hop_length
        if missing:
            self._append(torch.zeros(self._codec.num_channels, missing))

    def _append(self, piece: Tensor) -> None:
        self._queue.append(piece)
        self._num_samples += piece.shape[1]
        self.num_pending = self._num_samples // self._codec.hop_length

    def take(self, num_frames: int) -> Tensor:
        missing = num_frames * self._codec.hop_length
        self._num_samples -= missing
        self.num_pending -= num_frames
        taken = []
        while missing:
            first = self._queue.popleft()
            if first.shape[1] > missing:
                self._queue.appendleft(first[:, missing:])
            taken.append(first[:, :missing])
            missing -= taken[-1].shape[1]
        return taken[0] if len(taken) == 1 else torch.cat(taken, dim=1)

    def emitted(self, output: Tensor) -> Tensor:
        return output[: self._num_rows]

    def tail(self, output: Tensor) -> Tensor:
        return output[: self._num_rows]

    def nothing(self) -> Tensor:
        return torch.zeros(self._num_rows, 0, dtype=torch.int64)

    @staticmethod
    def checked(codec: StreamableCodec, piece: Tensor) -> Tensor:
        if piece.dim() != 2 or piece.shape[0] != codec.num_channels or not piece.is_floating_point():
            raise ValueError(f"audio must be float [{codec.num_channels}, n], got {piece.dtype} {tuple(piece.shape)}")
        audio = np.array(piece.float().numpy(force=True))
        if not np.isfinite(audio).all():
            raise ValueError("audio holds NaN or infinity")
        return torch.from_numpy(audio)

    @staticmethod
    def step_function(codec: StreamableCodec) -> StepFunction:
        return codec.encode_step

    @staticmethod
    def flushed(codec: StreamableCodec, state: State) -> Tensor:
        return codec.encode_flush(state)

    @staticmethod
    @torch.inference_mode()
    def steady_state(codec: StreamableCodec) -> State:
        silence = torch.zeros(1, codec.num_channels, _PROBED_FRAMES * codec.hop_length, device=codec.quantizer.device)
        return _steady(lambda state: codec.encode_step(silence, state)[1], codec.encode_init(1))


def _steady(step: Callable[[State], State], state: State) -> State:
    after = step(state)
    while form_of(after) != form_of(state):
        state, after = after, step(after)
    return after
