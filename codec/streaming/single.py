"""One stream, any chunk size: encoders and decoders that own the partial frame, the trimmed delay and the tail."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from codec.models.interface import FRAMES_PER_STEP, Codec, streamable
from codec.models.voice import VoicedCodec, voiced


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
        self._given_voice = None if global_codes is None else _one_voice(codec, global_codes)
        self._voice: Tensor | None = None
        # Audio that says the voice, kept until somebody asks for that.
        self._heard: list[Tensor] = []
        self._num_unheard = 0
        self.reset()

    @property
    def global_codes(self) -> Tensor | None:
        """The voice, int64 [L], as `codec.encode` finds it; those given, where some are.

        None until the first `voice_samples` samples of the recording are here, or its end, and of codecs without.
        """
        if self._voice is None and self._heard and (self._num_unheard == 0 or self._flushed):
            self._voice = voiced(self._codec).encode_global(torch.cat(self._heard, dim=1)[None])[0]
            self._heard = []
        return self._voice

    @torch.inference_mode()
    def reset(self) -> None:
        """Start a new recording; a given voice stays."""
        self._state = self._codec.encode_init(1)
        self._pending: list[Tensor] = []
        self._num_pending = 0
        self._flushed = False
        self._voice = self._given_voice
        self._heard, self._num_unheard = [], 0
        if isinstance(self._codec, VoicedCodec) and self._voice is None:
            self._num_unheard = self._codec.voice_samples
            self._heard = [torch.zeros(self._codec.num_channels, 0, device=self._codec.quantizer.device)]

    def fork(self) -> StreamingEncoder:
        """An independent encoder in the same place of the stream. Cheap: states are values."""
        other = copy.copy(self)
        other._pending, other._heard = list(self._pending), list(self._heard)
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
        if self._num_unheard:
            self._heard.append(self._pending[-1][:, : self._num_unheard])
            self._num_unheard -= self._heard[-1].shape[1]
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
        self._global_codes = None if global_codes is None else _one_voice(codec, global_codes)[None]
        self.reset()

    @torch.inference_mode()
    def reset(self) -> None:
        """Start a new recording, with the same global codes."""
        self._state = self._codec.decode_init(1, self._global_codes)
        self._num_trimmed = 0
        self._num_pushed = 0
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
        parts = []
        for piece in codes.split(FRAMES_PER_STEP, dim=1):
            audio, self._state = self._codec.decode_step(piece[None], self._state)
            parts.append(audio[0])
        self._num_pushed += codes.shape[1]
        return self._trim(torch.cat(parts, dim=1))

    @torch.inference_mode()
    def flush(self) -> Tensor:
        """The tail [C, n] that the decoder's delay still holds. Ends the stream."""
        if self._flushed:
            raise ValueError("this stream was flushed already")
        self._flushed = True
        tail = self._trim(self._codec.decode_flush(self._state)[0])
        return tail if self._num_pushed else tail[:, :0]

    def _trim(self, audio: Tensor) -> Tensor:
        cut = min(self._codec.decode_delay_samples - self._num_trimmed, audio.shape[1])
        self._num_trimmed += cut
        return audio[:, cut:]


def _one_voice(codec: Codec, global_codes: Tensor) -> Tensor:
    """Global codes [L] or [1, L] as int64 [L]. ValueError where they are none of the codec's."""
    rows = global_codes[None] if global_codes.dim() == 1 else global_codes
    return voiced(codec).checked_global_codes(rows, 1)[0]
