"""Hearing the voice of a stream."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from codec.models.interface import Codec
from codec.models.voice import VoicedCodec, voiced


class VoiceListener:
    """Keeps the audio at the beginning of a stream that says the voice, until somebody asks for its global codes.

    Codecs without global codes have nothing to say, and keep nothing. Given global codes, int64 [L] or [1, L], need no
    audio; ValueError where they are none of the codec's.
    """

    def __init__(self, codec: Codec, global_codes: Tensor | None = None) -> None:
        self._codec = codec
        self._voice = None if global_codes is None else one_voice(codec, global_codes)
        self._heard: list[Tensor] = []
        self._num_missing = codec.voice_samples if isinstance(codec, VoicedCodec) and self._voice is None else 0
        self._waits = self._num_missing > 0

    @property
    def global_codes(self) -> Tensor | None:
        """The voice, int64 [L], as `codec.encode` finds it; None before `voice_samples` samples or the end are here."""
        if self._waits and self._num_missing == 0:
            heard = self._heard or [torch.zeros(self._codec.num_channels, 0)]
            audio = torch.cat(heard, dim=1).to(self._codec.quantizer.device)
            self._voice = voiced(self._codec).encode_global(audio[None])[0]
            self._heard, self._waits = [], False
        return self._voice

    def hear(self, audio: Tensor) -> None:
        """The next samples [C, n] of the stream; they must not change later."""
        if self._num_missing:
            self._heard.append(audio[:, : self._num_missing])
            self._num_missing -= self._heard[-1].shape[1]

    def end(self) -> None:
        """There are no more samples."""
        self._num_missing = 0

    def fork(self) -> VoiceListener:
        """An independent one that heard the same."""
        other = copy.copy(self)
        other._heard = list(self._heard)
        return other


def one_voice(codec: Codec, global_codes: Tensor) -> Tensor:
    """Global codes [L] or [1, L] as int64 [L]. ValueError where they are none of the codec's."""
    rows = global_codes[None] if global_codes.dim() == 1 else global_codes
    return voiced(codec).checked_global_codes(rows, 1)[0]
