"""The pitch of speech, by autocorrelation: what a decoder's own pitch learns from."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from codec.layers.source import HIGHEST_HZ, LOWEST_HZ

_WINDOW_SECONDS = 0.05
_LEAST_CORRELATION = 0.5  # below it a frame is not voiced
_OCTAVE_COST = 0.06  # by what a lag must be better than one half as long
_LEAST_RMS = 3e-3
_SMOOTH_HZ = 1500.0


@torch.no_grad()
def track_pitch(
    audio: Tensor, *, sample_rate_hz: int, hop_samples: int, first_center: int = 0
) -> tuple[Tensor, Tensor]:
    """Audio [B, T] -> pitch in Hz [B, F] and whether a frame is voiced, bool [B, F]; F is T / hop_samples, rounded up.

    Frame i is centred on sample `first_center + i * hop_samples`. Of frames that are not voiced the pitch is the least.

    Source: Boersma, "Accurate short-term analysis of the fundamental frequency and the harmonics-to-noise ratio of a
    sampled sound" (1993): autocorrelation divided by that of the window, and a cost of octaves; no paths are searched
    here, the median of five frames smooths instead.
    """
    num_frames = -(-audio.shape[1] // hop_samples)
    size = 2 * (round(_WINDOW_SECONDS * sample_rate_hz) // 2)
    left = size // 2 - first_center
    padded = F.pad(audio.float(), (max(0, left), num_frames * hop_samples + size))[:, max(0, -left) :]
    window = torch.hann_window(size, device=audio.device)
    frames = padded.unfold(1, size, hop_samples)[:, :num_frames]
    frames = (frames - frames.mean(2, keepdim=True)) * window
    least, most = int(sample_rate_hz / HIGHEST_HZ), min(size // 2, int(sample_rate_hz / LOWEST_HZ))

    # What is sharper than the lags are fine would hide a period between two of them.
    frequencies_hz = torch.fft.rfftfreq(2 * size, 1 / sample_rate_hz, device=audio.device)
    low_pass = torch.exp(-0.5 * (frequencies_hz / _SMOOTH_HZ).square())

    def correlation(signal: Tensor) -> Tensor:
        power = torch.fft.rfft(signal, n=2 * size).abs().square() * low_pass
        of_lags: Tensor = torch.fft.irfft(power, n=2 * size)[..., : most + 2]
        return of_lags

    raw = correlation(frames)
    of_window = correlation(window)
    normal = raw / raw[..., :1].clamp_min(1e-9) / (of_window / of_window[0])
    lags = torch.arange(most + 2, device=audio.device)
    score = normal - _OCTAVE_COST * (lags.clamp_min(1) / least).log2()
    is_peak = torch.zeros_like(score, dtype=torch.bool)
    is_peak[..., 1:-1] = (normal[..., 1:-1] >= normal[..., :-2]) & (normal[..., 1:-1] >= normal[..., 2:])
    score = score.masked_fill(~is_peak | (lags < least) | (lags > most), -torch.inf)
    best = score.argmax(2, keepdim=True)
    before, at, after = (normal.gather(2, (best + i).clamp(0, most + 1))[..., 0] for i in (-1, 0, 1))
    shift = (before - after) / (2 * (before - 2 * at + after)).clamp_max(-1e-6)
    pitch_hz = sample_rate_hz / (best[..., 0] + shift.clamp(-0.5, 0.5))
    rms = frames.square().mean(2).sqrt()
    is_voiced = (at > _LEAST_CORRELATION) & (rms > _LEAST_RMS) & torch.isfinite(score.amax(2))
    pitch_hz = torch.where(is_voiced, pitch_hz, LOWEST_HZ).clamp(LOWEST_HZ, HIGHEST_HZ)
    smooth = F.pad(pitch_hz, (2, 2), "replicate").unfold(1, 5, 1).median(2).values if num_frames > 2 else pitch_hz
    is_voiced = is_voiced & ((smooth / pitch_hz).log2().abs() < 0.2)
    return torch.where(is_voiced, smooth, LOWEST_HZ), is_voiced
