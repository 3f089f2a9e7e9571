"""Signal metrics of a decoded recording against the original. Audio is float [T], both of one length and rate."""

from __future__ import annotations

import contextlib
import importlib.util

import numpy as np

_FLOOR = 1e-9
_PESQ_MAX_SAMPLES = 16 * 16000


def available_metrics() -> tuple[str, ...]:
    """The names `evaluate` accepts on this machine: `stoi` and `pesq_wb` need the extras `metrics` and `pesq`."""
    optional = (("stoi", "pystoi"), ("pesq_wb", "pesq"))
    found = tuple(name for name, package in optional if importlib.util.find_spec(package) is not None)
    return ("si_sdr_db", "log_spectral_db", *found)


def evaluate(reference: np.ndarray, estimate: np.ndarray, rate_hz: int, metrics: tuple[str, ...]) -> dict[str, float]:
    """The named metrics; NaN where one is not defined for this signal (silence, or too short). ValueError else."""
    if reference.shape != estimate.shape or reference.ndim != 1:
        raise ValueError(f"expected two signals of one length, got {reference.shape} and {estimate.shape}")
    unknown = set(metrics) - set(available_metrics())
    if unknown:
        raise ValueError(f"metrics {sorted(unknown)} are not available (there are: {', '.join(available_metrics())})")
    if not reference.any():
        return dict.fromkeys(metrics, float("nan"))
    functions = {"si_sdr_db": _si_sdr_db, "log_spectral_db": _log_spectral_db, "stoi": _stoi, "pesq_wb": _pesq_wb}
    return {
        name: functions[name](reference.astype(np.float64), estimate.astype(np.float64), rate_hz) for name in metrics
    }


def _si_sdr_db(reference: np.ndarray, estimate: np.ndarray, rate_hz: int) -> float:
    """Scale-invariant signal-to-distortion ratio, at most 120 dB either way.

    Source: Le Roux et al. (2019), equation 5, on zero-mean signals.
    """
    reference, estimate = reference - reference.mean(), estimate - estimate.mean()
    energy, given = float(reference @ reference), float(estimate @ estimate)
    if min(energy, given) < _FLOOR:
        return float("nan")
    wanted = (estimate @ reference) / energy * reference
    noise = estimate - wanted
    floor = 1e-12 * given  # relative, or a quiet estimate would score better or worse than the same one amplified
    return float(10 * np.log10(max(wanted @ wanted, floor) / max(noise @ noise, floor)))


def _log_spectral_db(reference: np.ndarray, estimate: np.ndarray, rate_hz: int) -> float:
    """Root-mean-square difference of 32 ms log power spectra over frames within 60 dB of the loudest.

    Source: Gray and Markel, "Distance measures for speech processing" (1976), with power floored 60 dB below the
    loudest bin of the reference.
    """
    size = max(16, rate_hz * 32 // 1000)

    def power(signal: np.ndarray) -> np.ndarray:
        padded = np.pad(signal, (0, -len(signal) % size))
        frames = np.lib.stride_tricks.sliding_window_view(padded, size)[:: size // 2]
        result: np.ndarray = np.abs(np.fft.rfft(frames * np.hanning(size))) ** 2
        return result

    expected, given = power(reference), power(estimate)
    floor = max(float(expected.max()) * 1e-6, _FLOOR)
    loud = expected.sum(1) > float(expected.sum(1).max()) * 1e-6
    if not loud.any():
        return float("nan")
    difference = 10 * np.log10((expected[loud] + floor) / (given[loud] + floor))
    return float(np.sqrt((difference**2).mean(1)).mean())


def _stoi(reference: np.ndarray, estimate: np.ndarray, rate_hz: int) -> float:
    """Short-time objective intelligibility (Taal et al. 2011), as `pystoi` computes it."""
    import warnings

    import pystoi

    with warnings.catch_warnings():
        # pystoi warns, and returns 1e-5, where no 384 ms of speech remain after dropping silence.
        warnings.simplefilter("error", RuntimeWarning)
        try:
            return float(pystoi.stoi(reference, estimate, rate_hz))
        except (RuntimeWarning, ValueError, MemoryError):  # memory: rates of MHz take huge resampling filters
            return float("nan")


def _pesq_wb(reference: np.ndarray, estimate: np.ndarray, rate_hz: int) -> float:
    """Wide-band PESQ (ITU-T P.862.2), as `pesq` computes it at 16 kHz: the mean over equal pieces of at most 16 s.

    P.862 is meant for 8 to 20 s. Its reference code, which `pesq` wraps, has room for 50 utterances and writes past
    the end of its arrays where there are more; an utterance and the pause after it take 400 ms or longer.
    """
    import pesq

    from codec.audio import resample

    signals = [resample(signal[None], rate_hz, 16000)[0].astype(np.float32) for signal in (reference, estimate)]
    num_pieces = -(-len(signals[0]) // _PESQ_MAX_SAMPLES)
    scores = []
    for piece, decoded in zip(*(np.array_split(signal, num_pieces) for signal in signals), strict=True):
        # Silence divides by zero; ValueError and PesqError say that there is no utterance, or less than 250 ms.
        if piece.any() and decoded.any():
            with contextlib.suppress(pesq.PesqError, ValueError):
                scores.append(float(pesq.pesq(16000, piece, decoded, "wb")))
    return float(np.mean(scores)) if scores else float("nan")
