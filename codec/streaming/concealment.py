"""What is decoded and heard in place of frames that were lost: codes that go on, and a gain that fades.

    codes -> `heard`, and the codes go into the decoder
    a loss -> `lost` -> codes that go into the decoder instead
    audio out of the decoder -> `shape` -> audio

The last frame goes on, with all of its rows, while its gain fades to silence, so that nothing drones; then the decoder
is told nothing. When codes come again, the gain rises to 1. On speech, fewer rows and nothing at once were both further
from what was lost, by PESQ and STOI; `tools.measure_concealment` tells by how much silence is.

Letters: K rows of codes, F frames, C channels, n samples. Tensors may have more dimensions before these: rows of a
batch that are lost together.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from codec.models.interface import Codec

# The gain is 1 at first, then it falls to 0; afterwards it rises again.
_HOLD_MS, _FADE_MS, _RISE_MS = 40, 80, 10


class _Ramp(NamedTuple):
    """From `first_sample` on the gain is `gain`, changing by `slope` a sample, within 0..1."""

    first_sample: int
    gain: float
    slope: float


class Concealer(NamedTuple):  # cheaper than a dataclass: it changes twice with every frame
    """A value: which place a stream is in, what its last codes were, and the gain of its samples, past and due.

    It counts frames as they go into the decoder (`heard`, `lost`) and samples as they come out (`shape`): sample s of a
    stream belongs to frame s // hop, however late the decoder gives it. So the calls for frames come in their order,
    those for samples in theirs, and how both are cut into pieces changes no bit.

    >>> from codec.testing import tiny_codec
    >>> concealer = Concealer.of(tiny_codec())
    >>> concealer = concealer.heard(torch.tensor([[3], [1], [4]]))
    >>> codes, concealer = concealer.lost(2)
    >>> codes.tolist()
    [[3, 3], [1, 1], [4, 4]]
    >>> audio, concealer = concealer.shape(torch.ones(1, 3 * 64))
    >>> audio.shape, bool((audio == 1).all())
    (torch.Size([1, 192]), True)
    """

    hop_length: int
    sample_rate_hz: int
    absent: Tensor  # int64 [K', 1]: a frame that says nothing
    last: Tensor | None = None  # int64 [..., K, 1]: the last real frame
    num_frames: int = 0
    num_samples: int = 0
    num_lost: int = 0  # frames of the loss that goes on
    ramps: tuple[_Ramp, ...] = ()  # ascending; before the first the gain is 1

    @staticmethod
    def of(codec: Codec) -> Concealer:
        """At the beginning of a stream."""
        absent = torch.full((codec.valid_num_quantizers[0], 1), -1, device=codec.quantizer.device)
        return Concealer(codec.hop_length, codec.sample_rate_hz, absent)

    def heard(self, codes: Tensor) -> Concealer:
        """After real codes int64 [..., K, F] have gone into the decoder."""
        num_frames = codes.shape[-1]
        if num_frames == 0:
            return self
        # A copy: a view would keep all of the codes, and a caller may use their memory again.
        after = self._replace(last=codes[..., -1:].clone(), num_frames=self.num_frames + num_frames, num_lost=0)
        return after if self.num_lost == 0 else after._turned(self._sample, 1.0 / self._samples(_RISE_MS))

    def lost(self, num_frames: int) -> tuple[Tensor, Concealer]:
        """Codes int64 [..., K', num_frames] to decode in place of lost ones; K' is a valid number of rows.

        Before the first real codes they have no dimensions but [K', F].
        """
        num_steady = 0 if self.last is None else -(-self._samples(_HOLD_MS + _FADE_MS) // self.hop_length) + 1
        num_repeated = max(0, min(num_frames, num_steady - self.num_lost))
        last = self.absent if self.last is None else self.last
        codes = last.expand(*last.shape[:-1], num_frames).clone()
        codes[..., num_repeated:] = -1
        after = self._replace(num_frames=self.num_frames + num_frames, num_lost=self.num_lost + num_frames)
        if self.num_lost or not num_frames:
            return codes, after
        return codes, after._turned(self._sample, -1.0 / self._samples(_FADE_MS))

    def shape(self, audio: Tensor) -> tuple[Tensor, Concealer]:
        """The next samples [..., n] of the stream, its delay already trimmed -> the same with their gain.

        Where that is 1 throughout it is the very same tensor.
        """
        first, last = self.num_samples, self.num_samples + audio.shape[-1]
        if not self.ramps:
            return audio, self._replace(num_samples=last)
        at = torch.arange(first, last, device=audio.device, dtype=torch.float64)
        gain = torch.ones_like(at)
        for ramp in self.ramps:
            values = (ramp.gain + ramp.slope * (at - ramp.first_sample)).clamp(0.0, 1.0)
            gain = torch.where(at >= ramp.first_sample, values, gain)
        # What holds from here on: the ramp that the next sample is in, and those after it.
        num_begun = sum(ramp.first_sample <= last for ramp in self.ramps)
        ramps = self.ramps[max(0, num_begun - 1) :]
        if num_begun == len(self.ramps) and ramps[0].slope >= 0 and self._gain_at(last) == 1.0:
            ramps = ()  # it stays 1
        shaped = audio if bool((gain == 1.0).all()) else audio * gain.to(audio.dtype)
        return shaped, self._replace(num_samples=last, ramps=ramps)

    @property
    def _sample(self) -> int:
        """The first sample of the next frame."""
        return self.num_frames * self.hop_length

    def _samples(self, duration_ms: int) -> int:
        return max(1, duration_ms * self.sample_rate_hz // 1000)

    def _gain_at(self, sample: int) -> float:
        gain = 1.0
        for ramp in self.ramps:
            if ramp.first_sample <= sample:
                gain = min(1.0, max(0.0, ramp.gain + ramp.slope * (sample - ramp.first_sample)))
        return gain

    def _turned(self, sample: int, slope: float) -> Concealer:
        """With a gain that changes by `slope` from a sample on."""
        gain = self._gain_at(sample)
        if slope < 0 and self.last is None:
            gain = 0.0
        elif slope < 0 and gain == 1.0:  # held at first
            gain -= slope * self._samples(_HOLD_MS)
        elif slope > 0 and gain == 1.0:
            slope = 0.0
        return self._replace(ramps=(*self.ramps, _Ramp(sample, gain, slope)))
