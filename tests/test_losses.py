"""Losses by hand, by other libraries, and by what they must do: signs, silence, precision, names."""

import doctest
import math
from typing import Any

import librosa
import numpy as np
import pytest
import torch
import torchaudio
from torch import Tensor

import recipes.losses
from codec.config import from_dict, to_dict
from codec.testing import speech_like
from recipes.discriminators import Judgement
from recipes.losses import (
    DAC_MEL,
    ENCODEC_MEL,
    GAN_KINDS,
    HIFICODEC_16K_MEL,
    HIFICODEC_24K_MEL,
    MelLoss,
    MelLossConfig,
    ReconstructionLoss,
    SpectralLoss,
    adversarial_loss,
    discriminator_loss,
    feature_matching_loss,
)

PUBLISHED_MELS = {
    "dac": DAC_MEL,
    "hificodec_16k": HIFICODEC_16K_MEL,
    "hificodec_24k": HIFICODEC_24K_MEL,
    "encodec": ENCODEC_MEL,
}


def _judgement(score: list[float], *features: list[float]) -> Judgement:
    return Judgement(torch.tensor(score), [torch.tensor(values) for values in features])


def _pair(num_samples: int = 4800) -> tuple[Tensor, Tensor]:
    target = torch.from_numpy(speech_like(num_samples))[None]
    noise = torch.from_numpy(np.random.default_rng(0).standard_normal((1, num_samples)).astype(np.float32))
    return target + 0.02 * noise, target


def test_examples_in_docstrings_run() -> None:
    assert doctest.testmod(recipes.losses).attempted > 0
    assert doctest.testmod(recipes.losses).failed == 0


# Adversarial losses by hand

REAL = [_judgement([0.5, 2.0], [1.0, -3.0], [2.0]), _judgement([-1.0], [0.0])]
FAKE = [_judgement([0.0, -2.0], [2.0, -1.0], [2.5]), _judgement([0.5], [1.0])]


@pytest.mark.parametrize(
    ("kind", "of_discriminators", "of_generator"),
    [
        # Real: (0.5 + 0) / 2, 2; fake: (1 + 0) / 2, 1.5. Generator: -mean of each.
        ("hinge", (0.25 + 0.5, 2.0 + 1.5), (1.0, -0.5)),
        ("clipped_hinge", (0.25 + 0.5, 2.0 + 1.5), ((1.0 + 3.0) / 2, 0.5)),
        # Real: (0.25 + 1) / 2, 4; fake: (0 + 4) / 2, 0.25. Generator: (1 + 9) / 2, 0.25.
        ("least_squares", (0.625 + 2.0, 4.0 + 0.25), (5.0, 0.25)),
    ],
)
def test_adversarial_losses_by_hand(
    kind: str, of_discriminators: tuple[float, float], of_generator: tuple[float, float]
) -> None:
    assert float(discriminator_loss(REAL, FAKE, kind)) == pytest.approx(sum(of_discriminators))
    assert float(discriminator_loss(REAL, FAKE, kind, reduction="mean")) == pytest.approx(sum(of_discriminators) / 2)
    assert float(adversarial_loss(FAKE, kind)) == pytest.approx(sum(of_generator))
    assert float(adversarial_loss(FAKE, kind, reduction="mean")) == pytest.approx(sum(of_generator) / 2)


def test_feature_matching_by_hand() -> None:
    # L1 per layer: 1.5, 0.5, 1. Mean magnitude of the real layers: 2, 2, 0.
    assert float(feature_matching_loss(REAL, FAKE, relative=False)) == pytest.approx(3.0)
    assert float(feature_matching_loss(REAL, FAKE, relative=False, reduction="mean")) == pytest.approx(1.0)
    one, other = REAL[:1], FAKE[:1]
    assert float(feature_matching_loss(one, other, relative=True)) == pytest.approx(0.75 + 0.25)
    assert float(feature_matching_loss(one, other, relative=True, reduction="mean")) == pytest.approx(0.5)
    assert math.isfinite(float(feature_matching_loss(REAL, FAKE, relative=True)))  # a layer that is all zeros


def test_features_are_matched_by_the_generator_only() -> None:
    real, fake = torch.ones(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    score = torch.zeros(1)
    feature_matching_loss([Judgement(score, [real])], [Judgement(score, [fake])], relative=True).backward()
    assert real.grad is None
    assert fake.grad is not None
    assert (fake.grad < 0).all()  # down the gradient is up, to the real ones


@pytest.mark.parametrize("kind", GAN_KINDS)
def test_signs(kind: str) -> None:
    """Discriminators gain by scoring real audio higher and decoded audio lower, the generator by a higher score."""
    real, fake = torch.zeros(4, requires_grad=True), torch.zeros(4, requires_grad=True)
    slope_real, slope_fake = torch.autograd.grad(
        discriminator_loss([Judgement(real, [])], [Judgement(fake, [])], kind), [real, fake]
    )
    assert (slope_real < 0).all()
    # Least squares wants 0 for decoded audio, which it has here.
    assert (slope_fake == 0).all() if kind == "least_squares" else (slope_fake > 0).all()
    (slope,) = torch.autograd.grad(adversarial_loss([Judgement(fake, [])], kind), [fake])
    assert (slope < 0).all()
    beyond = torch.full((4,), 3.0, requires_grad=True)
    (slope,) = torch.autograd.grad(adversarial_loss([Judgement(beyond, [])], kind), [beyond])
    assert float(slope.sign().mean()) == {"hinge": -1.0, "clipped_hinge": 0.0, "least_squares": 1.0}[kind]


def test_judgements_count_in_float32() -> None:
    real, fake = torch.full((4096,), 0.1), torch.full((4096,), 0.1 + 1e-4)
    one, other = [Judgement(real, [real.bfloat16()])], [Judgement(fake, [fake])]
    with torch.autocast("cpu", torch.bfloat16):
        losses = [
            discriminator_loss(one, other, "hinge"),
            adversarial_loss(other, "least_squares"),
            feature_matching_loss([Judgement(real, [real])], other, relative=True),
        ]
        assert feature_matching_loss(one, one, relative=True).dtype == torch.float32
    assert all(loss.dtype == torch.float32 for loss in losses)
    assert float(losses[2]) == pytest.approx(1e-3, rel=1e-3)  # bfloat16 knows nothing between 0.1 and 0.1001
    assert float(losses[1]) == pytest.approx((1 - 0.1001) ** 2, rel=1e-6)


def test_unknown_kinds_are_named() -> None:
    with pytest.raises(ValueError, match="kind='wasserstein' is not one of 'hinge', 'clipped_hinge', 'least_squares'"):
        discriminator_loss(REAL, FAKE, "wasserstein")
    with pytest.raises(ValueError, match="kind="):
        adversarial_loss(FAKE, "")
    with pytest.raises(ValueError, match="reduction='max' is not one of 'sum', 'mean'"):
        feature_matching_loss(REAL, FAKE, relative=False, reduction="max")


# Mel losses, against other libraries


def _dac_by_librosa(estimate: np.ndarray, target: np.ndarray, rate_hz: int) -> float:
    loss = 0.0
    for window, bands in zip((32, 64, 128, 256, 512, 1024, 2048), (5, 10, 20, 40, 80, 160, 320), strict=True):
        logs = [
            np.log10(
                np.maximum(
                    librosa.feature.melspectrogram(
                        y=signal, sr=rate_hz, n_fft=window, hop_length=window // 4, n_mels=bands, power=1.0,
                        pad_mode="reflect",
                    ),
                    1e-5,
                )
            )
            for signal in (estimate, target)
        ]  # fmt: skip
        loss += float(np.abs(logs[0] - logs[1]).mean())
    return loss


@pytest.mark.filterwarnings("ignore:Empty filters detected")
def test_the_mel_loss_of_dac_is_what_librosa_gives() -> None:
    estimate, target = _pair()
    ours = MelLoss(DAC_MEL, 16000)(estimate, target)[""]
    expected = _dac_by_librosa(estimate[0].double().numpy(), target[0].double().numpy(), 16000)
    assert float(ours) == pytest.approx(expected, rel=1e-4)  # float32 against float64, near the floor of the logarithm


def _hifigan_by_hand(audio: np.ndarray, rate_hz: int, window: int, hop: int, fft: int) -> np.ndarray:
    """Log-mel of HiFi-GAN: reflected by (fft - hop) / 2, frames that lie inside, the window centered in its FFT."""
    around = (fft - hop) // 2
    padded = np.pad(audio, around, mode="reflect")
    taper = np.zeros(fft)
    taper[(fft - window) // 2 : (fft - window) // 2 + window] = np.hanning(window + 1)[:-1]
    frames = np.lib.stride_tricks.sliding_window_view(padded, fft)[::hop] * taper
    magnitude = np.sqrt(np.abs(np.fft.rfft(frames)) ** 2 + 1e-9)
    mels = magnitude @ librosa.filters.mel(sr=rate_hz, n_fft=fft, n_mels=80).T
    return np.log(np.maximum(mels, 1e-5))


@pytest.mark.filterwarnings("ignore:Empty filters detected")
@pytest.mark.parametrize(
    ("config", "rate_hz", "sizes"),
    [
        (HIFICODEC_16K_MEL, 16000, [(800, 200, 1024), (512, 120, 512), (256, 60, 256)]),
        (HIFICODEC_24K_MEL, 24000, [(1024, 240, 1024), (512, 120, 512), (256, 60, 256)]),
    ],
)
def test_the_mel_loss_of_hificodec_by_hand(config: MelLossConfig, rate_hz: int, sizes: list[Any]) -> None:
    estimate, target = _pair(4800)  # whole hops of every size; else ours has one more window, filled with zeros
    expected = 0.0
    for weight, size in zip((45.0, 1.0, 1.0), sizes, strict=True):
        one, other = (_hifigan_by_hand(x[0].double().numpy(), rate_hz, *size) for x in (estimate, target))
        expected += weight * float(np.abs(one - other).mean())
    # They add 1e-9 to the power before the root, which tells for the quietest bands only.
    assert float(MelLoss(config, rate_hz)(estimate, target)[""]) == pytest.approx(expected, rel=2e-3)


@pytest.mark.filterwarnings("ignore:At least one mel filterbank has all zero values")
def test_the_mel_loss_of_encodec_is_what_torchaudio_gives() -> None:
    estimate, target = _pair(4096)
    expected = 0.0
    for size in (64, 128, 256, 512, 1024):
        spectrum = torchaudio.transforms.MelSpectrogram(
            16000, size, size, size // 4, f_min=64.0, n_mels=64, normalized=True, center=False
        )
        around = (size - size // 4) // 2
        one, other = (
            spectrum(torch.nn.functional.pad(signal, (around, around), "reflect")) for signal in (estimate, target)
        )
        expected += float((one - other).abs().mean())
        expected += float(((one + 1e-5).log10() - (other + 1e-5).log10()).square().mean())
    assert float(MelLoss(ENCODEC_MEL, 16000)(estimate, target)[""]) == pytest.approx(expected / 10, rel=1e-4)


@pytest.mark.parametrize("config", PUBLISHED_MELS.values(), ids=PUBLISHED_MELS)
def test_mel_losses_can_be_written_down_and_behave(config: MelLossConfig) -> None:
    assert from_dict(to_dict(config)) == config
    loss = MelLoss(config, 24000)
    for num_samples in (loss.min_samples, 1500):
        estimate, target = _pair(num_samples)
        assert float(loss(target, target)[""]) == 0.0
        assert float(loss(estimate, target)[""]) > 0.1
    for wrong, right in ((torch.zeros(1, 1500), target), (estimate, torch.zeros(1, 1500))):
        wrong = wrong.clone().requires_grad_()
        loss(wrong, right)[""].backward()
        assert wrong.grad is not None
        assert torch.isfinite(wrong.grad).all()
    assert wrong.grad.abs().sum() > 0
    with pytest.raises(ValueError, match=f"needs {loss.min_samples} samples or more"):
        loss(*_pair(loss.min_samples - 1))


@pytest.mark.parametrize("config", [HIFICODEC_24K_MEL, ENCODEC_MEL], ids=["hificodec", "encodec"])
def test_there_is_a_column_for_every_hop_that_was_begun(config: MelLossConfig) -> None:
    loss = MelLoss(config, 24000)
    for num_samples in (1199, 1200, 1201):
        for scale, (_, hop, _) in enumerate(config.sizes):
            mels = loss.mels(_pair(num_samples)[1], scale)
            assert mels.shape == (1, config.num_mels[scale], -(-num_samples // hop))


# Named terms

TERMS: dict[str, Any] = {
    "waveform": {"type": "waveform"},
    "energy": {"type": "waveform", "distance": "l2"},
    "mel": {"type": "mel", "window_samples": [64, 256], "num_mels": [8, 16]},
    "spectral": {"type": "spectral", "window_samples": [256, 64], "num_mels": [16, 8]},
}


def test_terms_have_names_and_fold_channels() -> None:
    loss = ReconstructionLoss(TERMS, sample_rate_hz=16000)
    assert loss.names == ("waveform", "energy", "mel", "spectral_mel", "spectral_magnitude", "spectral_complex")
    target = torch.stack([torch.from_numpy(speech_like(600, seed=seed)) for seed in range(4)]).view(2, 2, 600)
    estimate = target + 0.1
    losses = loss(estimate, target)
    assert tuple(losses) == loss.names
    assert float(losses["waveform"]) == pytest.approx(0.1, rel=1e-5)
    assert float(losses["energy"]) == pytest.approx(0.01, rel=1e-5)
    folded = loss(estimate.view(4, 1, 600), target.view(4, 1, 600))
    assert all(torch.equal(losses[name], folded[name]) for name in loss.names)
    plain = SpectralLoss(sample_rate_hz=16000, window_samples=(256, 64), num_mels=(16, 8))
    for name, value in plain(estimate.flatten(0, 1), target.flatten(0, 1)).items():
        assert torch.equal(losses[f"spectral_{name}"], value)


def test_autocast_changes_nothing() -> None:
    loss = ReconstructionLoss(TERMS | {"dac": DAC_MEL, "encodec": ENCODEC_MEL}, sample_rate_hz=16000)
    estimate, target = (signal[:, None] for signal in _pair(1600))
    plain = loss(estimate, target)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = loss(estimate, target)
    assert all(torch.equal(plain[name], mixed[name]) for name in loss.names)
    assert loss(estimate.bfloat16(), target)["dac"].dtype == torch.float32


def test_a_step_down_the_gradient_is_an_improvement() -> None:
    loss = ReconstructionLoss(TERMS | {"dac": DAC_MEL, "encodec": ENCODEC_MEL}, sample_rate_hz=16000)
    estimate, target = (signal[:, None] for signal in _pair(1600))
    for name in loss.names:
        moved = estimate.clone().requires_grad_()
        before = loss(moved, target)[name]
        before.backward()
        assert moved.grad is not None
        step = 1e-3 * moved.grad / moved.grad.norm()
        assert float(loss((moved - step).detach(), target)[name]) < float(before.detach()), name


@pytest.mark.parametrize(
    ("term", "message"),
    [
        ({"type": "waveform", "distance": "l3"}, r"loss.terms.x: distance='l3' is not one of 'l1', 'l2'"),
        ({"type": "mel", "colour": 1}, r"loss.terms.x.colour: mel has no such setting"),
        ({"type": "mel", "window_samples": [64]}, "num_mels must be a positive number for each of 1 windows"),
        ({"type": "mel", "hop_samples": [64]}, "hop_samples must name 7 values, or none"),
        (
            {"type": "mel", "window_samples": [64], "num_mels": [8], "hop_samples": [65]},
            "a window of 64 samples cannot hop by 65",
        ),
        ({"type": "mel", "window_samples": [2], "num_mels": [8]}, "windows of 4 samples or more"),
        ({"type": "mel", "power": 3}, "power=3 is not one of 1, 2"),
        ({"type": "mel", "floor": 0.0}, "floor must be positive"),
        ({"type": "mel", "logarithm": "ln"}, "logarithm='ln' is not one of 'log10', 'log'"),
        ({"type": "spectral", "num_mels": [1]}, "3 window lengths need as many num_mels"),
        ({"type": "loudness"}, r"loss.terms.x.type: 'loudness' is unknown"),
        ({"type": "multi_period"}, "MultiPeriodConfig does not describe a reconstruction loss"),
    ],
)
def test_mistakes_are_named(term: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReconstructionLoss({"x": term}, sample_rate_hz=16000)


def test_names_and_shapes_must_fit() -> None:
    with pytest.raises(ValueError, match="two terms of the loss have the same name"):
        ReconstructionLoss(TERMS | {"spectral_mel": {"type": "waveform"}}, sample_rate_hz=16000)
    loss = ReconstructionLoss(TERMS, sample_rate_hz=16000)
    with pytest.raises(ValueError, match=r"expected two \[B, C, T\], got \(1, 1, 600\) and \(1, 1, 599\)"):
        loss(torch.zeros(1, 1, 600), torch.zeros(1, 1, 599))
