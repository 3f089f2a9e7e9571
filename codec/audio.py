"""Audio files and streams: read, resample, write, in pieces. The only module that touches them.

Audio is float32 [C, T] (channels first), full scale at -1..1. Every failure is an `AudioError` of one line.
"""

from __future__ import annotations

import contextlib
import io
import os
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

import numpy as np
import soundfile
import soxr

from codec import wav
from codec.files import AtomicFile

AUDIO_SUFFIXES = (".flac", ".mp3", ".ogg", ".opus", ".wav")
_ENCODERS = {  # those of libsndfile, by suffix; WAV is written here
    ".flac": ("FLAC", "PCM_16"),
    ".mp3": ("MP3", "MPEG_LAYER_III"),
    ".ogg": ("OGG", "VORBIS"),
    ".opus": ("OGG", "OPUS"),
}
_OPUS_RATES_HZ = (8000, 12000, 16000, 24000, 48000)  # Source: RFC 6716, section 2
_UNKNOWN_SAMPLES = 2**63 - 1  # what libsndfile says of FLAC written to a pipe


class AudioError(ValueError):
    """The audio cannot be used; the message says why in one line."""


@dataclass(frozen=True)
class RawFormat:
    """Headerless PCM: signed 16 bit, little endian, channels interleaved."""

    rate_hz: int
    num_channels: int = 1

    def __post_init__(self) -> None:
        if self.rate_hz < 1 or not 1 <= self.num_channels <= wav.MAX_CHANNELS:
            raise AudioError(f"raw audio cannot have {self.num_channels} channels of {self.rate_hz} Hz")


def find_audio(folder: str | os.PathLike[str]) -> list[Path]:
    """All audio files under a folder, known by their suffix, sorted. AudioError where there is none."""
    found = sorted(file for file in Path(folder).rglob("*") if file.suffix.lower() in AUDIO_SUFFIXES)
    if not found:
        raise AudioError(f"no audio files under {folder} (looked for {', '.join(AUDIO_SUFFIXES)})")
    return found


class AudioReader:
    """Audio from a file or a stream, in blocks and in constant memory.

    WAV with PCM or float samples is parsed here, alike from files and pipes; all else that libsndfile knows is left to
    it, from a pipe by way of a temporary file. A path that is no ordinary file (a named pipe, /dev/stdin) is read as a
    stream. A stream that was passed is not closed, nor read beyond what its header declares.

    `num_samples` is what the header says, None where it does not. Audio that ends before that is an AudioError, as is a
    FLAC frame that is cut. Not detected: an early end of Ogg, AIFF, AU, CAF or compressed WAV, whose lengths libsndfile
    takes from what is there, and of streams without a length, MP3 without a Xing header among them.

    >>> samples = io.BytesIO(bytes(1200))
    >>> with AudioReader(samples, raw=RawFormat(16000, num_channels=2)) as reader:
    ...     [block.shape for block in reader.blocks(200)]
    [(2, 200), (2, 100)]
    """

    name: str  # for messages: the path, or "standard input"
    rate_hz: int
    num_channels: int
    num_samples: int | None  # per channel
    is_live: bool  # a pipe or the like, whose audio may still be coming in

    def __init__(self, source: str | os.PathLike[str] | BinaryIO, *, raw: RawFormat | None = None) -> None:
        path = source if isinstance(source, (str, os.PathLike)) else None
        self.name = "standard input" if path is None else _shown(path)
        self._position = 0
        with contextlib.ExitStack() as opened:
            with _failing(f"{self.name} cannot be read as audio"):
                stream = cast(BinaryIO, source) if path is None else opened.enter_context(_open(path, self.name))
                self.is_live = _num_file_bytes(stream) is None
                self._source = _open_source(stream, self.name, raw, opened)
            self.rate_hz, self.num_channels = self._source.rate_hz, self._source.num_channels
            self.num_samples = self._source.num_samples
            if self.num_samples == 0:
                raise AudioError(f"{self.name} holds no samples")
            self._opened = opened.pop_all()

    def blocks(self, block_samples: int = 8192) -> Iterator[np.ndarray]:
        """The audio as [C, block_samples], the last block perhaps shorter. Each comes as soon as its bytes are there.

        AudioError where the audio ends too early or holds NaN or infinity.
        """
        if block_samples < 1:
            raise ValueError(f"block_samples must be positive, not {block_samples}")
        while (block := self._read(block_samples)).shape[1]:
            is_finite = np.isfinite(block).all(axis=0)
            if not is_finite.all():
                position = self._position - block.shape[1] + int(is_finite.argmin())
                raise AudioError(f"{self.name} holds NaN or infinite samples, the first at sample {position}")
            yield block
        if self._position == 0:
            raise AudioError(f"{self.name} holds no samples")

    def seek(self, sample: int) -> None:
        """Go forward to this sample, before `blocks`. AudioError where the audio ends before it."""
        if sample < self._position:
            raise ValueError(f"the reader is at sample {self._position}, beyond {sample}")
        is_there = self.num_samples is None or sample <= self.num_samples
        if self.num_samples is not None and sample < self.num_samples:
            with _failing(f"{self.name} cannot be read as audio"):
                self._position += self._source.jump(sample - self._position)
        while is_there and self._position < sample:
            is_there = self._read(min(8192, sample - self._position)).shape[1] > 0
        if not is_there:
            raise AudioError(f"{self.name} has {self.num_samples or self._position} samples, none to go to at {sample}")

    def close(self) -> None:
        """Close what the reader opened. Does nothing when called again."""
        self._opened.close()

    def __enter__(self) -> AudioReader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _read(self, num_samples: int) -> np.ndarray:
        with _failing(f"{self.name} cannot be read as audio"):
            block = self._source.read(num_samples)
            self._position += block.shape[1]
            if block.shape[1] == 0 and self._position < (self.num_samples or 0):
                raise ValueError(f"it ended after {self._position} of {self.num_samples} samples")
            return block


class Resampler:
    """Resamples audio that comes in pieces; where rates are equal, it hands them on.

    All output together is bit-equal to what `resample` makes of all input together.

    >>> resampler = Resampler(16000, 48000, num_channels=1)
    >>> start = resampler.push(np.zeros((1, 500), np.float32))
    >>> start.shape[1] + resampler.flush().shape[1]
    1500
    """

    def __init__(self, from_hz: int, to_hz: int, num_channels: int) -> None:
        self._from_hz, self._to_hz, self._num_channels = from_hz, to_hz, num_channels
        self._num_in = self._num_out = 0
        self._stream = None
        if from_hz != to_hz:
            with _failing(f"audio cannot be resampled from {from_hz} to {to_hz} Hz"):
                self._stream = soxr.ResampleStream(from_hz, to_hz, num_channels, dtype="float32", quality="HQ")

    def push(self, audio: np.ndarray) -> np.ndarray:
        """[C, n] in; out comes [C, m], what can be said by now."""
        return self._process(audio, is_last=False)

    def flush(self) -> np.ndarray:
        """The rest of the output, once and after all input."""
        rest = self._process(np.zeros((self._num_channels, 0), np.float32), is_last=True)
        num_missing = resampled_length(self._num_in, self._from_hz, self._to_hz) - (self._num_out - rest.shape[1])
        return fit_length(rest, num_missing)

    def _process(self, audio: np.ndarray, *, is_last: bool) -> np.ndarray:
        self._num_in += audio.shape[1]
        if self._stream is not None and self._num_in:
            with _failing(f"audio cannot be resampled from {self._from_hz} to {self._to_hz} Hz"):
                audio = self._stream.resample_chunk(np.ascontiguousarray(audio.T, np.float32), last=is_last).T
        self._num_out += audio.shape[1]
        return audio


class AudioWriter:
    """A 16-bit audio file, or a stream, written in pieces. Values beyond full scale are clipped.

    A path's suffix says what is written: one of AUDIO_SUFFIXES; `suffix` overrides it, `raw` stands for samples without
    a header. The file appears whole at `finish` or not at all. WAV beyond 4 GiB becomes RF64. A stream gets WAV or raw
    samples, at once after every `write`; its header has sizes 2^32 - 1 where `num_samples` is not known or too large.
    A stream is not closed, and a BrokenPipeError from it passes through.

    >>> stream = io.BytesIO()
    >>> with AudioWriter(stream, 16000, num_channels=1, num_samples=200) as writer:
    ...     writer.write(np.zeros((1, 200), np.float32))
    ...     writer.finish()
    >>> len(stream.getvalue())
    444
    """

    name: str  # for messages: the path, or "standard output"

    def __init__(
        self,
        target: str | os.PathLike[str] | BinaryIO,
        rate_hz: int,
        num_channels: int,
        *,
        num_samples: int | None = None,
        raw: bool = False,
        suffix: str | None = None,
    ) -> None:
        path = target if isinstance(target, (str, os.PathLike)) else None
        self.name = "standard output" if path is None else _shown(path)
        self._rate_hz, self._num_channels = rate_hz, num_channels
        self._num_promised, self._num_written = num_samples, 0
        self._partial: AtomicFile | None = None
        self._encoder: _Encoder | None = None
        suffix = (suffix or (".wav" if path is None else Path(path).suffix)).lower()
        with contextlib.ExitStack() as opened, _failing(f"{self.name} cannot be written"):
            if not raw:
                _check_writable(suffix, rate_hz, num_channels, is_path=path is not None)
            if path is not None:
                self._partial = opened.enter_context(AtomicFile(path))
            self._file = cast(BinaryIO, target) if self._partial is None else self._partial.file
            self._header_changes = not raw and suffix == ".wav" and path is not None and num_samples is None
            if not raw and suffix == ".wav":
                wide = path is not None and not wav.fits(num_channels, num_samples)
                self._put(wav.write_header(rate_hz, num_channels, num_samples, wide=wide))
            elif not raw:
                self._encoder = opened.enter_context(_Encoder(self._file, rate_hz, num_channels, *_ENCODERS[suffix]))
            self._opened = opened.pop_all()

    def write(self, audio: np.ndarray) -> None:
        """Append [C, n]. The scale is that of reading: 16-bit samples survive both."""
        if audio.ndim != 2 or audio.shape[0] != self._num_channels:
            raise ValueError(f"audio must be [{self._num_channels}, n], not {list(audio.shape)}")
        with _failing(f"{self.name} cannot be written"):
            if np.isnan(audio).any():
                raise ValueError("the audio holds NaN")
            self._num_written += audio.shape[1]
            self._check_promise(is_last=False)
            samples = np.clip(np.round(audio.T * 32768.0), -32768, 32767).astype("<i2")
            if self._encoder is None:
                self._put(samples.tobytes())
            else:
                self._encoder.write(samples)

    def finish(self) -> None:
        """Complete the file and put it in its place. AudioError where `num_samples` were promised and did not come."""
        with _failing(f"{self.name} cannot be written"):
            self._check_promise(is_last=True)
            if self._encoder is not None:
                self._encoder.finish()
            if self._header_changes:
                self._file.seek(0)
                self._put(wav.write_header(self._rate_hz, self._num_channels, self._num_written, wide=True))
            if self._partial is not None:
                self._partial.commit()

    def close(self) -> None:
        """Discard the file unless it was finished. Does nothing when called again."""
        self._opened.close()

    def __enter__(self) -> AudioWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _put(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:  # an unbuffered stream may take less than all
            rest = rest[self._file.write(rest) :]
        if self._partial is None:
            self._file.flush()

    def _check_promise(self, *, is_last: bool) -> None:
        promised = self._num_promised
        if promised is not None and (self._num_written > promised or (is_last and self._num_written < promised)):
            raise ValueError(f"{promised} samples were announced, {self._num_written} came")


def read_audio(path: str | os.PathLike[str]) -> tuple[np.ndarray, int]:
    """A whole file as float32 [C, T], and its rate in Hz. AudioError where it is no audio or holds none."""
    with AudioReader(path) as reader, _failing(f"{reader.name} cannot be read as audio"):
        return np.concatenate(list(reader.blocks()), axis=1), reader.rate_hz


def write_audio(path: str | os.PathLike[str], audio: np.ndarray, rate_hz: int) -> None:
    """Write [C, T] as a 16-bit WAV file, whatever its name. See `AudioWriter`."""
    with AudioWriter(path, rate_hz, len(audio), num_samples=audio.shape[1], suffix=".wav") as writer:
        writer.write(audio)
        writer.finish()


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


class _Source(Protocol):
    rate_hz: int
    num_channels: int
    num_samples: int | None

    def read(self, num_samples: int) -> np.ndarray:
        """The next samples, [C, n]: as many as asked for, fewer only at the end."""

    def jump(self, num_samples: int) -> int:
        """Go forward without reading where that is exact; returns by how many samples. The target is in the audio."""


class _DecodedSource:
    """What libsndfile decodes."""

    def __init__(self, file: BinaryIO, opened: contextlib.ExitStack) -> None:
        os.lseek(file.fileno(), 0, os.SEEK_SET)
        self._decoder = opened.enter_context(_Decoder(file.fileno(), closefd=False))
        self.num_samples: int | None = self._decoder.frames
        if self._decoder.frames == _UNKNOWN_SAMPLES:
            self.num_samples = None
        if self._decoder.format == "MP3" and not _mp3_says_its_length(file):
            self.num_samples = None
            self._decoder = opened.enter_context(_Decoder(_FileWithoutEnd(file.fileno(), closefd=False)))
        self.rate_hz, self.num_channels = self._decoder.samplerate, self._decoder.channels

    def read(self, num_samples: int) -> np.ndarray:
        return np.ascontiguousarray(self._decoder.read(num_samples, dtype="float32", always_2d=True).T)

    def jump(self, num_samples: int) -> int:
        if self._decoder.format in ("MP3", "OGG"):  # decoders that carry their past with them
            return 0
        self._decoder.seek(num_samples, os.SEEK_CUR)
        return num_samples


class _Decoder(soundfile.SoundFile):
    """Reads forward only. soundfile would seek after every read, which fails at the end of FLAC of unknown length."""

    def seekable(self) -> bool:
        return False


class _FileWithoutEnd(io.FileIO):
    """A file that claims to be larger than it is, whoever asks for its end.

    Without a Xing header, libsndfile takes an MP3 file's length from its size and the bitrate of its first frame, and
    ends there: most of a file can be lost. Bitrates differ by less than this factor (8 to 320 kbit/s).
    """

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if (offset, whence) == (0, os.SEEK_END):  # a tag of 128 bytes is looked for where the file really ends
            offset = 63 * os.fstat(self.fileno()).st_size
        return super().seek(offset, whence)


class _Encoder:
    """A file that libsndfile encodes. It hides errors of its last writes, made on closing; this one does not."""

    def __init__(self, file: BinaryIO, rate_hz: int, num_channels: int, format: str, subtype: str) -> None:
        self._sink = _Sink(file.fileno(), "wb", closefd=False)
        self._file = soundfile.SoundFile(self._sink, "w", rate_hz, num_channels, subtype, format=format)
        self._is_lossless = subtype == "PCM_16"

    def write(self, samples_TC: np.ndarray) -> None:
        """Append 16-bit samples."""
        if not self._is_lossless:  # libsndfile garbles stereo MP3 that comes in 16 bits
            samples_TC = samples_TC.astype(np.float32) / np.float32(32768)
        with self._errors_of_the_sink():
            for start in range(0, len(samples_TC), 8192):  # Vorbis takes its working memory from the stack
                self._file.write(samples_TC[start : start + 8192])

    def finish(self) -> None:
        with self._errors_of_the_sink():
            self._file.close()

    def __enter__(self) -> _Encoder:
        return self

    def __exit__(self, *exception: object) -> None:
        with contextlib.suppress(soundfile.SoundFileError):
            self._file.close()

    @contextlib.contextmanager
    def _errors_of_the_sink(self) -> Iterator[None]:
        try:
            yield
        except (soundfile.SoundFileError, AssertionError) as error:  # soundfile asserts that all was written
            raise self._sink.error or OSError(str(error)) from error
        if self._sink.error is not None:
            raise self._sink.error


class _Sink(io.FileIO):
    """Remembers the first error. libsndfile calls it from C, where exceptions are lost."""

    error: BaseException | None = None

    def write(self, data: Any) -> int:
        rest = memoryview(data)
        try:
            while rest and self.error is None:
                rest = rest[super().write(rest) :]
        except BaseException as error:  # an interrupt as well
            self.error = error
        return len(data) - len(rest)


def _open(path: Any, name: str) -> BinaryIO:
    try:
        return open(path, "rb")
    except FileNotFoundError as error:
        raise AudioError(f"{name}: no such file") from error
    except IsADirectoryError as error:
        raise AudioError(f"{name} is a folder") from error


def _open_source(stream: BinaryIO, name: str, raw: RawFormat | None, opened: contextlib.ExitStack) -> _Source:
    num_bytes = _num_file_bytes(stream)
    if num_bytes == 0:
        raise AudioError(f"{name} is empty")
    if raw is not None:
        return wav.PcmReader(stream, wav.WavFormat(raw.rate_hz, raw.num_channels, wav.PCM_16), num_bytes)
    if num_bytes is not None:
        format = wav.read_header(lambda n: wav.read_exactly(stream, n), num_bytes)
        return wav.PcmReader(stream, format, num_bytes - stream.tell()) if format else _DecodedSource(stream, opened)
    # The file has no name, so nothing can stay behind.
    copy = cast(BinaryIO, opened.enter_context(tempfile.SpooledTemporaryFile(max_size=2**20)))  # noqa: SIM115

    def read(num_bytes: int) -> bytes:
        data = wav.read_exactly(stream, num_bytes)
        with _failing(f"{name} cannot be kept in a temporary file"):
            copy.write(data)
        return data

    format = wav.read_header(read)
    if format is not None:
        copy.close()
        return wav.PcmReader(stream, format, None)
    while read(wav.PIECE_BYTES):
        pass
    if copy.tell() == 0:
        raise AudioError(f"{name} is empty")
    with _failing(f"{name} cannot be kept in a temporary file"):
        copy.fileno()  # from memory to disk
        copy.flush()
    return _DecodedSource(copy, opened)


def _num_file_bytes(stream: BinaryIO) -> int | None:
    """The size of an ordinary file that was not read yet; None for all else."""
    try:
        status = os.fstat(stream.fileno())
        return status.st_size if stat.S_ISREG(status.st_mode) and stream.tell() == 0 else None
    except (OSError, AttributeError):  # in memory, or something of the caller's own
        return None


def _mp3_says_its_length(file: BinaryIO) -> bool:
    """Whether the first frame tells the number of frames. Source: Xing's "VBR header"; ID3v2.4, section 3.1."""
    start = 0
    while (head := os.pread(file.fileno(), 10, start))[:3] == b"ID3" and len(head) == 10:
        start += 10 + sum(byte << shift for byte, shift in zip(head[6:], (21, 14, 7, 0), strict=True))
    frame = os.pread(file.fileno(), 4096, start)
    found = max(frame.find(b"Xing"), frame.find(b"Info"))
    return found >= 0 and frame[found + 7] & 1 == 1 and any(frame[found + 8 : found + 12])


def _check_writable(suffix: str, rate_hz: int, num_channels: int, *, is_path: bool) -> None:
    known = AUDIO_SUFFIXES if is_path else (".wav",)
    if suffix not in known:
        raise ValueError(f"its suffix {suffix!r} is none of {', '.join(known)}")
    if suffix == ".ogg" and not (1 <= rate_hz <= 200_000 and 1 <= num_channels <= 255):  # libsndfile would crash
        raise ValueError(f"Vorbis cannot hold {num_channels} channels of {rate_hz} Hz, only 255 of up to 200000 Hz")
    if suffix == ".opus" and rate_hz not in _OPUS_RATES_HZ:
        raise ValueError(f"Opus has no rate of {rate_hz} Hz, only {', '.join(map(str, _OPUS_RATES_HZ))}")


def _shown(path: Any) -> str:
    """A path as one line."""
    name = os.fsdecode(path)
    return name if name.isprintable() else repr(name)


@contextlib.contextmanager
def _failing(what: str) -> Iterator[None]:
    """Turns every failure within into an AudioError: what failed, and why."""
    try:
        yield
    except (AudioError, BrokenPipeError):
        raise
    except (
        soundfile.SoundFileError,
        OSError,
        ValueError,
        TypeError,
        OverflowError,
        RuntimeError,
        MemoryError,
    ) as error:
        reason = getattr(error, "error_string", None) or getattr(error, "strerror", None) or str(error)
        lines = (reason or type(error).__name__).removeprefix("Error : ").split()
        raise AudioError(f"{what}: {' '.join(lines).rstrip('.')}") from error
