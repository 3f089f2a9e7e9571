"""The constant delay of a codec: found over several recordings, and taken out before signals are compared.

A vocoder keeps no waveform, and a voiced waveform looks like itself one period of pitch later. So log spectra, which
all codecs keep, say where to look to a millisecond, and the waveform, where it is alike, says the sample.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from codec.evaluation.metrics import mel_bands, power_spectrum

MAX_DELAY_MS = 50
_FINE_MS = 2.5  # around what the spectra say; less than the period of any voice
_ALIKE = 0.2  # the least correlation that says anything; unlike signals reach a third of it by chance


def find_delay(pairs: Sequence[tuple[np.ndarray, np.ndarray]], rate_hz: int) -> int:
    """By how many samples the second of each pair of signals is late, within 50 ms: one number for all pairs.

    0 where the signals have nothing in common. Recordings are weighed alike.
    """
    curves = [_spectral_curve(*_of_one_length(*pair), rate_hz) for pair in pairs]
    if not curves:
        return 0
    spectral = np.mean(curves, axis=0)
    if spectral.max() < _ALIKE:
        return 0
    coarse = (int(spectral.argmax()) - MAX_DELAY_MS) * _step_samples(rate_hz)
    reach = MAX_DELAY_MS * rate_hz // 1000
    waveform = np.abs(np.mean([_waveform_curve(*_of_one_length(*pair), reach) for pair in pairs], axis=0))
    fine = int(_FINE_MS * rate_hz / 1000)
    first = max(0, coarse + reach - fine)
    near = waveform[first : coarse + reach + fine + 1]
    return first + int(near.argmax()) - reach if near.max() >= _ALIKE else coarse


def aligned(reference: np.ndarray, decoded: np.ndarray, delay_samples: int) -> tuple[np.ndarray, np.ndarray]:
    """The stretch [T] that both have once the delay is taken out."""
    if delay_samples < 0:
        decoded_late, reference_late = decoded, reference[-delay_samples:]
    else:
        decoded_late, reference_late = decoded[delay_samples:], reference
    return _of_one_length(reference_late, decoded_late)


def _of_one_length(reference: np.ndarray, decoded: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    length = min(len(reference), len(decoded))
    return reference[:length], decoded[:length]


def _step_samples(rate_hz: int) -> int:
    return max(1, rate_hz // 1000)


def _spectral_curve(reference: np.ndarray, decoded: np.ndarray, rate_hz: int) -> np.ndarray:
    """Correlation of log mel spectra at lags of -50 to 50 steps of about 1 ms."""
    window = max(16, rate_hz * 16 // 1000)
    features = []
    for signal in (reference, decoded):
        power = power_spectrum(signal.astype(np.float64), window, _step_samples(rate_hz)) @ mel_bands(
            20, window, rate_hz
        )
        decibels = 10 * np.log10(power + max(float(power.max(initial=0)) * 1e-6, 1e-12))
        features.append(decibels - decibels.mean(axis=0))
    first, second = features
    curves = [_correlations(a, b, MAX_DELAY_MS) for a, b in zip(first.T, second.T, strict=True)]
    curve: np.ndarray = np.sum(curves, axis=0) / _scale(first, second)
    return curve


def _waveform_curve(reference: np.ndarray, decoded: np.ndarray, reach: int) -> np.ndarray:
    """Correlation of the signals at lags of -reach to reach samples."""
    first, second = (signal.astype(np.float64) for signal in (reference, decoded))
    curve: np.ndarray = _correlations(first, second, reach) / _scale(first, second)
    return curve


def _scale(first: np.ndarray, second: np.ndarray) -> float:
    return max(float(np.sqrt((first**2).sum() * (second**2).sum())), 1e-12)


def _correlations(first: np.ndarray, second: np.ndarray, reach: int) -> np.ndarray:
    """Sum over t of first[t] * second[t + lag], for lags of -reach to reach."""
    size = 1 << (len(first) + reach).bit_length()
    spectrum = np.conj(np.fft.rfft(first, size)) * np.fft.rfft(second, size)
    curve = np.fft.irfft(spectrum, size)
    return np.concatenate([curve[size - reach :], curve[: reach + 1]])
