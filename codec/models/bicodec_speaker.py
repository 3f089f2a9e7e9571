"""The speaker encoder of BiCodec: mel magnitudes -> ECAPA-TDNN -> a perceiver, which asks a few questions of it.

Letters: B batch, T samples, F frames of the mel spectrum, C channels, E dims of a latent, L latents, V dims of the
x-vector.

Source: Desplanques, Thienpondt and Demuynck, "ECAPA-TDNN: emphasized channel attention, propagation and aggregation in
TDNN based speaker verification" (2020), section 3, in the form of https://github.com/wenet-e2e/wespeaker: convolution,
ReLU and norm in this order, frames pooled by attention that knows the mean and the deviation of the recording. Jaegle
et al., "Perceiver: general perception with iterative attention" (2021), section 3, in the form of
https://github.com/lucidrains/naturalspeech2-pytorch. All as BiCodec was published,
https://github.com/SparkAudio/Spark-TTS, sparktts/modules/speaker.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codec.layers.spectra import from_mel, mel_triangles, to_mel

_RES2_SCALE = 8
_DILATIONS = (2, 3, 4)
_VARIANCE_FLOOR = 1e-7


class MelMagnitudes(nn.Module):
    """Audio [B, T] -> mel magnitudes [B, 1 + T // hop, num_mels]: linear ones, of which no logarithm is taken.

    Windows are centred, with the audio mirrored at both ends, so T must be more than half of `fft_samples`.
    """

    filters: Tensor
    window: Tensor

    def __init__(
        self,
        *,
        sample_rate_hz: int,
        fft_samples: int,
        window_samples: int,
        hop_samples: int,
        num_mels: int,
        min_hz: float,
        max_hz: float,
    ) -> None:
        super().__init__()
        self.fft_samples, self.hop_samples = fft_samples, hop_samples
        places = torch.arange(num_mels + 2, dtype=torch.float64) / (num_mels + 1)
        edges_hz = from_mel(to_mel(min_hz) + (to_mel(max_hz) - to_mel(min_hz)) * places)
        triangles, _ = mel_triangles(edges_hz, sample_rate_hz, fft_samples)
        # As high as they are narrow, so that all have the same area.
        filters = triangles * 2.0 / (edges_hz[2:, None] - edges_hz[:-2, None])
        self.register_buffer("filters", filters.T.float(), persistent=False)
        self.register_buffer("window", torch.hann_window(window_samples), persistent=False)

    def forward(self, audio: Tensor) -> Tensor:
        with torch.autocast(audio.device.type, enabled=False):
            spectrum = torch.stft(
                audio.to(self.window.dtype),
                self.fft_samples,
                self.hop_samples,
                len(self.window),
                self.window,
                return_complex=True,
            )
            return spectrum.abs().transpose(1, 2) @ self.filters


class ECAPA(nn.Module):
    """ECAPA-TDNN: mels [B, F, num_mels] -> x-vectors [B, V], and the frames [B, F, 3 C] that they are pooled from."""

    def __init__(self, num_mels: int, channels: int, bottleneck_dim: int, x_vector_dim: int) -> None:
        super().__init__()
        self.enter = _ConvReLUNorm(num_mels, channels, 5)
        self.blocks = nn.ModuleList(_SERes2Block(channels, bottleneck_dim, dilation) for dilation in _DILATIONS)
        width = channels * len(_DILATIONS)
        self.mix = nn.Conv1d(width, width, 1)
        self.pool = _AttentiveStatistics(width, bottleneck_dim)
        self.norm = _ChannelNorm(2 * width)
        self.leave = nn.Linear(2 * width, x_vector_dim)

    def forward(self, mels: Tensor) -> tuple[Tensor, Tensor]:
        x = self.enter(mels.transpose(1, 2))
        heard = []
        for block in self.blocks:
            x = block(x)
            heard.append(x)
        frames = F.relu(self.mix(torch.cat(heard, dim=1)))
        return self.leave(self.norm(self.pool(frames))), frames.transpose(1, 2)


class _ChannelNorm(nn.Module):
    """Batch norm over [B, C] or [B, C, T]. Unlike torch's it keeps no count of batches, which nothing would read."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training)


class _ConvReLUNorm(nn.Module):
    """A convolution of the same length, ReLU and norm, in this order."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, *, dilation: int = 1) -> None:
        super().__init__()
        padding = (kernel_size - 1) // 2 * dilation
        self.conv = nn.Conv1d(in_channels, out_channels, kernel_size, padding=padding, dilation=dilation)
        self.norm = _ChannelNorm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return cast("Tensor", self.norm(F.relu(self.conv(x))))


class _SERes2Block(nn.Module):
    """Convolutions over groups of channels, each hearing the one before; squeeze and excitation; residual."""

    def __init__(self, channels: int, bottleneck_dim: int, dilation: int) -> None:
        super().__init__()
        self.enter = _ConvReLUNorm(channels, channels, 1)
        width = channels // _RES2_SCALE
        # The last group passes as it is.
        self.groups = nn.ModuleList(_ConvReLUNorm(width, width, 3, dilation=dilation) for _ in range(_RES2_SCALE - 1))
        self.leave = _ConvReLUNorm(channels, channels, 1)
        self.squeeze = nn.Linear(channels, bottleneck_dim)
        self.excite = nn.Linear(bottleneck_dim, channels)

    def forward(self, x: Tensor) -> Tensor:
        first, *others = self.enter(x).chunk(_RES2_SCALE, dim=1)
        heard = [self.groups[0](first)]
        for group, part in zip(list(self.groups)[1:], others[:-1], strict=True):
            heard.append(group(heard[-1] + part))
        y = self.leave(torch.cat([*heard, others[-1]], dim=1))
        gate: Tensor = torch.sigmoid(self.excite(F.relu(self.squeeze(y.mean(2)))))
        gated: Tensor = x + y * gate[:, :, None]
        return gated


class _AttentiveStatistics(nn.Module):
    """[B, C, F] -> weighted means and standard deviations [B, 2 C]; each channel has weights of its own."""

    def __init__(self, channels: int, bottleneck_dim: int) -> None:
        super().__init__()
        self.hidden = nn.Conv1d(3 * channels, bottleneck_dim, 1)
        self.scores = nn.Conv1d(bottleneck_dim, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(self.hidden.weight.dtype)
            variance, mean = torch.var_mean(x, 2, keepdim=True)
            recording = torch.cat([mean, (variance + _VARIANCE_FLOOR).sqrt()], dim=1).expand(-1, -1, x.shape[2])
            weights = self.scores(torch.tanh(self.hidden(torch.cat([x, recording], dim=1)))).softmax(2)
            mean = (weights * x).sum(2)
            variance = (weights * x.square()).sum(2) - mean.square()
            return torch.cat([mean, variance.clamp_min(_VARIANCE_FLOOR).sqrt()], dim=1)


class Resampler(nn.Module):
    """A perceiver: frames [B, F, C] -> [B, L, E], from `num_latents` learned questions.

    In each layer the latents attend to themselves and to the frames, without biases or norms, then pass two linear
    layers with a gate; at the end each latent is divided by its root mean square. The gated layers are two thirds of
    four times as wide as the latents.
    """

    def __init__(
        self, in_dim: int, latent_dim: int, num_latents: int, *, num_layers: int, num_heads: int, head_dim: int
    ) -> None:
        super().__init__()
        self.enter = nn.Linear(in_dim, latent_dim)
        self.latents = nn.Parameter(torch.randn(num_latents, latent_dim) * 0.02)
        self.layers = nn.ModuleList(_ResamplerLayer(latent_dim, num_heads, head_dim) for _ in range(num_layers))
        self.scale = nn.Parameter(torch.ones(latent_dim))

    def forward(self, frames: Tensor) -> Tensor:
        context = self.enter(frames)
        latents = self.latents.expand(len(frames), -1, -1)
        for layer in self.layers:
            latents = layer(latents, context)
        normalized: Tensor = F.normalize(latents, dim=2) * latents.shape[2] ** 0.5
        return normalized * self.scale


class _ResamplerLayer(nn.Module):
    def __init__(self, dim: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.queries = nn.Linear(dim, num_heads * head_dim, bias=False)
        self.keys_values = nn.Linear(dim, 2 * num_heads * head_dim, bias=False)
        self.attended = nn.Linear(num_heads * head_dim, dim, bias=False)
        inner_dim = dim * 4 * 2 // 3
        self.expand = nn.Linear(dim, 2 * inner_dim)
        self.project = nn.Linear(inner_dim, dim)

    def forward(self, latents: Tensor, context: Tensor) -> Tensor:
        keys, values = self.keys_values(torch.cat([latents, context], dim=1)).chunk(2, dim=2)
        queries, keys, values = (self._heads(part) for part in (self.queries(latents), keys, values))
        heard = F.scaled_dot_product_attention(queries, keys, values).transpose(1, 2).flatten(2)
        latents = latents + self.attended(heard)
        value, gate = self.expand(latents).chunk(2, dim=2)
        return latents + cast("Tensor", self.project(value * F.gelu(gate)))

    def _heads(self, x: Tensor) -> Tensor:
        """[B, N, heads * dims] -> [B, heads, N, dims]."""
        heads: Tensor = x.unflatten(2, (self.num_heads, -1))
        return heads.transpose(1, 2)
