"""What is wrong with decoded audio: distances of waveforms and spectra, and what discriminators make of it.

Shapes: B batch, C channels, N items times channels, T samples, F bins, M mel bands, L columns of a spectrogram.

`ReconstructionLoss` compares audio with audio by named terms, each described by a frozen configuration. The functions
at the end compare judgements of `recipes.discriminators`. Nothing here is weighted: a recipe weighs losses by name.
Everything is computed in float32 outside autocast.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from typing import Any

import librosa
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codec.config import build, from_dict, register
from recipes.discriminators import Judgement

GAN_KINDS = ("hinge", "clipped_hinge", "least_squares")
REDUCTIONS = ("sum", "mean")


def _check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, choices))}")


# Terms of the reconstruction loss


@dataclass(frozen=True, kw_only=True)
class TermConfig:
    """Base of the configurations of terms."""


class Term(nn.Module):
    """One term: `forward(estimate [N, T], target [N, T])` gives an unweighted scalar for each of its `parts`."""

    parts: tuple[str, ...] = ("",)

    def forward(self, estimate: Tensor, target: Tensor) -> dict[str, Tensor]:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class WaveformLossConfig(TermConfig):
    """`distance`: "l1", the mean absolute error, or "l2", the mean squared error."""

    distance: str = "l1"

    def __post_init__(self) -> None:
        _check_choice("distance", self.distance, ("l1", "l2"))


@register("waveform", WaveformLossConfig)
class WaveformLoss(Term):
    """Error of the samples themselves."""

    def __init__(self, config: WaveformLossConfig, sample_rate_hz: int) -> None:
        super().__init__()
        self.distance = _distance(config.distance)

    def forward(self, estimate: Tensor, target: Tensor) -> dict[str, Tensor]:
        return {"": self.distance(estimate, target)}


@dataclass(frozen=True, kw_only=True)
class MelLossConfig(TermConfig):
    """Distances of mel spectrograms at several scales; the defaults are those of DAC.

    For each scale: `window_samples`, `num_mels`, `hop_samples` (a quarter of the window if left empty), `fft_samples`
    (the window) and `scale_weights` (1), by which the scales are added up. A scale counts with `linear_weight` times
    the L1 of mels and `log_weight` times the `log_distance` ("l1" or "l2", which is squared) of their logarithms.

    `mel_scale` is "slaney" or "htk"; `normalize_bands` divides filters by their width (Slaney), `normalize_window` the
    spectrum by the norm of its window. `power` 1 is of magnitudes, 2 of energies. The `logarithm`, "log10" or "log", is
    of mels clamped at `floor`, or with `add_floor` of mels plus `floor`. Windows stand around
    the first sample and every hop after it (`padding="center"`), or each in the middle of its hop (`"hop"`).

    Bands narrower than a bin are empty in the published settings; they weigh nothing.
    """

    window_samples: tuple[int, ...] = (32, 64, 128, 256, 512, 1024, 2048)
    num_mels: tuple[int, ...] = (5, 10, 20, 40, 80, 160, 320)
    hop_samples: tuple[int, ...] = ()
    fft_samples: tuple[int, ...] = ()
    scale_weights: tuple[float, ...] = ()
    mel_scale: str = "slaney"
    min_frequency_hz: float = 0.0
    normalize_bands: bool = True
    normalize_window: bool = False
    power: int = 1
    padding: str = "center"
    logarithm: str = "log10"
    floor: float = 1e-5
    add_floor: bool = False
    linear_weight: float = 0.0
    log_weight: float = 1.0
    log_distance: str = "l1"

    def __post_init__(self) -> None:
        num_scales = len(self.window_samples)
        if not num_scales or min(self.window_samples) < 4:
            raise ValueError(f"window_samples must name windows of 4 samples or more, got {self.window_samples}")
        if len(self.num_mels) != num_scales or min(self.num_mels) < 1:
            raise ValueError(f"num_mels must be a positive number for each of {num_scales} windows")
        for name in ("hop_samples", "fft_samples", "scale_weights"):
            if len(getattr(self, name)) not in (0, num_scales):
                raise ValueError(f"{name} must name {num_scales} values, or none; got {getattr(self, name)}")
        for window, hop, fft in self.sizes:
            if not 1 <= hop <= window <= fft:
                raise ValueError(f"a window of {window} samples cannot hop by {hop} with an FFT of {fft}")
        if self.floor <= 0.0:
            raise ValueError(f"floor must be positive, got {self.floor}")
        _check_choice("mel_scale", self.mel_scale, ("slaney", "htk"))
        _check_choice("power", self.power, (1, 2))
        _check_choice("padding", self.padding, ("center", "hop"))
        _check_choice("logarithm", self.logarithm, ("log10", "log"))
        _check_choice("log_distance", self.log_distance, ("l1", "l2"))

    @property
    def sizes(self) -> list[tuple[int, int, int]]:
        """Window, hop and FFT of each scale, in samples."""
        hops = self.hop_samples or tuple(size // 4 for size in self.window_samples)
        return list(zip(self.window_samples, hops, self.fft_samples or self.window_samples, strict=True))


# Source: DAC, `conf/final/*.yml` and `dac/nn/loss.py` of https://github.com/descriptinc/descript-audio-codec.
DAC_MEL = MelLossConfig()
# Source: HiFi-Codec, `train.py` and `config_*.json` of https://github.com/yangdongchao/AcademiCodec; it is HiFi-GAN's
# mel loss (Kong et al., 2020, section 2.4) and two more resolutions.
HIFICODEC_24K_MEL = MelLossConfig(
    window_samples=(1024, 512, 256),
    hop_samples=(240, 120, 60),
    num_mels=(80, 80, 80),
    scale_weights=(45.0, 1.0, 1.0),
    padding="hop",
    logarithm="log",
)
HIFICODEC_16K_MEL = replace(
    HIFICODEC_24K_MEL, window_samples=(800, 512, 256), hop_samples=(200, 120, 60), fft_samples=(1024, 512, 256)
)
# Source: EnCodec (Défossez et al., 2022), section 3.4, as trained by `config/solver/compression/default.yaml` of
# https://github.com/facebookresearch/audiocraft: ten distances, averaged.
ENCODEC_MEL = MelLossConfig(
    window_samples=(64, 128, 256, 512, 1024),
    num_mels=(64,) * 5,
    scale_weights=(0.1,) * 5,
    mel_scale="htk",
    min_frequency_hz=64.0,
    normalize_bands=False,
    normalize_window=True,
    power=2,
    padding="hop",
    add_floor=True,
    linear_weight=1.0,
    log_distance="l2",
)


@register("mel", MelLossConfig)
class MelLoss(Term):
    """Distances of mel spectrograms; see `MelLossConfig`."""

    def __init__(self, config: MelLossConfig, sample_rate_hz: int) -> None:
        super().__init__()
        self.config = config
        self.log_distance = _distance(config.log_distance)
        self.min_samples = 1 + max(self._padding(hop, fft) for _, hop, fft in config.sizes)
        for scale, (window, _, fft) in enumerate(config.sizes):
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Empty filters detected")
                filters = librosa.filters.mel(
                    sr=sample_rate_hz,
                    n_fft=fft,
                    n_mels=config.num_mels[scale],
                    fmin=config.min_frequency_hz,
                    htk=config.mel_scale == "htk",
                    norm="slaney" if config.normalize_bands else None,
                )
            taper = torch.hann_window(window)
            if config.normalize_window:
                taper = taper / taper.square().sum().sqrt()
            self.register_buffer(f"filters_{scale}", torch.from_numpy(filters).float(), persistent=False)
            self.register_buffer(f"window_{scale}", taper, persistent=False)

    def forward(self, estimate: Tensor, target: Tensor) -> dict[str, Tensor]:
        config, loss = self.config, estimate.new_zeros(())
        for scale in range(len(config.sizes)):
            with torch.no_grad():  # the target's half of the backward pass would be wasted
                wanted = self.mels(target, scale)
            ours = self.mels(estimate, scale)
            error = config.log_weight * self.log_distance(self._log(ours), self._log(wanted))
            if config.linear_weight:
                error = error + config.linear_weight * F.l1_loss(ours, wanted)
            loss = loss + (config.scale_weights[scale] if config.scale_weights else 1.0) * error
        return {"": loss}

    def mels(self, audio: Tensor, scale: int) -> Tensor:
        """Mel spectrogram [N, M, L] of [N, T] at one scale, before the logarithm."""
        window, hop, fft = self.config.sizes[scale]
        if audio.shape[1] < self.min_samples:
            raise ValueError(f"the mel loss needs {self.min_samples} samples or more, got {audio.shape[1]}")
        around = self._padding(hop, fft)
        audio = F.pad(audio[:, None], (around, around), "reflect")[:, 0]
        if self.config.padding == "hop":  # zeros fill the last window, so that no sample goes unheard
            audio = F.pad(audio, (0, (fft - audio.shape[1]) % hop))
        spectra_NFL = torch.stft(
            audio, fft, hop, window, self.get_buffer(f"window_{scale}"), center=False, return_complex=True
        )
        magnitude_NFL = spectra_NFL.abs()
        return self.get_buffer(f"filters_{scale}") @ (magnitude_NFL if self.config.power == 1 else magnitude_NFL**2)

    def _padding(self, hop: int, fft: int) -> int:
        return fft // 2 if self.config.padding == "center" else (fft - hop) // 2

    def _log(self, mels: Tensor) -> Tensor:
        mels = mels + self.config.floor if self.config.add_floor else mels.clamp_min(self.config.floor)
        return mels.log10() if self.config.logarithm == "log10" else mels.log()


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


@dataclass(frozen=True, kw_only=True)
class SpectralLossConfig(TermConfig):
    """See `SpectralLoss`."""

    window_samples: tuple[int, ...] = (2048, 512, 128)
    num_mels: tuple[int, ...] = (128, 64, 16)
    mel_floor: float = 1e-4


@register("spectral", SpectralLossConfig)
class SpectralTerm(Term):
    """`SpectralLoss` as a term of three parts."""

    parts = ("mel", "magnitude", "complex")

    def __init__(self, config: SpectralLossConfig, sample_rate_hz: int) -> None:
        super().__init__()
        self.loss = SpectralLoss(
            sample_rate_hz=sample_rate_hz,
            window_samples=config.window_samples,
            num_mels=config.num_mels,
            mel_floor=config.mel_floor,
        )

    def forward(self, estimate: Tensor, target: Tensor) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = self.loss(estimate, target)
        return losses


class ReconstructionLoss(nn.Module):
    """Named terms: `forward(estimate [B, C, T], target [B, C, T])` gives `{name: unweighted scalar}` for `names`.

    Built from `{name: {"type": "waveform" | "mel" | "spectral", ...}}`. A spectral term counts as three, which are
    called `<name>_mel`, `<name>_magnitude` and `<name>_complex`. Channels are compared one by one.

    >>> loss = ReconstructionLoss({"l1": {"type": "waveform"}}, sample_rate_hz=16000)
    >>> loss(torch.ones(2, 1, 100), torch.zeros(2, 1, 100))
    {'l1': tensor(1.)}
    """

    def __init__(self, terms: Mapping[str, Any], *, sample_rate_hz: int) -> None:
        super().__init__()
        self.terms = nn.ModuleDict()
        names: list[str] = []
        for name, values in terms.items():
            path = f"loss.terms.{name}"
            config = values if is_dataclass(values) else from_dict(values, path)
            if not isinstance(config, TermConfig):
                raise ValueError(f"{path}: {type(config).__name__} does not describe a reconstruction loss")
            term: Term = build(config, sample_rate_hz)
            self.terms[name] = term
            names += [_part_name(name, part) for part in term.parts]
        if len(set(names)) < len(names):
            raise ValueError(f"two terms of the loss have the same name: {', '.join(sorted(names))}")
        self.names = tuple(names)

    def forward(self, estimate: Tensor, target: Tensor) -> dict[str, Tensor]:
        if estimate.dim() != 3 or estimate.shape != target.shape:
            raise ValueError(f"expected two [B, C, T], got {tuple(estimate.shape)} and {tuple(target.shape)}")
        losses: dict[str, Tensor] = {}
        with torch.autocast(estimate.device.type, enabled=False):
            ours, wanted = estimate.float().flatten(0, 1), target.float().flatten(0, 1)
            for name, term in self.terms.items():
                losses |= {_part_name(name, part): value for part, value in term(ours, wanted).items()}
        return losses


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


# What discriminators make of it.
#
# `kind` is one of `GAN_KINDS`: "least_squares" (Mao et al., 2017; HiFi-GAN and DAC); "hinge" (Lim and Ye, 2017; EnCodec
# as audiocraft trains it); "clipped_hinge", in which scores beyond the margin gain the generator nothing either
# (SoundStream, section III-E; EnCodec, section 3.4). `reduction` adds up over sub-discriminators (HiFi-GAN, DAC) or
# takes their mean (EnCodec); in feature matching it goes over all of their layers.


def discriminator_loss(
    real: Sequence[Judgement], fake: Sequence[Judgement], kind: str, *, reduction: str = "sum"
) -> Tensor:
    """What discriminators minimise: `real` are judgements of recordings, `fake` of detached decoded audio."""
    _check_choice("kind", kind, GAN_KINDS)
    losses = []
    with _float32(real):
        for true, made in zip(real, fake, strict=True):
            if kind == "least_squares":
                losses.append((1 - true.score).square().mean() + made.score.square().mean())
            else:
                losses.append(F.relu(1 - true.score).mean() + F.relu(1 + made.score).mean())
        return _reduced(losses, reduction)


def adversarial_loss(fake: Sequence[Judgement], kind: str, *, reduction: str = "sum") -> Tensor:
    """What the generator minimises, so that decoded audio is taken for real."""
    _check_choice("kind", kind, GAN_KINDS)
    rules: dict[str, Callable[[Tensor], Tensor]] = {
        "least_squares": lambda score: (1 - score).square().mean(),
        "hinge": lambda score: -score.mean(),
        "clipped_hinge": lambda score: F.relu(1 - score).mean(),
    }
    with _float32(fake):
        return _reduced([rules[kind](made.score) for made in fake], reduction)


def feature_matching_loss(
    real: Sequence[Judgement], fake: Sequence[Judgement], *, relative: bool, reduction: str = "sum"
) -> Tensor:
    """L1 between what hidden layers make of recordings and of decoded audio; gradients flow into `fake` only.

    `relative`: each layer counts relative to the mean magnitude of its real features (EnCodec, section 3.4). Source:
    Kumar et al., "MelGAN" (2019), section 2.3. (HiFi-GAN's code counts the score as one more layer; DAC's does not.)
    """
    losses = []
    with _float32(real):
        for true, made in zip(real, fake, strict=True):
            for wanted, ours in zip(true.features, made.features, strict=True):
                wanted = wanted.detach().float()
                distance = F.l1_loss(ours.float(), wanted)
                losses.append(distance / wanted.abs().mean().clamp_min(1e-9) if relative else distance)
        return _reduced(losses, reduction)


def _reduced(losses: list[Tensor], reduction: str) -> Tensor:
    _check_choice("reduction", reduction, REDUCTIONS)
    stacked = torch.stack(losses)
    return stacked.sum() if reduction == "sum" else stacked.mean()


def _float32(judgements: Sequence[Judgement]) -> torch.autocast:
    return torch.autocast(judgements[0].score.device.type, enabled=False)


def _distance(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    return F.l1_loss if name == "l1" else F.mse_loss


def _part_name(term: str, part: str) -> str:
    return f"{term}_{part}" if part else term
