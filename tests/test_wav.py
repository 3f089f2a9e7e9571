"""Reading from files and pipes: WAV, which is parsed here, above all."""

import contextlib
import errno
import io
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from codec import wav
from codec.audio import AudioError, AudioReader, AudioWriter, RawFormat, read_audio
from codec.testing import speech_like

FullDisk = Callable[[], contextlib.AbstractContextManager[None]]


def one_line(caught: pytest.ExceptionInfo[AudioError]) -> str:
    message = str(caught.value)
    assert message.strip()
    assert "\n" not in message
    return message


def stereo(num_samples: int = 3000) -> np.ndarray:
    return np.stack([speech_like(num_samples, seed=1), speech_like(num_samples, seed=2)])


class Pipe(io.RawIOBase):
    """A stream that cannot seek and gives a few bytes at a time."""

    def __init__(self, data: bytes, piece_bytes: int = 1) -> None:
        self.rest, self.piece_bytes = memoryview(data), piece_bytes

    def read(self, num_bytes: int = -1) -> bytes:
        wanted = self.piece_bytes if num_bytes < 0 else min(num_bytes, self.piece_bytes)
        piece, self.rest = self.rest[:wanted], self.rest[wanted:]
        return bytes(piece)


def piped(data: bytes, piece_bytes: int = 997, raw: RawFormat | None = None) -> np.ndarray:
    with AudioReader(Pipe(data, piece_bytes), raw=raw) as reader:
        return np.concatenate(list(reader.blocks(100)), axis=1)


def encoded(audio: np.ndarray, rate_hz: int, format: str, subtype: str) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, audio.T, rate_hz, format=format, subtype=subtype)
    return file.getvalue()


def written(audio: np.ndarray, rate_hz: int, *, num_samples: int | None = None, raw: bool = False) -> bytes:
    stream = io.BytesIO()
    with AudioWriter(stream, rate_hz, len(audio), num_samples=num_samples, raw=raw) as writer:
        writer.write(audio)
        writer.finish()
    return stream.getvalue()


FORMATS = [
    ("WAV", "PCM_U8"),
    ("WAV", "PCM_16"),
    ("WAV", "PCM_24"),
    ("WAV", "PCM_32"),
    ("WAV", "FLOAT"),
    ("WAV", "DOUBLE"),
    ("WAVEX", "PCM_24"),
    ("WAVEX", "FLOAT"),
    ("RF64", "PCM_16"),
    ("WAV", "ULAW"),
    ("WAV", "MS_ADPCM"),
    ("RF64", "ALAW"),
    ("FLAC", "PCM_24"),
    ("AIFF", "PCM_16"),
    ("OGG", "VORBIS"),
    ("OGG", "OPUS"),
    ("MP3", "MPEG_LAYER_III"),
]


@pytest.mark.parametrize("num_channels", [1, 2])
@pytest.mark.parametrize(("format", "subtype"), FORMATS)
def test_files_and_pipes_give_what_libsndfile_gives(
    format: str, subtype: str, num_channels: int, tmp_path: Path
) -> None:
    audio = 1.3 * stereo(4801)[:num_channels]
    data = encoded(audio, 24000, format, subtype)
    path = tmp_path / "audio"
    path.write_bytes(data)
    expected, _ = soundfile.read(path, dtype="float32", always_2d=True)
    with AudioReader(path) as reader:
        assert (reader.name, reader.rate_hz, reader.num_channels) == (str(path), 24000, num_channels)
        assert reader.num_samples == len(expected)
        blocks = list(reader.blocks(1000))
    assert all(block.dtype == np.float32 and block.flags.c_contiguous for block in blocks)
    assert {block.shape for block in blocks[:-1]} == {(num_channels, 1000)}
    read = np.concatenate(blocks, axis=1)
    # soundfile seeks around its reads; libsndfile's MP3 decoder then rounds differently.
    np.testing.assert_allclose(read, expected.T, rtol=0, atol=2**-22 if format == "MP3" else 0)
    np.testing.assert_array_equal(piped(data), read)
    np.testing.assert_array_equal(read_audio(path)[0], read)


@pytest.mark.parametrize(("format", "subtype"), FORMATS)
def test_seeking_is_exact(format: str, subtype: str, tmp_path: Path) -> None:
    path = tmp_path / "audio"
    path.write_bytes(encoded(stereo(20000), 24000, format, subtype))
    whole, _ = read_audio(path)
    for sample in (0, 1, 777, 9999, 19999, whole.shape[1]):
        for source in (path, Pipe(path.read_bytes(), 4096)):
            with AudioReader(source) as reader:
                reader.seek(sample // 2)
                reader.seek(sample)
                rest = [np.zeros((2, 0)), *reader.blocks()]
            np.testing.assert_array_equal(np.concatenate(rest, axis=1), whole[:, sample:])
    for source in (path, Pipe(path.read_bytes(), 4096)):
        with AudioReader(source) as reader, pytest.raises(AudioError, match=f"has {whole.shape[1]} samples"):
            reader.seek(whole.shape[1] + 1)
    with AudioReader(path) as reader:
        reader.seek(5)
        with pytest.raises(ValueError, match="beyond 4"):
            reader.seek(4)


@given(
    encoding=st.sampled_from(["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"]),
    format=st.sampled_from(["WAV", "WAVEX", "RF64"]),
    num_channels=st.sampled_from([1, 2, 3, 6]),
    num_samples=st.integers(1, 60),
    block_samples=st.integers(1, 70),
    piece_bytes=st.integers(1, 9),
    rate_hz=st.integers(8000, 192000),
)
@settings(max_examples=60)
def test_a_slow_pipe_changes_nothing(
    encoding: str,
    format: str,
    num_channels: int,
    num_samples: int,
    block_samples: int,
    piece_bytes: int,
    rate_hz: int,
) -> None:
    audio = np.random.default_rng(num_samples).uniform(-1, 1, (num_channels, num_samples))
    data = encoded(audio, rate_hz, format, encoding)
    expected, _ = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    with AudioReader(Pipe(data, piece_bytes)) as reader:
        assert (reader.rate_hz, reader.num_channels, reader.num_samples) == (rate_hz, num_channels, num_samples)
        blocks = list(reader.blocks(block_samples))
    assert [block.shape[1] for block in blocks[:-1]] == [block_samples] * (len(blocks) - 1)
    np.testing.assert_array_equal(np.concatenate(blocks, axis=1), expected.T)


def test_a_block_comes_as_soon_as_its_bytes_are_there() -> None:
    audio = stereo(300)
    data = written(audio, 16000)
    read_end, write_end = os.pipe()
    with open(read_end, "rb") as source, open(write_end, "wb", buffering=0) as sink:
        sink.write(data[: 44 + 4 * 100])
        with AudioReader(source) as reader:  # would block for ever, were more asked for
            blocks = reader.blocks(100)
            assert next(blocks).shape == (2, 100)
            sink.write(data[44 + 4 * 100 :])
            sink.close()
            assert [block.shape[1] for block in blocks] == [100, 100]
        assert not source.closed


def chunk(name: bytes, content: bytes, size: int | None = None) -> bytes:
    size = len(content) if size is None else size
    return name + size.to_bytes(4, "little") + content + b"\0" * (len(content) % 2)


FMT = chunk(b"fmt ", bytes.fromhex("0100 0100 803e0000 007d0000 0200 1000"))
HUGE = chunk(b"ds64", b"\xff" * 8 + bytes(7) + b"\1" + bytes(12))
SAMPLES = np.arange(-50, 51, dtype="<i2")


def riff(*chunks: bytes, size: int | None = None, name: bytes = b"RIFF") -> bytes:
    content = b"WAVE" + b"".join(chunks)
    return name + (len(content) if size is None else size).to_bytes(4, "little") + content


@pytest.mark.parametrize("data_bytes", [0, 2**32 - 1, 2**31, 2**31 - 4096, 2**31 - 4097, 2**31 - 1])
@pytest.mark.parametrize("riff_bytes", [0, 36, 2**32 - 1, 2**31 + 36, 2**31 - 4096 + 36])
def test_sizes_that_mean_unknown(data_bytes: int, riff_bytes: int, tmp_path: Path) -> None:
    data = riff(FMT, chunk(b"data", SAMPLES.tobytes(), data_bytes), size=riff_bytes)
    with AudioReader(Pipe(data)) as reader:
        assert reader.num_samples is None
        np.testing.assert_array_equal(np.concatenate(list(reader.blocks(7)), axis=1)[0], SAMPLES / 2**15)
    (tmp_path / "audio.wav").write_bytes(data)
    with AudioReader(tmp_path / "audio.wav") as reader:
        assert reader.num_samples == len(SAMPLES)
        np.testing.assert_array_equal(np.concatenate(list(reader.blocks(7)), axis=1)[0], SAMPLES / 2**15)


def test_zero_samples_before_other_chunks_are_none() -> None:
    with pytest.raises(AudioError, match="holds no samples"):
        piped(riff(FMT, chunk(b"data", b""), chunk(b"LIST", b"INFO")))
    with pytest.raises(AudioError, match="holds no samples"):
        piped(riff(FMT, chunk(b"data", b"")))


def test_rf64_without_a_size_reads_to_the_end() -> None:
    data = riff(chunk(b"ds64", bytes(28)), FMT, chunk(b"data", SAMPLES.tobytes(), 2**32 - 1), name=b"RF64")
    np.testing.assert_array_equal(piped(data)[0], SAMPLES / 2**15)


def test_other_chunks_are_skipped_and_read_to_their_end() -> None:
    others = chunk(b"odd ", b"x" * 77777), chunk(b"none", b""), chunk(b"LIST", b"y" * 100)
    data = riff(*others, FMT, *others, chunk(b"data", SAMPLES.tobytes()), *others)
    pipe = Pipe(data + b"something else", 5000)
    with AudioReader(pipe) as reader:
        assert reader.num_samples == len(SAMPLES)
        np.testing.assert_array_equal(np.concatenate(list(reader.blocks()), axis=1)[0], SAMPLES / 2**15)
    assert bytes(pipe.rest) == b"something else"  # the program that writes can finish, and nobody waits for more


def test_the_padding_of_an_odd_number_of_bytes_is_no_sample() -> None:
    fmt = chunk(b"fmt ", bytes.fromhex("0100 0100 803e0000 80bb0000 0300 1800"))
    for size in (None, 2**32 - 1):
        assert piped(riff(fmt, chunk(b"data", b"\1\2\3" * 5, size))).shape == (1, 5)


@pytest.mark.parametrize(("format", "subtype"), [f for f in FORMATS if f[0] in ("WAV", "WAVEX", "RF64")][:9])
@pytest.mark.parametrize("num_cut", [1, 700, 5000])
def test_wav_that_is_cut_off_is_an_error(format: str, subtype: str, num_cut: int, tmp_path: Path) -> None:
    data = encoded(stereo(3000), 16000, format, subtype)[:-num_cut]
    (tmp_path / "audio.wav").write_bytes(data)
    for read in (lambda: piped(data), lambda: read_audio(tmp_path / "audio.wav")):
        with pytest.raises(AudioError, match=r"cannot be read as audio: it ended after \d+ of 3000 samples"):
            read()


@pytest.mark.parametrize(("format", "subtype"), [("FLAC", "PCM_16"), ("MP3", "MPEG_LAYER_III")])
@pytest.mark.parametrize("part", [0.3, 0.9, 0.99])
def test_flac_and_mp3_that_are_cut_off_are_errors(format: str, subtype: str, part: float, tmp_path: Path) -> None:
    data = encoded(stereo(50000), 16000, format, subtype)
    (tmp_path / "audio").write_bytes(data[: int(part * len(data))])
    with pytest.raises(AudioError, match="cannot be read as audio") as caught:
        read_audio(tmp_path / "audio")
    one_line(caught)


def flac_of_unknown_length(audio: np.ndarray) -> bytes:
    data = bytearray(encoded(audio, 16000, "FLAC", "PCM_16"))
    data[21] &= 0xF0
    data[22:26] = bytes(4)
    return bytes(data)


def test_flac_of_unknown_length_is_read_to_its_end() -> None:
    audio = stereo(50000)
    with AudioReader(Pipe(flac_of_unknown_length(audio), 4096)) as reader:
        assert reader.num_samples is None
        read = np.concatenate(list(reader.blocks(1000)), axis=1)
    np.testing.assert_array_equal(read, piped(encoded(audio, 16000, "FLAC", "PCM_16"), 4096))


def test_mp3_without_a_length_is_read_to_its_end(tmp_path: Path) -> None:
    loud_then_quiet = np.concatenate([np.random.default_rng(0).uniform(-1, 1, 20000), np.zeros(100000)])
    path = tmp_path / "audio.mp3"
    with soundfile.SoundFile(
        path, "w", 16000, 1, "MPEG_LAYER_III", bitrate_mode="VARIABLE", compression_level=0.5
    ) as file:
        file.write(loud_then_quiet)
    data = path.read_bytes()
    assert read_audio(path)[0].shape == (1, 120000)
    start = data.index(b"\xff\xf3", data.index(b"Xing"))  # the frame after the one that holds the length
    for tags in ((b"", b""), (b"ID3\4\0\0\0\0\1\0" + bytes(128), b"TAG" + b"x" * 125)):
        path.write_bytes(tags[0] + data[start:] + tags[1])
        assert soundfile.info(path).frames < 110000  # a guess
        with AudioReader(path) as reader:
            assert reader.num_samples is None
            assert 120000 <= sum(block.shape[1] for block in reader.blocks()) < 123000


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "is empty"),
        (b"no audio at all\n" * 10, "cannot be read as audio: Format not recognised$"),
        (b"RIFF", "cannot be read as audio"),
        (riff(), "it ends before its samples begin"),
        (riff(FMT), "it ends before its samples begin"),
        (riff(FMT, chunk(b"LIST", b"", 2**32 - 1)), "it ends before its samples begin"),
        (riff(chunk(b"data", bytes(8))), "no fmt chunk"),
        (riff(chunk(b"fmt ", FMT[8:20]), chunk(b"data", bytes(8))), "fmt chunk is too short"),
        (riff(*[chunk(b"none", b"")] * 2000), "no samples in its first 1000 chunks"),
        (riff(FMT.replace(b"\1\0\1\0", b"\1\0\0\0"), chunk(b"data", bytes(8))), "claims 0 channels"),
        (riff(FMT.replace(b"\1\0\1\0", b"\1\0\xff\xff"), chunk(b"data", bytes(8))), "claims 65535 channels"),
        (riff(FMT.replace(b"\x80\x3e", b"\0\0"), chunk(b"data", bytes(8))), "1 channels of 0 Hz"),
        (riff(FMT.replace(b"\2\0\x10\0", b"\3\0\x10\0"), chunk(b"data", bytes(8))), "16 bits in 3 bytes"),
        (riff(FMT, chunk(b"data", bytes(6), 2**32 - 1), b"x"), "ended inside a sample: 1 bytes of 2"),
        (riff(FMT, chunk(b"data", bytes(8), 2**32 - 2)), "it ended after 4 of 2147483647 samples"),
        (riff(HUGE, FMT, chunk(b"data", bytes(8), 2**32 - 1), name=b"RF64"), "after 4 of 36028797018963968 samples"),
        (riff(chunk(b"ds64", bytes(8)), FMT, chunk(b"data", bytes(8)), name=b"RF64"), "ds64 chunk is too short"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("from_pipe", [True, False])
def test_streams_that_are_no_audio(data: bytes, reason: str, from_pipe: bool, tmp_path: Path) -> None:
    path = tmp_path / "audio.wav"
    path.write_bytes(data)
    with (
        pytest.raises(AudioError, match=reason) as caught,
        AudioReader(Pipe(data, 50) if from_pipe else path) as reader,
    ):
        for _ in reader.blocks():
            pass
    assert one_line(caught).startswith("standard input " if from_pipe else f"{path} ")


@given(
    position=st.integers(0, 90),
    values=st.binary(min_size=1, max_size=8),
    subtype=st.sampled_from(["PCM_16", "PCM_24", "FLOAT", "ULAW"]),
    format=st.sampled_from(["WAV", "WAVEX", "RF64"]),
    cut=st.integers(0, 400),
)
@settings(max_examples=150)
def test_damaged_wav_is_finite_audio_or_an_error(
    position: int, values: bytes, subtype: str, format: str, cut: int, tmp_path: Path
) -> None:
    data = bytearray(encoded(stereo(100), 16000, format, subtype))
    data[position : position + len(values)] = values
    data = data[: len(data) - cut] if cut % 2 else data
    for source in (Pipe(bytes(data), 64), tmp_path / "audio"):
        (tmp_path / "audio").write_bytes(data)
        try:
            with AudioReader(source) as reader:
                for block in reader.blocks():
                    assert block.shape[0] == reader.num_channels
                    assert np.isfinite(block).all()
        except AudioError as error:
            assert "\n" not in str(error)  # noqa: PT017 - no error is right as well


def test_lying_headers_take_no_memory() -> None:
    """In a process of its own, which may not have more memory than little audio takes."""
    code = """
import io, resource, sys
from codec import wav
from codec.audio import AudioError, AudioReader
resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
header = bytearray(wav.write_header(48000, 1024, 2**19))
try:
    with AudioReader(io.BytesIO(bytes(header) + bytes(2**20))) as reader:
        list(reader.blocks(2**40))
except AudioError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "standard input cannot be read as audio: it ended after 512 of 524288 samples\n"


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("subtype", ["FLOAT", "DOUBLE"])
def test_samples_that_are_not_finite_are_named(bad: float, subtype: str, tmp_path: Path) -> None:
    audio = stereo(1000).astype(np.float64)
    for value in (bad, 1e300 if subtype == "DOUBLE" else bad):  # what float32 cannot hold is infinite
        audio[1, 321] = value
        data = encoded(audio, 16000, "WAV", subtype)
        (tmp_path / "audio.wav").write_bytes(data)
        for read in (partial(piped, data), partial(read_audio, tmp_path / "audio.wav")):
            with pytest.raises(AudioError, match="NaN or infinite samples, the first at sample 321"):
                read()


@pytest.mark.parametrize("num_channels", [1, 2, 6])
def test_raw_samples(num_channels: int, tmp_path: Path) -> None:
    samples = np.random.default_rng(0).integers(-(2**15), 2**15, (1000, num_channels)).astype("<i2")
    path = tmp_path / "audio.wav"  # its suffix says nothing
    path.write_bytes(samples.tobytes())
    format = RawFormat(16000, num_channels)
    for source, num_samples in ((path, 1000), (Pipe(samples.tobytes()), None)):
        with AudioReader(source, raw=format) as reader:
            assert (reader.rate_hz, reader.num_channels, reader.num_samples) == (16000, num_channels, num_samples)
            reader.seek(100)
            audio = np.concatenate(list(reader.blocks(64)), axis=1)
        np.testing.assert_array_equal(audio, samples[100:].T / 2**15)
    assert written(piped(samples.tobytes(), raw=format), 16000, raw=True) == samples.tobytes()
    path.write_bytes(samples.tobytes()[:-1])
    for source in (path, Pipe(samples.tobytes()[:-1])):
        with pytest.raises(AudioError, match="ended inside a sample"), AudioReader(source, raw=format) as reader:
            list(reader.blocks())
    with pytest.raises(AudioError, match="holds no samples"):
        piped(b"", raw=format)


@pytest.mark.parametrize(("rate_hz", "num_channels"), [(0, 1), (-1, 1), (16000, 0), (16000, -1), (16000, 10**6)])
def test_raw_formats_that_make_no_sense(rate_hz: int, num_channels: int) -> None:
    with pytest.raises(AudioError, match=r"raw audio cannot have .* channels of .* Hz"):
        RawFormat(rate_hz, num_channels)


def test_a_named_pipe_is_read_as_a_stream(tmp_path: Path) -> None:
    path = tmp_path / "queue.wav"
    os.mkfifo(path)
    data = written(stereo(), 16000)
    thread = threading.Thread(target=path.write_bytes, args=(data,))
    thread.start()
    with AudioReader(path) as reader:
        assert sum(block.shape[1] for block in reader.blocks()) == 3000
    thread.join()


def test_a_file_as_standard_input_is_known_to_be_one(tmp_path: Path) -> None:
    for name in ("audio.wav", "audio.flac"):
        soundfile.write(tmp_path / name, stereo().T, 16000)
        with open(tmp_path / name, "rb") as file:
            with AudioReader(file) as reader:
                assert reader.num_samples == 3000
                assert sum(block.shape[1] for block in reader.blocks()) == 3000
            assert not file.closed


def test_a_stream_that_does_not_wait_is_an_error() -> None:
    read_end, write_end = os.pipe()
    os.set_blocking(read_end, False)
    with open(read_end, "rb") as source, open(write_end, "wb"), pytest.raises(AudioError, match="does not wait"):
        AudioReader(source)


def test_a_stream_that_fails_is_an_error() -> None:
    class Broken(Pipe):
        def read(self, num_bytes: int = -1) -> bytes:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    with pytest.raises(AudioError, match="standard input cannot be read as audio: Input/output error"):
        AudioReader(Broken(b""))


def test_no_room_for_a_copy_of_the_stream(full_disk: FullDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(np.random.default_rng(0).uniform(-1, 1, (1, 20000)), 16000, "FLAC", "PCM_16")
    with full_disk(), pytest.raises(AudioError, match="kept in a temporary file: File too large") as caught:
        piped(data, 4096)
    one_line(caught)
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    with pytest.raises(AudioError, match="kept in a temporary file: No such file"):
        piped(data, 4096)


def test_a_sparse_rf64_file_of_6_gib(tmp_path: Path) -> None:
    path = tmp_path / "audio.wav"
    num_samples = 3 * 2**30
    header = wav.write_header(16000, 1, num_samples, wide=True)
    with open(path, "wb") as file:
        file.write(header)
        file.truncate(len(header) + 2 * num_samples)
        file.seek(-2, os.SEEK_END)
        file.write(b"\0\x40")
    assert soundfile.info(path).frames == num_samples
    with AudioReader(path) as reader:
        assert reader.num_samples == num_samples
        reader.seek(num_samples - 2)
        assert [block.tolist() for block in reader.blocks()] == [[[0, 0.5]]]


def test_a_wav_file_of_2_gib_ends_where_it_says(tmp_path: Path) -> None:
    path = tmp_path / "audio.wav"
    num_samples = 2**30 - 100  # as large as what sox writes to pipes
    with open(path, "wb") as file:
        file.write(wav.write_header(16000, 1, num_samples))
        file.truncate(44 + 2 * num_samples)
        file.seek(0, os.SEEK_END)
        file.write(chunk(b"LIST", b"not audio!"))
    with AudioReader(path) as reader:
        assert reader.num_samples == num_samples
        reader.seek(num_samples - 5)
        assert [block.shape for block in reader.blocks()] == [(1, 5)]


def test_memory_does_not_grow_with_the_audio(tmp_path: Path) -> None:
    """Two minutes of 192 kHz in six channels, in float32 more than 500 MB, in a process that has less left."""
    code = f"""
import resource, numpy as np
from codec.audio import AudioReader, AudioWriter, Resampler
resource.setrlimit(resource.RLIMIT_AS, ({2**29},) * 2)
path = {str(tmp_path / "audio.raw")!r}
open(path, "wb").truncate(12 * 192000 * 120)
from codec.audio import RawFormat
resampler = Resampler(192000, 8000, 6)
with AudioReader(path, raw=RawFormat(192000, 6)) as reader, AudioWriter(path + ".wav", 8000, 6) as writer:
    for block in reader.blocks(65536):
        writer.write(resampler.push(block))
    writer.write(resampler.flush())
    writer.finish()
print(reader.num_samples)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == 192000 * 120
    assert soundfile.info(tmp_path / "audio.raw.wav").frames == 8000 * 120
