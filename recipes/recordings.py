"""What a source of recordings names: a folder of audio files, a manifest (TSV or JSONL), or WebDataset shards.

A tar file that is not compressed is a row of files. Its recordings are found once, as stretches of it, and any of them
can be opened at any time: no shuffle buffer is needed, and nothing depends on the order of reading.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, cast

# What is taken for audio in folders and shards. libsndfile does not read the second line: those are reported.
_SUFFIXES = {".aif", ".aiff", ".au", ".caf", ".flac", ".mp3", ".oga", ".ogg", ".opus", ".rf64", ".snd", ".w64", ".wav"}
_SUFFIXES |= {".3gp", ".aac", ".ac3", ".amr", ".m4a", ".mp2", ".mp4", ".mpc", ".sph", ".webm", ".wma", ".wv"}
_COLUMNS = ("path", "split", "corpus", "speaker", "text", "sample_rate_hz", "num_channels", "num_samples")
_HEADERLESS = ("path", "split", "corpus", "speaker", "", "", "text")  # its rate and seconds are not exact enough


@dataclass(frozen=True, slots=True)
class Recording:
    """One recording: what it is, and where its bytes lie. Rate, channels and samples are 0 until it was looked at."""

    path: str  # as its source names it
    corpus: str = "audio"
    speaker: str = ""
    text: str = ""
    sample_rate_hz: int = 0
    num_channels: int = 0
    num_samples: int = 0  # per channel, at its own rate
    file: str = ""  # the audio file, or the tar file that holds it
    first_byte: int = 0
    num_bytes: int | None = None  # None: the whole file

    @property
    def seconds(self) -> float:
        """Duration; 0 where it is not known yet."""
        return self.num_samples / self.sample_rate_hz if self.sample_rate_hz else 0.0

    @contextlib.contextmanager
    def opened(self) -> Iterator[str | BinaryIO]:
        """What a decoder opens: the name of the file, or the part of the tar file as a stream."""
        if self.num_bytes is None:
            yield self.file
            return
        with open(self.file, "rb", buffering=0) as whole:
            yield cast(BinaryIO, io.BufferedReader(_Part(whole, self.first_byte, self.num_bytes), 65536))


@dataclass(frozen=True)
class Skipped:
    """A recording that cannot be used, and why, in one line."""

    path: str
    reason: str

    @property
    def row(self) -> str:
        """Two columns, separated by a tab."""
        return f"{self.path if self.path.isprintable() else repr(self.path)}\t{self.reason}"

    def __str__(self) -> str:
        return self.row.replace("\t", ": ", 1)


def find_recordings(source: Path, *, split: str | None = None) -> tuple[list[Recording], list[Skipped]]:
    """The recordings that a folder of audio, a manifest or shards name, without opening them; and broken shards.

    A manifest is one of
    - TSV with a header, whose columns are among path, split, corpus, speaker, text, sample_rate_hz, num_channels and
      num_samples, in any order; others are ignored;
    - TSV without a header and with seven columns: path, split, corpus, speaker, rate, seconds, text;
    - JSONL (`.jsonl`): an object a line, with the keys of the header.
    Paths are relative to the manifest. `split` keeps the rows of that split, where a manifest has splits. A manifest
    that tells rate, channels and samples is believed, which saves opening every file at the start.

    Shards are a `.tar` file or a folder of them. The files of one recording share their name up to the first dot:
    `1.flac`, `1.txt` with its text, `1.json` with an object as in JSONL.
    """
    if source.is_dir():
        tars, files = sorted(source.rglob("*.tar")), _audio_files(source)
        if tars and files:
            raise ValueError(f"{source} holds both tar files ({tars[0].name}) and audio files ({files[0].name})")
        return _in_shards(source, tars) if tars else (_in_folder(source, files), [])
    if not source.is_file():
        raise ValueError(f"{source} is neither a folder of audio nor a manifest nor a tar file")
    if source.suffix == ".tar":
        return _in_shards(source, [source])
    return _in_manifest(source, split), []


class _Part(io.RawIOBase):
    """A stretch of an open file, as a file."""

    def __init__(self, whole: io.FileIO, first_byte: int, num_bytes: int) -> None:
        self._whole, self._first, self._size, self._position = whole, first_byte, num_bytes, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), max(0, self._size - self._position))
        data = os.pread(self._whole.fileno(), wanted, self._first + self._position)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def _audio_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in _SUFFIXES and file.is_file())


def _in_folder(folder: Path, files: Sequence[Path]) -> list[Recording]:
    if not files:
        raise ValueError(f"no audio files under {folder}")
    return [Recording(str(file.relative_to(folder)), speaker=file.parent.name, file=str(file)) for file in files]


def _in_manifest(manifest: Path, split: str | None) -> list[Recording]:
    found: list[Recording] = []
    splits: set[str] = set()
    for where, row in _rows(manifest):
        if not row.get("path"):
            raise ValueError(f"{where} names no path")
        if row.get("split"):
            splits.add(str(row["split"]))
            if split is not None and row["split"] != split:
                continue
        recording = _described(Recording(str(row["path"])), row, where)
        found.append(replace(recording, file=str(manifest.parent / recording.path)))
    if not found and splits:
        raise ValueError(f"{manifest} has no rows of split {split!r} (it has {sorted(splits)})")
    if not found:
        raise ValueError(f"{manifest} names no recordings")
    return found


def _rows(manifest: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where a row stands, and its values by name."""
    with manifest.open(newline="", encoding="utf-8-sig") as lines:
        try:
            if manifest.suffix == ".jsonl":
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        yield f"{manifest}:{number}", _json_object(line, f"{manifest}:{number}")
                return
            columns: Sequence[str] = ()
            for number, cells in enumerate(csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE), 1):
                if not columns:
                    columns = cells if "path" in cells else _HEADERLESS
                    if columns is cells:
                        continue
                if not any(cells):
                    continue
                if len(cells) != len(columns):
                    raise ValueError(f"{manifest}:{number}: {len(cells)} tab-separated columns, not {len(columns)}")
                yield f"{manifest}:{number}", dict(zip(columns, cells, strict=True))
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{manifest} is no text of UTF-8 in lines: {error}") from error


def _json_object(text: str | bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where} is no JSON object")
    return value


def _described(recording: Recording, row: dict[str, Any], where: str) -> Recording:
    """The recording with what a row of a manifest says of it."""
    values: dict[str, Any] = {}
    for column in _COLUMNS[2:]:
        value = row.get(column)
        if value is None or value == "":
            continue
        if column in ("corpus", "speaker", "text"):
            values[column] = str(value)
            continue
        try:
            values[column] = int(value)
        except (TypeError, ValueError):
            raise ValueError(f"{where}: {column} is {value!r}, not a whole number") from None
        if values[column] < 1:
            raise ValueError(f"{where}: {column} is {value}, not positive")
    return replace(recording, **values)


def _in_shards(source: Path, tars: Sequence[Path]) -> tuple[list[Recording], list[Skipped]]:
    found: list[Recording] = []
    skipped: list[Skipped] = []
    for tar in tars:
        name = str(tar.relative_to(source)) if source != tar else tar.name
        num_before = len(found)
        try:
            for recording in _in_tar(tar, name):
                found.append(recording)
        except (tarfile.TarError, OSError, EOFError) as error:
            num_whole = len(found) - num_before
            skipped.append(Skipped(name, f"the tar file is broken after {num_whole} recordings: {error}"))
    if not found:
        raise ValueError(f"{source} holds no recordings" + (f": {skipped[0].reason}" if skipped else ""))
    return found, skipped


def _in_tar(tar: Path, name: str) -> Iterator[Recording]:
    """The recordings of a tar file. Files of one recording follow one another, as the format demands."""
    key = ""
    recordings: list[Recording] = []
    row: dict[str, Any] = {}
    with tarfile.open(tar, "r:") as archive:  # no compression
        for member in archive:
            if not member.isreg():
                continue
            folder, _, base = member.name.rpartition("/")
            stem, _, extension = base.partition(".")
            if (member_key := f"{folder}/{stem}") != key:
                yield from (_described(recording, row, recording.path) for recording in recordings)
                key, recordings, row = member_key, [], {}
            suffix = "." + extension.rpartition(".")[2].lower()
            if suffix in _SUFFIXES:
                path = f"{name}/{member.name}"
                place = Recording(path, file=str(tar), first_byte=member.offset_data, num_bytes=member.size)
                recordings.append(place)
            elif extension in ("json", "txt"):
                data = cast(BinaryIO, archive.extractfile(member)).read()
                if extension == "json":
                    row |= _json_object(data, f"{name}/{member.name}")
                else:
                    row["text"] = data.decode("utf-8", "replace").strip()
    yield from (_described(recording, row, recording.path) for recording in recordings)
