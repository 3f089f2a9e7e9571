"""Level, noise and rooms: measured on what comes out."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from codec.testing import speech_like
from recipes.augment import (
    Augmentation,
    AugmentConfig,
    add_noise,
    k_weighting_filters,
    loudness_lufs,
    reverberate,
)


def _power_db(audio: np.ndarray) -> float:
    return float(10 * np.log10(np.mean(np.square(audio, dtype=np.float64))))


def _augmentation(num_channels: int = 1, rate_hz: int = 16000, noise: Any = None, **config: Any) -> Augmentation:
    return Augmentation(AugmentConfig(**config), sample_rate_hz=rate_hz, num_channels=num_channels, noise=noise)


def _changed(augmentation: Augmentation, audio: np.ndarray, seed: int = 0) -> np.ndarray:
    """As `Crops` does it, with silence before the crop."""
    rng = np.random.default_rng(seed)
    response = augmentation.draw_room(rng)
    return augmentation(np.pad(audio, ((0, 0), (response.shape[1] - 1, 0))), response, rng)


def test_loudness_filters_are_those_of_the_recommendation() -> None:
    """ITU-R BS.1770-4, annex 1, tables 1 and 2, for 48 kHz."""
    (shelf, shelf_poles), (high_pass, high_pass_poles) = k_weighting_filters(48000)
    assert shelf == pytest.approx([1.53512485958697, -2.69169618940638, 1.19839281085285], abs=1e-12)
    assert shelf_poles == pytest.approx([1.0, -1.69065929318241, 0.73248077421585], abs=1e-12)
    assert high_pass == pytest.approx([1.0, -2.0, 1.0], abs=1e-12)
    assert high_pass_poles == pytest.approx([1.0, -1.99004745483398, 0.99007225036621], abs=1e-12)


def _sine(frequency_hz: float, peak: float, seconds: float, rate_hz: int) -> np.ndarray:
    return (peak * np.sin(2 * np.pi * frequency_hz * np.arange(round(seconds * rate_hz)) / rate_hz))[None]


@pytest.mark.parametrize("rate_hz", [16000, 24000, 44100, 48000])
def test_loudness_is_what_the_recommendation_says_of_known_signals(rate_hz: int) -> None:
    """BS.1770-4: a 0 dB sine of 997 Hz in one channel is at -3.01 LKFS. EBU Tech 3341, case 1, to 0.1 LU."""
    assert loudness_lufs(_sine(997, 1.0, 5, rate_hz), rate_hz) == pytest.approx(-3.01, abs=0.05)
    quiet = 10 ** (-23 / 20)
    both = np.repeat(_sine(1000, quiet, 5, rate_hz), 2, axis=0)
    assert loudness_lufs(both, rate_hz) == pytest.approx(-23.0, abs=0.1)


def test_loudness_leaves_out_what_is_much_quieter_than_the_rest() -> None:
    """EBU Tech 3341, case 3: to 0.1 LU."""
    parts = [(10, -36.0), (60, -23.0), (10, -36.0)]
    changing = np.concatenate([_sine(1000, 10 ** (db / 20), seconds, 16000) for seconds, db in parts], axis=1)
    assert loudness_lufs(np.repeat(changing, 2, axis=0), 16000) == pytest.approx(-23.0, abs=0.1)


def test_loudness_of_silence_and_of_less_than_a_block() -> None:
    assert loudness_lufs(np.zeros((1, 16000)), 16000) == float("-inf")
    short = _sine(997, 1.0, 0.38, 16000)  # DAC's crops
    assert loudness_lufs(short, 16000) == pytest.approx(-3.01, abs=0.1)
    assert np.isfinite(loudness_lufs(short[:, :1] + 0.5, 16000))


def test_crops_come_to_a_loudness_unless_they_are_silent_or_would_clip() -> None:
    audio = 0.1 * speech_like(16000)[None]
    assert loudness_lufs(_changed(_augmentation(loudness_lufs=-30.0), audio), 16000) == pytest.approx(-30.0, abs=0.01)
    louder = _changed(_augmentation(loudness_lufs=-30.0, gain_db=(6.0, 6.0)), audio)
    assert loudness_lufs(louder, 16000) == pytest.approx(-24.0, abs=0.01)
    silence = np.zeros((1, 16000), np.float32)
    assert not _changed(_augmentation(loudness_lufs=-16.0), silence).any()
    hum = (silence + 1e-5 * np.sin(np.arange(16000) / 3)).astype(np.float32)  # below the gate
    assert np.array_equal(_changed(_augmentation(loudness_lufs=-16.0), hum), hum)
    loud = _changed(_augmentation(loudness_lufs=-0.5), audio)
    assert np.abs(loud).max() == pytest.approx(1.0)
    assert np.corrcoef(loud[0], audio[0])[0, 1] == pytest.approx(1.0)  # held back, not clipped


@given(st.integers(0, 30))
def test_gain_is_drawn_from_its_range(seed: int) -> None:
    audio = 0.1 * speech_like(2000)[None]
    gain_db = _power_db(_changed(_augmentation(gain_db=(-9.0, 3.0)), audio, seed)) - _power_db(audio)
    assert -9.0001 <= gain_db <= 3.0001
    if seed == 0:
        gains = [_changed(_augmentation(gain_db=(-9.0, 3.0)), audio, s).max() for s in range(20)]
        assert len(set(gains)) == 20


@given(st.floats(-10, 40), st.integers(1, 2))
def test_noise_has_its_ratio(snr_db: float, num_channels: int) -> None:
    rng = np.random.default_rng(0)
    audio = np.stack([speech_like(4000, seed=c) for c in range(num_channels)])
    noise = rng.standard_normal(audio.shape).astype(np.float32)
    mixed = add_noise(audio, noise, snr_db)
    assert mixed.dtype == np.float32
    assert _power_db(audio) - _power_db(mixed - audio) == pytest.approx(snr_db, abs=0.02)  # rounding of the sum
    assert np.array_equal(add_noise(audio, 0 * noise, snr_db), audio)
    assert not add_noise(0 * audio, noise, snr_db).any()


def test_the_share_of_crops_with_noise_and_with_rooms() -> None:
    audio = speech_like(500)[None]

    def share(**config: Any) -> float:
        augmentation = _augmentation(noise=lambda rng, n: rng.standard_normal((1, n)).astype(np.float32), **config)
        return float(np.mean([not np.array_equal(_changed(augmentation, audio, s), audio) for s in range(400)]))

    # 400 draws: a standard deviation of 0.023
    assert share(noise_probability=0.3) == pytest.approx(0.3, abs=0.07)
    assert share(reverb_probability=0.3) == pytest.approx(0.3, abs=0.07)
    assert share() == 0.0
    with pytest.raises(ValueError, match="there is no source of noise"):
        _augmentation(noise_probability=0.3)


def test_reverberation_is_a_convolution_that_knows_what_came_before() -> None:
    rng = np.random.default_rng(0)
    whole = rng.standard_normal((2, 900)).astype(np.float32)
    response = rng.standard_normal((2, 301)).astype(np.float32)
    wet = reverberate(whole, response)
    expected = np.stack([np.convolve(a, h)[300:900] for a, h in zip(whole, response, strict=True)])
    expected *= np.sqrt(np.square(whole[:, 300:]).mean() / np.square(expected).mean())
    assert wet.shape == (2, 600)
    assert wet.dtype == np.float32
    assert np.abs(wet - expected).max() < 1e-5
    assert _power_db(wet) == pytest.approx(_power_db(whole[:, 300:]), abs=0.001)
    assert not reverberate(0 * whole, response).any()
    assert np.array_equal(reverberate(whole, np.ones((2, 1), np.float32)), whole)


@pytest.mark.parametrize("rate_hz", [16000, 48000])
def test_artificial_rooms_decay_as_they_should(rate_hz: int) -> None:
    augmentation = _augmentation(
        2, rate_hz, reverb_probability=1.0, reverb_decay_ms=(400.0, 400.0), reverb_direct_db=(6.0, 6.0)
    )
    responses = np.stack([augmentation.draw_room(np.random.default_rng(seed)) for seed in range(100)])
    assert responses.shape == (100, 2, round(0.4 * rate_hz))
    assert (responses[:, :, 0] == 1.0).all()
    tails = np.square(responses[:, :, 1:], dtype=np.float64).sum(axis=2)
    assert 10 * np.log10(1.0 / tails) == pytest.approx(6.0, abs=1e-4)
    power = np.square(responses, dtype=np.float64).mean(axis=(0, 1))
    early, late = power[1 : rate_hz // 50].mean(), power[round(0.2 * rate_hz) :][: rate_hz // 50].mean()
    assert 10 * np.log10(early / late) == pytest.approx(30.0, abs=1.0)  # half of 60 dB in half of the time
    assert not np.allclose(responses[0, 0], responses[0, 1])  # both ears hear a room of their own
    drawn = {augmentation.draw_room(np.random.default_rng(seed)).tobytes() for seed in (1, 1, 2)}
    assert len(drawn) == 2


def test_everything_at_once_follows_from_the_draws_and_never_clips() -> None:
    augmentation = _augmentation(
        noise=lambda rng, n: rng.standard_normal((1, n)).astype(np.float32),
        loudness_lufs=-10.0,
        gain_db=(-6.0, 6.0),
        noise_probability=0.5,
        reverb_probability=0.5,
    )
    audio = speech_like(3000)[None]
    for seed in range(20):
        heard = _changed(augmentation, audio, seed)
        assert heard.shape == (1, 3000)
        assert heard.dtype == np.float32
        assert np.abs(heard).max() <= 1.0 + 1e-6
        assert np.array_equal(heard, _changed(augmentation, audio, seed))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"noise_snr_db": (3.0, 1.0)}, "noise_snr_db must be"),
        ({"reverb_direct_db": (float("nan"), 1.0)}, "reverb_direct_db must be"),
        ({"noise_probability": -0.1}, "noise_probability must lie in"),
        ({"reverb_decay_ms": (-1.0, 10.0)}, "reverb_decay_ms must be positive"),
        ({"loudness_lufs": -70.0}, "loudness_lufs must lie in"),
    ],
)
def test_ranges_that_cannot_be_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AugmentConfig(**values)
