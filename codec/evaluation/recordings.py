"""The recordings to measure on: a folder of audio, or a manifest that knows speakers and texts."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from codec.audio import find_audio, read_audio

MANIFEST = "manifest.tsv"
_NUM_COLUMNS = 7  # path, split, corpus, speaker, sample rate, seconds, text

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Recording:
    """A file, and what is known of it."""

    path: Path
    name: str  # as the reports call it: relative to the folder or the manifest
    speaker: str = ""
    text: str = ""

    def read(self) -> tuple[np.ndarray, int]:
        """All of it as float32 [T], channels averaged, and its rate in Hz. AudioError where it is no audio."""
        audio, rate_hz = read_audio(self.path)
        return audio.mean(axis=0, dtype=np.float32) if len(audio) > 1 else audio[0], rate_hz


def find_recordings(
    data: str | os.PathLike[str], *, split: str | None = None, max_files: int | None = None
) -> list[Recording]:
    """Of a folder with a `manifest.tsv` or that file itself, its rows; of another folder, all audio files, sorted.

    A manifest has no header; its tab-separated columns are path (relative to it), split, corpus, speaker, rate,
    seconds and text. `split` takes some of its rows. `max_files` takes as many, evenly spread. ValueError where there
    is nothing to take, or a file that a manifest names is missing.
    """
    source = Path(data)
    if max_files is not None and max_files < 1:
        raise ValueError(f"max_files={max_files} must be positive")
    manifest = source / MANIFEST if source.is_dir() else source
    if manifest.is_file():
        found = spread(_rows(manifest, split), max_files)
        missing = [recording.name for recording in found if not recording.path.is_file()]
        if missing:
            raise ValueError(f"{manifest} names {len(missing)} files that are not there, the first is {missing[0]}")
        return found
    if not source.is_dir():
        raise ValueError(f"{source} is neither a folder nor a manifest")
    if split is not None:
        raise ValueError(f"{source} has no {MANIFEST} that could tell its split {split!r}")
    return spread([Recording(file, file.relative_to(source).as_posix()) for file in find_audio(source)], max_files)


def _rows(manifest: Path, split: str | None) -> list[Recording]:
    try:
        with manifest.open(newline="", encoding="utf-8") as lines:
            rows = list(csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{manifest} cannot be read: {error}") from error
    for number, row in enumerate(rows, 1):
        if len(row) != _NUM_COLUMNS:
            raise ValueError(f"{manifest}, line {number}: {_NUM_COLUMNS} tab-separated columns are expected")
    taken = [row for row in rows if split is None or row[1] == split]
    if not taken:
        splits = sorted({row[1] for row in rows})
        raise ValueError(f"{manifest} has no rows" + (f" of split {split!r} (it has {splits})" if splits else ""))
    return [Recording(manifest.parent / row[0], row[0], speaker=row[3], text=row[6].strip()) for row in taken]


def spread(items: Sequence[_Item], count: int | None) -> list[_Item]:
    """So many of them, evenly spread from the first on; all where there are no more."""
    if count is None or count >= len(items):
        return list(items)
    return [items[i * len(items) // count] for i in range(count)]
