"""Audio files: read, write, resample. The only module that touches them.

Audio is float32 [C, T] (channels first), full scale at -1..1.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import numpy as np
import soundfile
import soxr

AUDIO_SUFFIXES = (".flac", ".mp3", ".ogg", ".opus", ".wav")


class AudioError(ValueError):
    """The audio cannot be used; the message says why in one line."""


def find_audio(folder: str | os.PathLike[str]) -> list[Path]:
    """All audio files under a folder, known by their suffix, sorted. AudioError where there is none."""
    found = sorted(file for file in Path(folder).rglob("*") if file.suffix.lower() in AUDIO_SUFFIXES)
    if not found:
        raise AudioError(f"no audio files under {folder} (looked for {', '.join(AUDIO_SUFFIXES)})")
    return found


def read_audio(path: str | os.PathLike[str]) -> tuple[np.ndarray, int]:
    """A whole file as float32 [C, T], and its rate in Hz. AudioError where it is no audio or holds none."""
    name = os.fspath(path)
    if not os.path.exists(name):
        raise AudioError(f"{name}: no such file")
    if os.path.isdir(name):
        raise AudioError(f"{name} is a folder")
    try:
        audio, rate_hz = soundfile.read(os.fsencode(name), dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, OSError, TypeError, MemoryError) as error:  # TypeError: headerless "*.raw"
        reason = getattr(error, "error_string", None) or str(error)
        raise AudioError(f"{name} cannot be read as audio: {reason.strip()}") from error
    if audio.shape[0] == 0:
        raise AudioError(f"{name} holds no samples")
    if not np.isfinite(audio).all():
        raise AudioError(f"{name} holds NaN or infinite samples")
    return np.ascontiguousarray(audio.T), int(rate_hz)


def write_audio(path: str | os.PathLike[str], audio: np.ndarray, rate_hz: int) -> None:
    """Write [C, T] as a 16-bit WAV file. Values beyond full scale are clipped.

    The file appears whole or not at all: it is written beside its place and renamed.
    """
    target = Path(path)
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        # The scale that reading undoes: 16-bit samples survive reading and writing.
        samples = np.clip(np.round(audio.T * 32768.0), -32768, 32767).astype(np.int16)
        partial.touch()  # fails with the reason, where libsndfile says "System error"
        soundfile.write(partial, samples, rate_hz, format="WAV", subtype="PCM_16")
        os.replace(partial, target)
    except (soundfile.SoundFileError, OSError, OverflowError) as error:  # OverflowError: a rate beyond 31 bits
        raise AudioError(f"{target} cannot be written: {getattr(error, 'strerror', None) or error}") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def resample(audio: np.ndarray, from_hz: int, to_hz: int) -> np.ndarray:
    """[C, T] at another rate: exactly `resampled_length(T, from_hz, to_hz)` samples; as it is where rates are equal."""
    if from_hz == to_hz:
        return audio
    result = soxr.resample(np.ascontiguousarray(audio.T), from_hz, to_hz, quality="HQ").T
    return fit_length(result, resampled_length(audio.shape[1], from_hz, to_hz))


def resampled_length(num_samples: int, from_hz: int, to_hz: int) -> int:
    """How many samples a recording has at another rate: rounded up, so that none is lost on the way back."""
    return -(-num_samples * to_hz // from_hz)


def fit_length(audio: np.ndarray, num_samples: int) -> np.ndarray:
    """[C, T] cut, or padded with zeros, to [C, num_samples]."""
    if audio.shape[1] >= num_samples:
        return audio[:, :num_samples]
    return np.pad(audio, ((0, 0), (0, num_samples - audio.shape[1])))
