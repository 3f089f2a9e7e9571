"""How frozen speech models take audio: normalised waveforms or log-mels, padded, rows of unequal length apart.

Letters: B batch, T samples, F frames of the model, D dims.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PADDINGS = ("centered", "end", "none")


class Entrance(nn.Module):
    """How a network takes audio, and where its frames lie: frame i hears `field_samples` from i * `stride_samples`.

    The audio is normalised to zero mean and unit variance if there is an `epsilon`, which is added to the variance.
    With `mel_filters` [bins, bands] and their `window`, the input is log-mels, `num_columns` of them a frame.
    """

    mel_filters: Tensor
    window: Tensor

    def __init__(
        self,
        sample_rate_hz: int,
        stride_samples: int,
        field_samples: int,
        *,
        epsilon: float | None = None,
        mel_filters: Tensor | None = None,
        window: Tensor | None = None,
        num_columns: int = 0,
    ) -> None:
        super().__init__()
        self.sample_rate_hz = sample_rate_hz
        self.stride_samples, self.field_samples = stride_samples, field_samples
        self.epsilon, self.num_columns = epsilon, num_columns
        self.register_buffer("mel_filters", mel_filters, persistent=False)
        self.register_buffer("window", window, persistent=False)

    def num_frames(self, num_samples: int, padding: str) -> int:
        """How many frames a row of so many samples has."""
        if padding != "none":
            return -(-num_samples // self.stride_samples)
        return max(0, (num_samples - self.field_samples) // self.stride_samples + 1)

    def forward(self, audio: Tensor, padding: str) -> Tensor:
        """The input of the network for rows [B, T] of one length: [B, T'], or [B, F, D] with log-mels."""
        if self.epsilon is not None:
            variance, mean = torch.var_mean(audio, 1, correction=0, keepdim=True)
            audio = (audio - mean) / (variance + self.epsilon).sqrt()
        num_samples, before = audio.shape[1], 0
        if padding != "none":
            before = (self.field_samples - self.stride_samples) // 2 if padding == "centered" else 0
            needed = (self.num_frames(num_samples, padding) - 1) * self.stride_samples + self.field_samples
            around = self.field_samples + self.stride_samples
            audio = F.pad(audio, (around, around))[:, around - before :][:, :needed]
        return self._log_mels(audio, before + num_samples) if self.num_columns else audio

    def _log_mels(self, audio: Tensor, end: int) -> Tensor:
        """Columns of log-mels, normalised per band over those that begin before sample `end`; zeros stand after it.

        Source: Kaldi's filter banks (`compute-fbank-feats`), as SeamlessM4TFeatureExtractor of `transformers` has them:
        frames without their mean, pre-emphasis of 0.97, powers of a spectrum of twice as many points as it has bins.
        """
        hop = self.stride_samples // self.num_columns
        frames = audio.double().unfold(1, len(self.window), hop) * 2**15
        frames = frames - frames.mean(2, keepdim=True)
        frames = frames - 0.97 * torch.cat([frames[..., :1], frames[..., :-1]], 2)
        spectrum = torch.fft.rfft(frames * self.window, 2 * (len(self.mel_filters) - 1))
        columns = (spectrum.abs().square() @ self.mel_filters).clamp(min=2.0**-23).log()
        num_heard = min(columns.shape[1], -(-end // hop))
        heard = columns[:, :num_heard]
        variance, mean = torch.var_mean(heard, 1, correction=min(1, num_heard - 1), keepdim=True)
        columns = F.pad((heard - mean) / (variance + 1e-7).sqrt(), (0, 0, 0, columns.shape[1] - num_heard))
        columns = columns[:, : columns.shape[1] // self.num_columns * self.num_columns]
        return columns.reshape(len(audio), -1, self.num_columns * columns.shape[2]).float()


def by_length(
    entrance: Entrance,
    audio: Tensor,
    num_samples: Tensor | None,
    padding: str,
    compute: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """What `compute` makes of rows of one length, [N, b, F, D], for all rows: [N, B, F, D], and num_frames [B]."""
    if padding not in PADDINGS:
        raise ValueError(f"padding={padding!r} is not one of {', '.join(map(repr, PADDINGS))}")
    if audio.ndim != 2 or not audio.is_floating_point():
        raise ValueError(f"audio must be floating-point [B, T], not {audio.dtype} {list(audio.shape)}")
    lengths = [audio.shape[1]] * len(audio) if num_samples is None else num_samples.tolist()
    if len(lengths) != len(audio) or not lengths:
        raise ValueError(f"num_samples must name a length for each of {len(audio)} rows, one at the least")
    if not all(0 < length <= audio.shape[1] for length in lengths):
        raise ValueError(f"a row must have 1 to {audio.shape[1]} samples, not {min(lengths)} to {max(lengths)}")
    num_frames = [entrance.num_frames(length, padding) for length in lengths]
    if min(num_frames) < 1:
        raise ValueError(
            f"audio of {min(lengths)} samples is shorter than the {entrance.field_samples} that one frame needs"
        )
    result: Tensor | None = None
    with torch.no_grad(), torch.autocast(audio.device.type, enabled=False):
        for length in sorted(set(lengths)):
            rows = [row for row, of_row in enumerate(lengths) if of_row == length]
            values = compute(entrance(audio[rows, :length].float(), padding)).float()
            if result is None:
                result = values.new_zeros(len(values), len(audio), max(num_frames), values.shape[3])
            result[:, rows, : values.shape[2]] = values
    assert result is not None
    return result, torch.tensor(num_frames, device=audio.device)


def geometry(kernels: Sequence[int], strides: Sequence[int]) -> tuple[int, int]:
    """Samples between frames of stacked convolutions, and samples that a frame hears."""
    field = 1 + sum((kernel - 1) * math.prod(strides[:i]) for i, kernel in enumerate(kernels))
    return math.prod(strides), field
