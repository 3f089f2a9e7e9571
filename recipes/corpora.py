"""Recordings to train on, wherever they lie, and any stretch of any of them.

`open_corpus` knows four kinds of sources: a packed folder (see `recipes.packing`), a folder of audio files, a manifest
(TSV or JSONL), and WebDataset shards (tar files). All of them become a `Corpus`: a list of recordings, and
`read(number, first_sample, num_samples)`, which depends on nothing that was read before.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import soundfile

from codec.audio import AudioError, AudioReader
from recipes.recordings import Recording, Skipped, find_recordings


def is_packed(source: Path) -> bool:
    """Whether this is a folder that `recipes.packing.pack_audio` wrote."""
    return (source / "index.json").is_file()


class Corpus(Protocol):
    """The recordings of one source."""

    source: Path
    recordings: Sequence[Recording]
    skipped: Sequence[Skipped]  # what was found and cannot be used

    def read(self, number: int, first_sample: int, num_samples: int) -> np.ndarray:
        """float32 [C, num_samples] of `recordings[number]`, at its own rate and with its own channels.

        AudioError, which names the recording, where these samples cannot be read.
        """


def open_corpus(source: Path, *, split: str | None = None) -> Corpus:
    """Find the recordings of a source and look at each one's header.

    Recordings that cannot be read are listed in `skipped`. ValueError where the source is none of the four kinds, where
    it holds no recordings, where a manifest names files that are not there, and where nothing can be read.

    >>> import tempfile
    >>> from codec.audio import write_audio
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_audio(Path(folder, "a.wav"), np.zeros((2, 800), np.float32), 8000)
    ...     corpus = open_corpus(Path(folder))
    ...     [(r.path, r.sample_rate_hz, r.num_channels, r.num_samples) for r in corpus.recordings]
    ...     corpus.read(0, 100, 50).shape
    [('a.wav', 8000, 2, 800)]
    (2, 50)
    """
    if is_packed(source):
        return PackedCorpus(source)
    found, skipped = find_recordings(source, split=split)
    if source.is_file() and source.suffix != ".tar":
        missing = [recording.path for recording in found if not os.path.isfile(recording.file)]
        if missing:
            raise ValueError(f"{source} names {len(missing)} files that are not there, the first: {missing[0]}")
    with ThreadPoolExecutor(8) as pool:  # decoders release the interpreter, and disks may be far away
        looked_at = list(pool.map(examine, found))
    skipped += [result for result in looked_at if isinstance(result, Skipped)]
    recordings = [result for result in looked_at if isinstance(result, Recording)]
    if not recordings:
        raise ValueError(f"{source}: no recording can be used of {len(skipped)}; the first, {skipped[0]}")
    return FileCorpus(source, recordings, skipped)


def examine(recording: Recording) -> Recording | Skipped:
    """The recording with its rate, channels and samples, from its header where that tells them."""
    if recording.sample_rate_hz and recording.num_channels and recording.num_samples:
        return recording
    try:
        with recording.opened() as source:
            if not isinstance(source, str):  # AudioReader would copy it first
                with contextlib.suppress(soundfile.SoundFileError), soundfile.SoundFile(source) as file:
                    if file.format != "MP3" and 0 < file.frames < 2**62:  # an MP3's length may be a guess
                        return replace(
                            recording,
                            sample_rate_hz=file.samplerate,
                            num_channels=file.channels,
                            num_samples=file.frames,
                        )
                source.seek(0)
            with AudioReader(source) as reader:
                num_samples = reader.num_samples
                if num_samples is None:
                    num_samples = sum(block.shape[1] for block in reader.blocks())
                return replace(
                    recording,
                    sample_rate_hz=reader.rate_hz,
                    num_channels=reader.num_channels,
                    num_samples=num_samples,
                )
    except (AudioError, OSError) as error:
        return Skipped(recording.path, reason_of(error, recording))


def reason_of(error: Exception, recording: Recording) -> str:
    """Why a recording cannot be used, without its name."""
    reason = str(error) if isinstance(error, AudioError) else getattr(error, "strerror", None) or str(error)
    for name in (recording.file, repr(recording.file), "standard input"):
        reason = reason.removeprefix(name)
    return " ".join(reason.split()).removeprefix(": ").removeprefix("cannot be read as audio: ")


def to_channels(audio: np.ndarray, num_channels: int) -> np.ndarray:
    """[C, T] with so many channels: mixed down to one by their mean, or one repeated. AudioError for all else."""
    if len(audio) == num_channels:
        return audio
    if num_channels == 1:
        return np.asarray(audio.mean(axis=0, keepdims=True))
    if len(audio) == 1:
        return np.repeat(audio, num_channels, axis=0)
    raise AudioError(f"it has {len(audio)} channels, neither 1 nor {num_channels}")


class FileCorpus:
    """Audio files on disk or in tar files. Only what is asked for is read where the format can be entered anywhere.

    MP3 cannot (a frame needs bits of those before it), nor can files whose header does not tell their length: these are
    decoded from their beginning.
    """

    def __init__(self, source: Path, recordings: Sequence[Recording], skipped: Sequence[Skipped]) -> None:
        self.source = source
        self.recordings, self.skipped = recordings, skipped

    def read(self, number: int, first_sample: int, num_samples: int) -> np.ndarray:
        """See `Corpus.read`."""
        recording = self.recordings[number]
        try:
            with recording.opened() as source:
                audio = _read_from(source, recording, first_sample, num_samples)
                if audio is None:
                    if not isinstance(source, str):
                        source.seek(0)
                    with AudioReader(source) as reader:
                        _check_rate(recording, reader.rate_hz)
                        reader.seek(first_sample)
                        audio = next(reader.blocks(num_samples), np.zeros((1, 0), np.float32))
            if audio.shape[1] < num_samples:
                raise AudioError(f"it ended after {first_sample + audio.shape[1]} of {recording.num_samples} samples")
            if not np.isfinite(audio).all():
                raise AudioError("holds NaN or infinite samples")
        except (AudioError, OSError) as error:
            raise AudioError(f"{recording.path}: {reason_of(error, recording)}") from error
        return audio


class PackedCorpus:
    """A folder that `recipes.packing.pack_audio` wrote: one file of 16-bit samples, mapped into memory."""

    skipped: Sequence[Skipped] = ()

    def __init__(self, source: Path) -> None:
        if not is_packed(source):
            raise ValueError(f"{source} is no folder of packed audio: it holds no index.json")
        index = json.loads((source / "index.json").read_text(encoding="utf-8"))
        self.source = source
        self.sample_rate_hz = int(index["sample_rate_hz"])
        self._shape = int(index["num_samples"]), int(index.get("num_channels", 1))
        self._first_samples = [int(clip["first_sample"]) for clip in index["clips"]]
        self.recordings: Sequence[Recording] = [
            Recording(
                clip["path"],
                clip["corpus"],
                clip["speaker"],
                clip["text"],
                self.sample_rate_hz,
                self._shape[1],
                clip["num_samples"],
            )
            for clip in index["clips"]
        ]
        if self._shape[0] == 0 or not self.recordings:
            raise ValueError(f"{source} holds no audio")
        num_bytes = (source / "audio.i16").stat().st_size if (source / "audio.i16").exists() else 0
        if num_bytes != 2 * self._shape[0] * self._shape[1]:
            raise ValueError(f"{source}/audio.i16 has {num_bytes} bytes, index.json tells of {self._shape[0]} samples")
        self._audio: np.ndarray | None = None

    def read(self, number: int, first_sample: int, num_samples: int) -> np.ndarray:
        """See `Corpus.read`."""
        recording = self.recordings[number]
        if first_sample + num_samples > recording.num_samples:
            raise AudioError(f"{recording.path}: it has only {recording.num_samples} samples")
        if self._audio is None:  # opened in the process that reads
            self._audio = np.memmap(self.source / "audio.i16", dtype="<i2", mode="r", shape=self._shape)
        start = self._first_samples[number] + first_sample
        return np.ascontiguousarray(self._audio[start : start + num_samples].T).astype(np.float32) / np.float32(32768)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_audio": None}  # a map would travel to another process as a copy of all its samples


def _read_from(source: str | BinaryIO, recording: Recording, first_sample: int, num_samples: int) -> np.ndarray | None:
    """[C, n] by going straight to the first sample; None where the format does not allow it or it fails."""
    try:
        with soundfile.SoundFile(source) as file:
            _check_rate(recording, file.samplerate)
            if file.format == "MP3":
                return None
            file.seek(first_sample)
            audio = file.read(num_samples, dtype="float32", always_2d=True).T
    except soundfile.SoundFileError:
        return None
    return np.ascontiguousarray(audio) if audio.shape[1] == num_samples else None


def _check_rate(recording: Recording, rate_hz: int) -> None:
    if rate_hz != recording.sample_rate_hz:
        raise AudioError(f"it has {rate_hz} Hz, not {recording.sample_rate_hz} Hz as was said of it")
