"""What a speech model makes of whole recordings, computed once and kept in a folder.

    features.f16     float16 [all frames, L, D], little endian, recording after recording
    index.jsonl      a line that says of which model and layers they are, then a line for each recording

A line is added when the recording's features are on disk, so a run that was interrupted goes on where it was, and the
features of another source can be added later. Recordings are known by source, path, rate and number of samples: audio
that was replaced by other audio of the very same length goes unnoticed.

The model hears a recording as a whole, mixed down to one channel, its frames centred (see `codec.features`). Recordings
longer than 65 s are heard in pieces of 60 s, with 5 s more on both sides whose frames are not kept; what the model
normalises over its input is over the piece then.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from codec.audio import AudioError, resampled_length
from codec.batch import progress_bar
from codec.features import SpeechModel
from recipes.corpora import Corpus
from recipes.crops import read_stretch
from recipes.recordings import Recording, Skipped

_PIECE_SECONDS, _CONTEXT_SECONDS = 60, 5
_LARGEST = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class CacheKey:
    """Of which model and layers features are. Several layers are averaged, or else kept side by side."""

    version: str
    layers: tuple[int, ...]
    is_averaged: bool
    feature_dim: int
    frame_rate_hz: float

    @classmethod
    def of(cls, model: SpeechModel, layers: str | int | Sequence[int]) -> CacheKey:
        """As `SpeechModel.forward` names layers, or "weighted": all of them side by side."""
        is_averaged = layers != "weighted"
        numbers = sorted(model.layer_numbers(layers)) if is_averaged else range(model.num_layers + 1)
        return cls(model.version, tuple(numbers), is_averaged, model.feature_dim, model.frame_rate_hz)

    @property
    def num_kept(self) -> int:
        """How many layers a frame holds."""
        return 1 if self.is_averaged else len(self.layers)

    @property
    def frame_bytes(self) -> int:
        """What a frame takes on disk."""
        return 2 * self.num_kept * self.feature_dim

    def __str__(self) -> str:
        names = ", ".join(map(str, self.layers))
        return f"{self.version}, {'mean of layers' if self.is_averaged else 'layers'} {names}"


# Asked for every crop, and it looks at every folder on the way.
_real = functools.lru_cache(maxsize=64)(os.path.realpath)


@dataclass(frozen=True)
class _Entry:
    """A recording, and where its frames are; `reason` tells why there are none."""

    source: str
    path: str
    num_samples: int
    sample_rate_hz: int
    first_frame: int
    num_frames: int
    reason: str | None = None

    @property
    def key(self) -> tuple[str, str]:
        return _real(self.source), self.path

    def is_of(self, recording: Recording) -> bool:
        return (self.num_samples, self.sample_rate_hz) == (recording.num_samples, recording.sample_rate_hz)


@dataclass
class CacheReport:
    """What a run did: `num_added` recordings, `num_there` before; `skipped` could not be read."""

    num_added: int = 0
    num_there: int = 0
    num_frames: int = 0  # in all
    skipped: list[Skipped] = field(default_factory=list)


class FeatureCache:
    """The features in a folder, mapped into memory. It travels to other processes without them.

    ValueError of one line where the folder holds no cache or a damaged one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / "index.jsonl").is_file():
            raise ValueError(f"{folder} is no cache of features: it holds no index.jsonl")
        self.key, self._entries, _ = _read_index(folder)
        self._map: np.ndarray | None = None

    def check(self, wanted: CacheKey) -> None:
        """ValueError where the features are of another model or of other layers than wanted."""
        if self.key != wanted:
            raise ValueError(f"{self.folder} is of another teacher: it holds {self.key}; wanted is {wanted}")

    def check_recordings(self, recordings: Iterable[tuple[str, Recording]]) -> None:
        """ValueError where one of these, each with its source, is not in the cache or has changed since."""
        for source, recording in recordings:
            self._entry(source, recording)

    def read(self, source: str, recording: Recording, first_frame: int, num_frames: int) -> np.ndarray:
        """float32 [n, num_kept, D]: frames from the first one on, fewer than `num_frames` where the recording ends."""
        entry = self._entry(source, recording)
        if first_frame < 0:
            raise ValueError(f"first_frame must not be negative, not {first_frame}")
        shape = (0, self.key.num_kept, self.key.feature_dim)
        first, last = min(first_frame, entry.num_frames), min(first_frame + num_frames, entry.num_frames)
        if first == last:
            return np.zeros(shape, np.float32)
        if self._map is None:  # opened in the process that reads
            features = np.memmap(self.folder / "features.f16", dtype="<f2", mode="r")
            num_whole = len(features) // (shape[1] * shape[2])
            self._map = features[: num_whole * shape[1] * shape[2]].reshape(num_whole, *shape[1:])
        return self._map[entry.first_frame + first : entry.first_frame + last].astype(np.float32)

    def _entry(self, source: str, recording: Recording) -> _Entry:
        entry = self._entries.get((_real(source), recording.path))
        if entry is None:
            raise ValueError(f"{self.folder} lacks {recording.path} of {source}: run tools.cache_features for it")
        if not entry.is_of(recording):
            raise ValueError(
                f"{self.folder} is stale: {recording.path} has {recording.num_samples} samples at "
                f"{recording.sample_rate_hz} Hz, and had {entry.num_samples} at {entry.sample_rate_hz} Hz"
            )
        return entry

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_map": None}


def write_features(
    corpus: Corpus, model: SpeechModel, out: Path, *, layers: str | int | Sequence[int], device: str = "cpu"
) -> CacheReport:
    """Add to the cache `out` what it lacks of a corpus; it is made if it is not there.

    `layers` as in `CacheKey.of`. Recordings that cannot be read are left out, and tried again by the next run.
    ValueError where `out` is of another model or other layers, or in use by another process.
    """
    wanted = CacheKey.of(model, layers)
    model.to(device)
    out.mkdir(parents=True, exist_ok=True)
    report = CacheReport(skipped=list(corpus.skipped))
    with progress_bar() as advance, _opened(out, wanted) as (features, index, entries):
        report.num_frames = sum(entry.num_frames for entry in entries.values())
        next_frame = _end(entries)
        for number, recording in enumerate(corpus.recordings):
            advance(1, len(corpus.recordings))
            about = str(corpus.source), recording.path, recording.num_samples, recording.sample_rate_hz
            entry = _Entry(*about, next_frame, 0)
            old = entries.get(entry.key)
            if old is not None and old.reason is None and old.is_of(recording):
                report.num_there += 1
                continue
            try:
                for values in _computed(corpus, number, model, wanted):
                    features.write(values.astype("<f2").tobytes())
                    entry = _Entry(*about, next_frame, entry.num_frames + len(values))
                features.flush()
                report.num_added += 1
                report.num_frames += entry.num_frames
            except AudioError as error:
                entry = _Entry(*about, next_frame, 0, str(error).removeprefix(f"{recording.path}: "))
                report.skipped.append(Skipped(recording.path, entry.reason or ""))
                features.truncate(next_frame * wanted.frame_bytes)
            index.write(json.dumps(asdict(entry)).encode() + b"\n")
            index.flush()
            next_frame = entry.first_frame + entry.num_frames
    return report


def _computed(corpus: Corpus, number: int, model: SpeechModel, key: CacheKey) -> Iterator[np.ndarray]:
    """The features [n, num_kept, D] of a recording, piece by piece."""
    recording, rate_hz, stride = corpus.recordings[number], model.sample_rate_hz, model.stride_samples
    num_samples = resampled_length(recording.num_samples, recording.sample_rate_hz, rate_hz)
    num_frames = -(-num_samples // stride)
    piece, context = (round(seconds * model.frame_rate_hz) for seconds in (_PIECE_SECONDS, _CONTEXT_SECONDS))
    # The last piece takes in what would be shorter than its context.
    starts = [0, *range(piece, num_frames - context, piece)]
    for start, stop in zip(starts, [*starts[1:], num_frames], strict=True):
        first = max(0, start - context)
        last_sample = min(num_samples, (stop + context) * stride)
        audio = read_stretch(corpus, number, first * stride, last_sample, sample_rate_hz=rate_hz, num_channels=1)
        heard = torch.from_numpy(audio).to(next(model.parameters()).device)
        if key.is_averaged:
            values = model(heard, layers=key.layers).values[0][:, None]
        else:
            values = model.hidden(heard)[0][:, 0].transpose(0, 1)
        yield values[start - first : stop - first].clamp(-_LARGEST, _LARGEST).cpu().numpy()


@contextlib.contextmanager
def _opened(out: Path, wanted: CacheKey) -> Iterator[tuple[BinaryIO, BinaryIO, dict[tuple[str, str], _Entry]]]:
    """Both files, behind all that is whole; and the recordings that are there."""
    with (out / "index.jsonl").open("ab+") as index, (out / "features.f16").open("ab+") as appended:
        try:
            fcntl.flock(index, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(f"{out} is in use by another process") from error
        entries: dict[tuple[str, str], _Entry] = {}
        if (out / "index.jsonl").read_bytes().find(b"\n") < 0:
            index.truncate(0)
            index.write(json.dumps(asdict(wanted)).encode() + b"\n")
            index.flush()
        else:
            there, entries, num_whole = _read_index(out)
            if there != wanted:
                raise ValueError(f"{out} is of another teacher: it holds {there}; wanted is {wanted}")
            index.truncate(num_whole)
        appended.truncate(_end(entries) * wanted.frame_bytes)
        yield appended, index, entries


def _end(entries: Mapping[tuple[str, str], _Entry]) -> int:
    """The frame behind the last one that counts."""
    return max((entry.first_frame + entry.num_frames for entry in entries.values()), default=0)


def _read_index(folder: Path) -> tuple[CacheKey, dict[tuple[str, str], _Entry], int]:
    """Of what the features are, the recordings, and how many bytes of the index are whole lines."""
    data = (folder / "index.jsonl").read_bytes()
    num_whole = data.rfind(b"\n") + 1
    try:
        first, *others = [json.loads(line) for line in data[:num_whole].splitlines()]
        key = CacheKey(**(first | {"layers": tuple(first["layers"])}))
        entries = {entry.key: entry for entry in (_Entry(**values) for values in others)}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{folder}/index.jsonl is damaged: {' '.join(str(error).split())}") from error
    num_bytes = (folder / "features.f16").stat().st_size if (folder / "features.f16").is_file() else 0
    if num_bytes < _end(entries) * key.frame_bytes:
        raise ValueError(f"{folder}/features.f16 was cut off: remove {folder} and begin anew")
    return key, entries, num_whole
