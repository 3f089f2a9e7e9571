"""Codecs that look ahead, window by window: the codes and the audio of whole recordings, as they come in.

A window is analyzed, or synthesized, together with all that its networks hear around it, and only its own part is kept.
So nothing differs from the whole but the rounding of floats. A codec that hears everything gets one window: the whole
recording, when it has ended.

Letters: B batch, C channels, K rows of codes, F frames, n samples, L global codes.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from codec.models.interface import UNLIMITED, Codec
from codec.models.voice import VoicedCodec

# Frames of a window that are kept. Those around it cost time, so it is much longer than what networks hear.
FRAMES_PER_WINDOW = 512


class WindowedEncoder:
    """Audio [B, C, n] in pieces of any size -> codes [B, K, F] that are settled by then."""

    def __init__(self, codec: Codec, batch_size: int, *, num_quantizers: int | None = None) -> None:
        self._codec = codec
        self._num_quantizers = codec.quantizer.check_num_quantizers(num_quantizers)
        hop = codec.hop_length
        heard_samples = max(codec.encode_samples_before, codec.encode_delay_samples)
        self._is_limited = heard_samples < UNLIMITED and codec.quantizer.is_framewise
        self._before = -(-codec.encode_samples_before // hop)  # frames
        self._after = -(-codec.encode_delay_samples // hop)
        self._pieces = [torch.zeros(batch_size, codec.num_channels, 0)]
        self._num_pending = 0
        self._num_context = 0  # frames at the start of what is kept whose codes are out

    @torch.inference_mode()
    def push(self, audio: Tensor) -> Tensor:
        """The codes [B, K, F] that became settled; F may be 0."""
        self._pieces.append(audio)
        self._num_pending += audio.shape[2]
        frames = self._num_context + FRAMES_PER_WINDOW
        codes = [self._no_codes()]
        while self._is_limited and self._num_pending >= (frames + self._after) * self._codec.hop_length:
            kept = torch.cat(self._pieces, dim=2)
            heard = kept[:, :, : (frames + self._after) * self._codec.hop_length]
            codes.append(self._encode(heard)[:, :, self._num_context : frames])
            first = max(0, frames - self._before)
            self._pieces = [kept[:, :, first * self._codec.hop_length :]]
            self._num_pending = self._pieces[0].shape[2]
            self._num_context = frames - first
            frames = self._num_context + FRAMES_PER_WINDOW
        return torch.cat(codes, dim=2)

    @torch.inference_mode()
    def flush(self) -> Tensor:
        """The codes still due when the audio has ended."""
        audio = torch.cat(self._pieces, dim=2)
        if audio.shape[2] <= self._num_context * self._codec.hop_length:
            return self._no_codes()
        return self._encode(audio)[:, :, self._num_context :]

    def _encode(self, audio: Tensor) -> Tensor:
        latents = self._codec.analyze(audio.to(next(self._codec.parameters())))
        return self._codec.quantizer.encode(latents, num_quantizers=self._num_quantizers)

    def _no_codes(self) -> Tensor:
        return torch.zeros(len(self._pieces[0]), self._num_quantizers, 0, dtype=torch.int64)


class WindowedDecoder:
    """Codes [B, K, F] in pieces of any size -> audio [B, C, n] that is settled by then, in whole frames.

    Codecs with global codes need them, int64 [B, L]; ValueError where they are missing, or none of the codec's.
    """

    def __init__(self, codec: Codec, batch_size: int, *, global_codes: Tensor | None = None) -> None:
        self._codec = codec
        self._synthesize = codec.synthesize
        if isinstance(codec, VoicedCodec):
            voices = codec.voice_of(codec.checked_global_codes(global_codes, batch_size))
            self._synthesize = functools.partial(codec.synthesize, voice=voices)
        elif global_codes is not None:
            raise ValueError("this codec has no global codes")
        self._is_limited = max(codec.decode_frames_before, codec.decode_frames_after) < UNLIMITED
        self._pieces: list[Tensor] = []
        self._num_pending = 0
        self._num_context = 0
        self._batch_size = batch_size

    @torch.inference_mode()
    def push(self, codes: Tensor) -> Tensor:
        """The audio [B, C, n] that became settled; n may be 0."""
        self._pieces.append(codes)
        self._num_pending += codes.shape[2]
        before, after = self._codec.decode_frames_before, self._codec.decode_frames_after
        frames = self._num_context + FRAMES_PER_WINDOW
        audio = [self._no_audio()]
        while self._is_limited and self._num_pending >= frames + after:
            kept = torch.cat(self._pieces, dim=2)
            audio.append(self._decode(kept[:, :, : frames + after], frames))
            first = max(0, frames - before)
            self._pieces = [kept[:, :, first:]]
            self._num_pending = self._pieces[0].shape[2]
            self._num_context = frames - first
            frames = self._num_context + FRAMES_PER_WINDOW
        return torch.cat(audio, dim=2)

    @torch.inference_mode()
    def flush(self) -> Tensor:
        """The audio still due when the codes have ended."""
        if self._num_pending <= self._num_context:
            return self._no_audio()
        return self._decode(torch.cat(self._pieces, dim=2), self._num_pending)

    def _decode(self, codes: Tensor, num_frames: int) -> Tensor:
        """Audio of the frames after those that are out, up to `num_frames`."""
        hop = self._codec.hop_length
        device = next(self._codec.parameters()).device
        audio = self._synthesize(self._codec.quantizer.decode(codes.to(device)), codes.shape[2] * hop)
        return audio[:, :, self._num_context * hop : num_frames * hop].float()

    def _no_audio(self) -> Tensor:
        device = next(self._codec.parameters()).device
        return torch.zeros(self._batch_size, self._codec.num_channels, 0, device=device)
