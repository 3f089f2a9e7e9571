"""Metrics of a decoded recording against the original. Audio is float [T], both of one length, rate and time."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

_FLOOR = 1e-9
_PESQ_MAX_SECONDS = 16
_F0_RATE_HZ = 16000
_F0_MAX_SECONDS = 30
_F0_FRAME_SAMPLES = 1024
_NAN = float("nan")


@dataclass(frozen=True)
class Metric:
    """A number that is measured, and what has to be said of it."""

    name: str
    label: str
    unit: str
    better: str  # "higher", "lower"; "" where neither is meant
    about: str
    package: str = ""  # that it needs, and the extra which installs that
    extra: str = ""

    @property
    def is_available(self) -> bool:
        """Whether the package it needs is installed."""
        return not self.package or importlib.util.find_spec(self.package) is not None

    @property
    def title(self) -> str:
        """The label with its unit."""
        return f"{self.label}, {self.unit}" if self.unit else self.label


METRICS = {
    metric.name: metric
    for metric in (
        Metric(
            *("pesq_wb", "PESQ-WB", "", "higher"),
            "Wide-band PESQ (ITU-T P.862.2) at 16 kHz as the package pesq computes it, 1 to 4.64: the mean over equal "
            "pieces of at most 16 s, since P.862 is meant for 8 to 20 s.",
            *("pesq", "pesq"),
        ),
        Metric(
            *("pesq_nb", "PESQ-NB", "", "higher"),
            "Narrow-band PESQ (ITU-T P.862 with P.862.1) at 8 kHz, in the same pieces.",
            *("pesq", "pesq"),
        ),
        Metric(
            *("stoi", "STOI", "", "higher"),
            "Short-time objective intelligibility (Taal et al. 2011), 0 to 1, as pystoi computes it at 10 kHz.",
            *("pystoi", "metrics"),
        ),
        Metric(
            *("estoi", "ESTOI", "", "higher"),
            "Extended STOI (Jensen and Taal 2016), as pystoi computes it.",
            *("pystoi", "metrics"),
        ),
        Metric(
            *("si_sdr_db", "SI-SDR", "dB", "higher"),
            "Scale-invariant signal-to-distortion ratio (Le Roux et al. 2019) of zero-mean signals. It asks for the "
            "waveform itself, and says nothing of vocoders that keep no phase.",
        ),
        Metric(
            *("mel_db", "mel distance", "dB", "lower"),
            "Mean absolute difference of 40 log mel band powers, 32 ms windows every 8 ms, floored 60 dB below the "
            "loudest band of the original.",
        ),
        Metric(
            *("log_spectral_db", "log-spectral distance", "dB", "lower"),
            "Root-mean-square difference of 32 ms log power spectra (Gray and Markel 1976) over frames within 60 dB "
            "of the loudest, powers floored 60 dB below the loudest bin of the original.",
        ),
        Metric(
            *("f0_rmse_cents", "F0 error", "cents", "lower"),
            "Root-mean-square difference of pitch over 10 ms frames that are voiced in both, octave errors included; "
            "pYIN (Mauch and Dixon 2014) of librosa, 60 to 500 Hz in steps of 20 cents.",
            *("librosa", "metrics"),
        ),
        Metric(
            *("voicing_error", "voicing error", "", "lower"),
            "Share of those frames that are voiced in one signal and unvoiced in the other.",
            *("librosa", "metrics"),
        ),
    )
}


def available_metrics() -> tuple[str, ...]:
    """The names that `measure` accepts on this machine; some need the extras `metrics` and `pesq`."""
    return tuple(name for name, metric in METRICS.items() if metric.is_available)


def measure(reference: np.ndarray, decoded: np.ndarray, rate_hz: int, metrics: Sequence[str]) -> dict[str, float]:
    """The named metrics; NaN where one is not defined for this signal (silence, or too short). ValueError else."""
    if reference.shape != decoded.shape or reference.ndim != 1:
        raise ValueError(f"expected two signals of one length, got {reference.shape} and {decoded.shape}")
    unknown = set(metrics) - set(available_metrics())
    if unknown:
        raise ValueError(f"metrics {sorted(unknown)} are not available (there are: {', '.join(available_metrics())})")
    if not reference.any():
        return dict.fromkeys(metrics, _NAN)
    first, second = reference.astype(np.float64), decoded.astype(np.float64)
    return {name: _FUNCTIONS[name](first, second, rate_hz) for name in metrics}


def _si_sdr_db(reference: np.ndarray, decoded: np.ndarray, rate_hz: int) -> float:
    """Scale-invariant signal-to-distortion ratio, at most 120 dB either way.

    Source: Le Roux et al. (2019), equation 5, on zero-mean signals.
    """
    reference, decoded = reference - reference.mean(), decoded - decoded.mean()
    energy, given = float(reference @ reference), float(decoded @ decoded)
    if min(energy, given) < _FLOOR:
        return _NAN
    wanted = (decoded @ reference) / energy * reference
    noise = decoded - wanted
    floor = 1e-12 * given  # relative, or a quiet estimate would score better or worse than the same one amplified
    return float(10 * np.log10(max(wanted @ wanted, floor) / max(noise @ noise, floor)))


def _log_spectral_db(reference: np.ndarray, decoded: np.ndarray, rate_hz: int) -> float:
    """Root-mean-square difference of 32 ms log power spectra over frames within 60 dB of the loudest.

    Source: Gray and Markel, "Distance measures for speech processing" (1976), with power floored 60 dB below the
    loudest bin of the reference.
    """
    size = _window_samples(rate_hz)
    expected, given = (power_spectrum(signal, size, size // 2) for signal in (reference, decoded))
    floor = max(float(expected.max()) * 1e-6, _FLOOR)
    loud = expected.sum(1) > float(expected.sum(1).max()) * 1e-6
    if not loud.any():
        return _NAN
    difference = 10 * np.log10((expected[loud] + floor) / (given[loud] + floor))
    return float(np.sqrt((difference**2).mean(1)).mean())


def _mel_db(reference: np.ndarray, decoded: np.ndarray, rate_hz: int) -> float:
    """Mean absolute difference of 40 log mel band powers, floored 60 dB below the loudest of the reference."""
    size = _window_samples(rate_hz)
    bands = mel_bands(40, size, rate_hz)
    expected, given = (power_spectrum(signal, size, size // 4) @ bands for signal in (reference, decoded))
    floor = max(float(expected.max()) * 1e-6, _FLOOR)
    return float(np.abs(10 * np.log10((expected + floor) / (given + floor))).mean())


def _window_samples(rate_hz: int) -> int:
    """Samples in 32 ms."""
    return max(16, rate_hz * 32 // 1000)


def power_spectrum(signal: np.ndarray, window_samples: int, hop_samples: int) -> np.ndarray:
    """Power [frames, window_samples // 2 + 1] in Hann windows; the signal is padded with zeros to whole windows."""
    padded = np.pad(signal, (0, -len(signal) % window_samples))
    frames = np.lib.stride_tricks.sliding_window_view(padded, window_samples)[::hop_samples]
    power: np.ndarray = np.abs(np.fft.rfft(frames * np.hanning(window_samples))) ** 2
    return power


@functools.lru_cache(maxsize=8)
def mel_bands(num_bands: int, window_samples: int, rate_hz: int) -> np.ndarray:
    """Weights [window_samples // 2 + 1, num_bands] of overlapping triangles, evenly spaced in mel from 0 Hz up.

    Source: mel = 2595 log10(1 + f / 700), O'Shaughnessy, "Speech Communication" (1987).
    """
    edges_mel = np.linspace(0, 2595 * np.log10(1 + rate_hz / 1400), num_bands + 2)
    edges_hz = 700 * (10 ** (edges_mel / 2595) - 1)
    bins_hz = np.fft.rfftfreq(window_samples, 1 / rate_hz)[:, None]
    rising = (bins_hz - edges_hz[:-2]) / (edges_hz[1:-1] - edges_hz[:-2])
    falling = (edges_hz[2:] - bins_hz) / (edges_hz[2:] - edges_hz[1:-1])
    weights: np.ndarray = np.clip(np.minimum(rising, falling), 0, None)
    return weights


def _stoi(reference: np.ndarray, decoded: np.ndarray, rate_hz: int, *, extended: bool) -> float:
    """Short-time objective intelligibility, as `pystoi` computes it."""
    import pystoi

    with warnings.catch_warnings():
        # pystoi warns, and returns 1e-5, where no 384 ms of speech remain after dropping silence.
        warnings.simplefilter("error", RuntimeWarning)
        # The extended form adds noise of the rounding's size: with a fixed seed, so that two runs agree.
        before = np.random.get_state()
        np.random.seed(0)
        try:
            return float(pystoi.stoi(reference, decoded, rate_hz, extended=extended))
        except (RuntimeWarning, ValueError, MemoryError):  # memory: rates of MHz take huge resampling filters
            return _NAN
        finally:
            np.random.set_state(before)


def _pesq(reference: np.ndarray, decoded: np.ndarray, rate_hz: int, *, mode: str) -> float:
    """PESQ at 16 kHz ("wb") or 8 kHz ("nb"), as `pesq` computes it: the mean over equal pieces of at most 16 s.

    P.862 is meant for 8 to 20 s. Its reference code, which `pesq` wraps, has room for 50 utterances and writes past
    the end of its arrays where there are more; an utterance and the pause after it take 400 ms or longer.
    """
    import pesq

    from codec.audio import resample

    pesq_hz = 16000 if mode == "wb" else 8000
    signals = [resample(signal[None], rate_hz, pesq_hz)[0].astype(np.float32) for signal in (reference, decoded)]
    num_pieces = -(-len(signals[0]) // (_PESQ_MAX_SECONDS * pesq_hz))
    scores = []
    for original, heard in zip(*(np.array_split(signal, num_pieces) for signal in signals), strict=True):
        # Silence divides by zero; ValueError and PesqError say that there is no utterance, or less than 250 ms.
        if original.any() and heard.any():
            with contextlib.suppress(pesq.PesqError, ValueError):
                scores.append(float(pesq.pesq(pesq_hz, original, heard, mode)))
    return float(np.mean(scores)) if scores else _NAN


def _f0_rmse_cents(reference: np.ndarray, decoded: np.ndarray, rate_hz: int) -> float:
    """Root-mean-square difference of pitch where both are voiced."""
    expected, given = (_pitch_hz(signal.tobytes(), rate_hz) for signal in (reference, decoded))
    voiced = ~np.isnan(expected) & ~np.isnan(given)
    if not voiced.any():
        return _NAN
    return float(np.sqrt(np.mean((1200 * np.log2(given[voiced] / expected[voiced])) ** 2)))


def _voicing_error(reference: np.ndarray, decoded: np.ndarray, rate_hz: int) -> float:
    """Share of frames that are voiced in one only."""
    expected, given = (_pitch_hz(signal.tobytes(), rate_hz) for signal in (reference, decoded))
    return float(np.mean(np.isnan(expected) != np.isnan(given))) if len(expected) else _NAN


@functools.lru_cache(maxsize=4)  # the original is the same for all codecs, and a track serves two metrics
def _pitch_hz(samples: bytes, rate_hz: int) -> np.ndarray:
    """Pitch of float64 samples every 10 ms, NaN where unvoiced; in pieces of 30 s, since Viterbi's memory grows."""
    import librosa

    from codec.audio import resample

    signal = resample(np.frombuffer(samples)[None], rate_hz, _F0_RATE_HZ)[0]
    tracks = [np.zeros(0)]
    for piece in np.array_split(signal, -(-len(signal) // (_F0_MAX_SECONDS * _F0_RATE_HZ))):
        if len(piece) >= _F0_FRAME_SAMPLES:
            frequency, is_voiced, _ = librosa.pyin(
                piece, fmin=60, fmax=500, sr=_F0_RATE_HZ, frame_length=_F0_FRAME_SAMPLES, hop_length=160, resolution=0.2
            )
            tracks.append(np.where(is_voiced, frequency, _NAN))
    return np.concatenate(tracks)


_FUNCTIONS: dict[str, Callable[[np.ndarray, np.ndarray, int], float]] = {
    "pesq_wb": functools.partial(_pesq, mode="wb"),
    "pesq_nb": functools.partial(_pesq, mode="nb"),
    "stoi": functools.partial(_stoi, extended=False),
    "estoi": functools.partial(_stoi, extended=True),
    "si_sdr_db": _si_sdr_db,
    "mel_db": _mel_db,
    "log_spectral_db": _log_spectral_db,
    "f0_rmse_cents": _f0_rmse_cents,
    "voicing_error": _voicing_error,
}
