"""One stream, any chunk size: encoders and decoders that own the partial frame, the trimmed delay and the tail."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from codec.models.interface import FRAMES_PER_STEP, Codec, streamable
from codec.streaming.concealment import Concealer
from codec.streaming.voice import VoiceListener, one_voice


class StreamingEncoder:
    """Audio in pieces of any size -> codes as soon as their frame is complete.

    All pieces together give the codes that `codec.encode` gives for the whole recording, bit for bit. The voice of
    codecs with global codes, int64 [L] or [1, L], may be given.

    >>> from codec.testing import tiny_codec
    >>> codec = tiny_codec()
    >>> encoder = StreamingEncoder(codec)
    >>> [encoder.push(torch.zeros(1, n)).shape[1] for n in (0, codec.hop_length - 1, 1)], encoder.flush().shape[1]
    ([0, 0, 1], 0)
    """

    def __init__(self, codec: Codec, *, num_quantizers: int | None = None, global_codes: Tensor | None = None) -> None:
        self._codec = streamable(codec)
        valid = codec.valid_num_quantizers
        self.num_quantizers = valid[-1] if num_quantizers is None else num_quantizers
        if self.num_quantizers not in valid:
            raise ValueError(f"num_quantizers={num_quantizers} is not one of {valid}")
        self._given_voice = None if global_codes is None else one_voice(codec, global_codes)
        self.reset()

    @property
    def global_codes(self) -> Tensor | None:
        """The voice, int64 [L], as `codec.encode` finds it; those given, where some are.

        None until the first `voice_samples` samples of the recording are here, or its end, and of codecs without.
        """
        return self._voice.global_codes

    @torch.inference_mode()
    def reset(self) -> None:
        """Start a new recording; a given voice stays."""
        self._state = self._codec.encode_init(1)
        self._pending: list[Tensor] = []
        self._num_pending = 0
        self._flushed = False
        self._voice = VoiceListener(self._codec, self._given_voice)

    def fork(self) -> StreamingEncoder:
        """An independent encoder in the same place of the stream. Cheap: states are values."""
        other = copy.copy(self)
        other._pending, other._voice = list(self._pending), self._voice.fork()
        return other

    @torch.inference_mode()
    def push(self, audio: Tensor) -> Tensor:
        """Audio float [C, n], any n >= 0 -> codes int64 [K, F] completed by it; F may be 0."""
        if self._flushed:
            raise ValueError("this stream was flushed; reset it to begin another")
        if audio.dim() != 2 or audio.shape[0] != self._codec.num_channels or not audio.is_floating_point():
            raise ValueError(
                f"audio must be float [{self._codec.num_channels}, n], got {audio.dtype} {tuple(audio.shape)}"
            )
        if not torch.isfinite(audio).all():
            raise ValueError("audio holds NaN or infinity")
        # Pieces are joined only when a frame is complete, so tiny pushes stay cheap; copied, since a caller may
        # reuse its buffer.
        self._pending.append(audio.float().clone())
        self._voice.hear(self._pending[-1])
        self._num_pending += audio.shape[1]
        hop = self._codec.hop_length
        whole = self._num_pending // hop * hop
        if whole == 0:
            return torch.zeros(self.num_quantizers, 0, dtype=torch.int64, device=audio.device)
        joined = torch.cat(self._pending, dim=1)
        self._pending = [joined[:, whole:]]
        self._num_pending -= whole
        return self._step(joined[:, :whole])

    @torch.inference_mode()
    def flush(self) -> Tensor:
        """The codes [K, F] of what is left, the last partial frame padded with zeros. Ends the stream."""
        if self._flushed:
            raise ValueError("this stream was flushed already")
        parts = []
        if self._num_pending:
            rest = torch.cat(self._pending, dim=1)
            parts.append(self._step(torch.nn.functional.pad(rest, (0, self._codec.hop_length - rest.shape[1]))))
        parts.append(self._codec.encode_flush(self._state, num_quantizers=self.num_quantizers)[0])
        self._voice.end()
        self._flushed = True
        return torch.cat(parts, dim=1)

    def _step(self, audio: Tensor) -> Tensor:
        # One long push is stepped in pieces, so that minutes of audio need no more memory than seconds.
        parts = []
        for piece in audio.split(FRAMES_PER_STEP * self._codec.hop_length, dim=1):
            codes, self._state = self._codec.encode_step(piece[None], self._state, num_quantizers=self.num_quantizers)
            parts.append(codes[0])
        return torch.cat(parts, dim=1)


class StreamingDecoder:
    """Codes in pieces -> audio as soon as it is known.

    `push` returns n * hop samples, fewer while the decoder's delay fills; `flush` returns the tail. Together they are
    num_frames * hop samples, and cut to `num_samples` they are the audio that `codec.decode` gives, bit for bit.

    Codecs with global codes need those of a voice, int64 [L] or [1, L], at the start. ValueError where they are
    missing, or none of the codec's.

    >>> from codec.testing import tiny_codec
    >>> codec = tiny_codec()
    >>> decoder = StreamingDecoder(codec)
    >>> codes = torch.zeros(len(codec.codebook_sizes), 3, dtype=torch.int64)
    >>> decoder.push(codes).shape[1] + decoder.flush().shape[1] == 3 * codec.hop_length
    True
    """

    def __init__(self, codec: Codec, *, global_codes: Tensor | None = None) -> None:
        self._codec = streamable(codec)
        self._global_codes = None if global_codes is None else one_voice(codec, global_codes)[None]
        self.reset()

    @torch.inference_mode()
    def reset(self) -> None:
        """Start a new recording, with the same global codes."""
        self._state = self._codec.decode_init(1, self._global_codes)
        self._num_trimmed = 0
        self._concealer = Concealer.of(self._codec)
        self._flushed = False

    def fork(self) -> StreamingDecoder:
        """An independent decoder in the same place of the stream. Cheap: states are values."""
        return copy.copy(self)

    @torch.inference_mode()
    def push(self, codes: Tensor) -> Tensor:
        """Codes int64 [K', F], F >= 0 -> audio float32 [C, n]. K' may be any valid prefix, and may change."""
        if self._flushed:
            raise ValueError("this stream was flushed; reset it to begin another")
        if codes.dim() != 2 or codes.dtype != torch.int64:
            raise ValueError(f"codes must be int64 [K, F], got {codes.dtype} {tuple(codes.shape)}")
        audio = self._step(codes)
        self._concealer = self._concealer.heard(codes)
        return self._shape(audio)

    @torch.inference_mode()
    def conceal(self, num_frames: int) -> Tensor:
        """The audio [C, n] in place of frames that were lost, n as if they had been pushed; the stream goes on.

        The last sound fades to silence within 120 ms. What is pushed later comes in smoothly, and is what it would be
        without the loss as soon as the decoder no longer hears that far back.
        """
        if self._flushed:
            raise ValueError("this stream was flushed; reset it to begin another")
        if num_frames < 0:
            raise ValueError(f"num_frames must not be negative, got {num_frames}")
        parts: list[Tensor] = []
        while num_frames or not parts:
            # In pieces, so that a loss of hours takes no memory for its codes.
            piece = min(num_frames, FRAMES_PER_STEP)
            codes, self._concealer = self._concealer.lost(piece)
            parts.append(self._shape(self._step(codes)))
            num_frames -= piece
        return torch.cat(parts, dim=1)

    @torch.inference_mode()
    def flush(self) -> Tensor:
        """The tail [C, n] that the decoder's delay still holds. Ends the stream."""
        if self._flushed:
            raise ValueError("this stream was flushed already")
        self._flushed = True
        tail = self._shape(self._codec.decode_flush(self._state)[0])
        return tail if self._concealer.num_frames else tail[:, :0]

    def _step(self, codes: Tensor) -> Tensor:
        """What the decoder gives, late by its delay."""
        parts = []
        for piece in codes.split(FRAMES_PER_STEP, dim=1):
            audio, self._state = self._codec.decode_step(piece[None], self._state)
            parts.append(audio[0])
        return torch.cat(parts, dim=1)

    def _shape(self, audio: Tensor) -> Tensor:
        """Without the delay, and with the gain that conceals losses."""
        cut = min(self._codec.decode_delay_samples - self._num_trimmed, audio.shape[1])
        self._num_trimmed += cut
        audio, self._concealer = self._concealer.shape(audio[:, cut:])
        return audio
