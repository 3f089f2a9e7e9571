"""Reconstruction losses: multi-scale log-mel and compressed complex spectra.

Shapes: B batch, T samples, F bins, M mel bands, L columns of a spectrogram.
"""

from __future__ import annotations

from collections.abc import Sequence

import librosa
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SpectralLoss(nn.Module):
    """Distances between spectrograms of several window lengths, averaged over the scales.

    `forward(estimate [B, T], target [B, T])` returns unweighted scalars:

    - `mel`: L1 of natural-log mel magnitudes (Slaney scale, clamped at `mel_floor`). Source: the reconstruction loss of
      SoundStream and DAC, with bands that follow the window length.
    - `magnitude`, `complex`: squared error of spectra compressed to the square root of their magnitude, without and
      with their phase, relative to the energy of the target's: silence scores 1, whatever the level. Source: Braun and
      Tashev, "A consolidated view of loss functions for supervised deep learning-based speech enhancement" (2021), with
      exponent 0.3; a square root costs less and weighs strong harmonics, hence phase, more.

    Spectra are computed in float32 outside autocast; windows hop by a quarter.
    """

    def __init__(
        self,
        *,
        sample_rate_hz: int,
        window_samples: Sequence[int] = (2048, 512, 128),
        num_mels: Sequence[int] = (128, 64, 16),
        mel_floor: float = 1e-4,
    ) -> None:
        super().__init__()
        if len(window_samples) != len(num_mels):
            raise ValueError(f"{len(window_samples)} window lengths need as many num_mels, got {len(num_mels)}")
        self.window_samples = tuple(window_samples)
        self.mel_floor = mel_floor
        for size, bands in zip(window_samples, num_mels, strict=True):
            filters = librosa.filters.mel(sr=sample_rate_hz, n_fft=size, n_mels=bands)
            # Every filter is a weighted mean of bins, so that the floor means the same at every scale.
            filters = filters / filters.sum(axis=1, keepdims=True)
            self.register_buffer(f"mel_{size}", torch.from_numpy(filters).float(), persistent=False)
            self.register_buffer(
                f"window_{size}", torch.hann_window(size) / torch.hann_window(size).sum(), persistent=False
            )

    def forward(self, estimate: Tensor, target: Tensor) -> dict[str, Tensor]:
        mel = magnitude = complex_ = estimate.new_zeros(())
        with torch.autocast(estimate.device.type, enabled=False):
            for size in self.window_samples:
                with torch.no_grad():  # the target's half of the backward pass would be wasted
                    wanted_mel, wanted_magnitude, wanted_complex = self._features(target.float(), size)
                ours_mel, ours_magnitude, ours_complex = self._features(estimate.float(), size)
                mel = mel + F.l1_loss(ours_mel, wanted_mel) / len(self.window_samples)
                magnitude = magnitude + _relative_error(ours_magnitude, wanted_magnitude) / len(self.window_samples)
                complex_ = complex_ + _relative_error(ours_complex, wanted_complex) / len(self.window_samples)
        return {"mel": mel, "magnitude": magnitude, "complex": complex_}

    def _features(self, audio: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
        window = self.get_buffer(f"window_{size}")
        spectra_BFL = torch.stft(audio, size, size // 4, window=window, return_complex=True)
        power_BFL = torch.view_as_real(spectra_BFL).square().sum(-1) + 1e-9
        magnitude_BFL = power_BFL.sqrt()
        mels_BML = torch.matmul(self.get_buffer(f"mel_{size}"), magnitude_BFL)
        compressed_BFL = magnitude_BFL.sqrt()
        unit = torch.view_as_real(spectra_BFL) / compressed_BFL[..., None]
        return mels_BML.clamp_min(self.mel_floor).log(), compressed_BFL, unit


def _relative_error(estimate: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(estimate, target) / target.square().mean().clamp_min(1e-9)


def si_sdr_db(estimate: Tensor, target: Tensor) -> Tensor:
    """Scale-invariant signal-to-distortion ratio per row of [B, T], in dB.

    Source: Le Roux et al., "SDR - half-baked or well done?" (2019), equation 5, on zero-mean signals.
    """
    estimate = estimate - estimate.mean(-1, keepdim=True)
    target = target - target.mean(-1, keepdim=True)
    scale = (estimate * target).sum(-1, keepdim=True) / target.square().sum(-1, keepdim=True).clamp_min(1e-9)
    wanted = scale * target
    noise = estimate - wanted
    return 10 * torch.log10(wanted.square().sum(-1).clamp_min(1e-9) / noise.square().sum(-1).clamp_min(1e-9))
