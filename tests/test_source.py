"""Pulses and noise: their pitch, power, shape and bits; and the pitch that is tracked."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from codec.layers.causal import map_state
from codec.layers.pitch import track_pitch
from codec.layers.source import HIGHEST_HZ, LOWEST_HZ, HarmonicNoise, _noise

BANDS = 20


def _source() -> HarmonicNoise:
    return HarmonicNoise(sample_rate_hz=16000, row_samples=64, num_bands=BANDS)


def _heard(pitch_hz: float, *, pulses: float = 0.0, noise: float = 0.0, num_rows: int = 250) -> Tensor:
    gains = torch.tensor([pulses] * BANDS + [noise] * BANDS).clamp_min(1e-9).log().expand(1, num_rows, -1)
    source = _source()
    samples, _ = source.step(torch.full((1, num_rows), pitch_hz), gains, source.init_state(1))
    return samples.flatten(1)


@pytest.mark.parametrize("pitch_hz", [60.0, 97.3, 200.0, 430.0])
def test_pulses_have_their_pitch_and_unit_power(pitch_hz: float) -> None:
    heard = _heard(pitch_hz, pulses=1.0)[:, 400:]
    assert heard.square().mean().item() == pytest.approx(1.0, abs=0.08)
    spectrum = np.abs(np.fft.rfft(heard[0].numpy() * np.hanning(heard.shape[1]))) ** 2
    frequencies = np.fft.rfftfreq(heard.shape[1], 1 / 16000)
    near = np.abs(frequencies - pitch_hz * np.rint(frequencies / pitch_hz)) < 4.0
    assert spectrum[near].sum() > 0.98 * spectrum.sum()
    found, is_voiced = track_pitch(heard, sample_rate_hz=16000, hop_samples=160)
    assert is_voiced[0, 5:-5].all()
    torch.testing.assert_close(found[0, 5:-5], torch.full_like(found[0, 5:-5], pitch_hz), rtol=0.01, atol=0)


def test_noise_has_unit_power_and_no_pitch() -> None:
    heard = _heard(100.0, noise=1.0)[:, 400:]
    assert heard.square().mean().item() == pytest.approx(1.0, abs=0.1)
    halves = heard[0, : heard.shape[1] // 2], heard[0, heard.shape[1] // 2 :][: heard.shape[1] // 2]
    assert abs(float((halves[0] * halves[1]).mean())) < 0.1
    _, is_voiced = track_pitch(heard, sample_rate_hz=16000, hop_samples=160)
    assert is_voiced.float().mean() < 0.1


def test_noise_is_a_function_of_the_number_and_evenly_spread() -> None:
    numbers = torch.arange(100_000)
    values = _noise(numbers)
    assert torch.equal(_noise(numbers[5000:]), values[5000:])
    assert values.abs().max() <= math.sqrt(3.0)
    assert values.mean().abs() < 0.02
    assert values.std().item() == pytest.approx(1.0, abs=0.01)
    assert (values[1:] * values[:-1]).mean().abs() < 0.02
    assert torch.isfinite(_noise(torch.tensor([0, 2**31, 2**40, 2**62]))).all()


def test_each_band_has_its_gain() -> None:
    gains = torch.full((1, 300, 2 * BANDS), -20.0)
    gains[:, :, BANDS + 12] = 0.0  # noise in one band
    source = _source()
    heard = source.step(torch.full((1, 300), 100.0), gains, source.init_state(1))[0].flatten()
    spectrum = np.abs(np.fft.rfft(heard.numpy())) ** 2
    frequencies = np.fft.rfftfreq(len(heard), 1 / 16000)
    weights = source.bands[:, 12]
    inside = np.interp(frequencies, np.arange(129) * 62.5, weights.numpy()) > 0.0
    assert spectrum[inside].sum() > 0.9 * spectrum.sum()


@given(cuts=st.lists(st.integers(0, 9), min_size=1, max_size=8), batch_size=st.integers(1, 3))
@settings(max_examples=25)
def test_steps_give_the_bits_of_the_whole(num_threads: int, cuts: list[int], batch_size: int) -> None:
    draws = torch.Generator().manual_seed(sum(cuts))
    source, num_rows = _source(), sum(cuts)
    pitch_hz = 60.0 + 300.0 * torch.rand(batch_size, num_rows, generator=draws)
    gains = torch.randn(batch_size, num_rows, 2 * BANDS, generator=draws)
    with torch.inference_mode():
        whole, last = source.step(pitch_hz, gains, source.init_state(batch_size))
        state, parts = source.init_state(batch_size), []
        for pitch_part, gain_part in zip(pitch_hz.split(cuts, dim=1), gains.split(cuts, dim=1), strict=True):
            part, state = source.step(pitch_part, gain_part, state)
            parts.append(part)
        assert torch.equal(torch.cat(parts, dim=1), whole)
        map_state(torch.testing.assert_close, state, last)
        alone, _ = source.step(pitch_hz[-1:], gains[-1:], source.init_state(1))
        assert torch.equal(alone, whole[-1:])


def test_the_phase_goes_on_where_the_pitch_changes() -> None:
    source = _source()
    pitch_hz = torch.cat([torch.full((1, 100), 120.0), torch.full((1, 100), 180.0)], dim=1)
    gains = torch.full((1, 200, 2 * BANDS), -20.0)
    gains[:, :, :3] = 0.0  # low harmonics alone: smooth, so that a jump would stand out
    heard = source.step(pitch_hz, gains, source.init_state(1))[0].flatten()[1000:]
    steps = heard.diff().abs()
    assert steps[5000:6000].max() < 1.6 * steps[500:4000].max()


def test_the_gradient_reaches_the_gains_alone() -> None:
    source = _source()
    pitch_hz = torch.full((1, 8), 100.0, requires_grad=True)
    gains = torch.zeros(1, 8, 2 * BANDS, requires_grad=True)
    heard, _ = source.step(pitch_hz, gains, source.init_state(1))
    gradient = torch.autograd.grad(heard.square().sum(), (gains, pitch_hz), allow_unused=True)
    assert gradient[0][0, :5].abs().sum() > 0
    assert gradient[1] is None


def test_pitch_beyond_what_voices_have_is_bounded_and_no_rows_are_no_samples() -> None:
    for pitch_hz, expected in ((5.0, LOWEST_HZ), (4000.0, HIGHEST_HZ)):
        assert torch.equal(_heard(pitch_hz, pulses=1.0), _heard(expected, pulses=1.0))
    source = _source()
    state = source.init_state(2)
    empty, after = source.step(torch.zeros(2, 0), torch.zeros(2, 0, 2 * BANDS), state)
    assert empty.shape == (2, 0, 64)
    assert after is state


def test_a_glide_is_tracked_and_its_frames_lie_where_they_say() -> None:
    time = torch.arange(32000) / 16000
    pitch_hz = 100.0 + 60.0 * time
    phase = 2 * math.pi * (pitch_hz / 16000).cumsum(0)
    audio = sum(torch.sin(k * phase) / k for k in range(1, 15))
    assert isinstance(audio, Tensor)
    audio[20000:24000] = 0.0
    for first_center in (0, -96, 500):
        found, is_voiced = track_pitch(audio[None], sample_rate_hz=16000, hop_samples=64, first_center=first_center)
        assert found.shape == (1, 500)
        centers = first_center + 64 * torch.arange(500)
        sounding = (centers > 1000) & (centers < 31000) & ((centers < 19000) | (centers > 25000))
        assert is_voiced[0, sounding].all()
        wanted = 100.0 + 60.0 * centers[sounding] / 16000
        torch.testing.assert_close(found[0, sounding], wanted, rtol=0.01, atol=0)
        silent = (centers > 20500) & (centers < 23500)
        assert not is_voiced[0, silent].any()
        assert (found[0, silent] == LOWEST_HZ).all()


def test_what_is_shorter_than_a_frame_is_tracked_without_complaint() -> None:
    found, is_voiced = track_pitch(torch.zeros(2, 10), sample_rate_hz=16000, hop_samples=64)
    assert found.shape == is_voiced.shape == (2, 1)
    assert not is_voiced.any()
