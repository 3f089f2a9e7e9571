"""What every codec offers (`AudioCodec`), and its base classes.

`Codec` holds what all share. `StreamableCodec` gives codecs made of steps their offline calls; `WholeCodec` gives them
to codecs that look ahead, and so take whole recordings only.

Letters: B batch, C channels, T samples, K rows of codes, F frames, hop samples per frame.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codec.layers.causal import State
from codec.quantizers.interface import Quantizer
from codec.tokens import Tokens

if TYPE_CHECKING:
    from codec.token_format import TokenFormat

# Frames that one step of an offline call, or of a long push to a stream, works on: enough to amortise its overhead, few
# enough to stay in the processor's cache. It changes speed only, never a bit.
FRAMES_PER_STEP = 128

# How far a network hears that hears everything: the most that the header of a `.codec` file can say.
UNLIMITED = 2**31 - 1


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


class Codec(nn.Module, ABC):
    """Base of all codecs: their attributes, what training needs of them, and checks of what comes in.

    `encode` and `decode` run without gradients. Training goes through `reconstruct`, whole signals at a time, or
    through `analyze`, `quantizer` and `synthesize` one by one.
    """

    codec_id: str = ""  # empty until the model is saved and loaded
    name: str = ""  # "speech_16k@1"; likewise
    token_format: TokenFormat | None = None  # what files with its codes say; likewise
    # Whether it hears by a frozen speech model that is no part of its weights, and the folder of `transformers` where
    # it looks for that one: `load` sets it to "features" inside the model's folder.
    hears_by_features: bool = False
    feature_folder: Path | None = None
    config: Any
    quantizer: Quantizer
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
    num_global_codes: int = 0  # of a recording; codecs that have any are `codec.models.voice.VoicedCodec`s
    # Whether, in float32, streams, batches and padding give the same bits as a recording alone, in one go.
    is_bit_exact: bool = False
    # How far before the beginning of a frame the encoder hears; what `codec.windows` needs to know.
    encode_samples_before: int = UNLIMITED

    @abstractmethod
    def encode(self, audio: Tensor, num_samples: Tensor | None = None, *, num_quantizers: int | None = None) -> Tokens:
        """Audio float32 [B, C, T] -> Tokens; see `AudioCodec`. Raises ValueError for other shapes, NaN or infinity."""

    @abstractmethod
    def decode(self, tokens: Tokens) -> Tensor:
        """Tokens -> audio float32 [B, C, T]; see `AudioCodec`. Raises ValueError for another codec's tokens."""

    @abstractmethod
    def analyze(self, audio: Tensor) -> Tensor:
        """Whole signals [B, C, T] -> latents [B, D, F], as the quantizer takes them; differentiable.

        F is ceil(T / hop), and where a decoder looks ahead, the frames more that it needs for the last samples.
        """

    @abstractmethod
    def synthesize(self, latents: Tensor, num_samples: int) -> Tensor:
        """Latents [B, D, F] of whole signals -> audio [B, C, num_samples], aligned with what was analyzed."""

    def reconstruct(self, audio: Tensor, quantize: Callable[[Tensor], Tensor]) -> Tensor:
        """Audio [B, C, T] -> latents [B, D, F] -> what `quantize` makes of them -> audio [B, C, T]; differentiable."""
        return self.synthesize(quantize(self.analyze(audio)), audio.shape[2])

    def num_frames_for(self, num_samples: int) -> int:
        """Frames that so many samples make."""
        return -(-num_samples // self.hop_length)

    def bitrate_bps(self, num_quantizers: int | None = None) -> float:
        """Bits per second of the first `num_quantizers` rows of codes, packed."""
        sizes = self.codebook_sizes[: num_quantizers or None]
        return sum((size - 1).bit_length() for size in sizes) * self.sample_rate_hz / self.hop_length

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

    def _checked_tokens(self, tokens: Tokens) -> int:
        """The number of samples of the longest row. ValueError where these tokens cannot be decoded."""
        if tokens.codec_id != self.codec_id:
            raise ValueError(
                f"these tokens were made by codec {tokens.codec_id!r}, not by this one ({self.codec_id!r})"
            )
        longest = int(tokens.num_samples.max()) if len(tokens.num_samples) else 0
        if self.num_frames_for(longest) > tokens.codes.shape[2]:
            raise ValueError(f"{longest} samples need more than the {tokens.codes.shape[2]} frames that are there")
        return longest


class StreamableCodec(Codec):
    """Base of codecs that stream: pure, batched steps on whole frames, and offline calls made of those steps.

    Because the offline calls are the steps, a stream gives the same bits as a file. All calls run without gradients.
    """

    is_streamable = True

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
        longest = self._checked_tokens(tokens)
        batch_size, num_frames = len(tokens.codes), self.num_frames_for(longest)
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

    def _offline_frames(self, batch_size: int) -> int:
        return max(1, FRAMES_PER_STEP // max(batch_size, 1))


def streamable(codec: Codec) -> StreamableCodec:
    """The codec itself, where it streams; ValueError where it does not."""
    if not (codec.is_streamable and isinstance(codec, StreamableCodec)):
        raise ValueError(f"{codec.name or type(codec).__name__} is not causal and cannot stream")
    return codec


class WholeCodec(Codec):
    """Base of codecs that are not causal: offline calls made of `analyze` and `synthesize`; they cannot stream.

    Rows of different lengths are processed apart, so that nothing of one row, nor padding, is heard in another.

    A codec whose networks hear a limited stretch says so: `encode_samples_before` and `encode_delay_samples` around the
    samples of a frame, `decode_frames_before` and `decode_frames_after` around a frame. Then `codec.windows` can work
    through long recordings in bounded memory.
    """

    is_streamable = False
    decode_delay_samples = 0
    encode_delay_samples = UNLIMITED
    decode_frames_before = decode_frames_after = UNLIMITED

    @torch.inference_mode()
    def encode(self, audio: Tensor, num_samples: Tensor | None = None, *, num_quantizers: int | None = None) -> Tokens:
        num_rows = self.quantizer.check_num_quantizers(num_quantizers)
        audio, num_samples = self._checked_audio(audio, num_samples)
        codes = audio.new_zeros((len(audio), num_rows, self.num_frames_for(audio.shape[2])), dtype=torch.int64)
        for length, rows in rows_by_length(num_samples):
            latents = self.analyze(audio[rows, :, :length].to(self._dtype))
            codes[rows, :, : latents.shape[2]] = self.quantizer.encode(latents, num_quantizers=num_rows)
        return Tokens(codes, num_samples, self.codec_id)

    @torch.inference_mode()
    def decode(self, tokens: Tokens) -> Tensor:
        longest = self._checked_tokens(tokens)
        shape = (len(tokens.codes), self.num_channels, longest)
        audio = torch.zeros(shape, dtype=self._dtype, device=tokens.codes.device)
        for length, rows in rows_by_length(tokens.num_samples):
            latents = self.quantizer.decode(tokens.codes[rows, :, : self.num_frames_for(length)])
            audio[rows, :, :length] = self.synthesize(latents, length)
        return audio

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype


def rows_by_length(num_samples: Tensor) -> list[tuple[int, Tensor]]:
    """The lengths that there are, but 0, each with the rows that have it."""
    return [(length, (num_samples == length).nonzero()[:, 0]) for length in sorted(set(num_samples.tolist())) if length]
