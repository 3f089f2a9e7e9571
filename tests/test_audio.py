import contextlib
import os
import shutil
from collections.abc import Callable
from fractions import Fraction
from math import ceil
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from codec.audio import AudioError, fit_length, read_audio, resample, resampled_length, write_audio
from codec.testing import speech_like

rates_hz = st.sampled_from([8000, 11025, 16000, 22050, 24000, 44100, 48000, 96000, 192000]) | st.integers(8000, 192000)


FullDisk = Callable[[], contextlib.AbstractContextManager[None]]


def one_line(caught: pytest.ExceptionInfo[AudioError]) -> str:
    message = str(caught.value)
    assert message.strip()
    assert "\n" not in message
    return message


def stereo(num_samples: int = 3000) -> np.ndarray:
    return np.stack([speech_like(num_samples, seed=1), speech_like(num_samples, seed=2)])


@pytest.mark.parametrize(
    ("suffix", "subtype", "step"),
    [
        ("wav", "PCM_U8", 2**-7),
        ("wav", "PCM_16", 2**-15),
        ("wav", "PCM_24", 2**-23),
        ("wav", "PCM_32", 2**-24),  # what float32 can hold
        ("wav", "FLOAT", 0),
        ("wav", "DOUBLE", 0),
        ("flac", "PCM_16", 2**-15),
        ("flac", "PCM_24", 2**-23),
        ("aiff", "PCM_16", 2**-15),
    ],
)
def test_lossless_formats_are_read_exactly(suffix: str, subtype: str, step: float, tmp_path: Path) -> None:
    audio = stereo()
    path = tmp_path / f"audio.{suffix}"
    soundfile.write(path, audio.T, 22050, subtype=subtype)
    read, rate_hz = read_audio(path)
    assert (read.dtype, rate_hz) == (np.float32, 22050)
    assert read.flags.c_contiguous
    np.testing.assert_allclose(read, audio, rtol=0, atol=step)


@pytest.mark.parametrize(("suffix", "subtype"), [("ogg", "VORBIS"), ("ogg", "OPUS"), ("mp3", "MPEG_LAYER_III")])
def test_lossy_formats_are_read(suffix: str, subtype: str, tmp_path: Path) -> None:
    audio = stereo(16000)
    path = tmp_path / f"audio.{suffix}"
    soundfile.write(path, audio.T, 16000, subtype=subtype)
    read, rate_hz = read_audio(path)
    assert (read.shape, rate_hz) == (audio.shape, 16000)
    for channel in range(2):
        assert np.corrcoef(read[channel], audio[channel])[0, 1] > 0.9


@pytest.mark.parametrize("num_channels", [1, 2, 6])
@pytest.mark.parametrize("num_samples", [1, 2, 5000])
def test_16_bit_samples_survive_writing_and_reading(num_channels: int, num_samples: int, tmp_path: Path) -> None:
    path = tmp_path / "with space ü.wav"
    values = np.random.default_rng(0).integers(-(2**15), 2**15, (num_channels, num_samples))
    audio = (values / 2**15).astype(np.float32)
    write_audio(path, audio, 44100)
    info = soundfile.info(path)
    assert (info.format, info.subtype, info.frames, info.channels) == ("WAV", "PCM_16", num_samples, num_channels)
    read, rate_hz = read_audio(str(path))
    assert rate_hz == 44100
    np.testing.assert_array_equal(read, audio)


def test_writing_rounds_to_the_nearest_step_and_clips(tmp_path: Path) -> None:
    path = tmp_path / "audio.wav"
    write_audio(path, np.array([[1.0, -1.0, 1.5, -1.5, 1e30, -np.inf, 0.6 / 2**15, -0.4 / 2**15]], np.float32), 16000)
    samples, _ = soundfile.read(path, dtype="int16")
    assert samples.tolist() == [32767, -32768, 32767, -32768, 32767, -32768, 1, 0]


@pytest.mark.parametrize("suffix", ["", ".flac", ".raw", ".codec"])
def test_what_is_written_is_wav_whatever_its_name(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"audio{suffix}"
    write_audio(path, stereo(), 16000)
    assert path.read_bytes()[:4] == b"RIFF"


def test_a_name_that_is_not_unicode(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"\xff.wav")
    write_audio(tmp_path / "audio.wav", stereo(), 16000)
    shutil.copy(tmp_path / "audio.wav", path)
    assert read_audio(path)[0].shape == (2, 3000)


def flac_that_claims_2_to_the_36_samples(path: Path) -> None:
    soundfile.write(path, np.zeros(100), 16000)
    data = bytearray(path.read_bytes())
    data[21] |= 0x0F  # the count's 36 bits stand in STREAMINFO after rate, channels and sample size
    data[22:26] = b"\xff" * 4
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing.wav", "no such file"),
        ("folder", "is a folder"),
        ("empty.wav", "cannot be read as audio"),
        ("text.wav", "cannot be read as audio"),
        ("text.txt", "cannot be read as audio"),
        ("headerless.raw", "cannot be read as audio"),
        ("riff_only.wav", "cannot be read as audio"),
        ("claims.flac", "cannot be read as audio"),
        ("zero_samples.wav", "holds no samples"),
        ("nan.wav", "NaN or infinite"),
        ("infinite.wav", "NaN or infinite"),
    ],
)
def test_what_is_no_audio_is_an_error_of_one_line(name: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.wav").touch()
    for text in ("text.wav", "text.txt", "headerless.raw"):
        (tmp_path / text).write_text("this is\nno audio\n" * 10)
    (tmp_path / "riff_only.wav").write_bytes(b"RIFF\x24\x00\x00\x00WAVE")
    flac_that_claims_2_to_the_36_samples(tmp_path / "claims.flac")
    soundfile.write(tmp_path / "zero_samples.wav", np.zeros((0, 2)), 16000)
    soundfile.write(tmp_path / "nan.wav", np.array([0, np.nan]), 16000, subtype="FLOAT")
    soundfile.write(tmp_path / "infinite.wav", np.array([0, np.inf]), 16000, subtype="FLOAT")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(AudioError, match=reason) as caught:
        read_audio(tmp_path / name)
    assert str(tmp_path / name) in one_line(caught)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing/audio.wav", "No such file"),
        ("a_file/audio.wav", "Not a directory"),
        ("x" * 300 + ".wav", "too long"),
        ("folder", "Is a directory"),
    ],
)
def test_what_cannot_be_written_is_an_error_of_one_line_and_leaves_nothing(
    name: str, reason: str, tmp_path: Path
) -> None:
    (tmp_path / "a_file").touch()
    (tmp_path / "folder").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(AudioError, match=reason) as caught:
        write_audio(tmp_path / name, stereo(), 16000)
    assert str(tmp_path / name) in one_line(caught)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("rate_hz", [-1, 0, 2**31, 2**32 - 1])
def test_a_rate_that_wav_cannot_hold_is_an_error(rate_hz: int, tmp_path: Path) -> None:
    with pytest.raises(AudioError) as caught:
        write_audio(tmp_path / "audio.wav", stereo(), rate_hz)
    one_line(caught)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path, full_disk: FullDisk) -> None:
    path = tmp_path / "audio.wav"
    path.write_bytes(b"before")
    with full_disk(), pytest.raises(AudioError) as caught:
        write_audio(path, stereo(), 16000)
    one_line(caught)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b"before"


def test_the_old_file_is_there_until_the_new_one_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "audio.wav"
    path.write_bytes(b"before")
    replace, seen = os.replace, []

    def watched_replace(source: Path, target: Path) -> None:
        seen.append((target, path.read_bytes(), soundfile.info(source).frames))
        replace(source, target)

    monkeypatch.setattr(os, "replace", watched_replace)
    write_audio(path, stereo(), 16000)
    assert seen == [(path, b"before", 3000)]
    assert list(tmp_path.iterdir()) == [path]


@given(
    from_hz=rates_hz,
    to_hz=rates_hz,
    num_samples=st.sampled_from([0, 1, 2, 319, 320, 321]) | st.integers(0, 5000),
    num_channels=st.integers(1, 3),
)
@settings(max_examples=60)
def test_resampled_lengths_are_exact(from_hz: int, to_hz: int, num_samples: int, num_channels: int) -> None:
    expected = ceil(Fraction(num_samples * to_hz, from_hz))
    assert resampled_length(num_samples, from_hz, to_hz) == expected
    audio = np.random.default_rng(0).uniform(-1, 1, (num_channels, num_samples)).astype(np.float32)
    resampled = resample(audio, from_hz, to_hz)
    assert resampled.shape == (num_channels, expected)
    assert resampled.dtype == np.float32
    assert np.isfinite(resampled).all()
    assert resampled_length(expected, to_hz, from_hz) >= num_samples


@pytest.mark.parametrize("other_hz", [16000, 22050, 44100, 48000, 192000])
def test_resampling_keeps_time_level_and_channels(other_hz: int) -> None:
    def tones(rate_hz: int) -> np.ndarray:
        time = np.arange(rate_hz // 2) / rate_hz
        return np.stack([0.5 * np.sin(2 * np.pi * hz * time) for hz in (300, 1100)]).astype(np.float32)

    resampled = resample(tones(16000), 16000, other_hz)
    inside = slice(other_hz // 20, -other_hz // 20)  # the ends ring, since the tones do not go on there
    np.testing.assert_allclose(resampled[:, inside], tones(other_hz)[:, inside], atol=1e-4)


def test_equal_rates_change_nothing() -> None:
    audio = stereo()
    assert resample(audio, 16000, 16000) is audio


@given(num_given=st.integers(0, 20), num_samples=st.integers(0, 20))
def test_fit_length_cuts_or_pads_with_zeros(num_given: int, num_samples: int) -> None:
    audio = np.arange(1, 1 + 2 * num_given, dtype=np.float32).reshape(2, num_given)
    fitted = fit_length(audio, num_samples)
    assert (fitted.shape, fitted.dtype) == ((2, num_samples), np.float32)
    shared = min(num_given, num_samples)
    np.testing.assert_array_equal(fitted[:, :shared], audio[:, :shared])
    assert not fitted[:, shared:].any()
