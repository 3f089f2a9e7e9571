"""A light speaker encoder: what a voice sounds like, from a few seconds of it.

    log-mel [B, T, 80] -> separable convolutions with squeeze and excitation -> attentive statistics -> x-vector [B, V]

Built like TitaNet, an order of magnitude smaller, and with layer norms, so that it knows no batch statistics.

Source: Koluguri et al., "TitaNet: neural model for speaker representation with 1D depth-wise separable convolutions and
global context" (2022), section 2; attentive statistics: Okabe et al., "Attentive statistics pooling for deep speaker
embedding" (2018), section 3.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codec.layers.spectra import LogMel

_HOP_SAMPLES, _WINDOW_HOPS, _NUM_MELS = 160, 3, 80
_KERNEL_SIZES = (3, 7, 11, 15)


class SpeakerEncoder(nn.Module):
    """Audio float [B, T] at `sample_rate_hz` -> x-vectors [B, V]; at least one sample.

    The whole recording counts alike, and its loudness does not: the mean over all bands and time is taken out.
    """

    def __init__(self, *, sample_rate_hz: int, channels: int, x_vector_dim: int) -> None:
        super().__init__()
        hop_samples = _HOP_SAMPLES * sample_rate_hz // 16000
        self.hop_samples = hop_samples
        self.mels = LogMel(
            sample_rate_hz=sample_rate_hz, hop_samples=hop_samples, window_hops=_WINDOW_HOPS, num_mels=_NUM_MELS
        )
        self.enter = nn.Linear(_NUM_MELS, channels)
        self.blocks = nn.ModuleList(_Block(channels, kernel_size) for kernel_size in _KERNEL_SIZES)
        self.norm = nn.LayerNorm(channels * len(_KERNEL_SIZES))
        self.widen = nn.Linear(channels * len(_KERNEL_SIZES), 3 * channels)
        self.pool = _AttentiveStatistics(3 * channels)
        self.leave = nn.Linear(6 * channels, x_vector_dim)

    def forward(self, audio: Tensor) -> Tensor:
        num_hops = max(_WINDOW_HOPS, -(-audio.shape[1] // self.hop_samples))
        audio = F.pad(audio, (0, num_hops * self.hop_samples - audio.shape[1]))
        mels = self.mels(audio.unflatten(1, (num_hops, self.hop_samples)))
        x = self.enter(mels - mels.mean((1, 2), keepdim=True))
        heard = []
        for block in cast("list[_Block]", self.blocks):
            x = block(x)
            heard.append(x)
        x = F.gelu(self.widen(self.norm(torch.cat(heard, dim=2))))
        vector: Tensor = self.leave(self.pool(x))
        return vector


class _Block(nn.Module):
    """A separable convolution, squeeze and excitation over the whole recording, residual. [B, T, C]"""

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.conv = nn.Conv1d(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)
        self.mix = nn.Linear(channels, channels)
        self.squeeze = nn.Linear(channels, channels // 8)
        self.excite = nn.Linear(channels // 8, channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.norm(x).transpose(1, 2)).transpose(1, 2)
        y = F.gelu(self.mix(y))
        gate: Tensor = torch.sigmoid(self.excite(F.relu(self.squeeze(y.mean(1, keepdim=True)))))
        return x + y * gate


class _AttentiveStatistics(nn.Module):
    """Weighted means and standard deviations over time, channel by channel: [B, T, C] -> [B, 2 C]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(channels, channels // 4)
        self.scores = nn.Linear(channels // 4, channels)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            weights = self.scores(torch.tanh(self.hidden(x))).softmax(1)
            mean = (weights * x).sum(1)
            variance = (weights * x.square()).sum(1) - mean.square()
            return torch.cat([mean, variance.clamp_min(1e-6).sqrt()], dim=1)
