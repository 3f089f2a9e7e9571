"""What every codec offers (`AudioCodec`), and the offline calls of codecs that stream (`StreamableCodec`).

Letters: B batch, C channels, T samples, K rows of codes, F frames, hop samples per frame.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codec.layers.causal import State
from codec.tokens import Tokens

if TYPE_CHECKING:
    from codec.token_format import TokenFormat

# Frames that one step of an offline call, or of a long push to a stream, works on: enough to amortise its overhead, few
# enough to stay in the processor's cache. It changes speed only, never a bit.
FRAMES_PER_STEP = 128


@runtime_checkable
class AudioCodec(Protocol):
    """What the command line, the metrics and TTS backends rely on.

    `num_frames = ceil(num_samples / hop_length)`, always, and decoding returns exactly `num_samples` samples.
    `encode_delay_samples`: how far past the end of a frame the encoder looks. `decode_delay_samples`: by how much the
    output of `decode_step` is late; `decode` has it trimmed. `decode_frames_before` and `decode_frames_after`: on how
    many frames before and after its own a decoded sample depends.
    """

    codec_id: str
    sample_rate_hz: int
    num_channels: int
    hop_length: int
    codebook_sizes: tuple[int, ...]
    valid_num_quantizers: tuple[int, ...]
    is_streamable: bool
    encode_delay_samples: int
    decode_delay_samples: int
    decode_frames_before: int
    decode_frames_after: int

    def encode(self, audio: Tensor, num_samples: Tensor | None = None, *, num_quantizers: int | None = None) -> Tokens:
        """Audio float32 [B, C, T] in -1..1 -> tokens. `num_samples` [B]: real lengths in a padded batch."""
        ...

    def decode(self, tokens: Tokens) -> Tensor:
        """Tokens -> audio [B, C, T], T the longest row's `num_samples`; shorter rows end in zeros."""
        ...


class StreamableCodec(nn.Module, ABC):
    """Base of codecs that stream: pure, batched steps on whole frames, and offline calls made of those steps.

    Because the offline calls are the steps, a stream gives the same bits as a file. All calls run without gradients.
    """

    codec_id: str = ""  # empty until the model is saved and loaded
    name: str = ""  # "speech_16k@1"; likewise
    token_format: TokenFormat | None = None  # what files with its codes say; likewise
    config: Any
    sample_rate_hz: int
    num_channels: int
    hop_length: int
    codebook_sizes: tuple[int, ...]
    valid_num_quantizers: tuple[int, ...]
    is_streamable = True
    encode_delay_samples: int
    decode_delay_samples: int
    decode_frames_before: int
    decode_frames_after: int

    @abstractmethod
    def encode_init(self, batch_size: int) -> State:
        """The state of `batch_size` encoders before any audio."""

    @abstractmethod
    def encode_step(self, audio: Tensor, state: State, *, num_quantizers: int | None = None) -> tuple[Tensor, State]:
        """Audio [B, C, n * hop] -> codes int64 [B, K, n'] that are complete by then, and the state after it."""

    @abstractmethod
    def encode_flush(self, state: State, *, num_quantizers: int | None = None) -> Tensor:
        """The codes [B, K, n] still due when the audio has ended."""

    @abstractmethod
    def decode_init(self, batch_size: int, global_codes: Tensor | None = None) -> State:
        """The state of `batch_size` decoders before any codes."""

    @abstractmethod
    def decode_step(self, codes: Tensor, state: State) -> tuple[Tensor, State]:
        """Codes [B, K', n] of any valid prefix -> audio [B, C, n * hop], late by `decode_delay_samples`.

        A code of -1 says that the stage is absent in this row and frame.
        """

    @abstractmethod
    def decode_flush(self, state: State) -> Tensor:
        """The last `decode_delay_samples` samples [B, C, n]."""

    @torch.inference_mode()
    def encode(self, audio: Tensor, num_samples: Tensor | None = None, *, num_quantizers: int | None = None) -> Tokens:
        """Audio float32 [B, C, T] -> Tokens; see `AudioCodec`. Raises ValueError for other shapes, NaN or infinity."""
        audio, num_samples = self._checked_audio(audio, num_samples)
        batch_size, _, num_given = audio.shape
        audio = audio.masked_fill(torch.arange(num_given, device=audio.device) >= num_samples.view(-1, 1, 1), 0.0)
        num_frames = -(-num_given // self.hop_length)
        audio = F.pad(audio, (0, num_frames * self.hop_length - num_given))
        state = self.encode_init(batch_size)
        parts = []
        for chunk in audio.split(self._offline_frames(batch_size) * self.hop_length, dim=2):
            codes, state = self.encode_step(chunk, state, num_quantizers=num_quantizers)
            parts.append(codes)
        parts.append(self.encode_flush(state, num_quantizers=num_quantizers))
        codes = torch.cat(parts, dim=2)[:, :, :num_frames]
        return Tokens(codes.masked_fill(~self._frame_mask(num_samples, num_frames), 0), num_samples, self.codec_id)

    @torch.inference_mode()
    def decode(self, tokens: Tokens) -> Tensor:
        """Tokens -> audio float32 [B, C, T]; see `AudioCodec`. Raises ValueError for another codec's tokens."""
        if tokens.codec_id != self.codec_id:
            raise ValueError(
                f"these tokens were made by codec {tokens.codec_id!r}, not by this one ({self.codec_id!r})"
            )
        batch_size, _, num_frames = tokens.codes.shape
        longest = int(tokens.num_samples.max()) if batch_size else 0
        if -(-longest // self.hop_length) > num_frames:
            raise ValueError(f"{longest} samples need more than the {num_frames} frames that are there")
        num_frames = -(-longest // self.hop_length)
        # Past its end a row gets absent codes, as in a flush, so that no neighbour's length can be heard.
        codes = tokens.codes[:, :, :num_frames]
        codes = codes.masked_fill(~self._frame_mask(tokens.num_samples, num_frames), -1)
        state = self.decode_init(batch_size, tokens.global_codes)
        parts = []
        for chunk in codes.split(self._offline_frames(batch_size), dim=2):
            audio, state = self.decode_step(chunk, state)
            parts.append(audio)
        parts.append(self.decode_flush(state))
        audio = torch.cat(parts, dim=2)[:, :, self.decode_delay_samples :][:, :, :longest]
        at = torch.arange(audio.shape[2], device=audio.device)
        return audio.masked_fill(at >= tokens.num_samples.view(-1, 1, 1), 0.0)

    def bitrate_bps(self, num_quantizers: int | None = None) -> float:
        """Bits per second of the first `num_quantizers` rows of codes, packed."""
        sizes = self.codebook_sizes[: num_quantizers or None]
        return sum((size - 1).bit_length() for size in sizes) * self.sample_rate_hz / self.hop_length

    def _offline_frames(self, batch_size: int) -> int:
        return max(1, FRAMES_PER_STEP // max(batch_size, 1))

    def _frame_mask(self, num_samples: Tensor, num_frames: int) -> Tensor:
        """True on the frames [B, 1, F] that a row really has."""
        last = (num_samples + self.hop_length - 1) // self.hop_length
        return torch.arange(num_frames, device=num_samples.device) < last.view(-1, 1, 1)

    def _checked_audio(self, audio: Tensor, num_samples: Tensor | None) -> tuple[Tensor, Tensor]:
        if audio.dim() != 3 or audio.shape[1] != self.num_channels or not audio.is_floating_point():
            raise ValueError(f"audio must be float [B, {self.num_channels}, T], got {audio.dtype} {tuple(audio.shape)}")
        if not torch.isfinite(audio).all():
            raise ValueError("audio holds NaN or infinity")
        batch_size, _, num_given = audio.shape
        if num_samples is None:
            num_samples = torch.full((batch_size,), num_given, dtype=torch.int64, device=audio.device)
        if num_samples.shape != (batch_size,) or bool(((num_samples < 0) | (num_samples > num_given)).any()):
            raise ValueError(f"num_samples must be [{batch_size}] values in 0..{num_given}, got {num_samples.tolist()}")
        return audio.float(), num_samples.to(device=audio.device, dtype=torch.int64)
