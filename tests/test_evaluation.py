import importlib.util
from math import isnan

import numpy as np
import pytest

from codec.evaluation import METRICS, available_metrics
from codec.evaluation import measure as measure_all
from codec.testing import speech_like

BUILT_IN = ("si_sdr_db", "mel_db", "log_spectral_db")


def noise(num_samples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(num_samples).astype(np.float32)


def measure(metric: str, reference: np.ndarray, estimate: np.ndarray, rate_hz: int = 16000) -> float:
    result = measure_all(reference, estimate, rate_hz, (metric,))
    assert list(result) == [metric]
    assert type(result[metric]) is float
    return result[metric]


@pytest.mark.parametrize("wanted_db", [-30, -3, 0, 10, 40])
def test_si_sdr_of_a_known_mixture(wanted_db: float) -> None:
    reference, other = noise(4000, 1).astype(np.float64), noise(4000, 2).astype(np.float64)
    reference -= reference.mean()
    other -= other.mean()
    other -= (other @ reference) / (reference @ reference) * reference
    gain = np.sqrt(reference @ reference / (other @ other)) * 10 ** (-wanted_db / 20)
    assert measure("si_sdr_db", reference, reference + gain * other) == pytest.approx(wanted_db, abs=1e-6)


@pytest.mark.parametrize("scale", [1e-5, 0.1, -1, 1000])
def test_si_sdr_does_not_depend_on_scale_or_offset(scale: float) -> None:
    reference = speech_like(8000)
    estimate = reference + 0.02 * noise(8000)
    expected = measure("si_sdr_db", reference, estimate)
    scaled = (scale * estimate.astype(np.float64) + 0.2 * scale).astype(np.float64)
    assert measure("si_sdr_db", reference, scaled) == pytest.approx(expected, abs=1e-6)


def test_si_sdr_of_a_perfect_copy_is_finite_and_high() -> None:
    reference = speech_like(8000)
    assert measure("si_sdr_db", reference, reference) == pytest.approx(120)
    assert measure("si_sdr_db", reference, 0.3 * reference) > 100


def test_log_spectral_distance() -> None:
    reference = speech_like(16000)
    assert measure("log_spectral_db", reference, reference) == 0
    # Half the amplitude is 6.02 dB everywhere, but less where the floor holds both up.
    assert 4 < measure("log_spectral_db", reference, reference / 2) <= 20 * np.log10(2) + 1e-9
    distances = [measure("log_spectral_db", reference, reference + gain * noise(16000)) for gain in (1e-3, 1e-2, 1e-1)]
    assert 0 < distances[0] < distances[1] < distances[2]


@pytest.mark.parametrize("rate_hz", [8000, 22050, 44100])
def test_log_spectral_distance_of_other_rates(rate_hz: int) -> None:
    reference = noise(rate_hz)
    assert measure("log_spectral_db", reference, reference, rate_hz) == 0
    assert measure("log_spectral_db", reference, 2 * reference, rate_hz) == pytest.approx(20 * np.log10(2), abs=0.05)


def test_stoi_falls_with_noise() -> None:
    pytest.importorskip("pystoi")
    reference = speech_like(32000)
    assert measure("stoi", reference, reference) == pytest.approx(1, abs=1e-6)
    scores = [measure("stoi", reference, reference + gain * noise(32000)) for gain in (0.003, 0.03, 0.3)]
    assert 1 > scores[0] > scores[1] > scores[2]


def test_pesq_falls_with_noise_and_takes_long_recordings() -> None:
    pytest.importorskip("pesq")
    time = np.arange(40 * 16000) / 16000
    # 100 bursts: the reference code keeps 50 and overwrites its memory where there are more.
    reference = 0.1 * noise(len(time), 1) * (time % 0.4 < 0.2)
    scores = [measure("pesq_wb", reference, reference + gain * noise(len(time), 2)) for gain in (0, 0.001, 0.1)]
    assert scores[0] > 4.5 > scores[1] > scores[2] > 1
    short = slice(0, 16000)
    assert measure("pesq_wb", reference[short], reference[short]) > 4.5


@pytest.mark.parametrize(
    ("shift_cents", "wanted"), [(0, 0), (100, 100), (-300, 300)], ids=["same", "a_semitone_up", "a_third_down"]
)
def test_f0_error_of_a_shifted_tone(shift_cents: int, wanted: int) -> None:
    pytest.importorskip("librosa")
    reference, shifted = buzz(150), buzz(150 * 2 ** (shift_cents / 1200))
    assert measure("f0_rmse_cents", reference, shifted) == pytest.approx(wanted, abs=15)  # its grid has 20 cents
    assert measure("voicing_error", reference, shifted) < 0.05


def test_voicing_error_counts_frames_voiced_in_one_only() -> None:
    pytest.importorskip("librosa")
    reference = buzz(150)
    half = reference.copy()
    half[8000:] = 0.05 * noise(8000)
    assert measure("voicing_error", reference, half) == pytest.approx(0.5, abs=0.1)
    assert isnan(measure("f0_rmse_cents", reference, 0.05 * noise(16000)))


def buzz(pitch_hz: float) -> np.ndarray:
    time = np.arange(16000) / 16000
    return 0.1 * sum(np.sin(2 * np.pi * k * pitch_hz * time) / k for k in range(1, 11)).astype(np.float32)


def test_mel_distance() -> None:
    reference = speech_like(16000)
    assert measure("mel_db", reference, reference) == 0
    assert 3 < measure("mel_db", noise(16000), noise(16000) / 2) <= 20 * np.log10(2) + 3
    assert measure("mel_db", noise(16000), 2 * noise(16000)) == pytest.approx(20 * np.log10(2), abs=1e-3)
    distances = [measure("mel_db", reference, reference + gain * noise(16000)) for gain in (1e-3, 1e-2, 1e-1)]
    assert 0 < distances[0] < distances[1] < distances[2]


def test_estoi_falls_with_noise_and_repeats_itself() -> None:
    pytest.importorskip("pystoi")
    reference = speech_like(32000)
    noisy = [reference + gain * noise(32000) for gain in (0.003, 0.03, 0.3, 0)]
    noisy[3][8000:] = 0  # pystoi adds noise of its own, which decides where there is silence
    scores = [measure("estoi", reference, signal) for signal in noisy]
    assert 1 > scores[0] > scores[1] > scores[2]
    np.random.seed(1)
    state = np.random.get_state()[1].tolist()
    assert [measure("estoi", reference, signal) for signal in noisy] == scores
    assert np.random.get_state()[1].tolist() == state


def test_narrow_band_pesq_does_not_hear_what_telephones_lose() -> None:
    pytest.importorskip("pesq")
    reference = speech_like(32000)
    spectrum = np.fft.rfft(reference)
    spectrum[len(spectrum) // 2 :] = 0
    without_highs = np.fft.irfft(spectrum, len(reference)).astype(np.float32)
    assert measure("pesq_nb", reference, without_highs) > 4.4
    noisy = reference + 0.03 * noise(32000)
    assert measure("pesq_nb", reference, noisy) < 4


@pytest.mark.parametrize("metric", available_metrics())
@pytest.mark.parametrize("rate_hz", [8000, 16000, 48000])
@pytest.mark.parametrize("num_samples", [0, 1, 2, 300, 20000])
def test_silence_has_no_metrics(metric: str, rate_hz: int, num_samples: int) -> None:
    silence = np.zeros(num_samples, np.float32)
    assert isnan(measure(metric, silence, silence, rate_hz))
    assert isnan(measure(metric, silence, noise(num_samples), rate_hz))


def test_a_silent_estimate_is_not_taken_for_a_good_one() -> None:
    reference, silence = speech_like(32000), np.zeros(32000, np.float32)
    values = measure_all(reference, silence, 16000, available_metrics())
    assert isnan(values["si_sdr_db"])
    assert values["log_spectral_db"] > 10
    assert values.get("stoi", 0) == pytest.approx(0, abs=0.01)
    assert isnan(values.get("pesq_wb", float("nan")))


@pytest.mark.parametrize("metric", available_metrics())
@pytest.mark.parametrize("rate_hz", [8000, 22050, 192000])
@pytest.mark.parametrize("num_samples", [1, 2, 100, 1500])
def test_recordings_that_are_too_short_raise_nothing(metric: str, rate_hz: int, num_samples: int) -> None:
    values = [measure(metric, 0.1 * noise(num_samples), noise(num_samples, 1), rate_hz)]
    values.append(measure(metric, np.ones(num_samples), np.sign(noise(num_samples)), rate_hz))
    assert metric in (*BUILT_IN, "voicing_error") or all(isnan(value) for value in values)


def test_unknown_metrics_are_an_error_that_lists_the_known_ones() -> None:
    reference = speech_like(100)
    with pytest.raises(ValueError, match=r"\['mos', 'si_sdr'\] are not available \(there are: "):
        measure_all(reference, reference, 16000, ("si_sdr", "si_sdr_db", "mos"))


@pytest.mark.parametrize(("shape", "other"), [((100,), (99,)), ((1, 100), (1, 100)), ((), ())])
def test_signals_of_other_shapes_are_an_error(shape: tuple[int, ...], other: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="two signals of one length"):
        measure_all(np.zeros(shape), np.zeros(other), 16000, BUILT_IN)


def test_metrics_of_extras_are_offered_where_they_are_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, metric in METRICS.items():
        assert (name in available_metrics()) == (not metric.package or bool(importlib.util.find_spec(metric.package)))
        assert bool(metric.package) == bool(metric.extra) == (name not in BUILT_IN)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert available_metrics() == BUILT_IN
    with pytest.raises(ValueError, match="stoi"):
        measure_all(speech_like(100), speech_like(100), 16000, ("stoi",))
