"""Discriminators that judge whether audio was decoded: HiFi-GAN's two, EnCodec's on spectrograms, DAC's on their bands.

Shapes: N items times channels, T samples, L columns of a spectrogram, F bins.

Each family is a list of sub-discriminators of one kind, described by a frozen configuration; `Discriminators` holds any
mixture of them. The defaults are the published sizes. To train on a few CPU cores, take fewer filters and scales, let
them hear `random_crops` only, and use another part of them in every step (`alternate`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, is_dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from codec.config import build, from_dict, register

# Layers that halve the bins must never see a single one: the gradient of their weights, in bfloat16 on a CPU, is then
# read from memory that nobody wrote (PyTorch 2.11 with oneDNN). Five bins are still two after two halvings.
MIN_BINS = 5


class Judgement(NamedTuple):
    """What one sub-discriminator makes of audio.

    `score`: float32, any shape, items times channels first; higher is more real. `features`: the outputs of the hidden
    layers, from the first on, in the dtype that autocast gave them; the score is not one of them.
    """

    score: Tensor
    features: list[Tensor]


@dataclass(frozen=True, kw_only=True)
class FamilyConfig:
    """What all families have: with `normalize_level` they hear audio without its mean and with its peak at 0.8.

    Level then decides nothing. Source: DAC, which does so for all of its discriminators.
    """

    normalize_level: bool = False


class SubDiscriminator(nn.Module):
    """One judge of audio [N, 1, T], which must have `min_samples` samples or more."""

    min_samples = 1

    def __init__(self, config: FamilyConfig) -> None:
        super().__init__()
        self.normalize_level = config.normalize_level

    def forward(self, audio: Tensor) -> Judgement:
        if self.normalize_level:
            audio = audio - audio.mean(2, keepdim=True)
            audio = 0.8 * audio / (audio.abs().amax(2, keepdim=True) + 1e-9)
        return self.judge(audio)

    def judge(self, audio: Tensor) -> Judgement:
        """What `forward` gives, of audio at the level that counts."""
        raise NotImplementedError


class Family(nn.ModuleList):
    """Sub-discriminators of one kind."""


# Waveforms folded by periods


@dataclass(frozen=True, kw_only=True)
class MultiPeriodConfig(FamilyConfig):
    """One sub-discriminator per period, with layers of these `channels`; all but the last layer stride by three."""

    periods: tuple[int, ...] = (2, 3, 5, 7, 11)
    channels: tuple[int, ...] = (32, 128, 512, 1024, 1024)

    def __post_init__(self) -> None:
        _check_positive(periods=self.periods, channels=self.channels)


@register("multi_period", MultiPeriodConfig)
class MultiPeriod(Family):
    """The multi-period discriminator of HiFi-GAN, which DAC uses, too.

    Source: Kong et al., "HiFi-GAN" (2020), section 2.3 and appendix A.2.
    """

    def __init__(self, config: MultiPeriodConfig) -> None:
        super().__init__(PeriodDiscriminator(config, period) for period in config.periods)


class PeriodDiscriminator(SubDiscriminator):
    """Samples that lie a period apart are the columns of an image; convolutions run along columns only."""

    def __init__(self, config: MultiPeriodConfig, period: int) -> None:
        super().__init__(config)
        channels = config.channels
        strides = (*(3,) * (len(channels) - 1), 1)
        self.layers = nn.ModuleList(
            weight_norm(nn.Conv2d(before, after, (5, 1), (stride, 1), padding=(2, 0)))
            for (before, after), stride in zip(pairwise((1, *channels)), strides, strict=True)
        )
        self.last = weight_norm(nn.Conv2d(channels[-1], 1, (3, 1), padding=(1, 0)))
        self.period = period
        self.min_samples = period

    def judge(self, audio: Tensor) -> Judgement:
        # Nothing is added where the period fits (DAC adds a whole period there).
        padded = F.pad(audio, (0, -audio.shape[2] % self.period), "reflect")
        features = _hidden(self.layers, padded.unflatten(2, (-1, self.period)), negative_slope=0.1)
        return Judgement(self.last(features[-1]).float(), features)


# Waveforms, as they are and averaged


@dataclass(frozen=True, kw_only=True)
class MultiScaleConfig(FamilyConfig):
    """`num_scales` sub-discriminators, each of which hears half the rate of the one before.

    `channels`, `strides` and `groups` of their layers. The first layer's window is 15 samples, the last one's 5, those
    of the others 41.
    """

    num_scales: int = 3
    channels: tuple[int, ...] = (128, 128, 256, 512, 1024, 1024, 1024)
    strides: tuple[int, ...] = (1, 2, 2, 4, 4, 1, 1)
    groups: tuple[int, ...] = (1, 4, 16, 16, 16, 16, 1)

    def __post_init__(self) -> None:
        _check_positive(num_scales=(self.num_scales,), channels=self.channels, strides=self.strides, groups=self.groups)
        if not 2 <= len(self.channels) == len(self.strides) == len(self.groups):
            raise ValueError("channels, strides and groups must name the same number of layers, two or more")
        for (before, after), groups in zip(pairwise((1, *self.channels)), self.groups, strict=True):
            if before % groups or after % groups:
                raise ValueError(f"a layer from {before} to {after} channels cannot have {groups} groups")


@register("multi_scale", MultiScaleConfig)
class MultiScale(Family):
    """The multi-scale discriminator of HiFi-GAN; its first scale has spectral norm instead of weight norm.

    Source: Kumar et al., "MelGAN" (2019), section 2.2; Kong et al., "HiFi-GAN" (2020), section 2.3, with the sizes of
    `models.py` of https://github.com/jik876/hifi-gan.
    """

    def __init__(self, config: MultiScaleConfig) -> None:
        super().__init__(
            ScaleDiscriminator(config, scale, weight_norm if scale else spectral_norm)
            for scale in range(config.num_scales)
        )


class ScaleDiscriminator(SubDiscriminator):
    """The waveform after `scale` halvings of its rate, each by means of four samples."""

    def __init__(self, config: MultiScaleConfig, scale: int, norm: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__(config)
        windows = (15, *(41,) * (len(config.channels) - 2), 5)
        self.layers = nn.ModuleList(
            norm(nn.Conv1d(before, after, window, stride, padding=window // 2, groups=groups))
            for (before, after), window, stride, groups in zip(
                pairwise((1, *config.channels)), windows, config.strides, config.groups, strict=True
            )
        )
        self.last = norm(nn.Conv1d(config.channels[-1], 1, 3, padding=1))
        self.scale = scale

    def judge(self, audio: Tensor) -> Judgement:
        for _ in range(self.scale):
            audio = F.avg_pool1d(audio, 4, 2, padding=2)
        features = _hidden(self.layers, audio, negative_slope=0.1)
        return Judgement(self.last(features[-1]).float(), features)


# Complex spectrograms: real and imaginary parts are the two channels of an image


@dataclass(frozen=True, kw_only=True)
class MultiScaleSTFTConfig(FamilyConfig):
    """One sub-discriminator of `num_filters` channels per size in `n_ffts`; windows hop by a quarter.

    `negative_slope` of the leaky ReLUs is 0.2 in the `encodec` package, 0.3 in the training that audiocraft published.
    """

    n_ffts: tuple[int, ...] = (1024, 2048, 512, 256, 128)
    num_filters: int = 32
    negative_slope: float = 0.2

    def __post_init__(self) -> None:
        _check_positive(n_ffts=self.n_ffts, num_filters=(self.num_filters,))
        _check_ffts(self.n_ffts)


@register("multi_scale_stft", MultiScaleSTFTConfig)
class MultiScaleSTFT(Family):
    """EnCodec's discriminators on complex spectrograms of several resolutions.

    Source: Défossez et al., "High fidelity neural audio compression" (2022), section 3.4, with the layers of
    `msstftd.py` of https://github.com/facebookresearch/encodec and the five resolutions of the paper.
    """

    def __init__(self, config: MultiScaleSTFTConfig) -> None:
        super().__init__(STFTDiscriminator(config, n_fft) for n_fft in config.n_ffts)


class STFTDiscriminator(SubDiscriminator):
    """One resolution: dilations grow along time, strides halve the bins."""

    window: Tensor

    def __init__(self, config: MultiScaleSTFTConfig, n_fft: int) -> None:
        super().__init__(config)
        width = config.num_filters
        self.layers = nn.ModuleList([nn.Conv2d(2, width, (3, 9), padding=(1, 4))])  # published without a norm
        for dilation in (1, 2, 4):
            layer = nn.Conv2d(width, width, (3, 9), (1, 2), dilation=(dilation, 1), padding=(dilation, 4))
            self.layers.append(weight_norm(layer))
        self.layers.append(weight_norm(nn.Conv2d(width, width, 3, padding=1)))
        self.last = weight_norm(nn.Conv2d(width, 1, 3, padding=1))
        self.negative_slope = config.negative_slope
        # A window of unit energy makes noise look alike at every resolution. (`normalized=True` of torch.stft divides
        # by the root of n_fft, which is something else.)
        window = torch.hann_window(n_fft)
        self.register_buffer("window", window / window.square().sum().sqrt(), persistent=False)
        self.min_samples = n_fft

    def judge(self, audio: Tensor) -> Judgement:
        features = _hidden(self.layers, _spectrogram(audio, self.window), negative_slope=self.negative_slope)
        return Judgement(self.last(features[-1]).float(), features)


@dataclass(frozen=True, kw_only=True)
class MultiBandMultiResolutionConfig(FamilyConfig):
    """One sub-discriminator per size in `n_ffts`, with `num_filters` channels for each band; windows hop by a quarter.

    Bands lie between neighbours in `band_edges`, which are shares of the bins.
    """

    n_ffts: tuple[int, ...] = (2048, 1024, 512)
    band_edges: tuple[float, ...] = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
    num_filters: int = 32

    def __post_init__(self) -> None:
        _check_positive(n_ffts=self.n_ffts, num_filters=(self.num_filters,))
        _check_ffts(self.n_ffts)
        edges = self.band_edges
        if len(edges) < 2 or edges[0] < 0.0 or edges[-1] > 1.0 or any(a >= b for a, b in pairwise(edges)):
            raise ValueError(f"band_edges must rise from 0 or more to 1 or less, got {edges}")
        if any(last - first < MIN_BINS for n_fft in self.n_ffts for first, last in self.bands(n_fft)):
            raise ValueError(
                f"band_edges={edges} leave fewer than {MIN_BINS} bins to a band at n_fft={min(self.n_ffts)}"
            )

    def bands(self, n_fft: int) -> list[tuple[int, int]]:
        """The first bin of each band, and the one after its last."""
        return list(pairwise(int(edge * (n_fft // 2 + 1)) for edge in self.band_edges))


@register("multi_band_multi_resolution", MultiBandMultiResolutionConfig)
class MultiBandMultiResolution(Family):
    """DAC's discriminators on bands of complex spectrograms of several resolutions.

    Source: Kumar et al., "High-fidelity audio compression with improved RVQGAN" (2023), section 3.4, and
    `dac/model/discriminator.py` of https://github.com/descriptinc/descript-audio-codec.
    """

    def __init__(self, config: MultiBandMultiResolutionConfig) -> None:
        super().__init__(BandsDiscriminator(config, n_fft) for n_fft in config.n_ffts)


class BandsDiscriminator(SubDiscriminator):
    """One resolution: a stack of layers for each band, and one last layer over all bands side by side."""

    window: Tensor

    def __init__(self, config: MultiBandMultiResolutionConfig, n_fft: int) -> None:
        super().__init__(config)
        width = config.num_filters
        self.bands = config.bands(n_fft)
        self.stacks = nn.ModuleList()
        for _ in self.bands:
            stack = nn.ModuleList([weight_norm(nn.Conv2d(2, width, (3, 9), padding=(1, 4)))])
            for _ in range(3):
                stack.append(weight_norm(nn.Conv2d(width, width, (3, 9), (1, 2), padding=(1, 4))))
            stack.append(weight_norm(nn.Conv2d(width, width, 3, padding=1)))
            self.stacks.append(stack)
        self.last = weight_norm(nn.Conv2d(width, 1, 3, padding=1))
        self.register_buffer("window", torch.hann_window(n_fft), persistent=False)
        self.hop = n_fft // 4
        self.overlap = (n_fft - self.hop) // 2
        self.min_samples = self.overlap + self.hop  # what is mirrored at the end, and one sample more

    def judge(self, audio: Tensor) -> Judgement:
        # One column per hop, the last of which may reach into what is mirrored.
        padded = F.pad(audio, (self.overlap, self.overlap + -audio.shape[2] % self.hop), "reflect")
        spectra = _spectrogram(padded, self.window)
        features, ends = [], []
        for (first, last), stack in zip(self.bands, self.stacks, strict=True):
            assert isinstance(stack, nn.ModuleList)
            features += _hidden(stack, spectra[:, :, :, first:last], negative_slope=0.1)
            ends.append(features[-1])
        return Judgement(self.last(torch.cat(ends, dim=3)).float(), features)


# All together


class Discriminators(nn.Module):
    """Sub-discriminators of one or more families, numbered in order; built from dicts or from configurations.

    `forward(audio [B, C, T])` gives a `Judgement` for each, or for those whose numbers are in `active`. Channels are
    judged one by one. Source: EnCodec (Défossez et al., 2022), section 3.4.

    Where only a part is active, the others get no gradient: an optimizer passes over them, and
    DistributedDataParallel needs `find_unused_parameters=True`.

    >>> judges = Discriminators([{"type": "multi_period", "periods": [2, 3], "channels": [4, 8]}])
    >>> [judgement.score.shape for judgement in judges(torch.zeros(5, 1, 100))]
    [torch.Size([5, 1, 17, 2]), torch.Size([5, 1, 12, 3])]
    """

    def __init__(self, configs: Sequence[Any]) -> None:
        super().__init__()
        self.families = nn.ModuleList()
        for index, values in enumerate(configs):
            path = f"adversary.discriminators[{index}]"
            config = values if is_dataclass(values) else from_dict(values, path)
            if not isinstance(config, FamilyConfig):
                raise ValueError(f"{path}: {type(config).__name__} does not describe discriminators")
            self.families.append(build(config))
        if not self.members:
            raise ValueError("an adversary needs one discriminator or more")

    @property
    def members(self) -> list[SubDiscriminator]:
        """All sub-discriminators, in the order of their numbers."""
        return [member for family in self.families for member in family]  # type: ignore[attr-defined]

    @property
    def min_samples(self) -> int:
        """The fewest samples that all of them can judge."""
        return max(member.min_samples for member in self.members)

    def forward(self, audio: Tensor, active: Iterable[int] | None = None) -> list[Judgement]:
        if audio.dim() != 3 or audio.shape[2] < self.min_samples:
            raise ValueError(
                f"discriminators need [B, C, {self.min_samples} samples or more], got {tuple(audio.shape)}"
            )
        members, signals = self.members, audio.flatten(0, 1)[:, None]
        return [members[index](signals) for index in (range(len(members)) if active is None else active)]


def alternate(num_discriminators: int, num_active: int, step: int) -> tuple[int, ...]:
    """Which sub-discriminators are active in a step: `num_active` of them in turn, all equally often.

    Depends on the step alone, so that a resumed run goes on as the whole one would have.
    """
    if not 1 <= num_active <= num_discriminators:
        raise ValueError(f"num_active={num_active} is not in 1..{num_discriminators}, the number of discriminators")
    return tuple((step * num_active + index) % num_discriminators for index in range(num_active))


def random_crops(signals: Sequence[Tensor], num_samples: int, *, generator: torch.Generator) -> list[Tensor]:
    """Of each [B, C, T] in `signals`, the same crop per item: [B, C, num_samples]. Shorter signals stay whole.

    What a generator made and what it should have made go in together, so that discriminators hear the same places.
    """
    batch_size, _, total = signals[0].shape
    if any(signal.shape != signals[0].shape for signal in signals):
        raise ValueError(f"signals differ in shape: {[tuple(signal.shape) for signal in signals]}")
    if num_samples < 1:
        raise ValueError(f"num_samples must be positive, got {num_samples}")
    if num_samples >= total:
        return list(signals)
    starts_B = torch.randint(total - num_samples + 1, (batch_size,), generator=generator).tolist()
    return [
        torch.stack([item[:, start : start + num_samples] for item, start in zip(signal, starts_B, strict=True)])
        for signal in signals
    ]


def _hidden(layers: nn.ModuleList, x: Tensor, *, negative_slope: float) -> list[Tensor]:
    """The outputs of layers one after another, each after a leaky ReLU."""
    features = []
    for layer in layers:
        x = F.leaky_relu(layer(x), negative_slope)
        features.append(x)
    return features


def _spectrogram(audio: Tensor, window: Tensor) -> Tensor:
    """[N, 1, T] -> real and imaginary parts [N, 2, L, F], of whole windows only, which hop by a quarter.

    In float32 outside autocast: bfloat16 would lose what is quiet beside something loud.
    """
    size = len(window)
    with torch.autocast(audio.device.type, enabled=False):
        spectra_NFL = torch.stft(
            audio[:, 0].float(), size, size // 4, window=window.float(), center=False, return_complex=True
        )
        # The two parts stay innermost in memory: channels-last, which convolutions on a CPU are fastest with.
        return torch.view_as_real(spectra_NFL).permute(0, 3, 2, 1)


def _check_positive(**values: Sequence[int]) -> None:
    for name, numbers in values.items():
        if not numbers or min(numbers) < 1:
            raise ValueError(f"{name} must be positive, got {', '.join(map(str, numbers)) or 'nothing'}")


def _check_ffts(n_ffts: Sequence[int]) -> None:
    for n_fft in n_ffts:
        if n_fft % 4:
            raise ValueError(f"n_fft={n_fft} is not a multiple of 4: windows hop by a quarter")
        if n_fft // 2 + 1 < MIN_BINS:
            raise ValueError(f"n_fft={n_fft} gives fewer than {MIN_BINS} bins")
