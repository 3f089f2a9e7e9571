import contextlib
import io
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from fractions import Fraction
from math import ceil
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from codec import files, wav
from codec.audio import (
    AudioError,
    AudioReader,
    AudioWriter,
    Resampler,
    fit_length,
    read_audio,
    resample,
    resampled_length,
    write_audio,
)
from codec.testing import speech_like

rates_hz = st.sampled_from([8000, 11025, 16000, 22050, 24000, 44100, 48000, 96000, 192000]) | st.integers(8000, 192000)

FullDisk = Callable[[], contextlib.AbstractContextManager[None]]


@pytest.fixture(autouse=True)
def nothing_is_left_behind(tmp_path: Path) -> Iterator[None]:
    yield
    assert not list(tmp_path.rglob("*.partial"))
    assert not files._partials


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
        ("empty.wav", "is empty"),
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


def from_stream(data: bytes) -> np.ndarray:
    with AudioReader(io.BytesIO(data)) as reader:
        return np.concatenate(list(reader.blocks(100)), axis=1)


def written(audio: np.ndarray, rate_hz: int, *, num_samples: int | None = None, raw: bool = False) -> bytes:
    stream = io.BytesIO()
    with AudioWriter(stream, rate_hz, len(audio), num_samples=num_samples, raw=raw) as writer:
        writer.write(audio)
        writer.finish()
    return stream.getvalue()


@given(
    from_hz=rates_hz,
    to_hz=rates_hz,
    sizes=st.lists(st.sampled_from([0, 1, 2, 17, 320, 1000]), max_size=8),
    num_channels=st.sampled_from([1, 2, 6]),
)
@settings(max_examples=80)
def test_pieces_are_resampled_as_the_whole(from_hz: int, to_hz: int, sizes: list[int], num_channels: int) -> None:
    audio = np.random.default_rng(0).uniform(-1, 1, (num_channels, sum(sizes))).astype(np.float32)
    resampler = Resampler(from_hz, to_hz, num_channels)
    pieces = np.split(audio, np.cumsum(sizes)[:-1], axis=1) if sizes else []
    resampled = np.concatenate([*map(resampler.push, pieces), resampler.flush()], axis=1)
    assert resampled.dtype == np.float32
    np.testing.assert_array_equal(resampled, resample(audio, from_hz, to_hz))


@pytest.mark.parametrize(("from_hz", "to_hz"), [(0, 16000), (16000, -1), (1, 2**32 - 1)])
def test_rates_that_cannot_be_resampled(from_hz: int, to_hz: int) -> None:
    with pytest.raises(AudioError, match=f"cannot be resampled from {from_hz} to {to_hz} Hz: ") as caught:
        Resampler(from_hz, to_hz, 1).push(np.zeros((1, 10**6), np.float32))
    one_line(caught)


@pytest.mark.parametrize("num_channels", [1, 2, 6])
@pytest.mark.parametrize("suffix", [".wav", ".flac", ".WAV", ".Flac"])
@pytest.mark.parametrize("is_announced", [True, False])
def test_lossless_files_hold_what_was_written(
    suffix: str, num_channels: int, is_announced: bool, tmp_path: Path
) -> None:
    path = tmp_path / f"{'ü ' * 80}{suffix}"
    values = np.random.default_rng(0).integers(-(2**15), 2**15, (num_channels, 20000))
    audio = (values / 2**15).astype(np.float32)
    with AudioWriter(path, 44100, num_channels, num_samples=20000 if is_announced else None) as writer:
        for piece in np.split(audio, [0, 1, 7000], axis=1):
            writer.write(piece)
        assert not path.exists()
        writer.finish()
    assert soundfile.info(path).format == suffix[1:].upper()
    np.testing.assert_array_equal(read_audio(path)[0], audio)
    np.testing.assert_array_equal(soundfile.read(path, dtype="int16", always_2d=True)[0], values.T)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("suffix", "subtype", "num_channels"),
    [(".ogg", "VORBIS", 6), (".ogg", "VORBIS", 1), (".opus", "OPUS", 2), (".mp3", "MPEG_LAYER_III", 2)],
)
def test_lossy_files_hold_what_was_written(suffix: str, subtype: str, num_channels: int, tmp_path: Path) -> None:
    path = tmp_path / f"audio{suffix}"
    audio = np.stack([speech_like(48000, seed=seed) for seed in range(num_channels)])
    with AudioWriter(path, 48000, num_channels) as writer:
        writer.write(audio)
        writer.finish()
    info = soundfile.info(path)
    assert (info.subtype, info.channels, info.frames, info.samplerate) == (subtype, num_channels, 48000, 48000)
    assert np.corrcoef(read_audio(path)[0].ravel(), audio.ravel())[0, 1] > 0.9


@pytest.mark.parametrize("rate_hz", [8000, 16000, 44100, 192000])
def test_what_goes_beyond_full_scale_is_clipped_and_silence_stays_silence(rate_hz: int) -> None:
    square = np.where(np.arange(500) % 100 < 50, 1.0, -1.0)
    audio = np.stack([square, 3 * square, 0 * square, np.full(500, np.inf)]).astype(np.float32)
    read = from_stream(written(audio, rate_hz))
    limited = np.minimum(square, 1 - 2**-15)
    np.testing.assert_array_equal(read, [limited, limited, 0 * square, np.full(500, 1 - 2**-15)])


@pytest.mark.parametrize("num_samples", [None, 3000])
def test_streams_get_wav_at_once(num_samples: int | None) -> None:
    audio = stereo()
    read_end, write_end = os.pipe()
    with open(read_end, "rb", buffering=0) as source, open(write_end, "wb") as sink:
        with AudioWriter(sink, 16000, 2, num_samples=num_samples) as writer:
            header = source.read(1000)
            writer.write(audio[:, :100])
            first = source.read(1000)
            assert (len(header), len(first)) == (44, 400)
            writer.write(audio[:, 100:])
            writer.finish()
        assert not sink.closed
        sink.close()
        data = header + first + source.readall()
    sizes = (b"\xff" * 4, b"\xff" * 4) if num_samples is None else ((12036).to_bytes(4, "little"), b"\xe0\x2e\0\0")
    assert (data[4:8], data[40:44]) == sizes
    assert data == written(audio, 16000, num_samples=num_samples)
    np.testing.assert_array_equal(from_stream(data), np.clip(np.round(audio * 2**15), -(2**15), 2**15 - 1) / 2**15)


@pytest.mark.parametrize("num_samples", [2**31, 2**63])
def test_streams_beyond_4_gib_are_of_unknown_length(num_samples: int) -> None:
    stream = io.BytesIO()
    with AudioWriter(stream, 16000, 2, num_samples=num_samples):
        pass
    assert (stream.getvalue()[4:8], stream.getvalue()[40:44]) == (b"\xff" * 4, b"\xff" * 4)


def test_an_unbuffered_stream_that_takes_a_little_at_a_time() -> None:
    class Slow(io.BytesIO):
        def write(self, data: memoryview) -> int:  # type: ignore[override]
            return super().write(bytes(data[:7]))

    stream = Slow()
    with AudioWriter(stream, 16000, 2) as writer:
        writer.write(stereo())
        writer.finish()
    assert stream.getvalue() == written(stereo(), 16000)


def test_a_broken_pipe_passes_through_and_other_failures_do_not() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    with open(write_end, "wb", buffering=0) as sink, pytest.raises(BrokenPipeError):
        AudioWriter(sink, 16000, 2)
    with open("/dev/full", "wb", buffering=0) as full:
        with pytest.raises(AudioError, match="standard output cannot be written: No space left on device") as caught:
            AudioWriter(full, 16000, 2)
        one_line(caught)


@pytest.mark.parametrize("is_announced", [True, False])
def test_wav_beyond_the_limit_of_32_bits_becomes_rf64(
    is_announced: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wav, "MAX_RIFF_BYTES", 12000)
    audio = np.round(stereo(4000) * 2**15).clip(-(2**15), 2**15 - 1) / 2**15
    path = tmp_path / "audio.wav"
    for num_samples, format in ((2900, "WAV"), (2982, "WAV"), (2983, "RF64"), (4000, "RF64")):
        with AudioWriter(path, 16000, 2, num_samples=num_samples if is_announced else None) as writer:
            writer.write(audio[:, :num_samples])
            writer.finish()
        info = soundfile.info(path)
        assert (info.format, info.subtype, info.frames) == (format, "PCM_16", num_samples)
        np.testing.assert_array_equal(soundfile.read(path)[0].T, audio[:, :num_samples])
        np.testing.assert_array_equal(read_audio(path)[0], audio[:, :num_samples])
        np.testing.assert_array_equal(from_stream(path.read_bytes()), audio[:, :num_samples])
        is_plain = is_announced and format == "WAV"
        assert path.stat().st_size == (44 if is_plain else 80) + 4 * num_samples


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg", ".opus", ".mp3"])
def test_what_is_not_finished_never_was(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"audio{suffix}"
    path.write_bytes(b"before")
    for num_samples in (0, 3000):
        with AudioWriter(path, 16000, 2) as writer:
            writer.write(stereo(num_samples))
        with contextlib.suppress(KeyboardInterrupt), AudioWriter(path, 16000, 2) as writer:
            writer.write(stereo(num_samples))
            raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b"before"
    writer.close()


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg", ".opus", ".mp3", "raw"])
@pytest.mark.parametrize("num_samples", [3000, 48000])
def test_a_full_disk(suffix: str, num_samples: int, tmp_path: Path, full_disk: FullDisk) -> None:
    path = tmp_path / f"audio{suffix}"
    path.write_bytes(b"before")
    audio = np.random.default_rng(0).uniform(-1, 1, (2, num_samples)).astype(np.float32)
    with full_disk(), contextlib.ExitStack() as ended:
        fits = num_samples == 3000 and suffix in (".opus", ".mp3")  # else only the last write, on closing, may fail
        if not fits:
            caught = ended.enter_context(pytest.raises(AudioError, match="cannot be written: File too large"))
        with AudioWriter(path, 48000, 2, raw=suffix == "raw") as writer:
            for piece in np.array_split(audio, 10, axis=1):
                writer.write(piece)
            writer.finish()
    assert list(tmp_path.iterdir()) == [path]
    assert (path.read_bytes() == b"before") != fits
    assert fits or one_line(caught).startswith(str(path))


@pytest.mark.parametrize(
    ("name", "rate_hz", "num_channels", "reason"),
    [
        ("audio.xyz", 16000, 1, r"its suffix '.xyz' is none of .flac, .mp3, .ogg, .opus, .wav"),
        ("audio", 16000, 1, r"its suffix '' is none of"),
        ("audio.opus", 44100, 1, "Opus has no rate of 44100 Hz, only 8000, 12000, 16000, 24000, 48000"),
        ("audio.wav", 0, 1, "WAV cannot hold 1 channels of 0 Hz"),
        ("audio.wav", 2**31, 1, "WAV cannot hold"),
        ("audio.wav", 16000, 0, "WAV cannot hold 0 channels"),
        ("audio.wav", 16000, 40000, "WAV cannot hold 40000 channels"),
        ("audio.wav", 192000, 20000, "WAV cannot hold"),
        ("audio.flac", 0, 1, "cannot be written: "),
        ("audio.flac", 16000, 9, "cannot be written: "),
        ("audio.mp3", 96000, 1, "cannot be written: "),
        ("audio.mp3", 16000, 3, "cannot be written: "),
        ("audio.ogg", 16000, 256, "Vorbis cannot hold 256 channels"),
        ("audio.ogg", 200001, 1, "Vorbis cannot hold"),
        ("audio.ogg", 0, 1, "Vorbis cannot hold"),
        ("audio.ogg", 16000, 0, "Vorbis cannot hold"),
        ("audio.flac", 2**40, 1, "cannot be written: "),
        ("missing/audio.flac", 16000, 1, "No such file"),
        ("folder.wav", 16000, 1, "Is a directory"),
        ("with\0zero.wav", 16000, 1, "null"),
        ("x" * 252 + ".wav", 16000, 1, "too long"),
        ("/dev/null", 16000, 1, "suffix"),
    ],
)
def test_files_that_cannot_be_written(name: str, rate_hz: int, num_channels: int, reason: str, tmp_path: Path) -> None:
    (tmp_path / "folder.wav").mkdir()
    with pytest.raises(AudioError, match=reason) as caught:
        AudioWriter(tmp_path / name, rate_hz, num_channels)
    one_line(caught)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.wav"]


def test_formats_of_streams() -> None:
    with pytest.raises(AudioError, match=r"its suffix '.flac' is none of .wav"):
        AudioWriter(io.BytesIO(), 16000, 1, suffix=".flac")


@pytest.mark.parametrize("num_written", [2, 4])
def test_announced_samples_must_come(num_written: int, tmp_path: Path) -> None:
    with AudioWriter(tmp_path / "audio.wav", 16000, 2, num_samples=3) as writer:
        writer.write(stereo(2))
        with pytest.raises(AudioError, match=f"3 samples were announced, {num_written} came"):
            writer.finish() if num_written == 2 else writer.write(stereo(2))
    assert not list(tmp_path.iterdir())


def test_what_is_no_audio_is_not_written() -> None:
    with AudioWriter(io.BytesIO(), 16000, 2) as writer:
        with pytest.raises(ValueError, match=r"audio must be \[2, n\], not \[1, 5\]"):
            writer.write(np.zeros((1, 5), np.float32))
        with pytest.raises(AudioError, match="the audio holds NaN"):
            writer.write(np.full((2, 5), np.nan, np.float32))


def test_names_of_255_bytes_links_and_permissions(tmp_path: Path) -> None:
    path, link = tmp_path / ("x" * 251 + ".wav"), tmp_path / "link.wav"
    link.symlink_to(path)
    before = os.umask(0o022)
    try:
        write_audio(link, stereo(), 16000)
    finally:
        os.umask(before)
    assert link.is_symlink()
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert read_audio(path)[0].shape == (2, 3000)


def test_errors_stay_on_one_line_whatever_the_name(tmp_path: Path) -> None:
    for action in (read_audio, lambda path: write_audio(path, stereo(), 16000)):
        with pytest.raises(AudioError) as caught:
            action(tmp_path / "no\nfolder" / os.fsdecode(b"\xff"))
        one_line(caught).encode()
