"""Logarithms of mel spectra as a causal layer, row-exact like the others."""

from __future__ import annotations

import torch
from torch import Tensor

from codec.kernels.row_linear import row_linear
from codec.layers.causal import CausalLayer, History, State

_FLOOR = 1e-5


class LogMel(CausalLayer):
    """Audio in hops [B, T, hop] -> [B, T, num_mels], each of the last `window_hops` hops under a Hann window.

    Logarithms of mel-weighted power, plus a floor of 1e-5, divided by 4 so that speech lies about within -3..3. With
    `num_cepstra`, of them only what so many cepstral coefficients say: with 16 or so, formants and no harmonics.

    A `stretch` [B] has the spectrum of row b read at `stretch[b]` times the frequency: above 1 the voice becomes deeper
    and its vocal tract longer. What would lie beyond the highest frequency repeats it.

    Source of mel: Slaney, "Auditory toolbox" (1998). Of the stretch: Jaitly and Hinton, "Vocal tract length
    perturbation improves speech recognition" (2013), here a plain linear one.
    """

    filters: Tensor
    window: Tensor
    smoothing: Tensor | None

    def __init__(
        self,
        *,
        sample_rate_hz: int,
        hop_samples: int,
        window_hops: int,
        num_mels: int,
        num_cepstra: int | None = None,
    ) -> None:
        super().__init__()
        self.history = History(hop_samples, window_hops - 1)
        window_samples = hop_samples * window_hops
        self.fft_samples = 1 << (window_samples - 1).bit_length()
        self.register_buffer("window", torch.hann_window(window_samples), persistent=False)
        filters = mel_filters(sample_rate_hz, self.fft_samples, num_mels)
        self.register_buffer("filters", filters, persistent=False)
        smoothing = None if num_cepstra is None else _smoothing(num_mels, num_cepstra)
        self.register_buffer("smoothing", smoothing, persistent=False)

    def init_state(self, batch_size: int) -> State:
        return self.history.init_state(batch_size)

    def step(self, x: Tensor, state: State, stretch: Tensor | None = None) -> tuple[Tensor, State]:
        windows, state = self.history.step(x, state)
        if windows.shape[1] == 0:  # of which there is no FFT
            return windows.new_zeros(len(windows), 0, len(self.filters)), state
        with torch.autocast(x.device.type, enabled=False):
            spectrum = torch.fft.rfft(windows.float() * self.window, n=self.fft_samples)
            power = spectrum.real.square() + spectrum.imag.square()
            if stretch is not None:
                power = _stretched(power, stretch)
            mels = (row_linear(power, self.filters) + _FLOOR).log() / 4.0
            return mels if self.smoothing is None else row_linear(mels, self.smoothing), state


def _stretched(power: Tensor, stretch: Tensor) -> Tensor:
    """Spectra [B, T, bins], read at multiples of the frequency of each bin."""
    num_bins = power.shape[2]
    place = (torch.arange(num_bins, device=power.device) * stretch[:, None]).clamp_max(num_bins - 1)  # [B, bins]
    below = place.floor().long()
    share = (place - below)[:, None]
    index = below[:, None].expand_as(power)
    return torch.lerp(power.gather(2, index), power.gather(2, (index + 1).clamp_max(num_bins - 1)), share)


def mel_filters(sample_rate_hz: int, fft_samples: int, num_mels: int) -> Tensor:
    """Triangles [num_mels, fft_samples // 2 + 1] from 0 Hz to half the rate, each with a sum of 1; none is empty.

    Slaney's scale: linear up to 1 kHz, logarithmic above. A triangle narrower than a bin becomes that bin.
    """
    edges_hz = from_mel(torch.linspace(0, float(to_mel(sample_rate_hz / 2)), num_mels + 2, dtype=torch.float64))
    triangles, bins_hz = mel_triangles(edges_hz, sample_rate_hz, fft_samples)
    nearest = (bins_hz - edges_hz[1:-1, None]).abs().argmin(1)
    is_empty = triangles.sum(1) < 1e-3
    triangles[is_empty, nearest[is_empty]] = 1.0
    return (triangles / triangles.sum(1, keepdim=True)).float()


def mel_triangles(edges_hz: Tensor, sample_rate_hz: int, fft_samples: int) -> tuple[Tensor, Tensor]:
    """Triangles [N, fft_samples // 2 + 1] of height 1 between every three of N + 2 edges, and the bins in Hz."""
    bins_hz = torch.arange(fft_samples // 2 + 1, dtype=torch.float64) * sample_rate_hz / fft_samples
    low, middle, high = edges_hz[:-2, None], edges_hz[1:-1, None], edges_hz[2:, None]
    triangles = torch.minimum((bins_hz - low) / (middle - low), (high - bins_hz) / (high - middle)).clamp_min(0.0)
    return triangles, bins_hz


def _smoothing(num_mels: int, num_cepstra: int) -> Tensor:
    """What is left [num_mels, num_mels] of a spectrum when only its first cosines are kept."""
    places = (torch.arange(num_mels, dtype=torch.float64) + 0.5) / num_mels
    cosines = torch.cos(torch.pi * torch.arange(num_cepstra, dtype=torch.float64)[:, None] * places)
    cosines = cosines / cosines.norm(dim=1, keepdim=True)
    smoothing: Tensor = (cosines.T @ cosines).float()
    return smoothing


def to_mel(frequency_hz: float) -> Tensor:
    """Slaney's scale: linear up to 1 kHz, logarithmic above."""
    frequency = torch.as_tensor(frequency_hz, dtype=torch.float64)
    return torch.where(
        frequency < 1000.0, frequency * 3 / 200, 15.0 + (frequency.clamp_min(1.0) / 1000.0).log() * _STEPS
    )


def from_mel(mel: Tensor) -> Tensor:
    """The frequencies in Hz of places on Slaney's scale."""
    return torch.where(mel < 15.0, mel * 200 / 3, 1000.0 * ((mel - 15.0) / _STEPS).exp())


_STEPS = 27.0 / torch.log(torch.tensor(6.4, dtype=torch.float64))  # mels per factor of e, above 1 kHz
