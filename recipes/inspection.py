"""What recordings hold: every sample is looked at once, in processes of their own and in constant memory."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from codec.audio import AudioError, AudioReader, AudioWriter, Resampler
from codec.batch import Advance, in_processes, progress_bar
from recipes.corpora import is_packed, reason_of, to_channels
from recipes.recordings import Recording, Skipped, find_recordings

CLIPPED = 0.9999  # of full scale: 16-bit audio at its highest value, and what lies beyond
SILENT_DB = -60.0  # RMS of a window of 20 ms
_BLOCK_WINDOWS = 256


@dataclass(frozen=True)
class Finding:
    """What became of one recording. `reason` tells why it cannot be used; counts are of its own samples."""

    path: str
    corpus: str
    speaker: str
    text: str
    reason: str | None = None
    sample_rate_hz: int = 0
    num_channels: int = 0
    num_samples: int = 0  # per channel
    num_clipped: int = 0  # of all channels
    num_windows: int = 0
    num_silent: int = 0  # windows
    num_prepared: int = 0  # samples per channel at the new rate


@dataclass
class CorpusSummary:
    """What is in a corpus. Seconds by rate and by number of channels."""

    num_recordings: int = 0
    num_broken: int = 0
    seconds_of_rate: dict[int, float] = field(default_factory=lambda: defaultdict(float))
    seconds_of_channels: dict[int, float] = field(default_factory=lambda: defaultdict(float))
    num_values: int = 0
    num_clipped: int = 0
    num_windows: int = 0
    num_silent: int = 0

    @property
    def seconds(self) -> float:
        """Duration of all recordings."""
        return sum(self.seconds_of_rate.values())

    @property
    def clipped_share(self) -> float:
        """Of all samples."""
        return self.num_clipped / max(1, self.num_values)

    @property
    def silent_share(self) -> float:
        """Of all windows of 20 ms."""
        return self.num_silent / max(1, self.num_windows)

    def add(self, finding: Finding) -> None:
        """Count one recording."""
        if finding.reason is not None:
            self.num_broken += 1
            return
        self.num_recordings += 1
        seconds = finding.num_samples / finding.sample_rate_hz
        self.seconds_of_rate[finding.sample_rate_hz] += seconds
        self.seconds_of_channels[finding.num_channels] += seconds
        self.num_values += finding.num_samples * finding.num_channels
        self.num_clipped += finding.num_clipped
        self.num_windows += finding.num_windows
        self.num_silent += finding.num_silent


@dataclass
class Report:
    """What a source holds, by corpus, and what was made of it: `num_samples` per channel at the new rate."""

    corpora: dict[str, CorpusSummary] = field(default_factory=dict)
    skipped: list[Skipped] = field(default_factory=list)
    num_samples: int = 0

    def add(self, finding: Finding) -> None:
        """Count one recording."""
        self.corpora.setdefault(finding.corpus, CorpusSummary()).add(finding)
        self.num_samples += finding.num_prepared
        if finding.reason is not None:
            self.skipped.append(Skipped(finding.path, finding.reason))


@dataclass(frozen=True)
class Parts:
    """Where decoded recordings go: each into a file of its own, `<folder>/<number><suffix>`, at this rate."""

    folder: Path
    suffix: str  # .i16 or .flac
    sample_rate_hz: int
    num_channels: int

    def file(self, number: int) -> Path:
        """The file of a recording."""
        return self.folder / f"{number}{self.suffix}"


def check_audio(source: Path, *, split: str | None = None, num_workers: int = 1) -> Report:
    """Decode all recordings of a folder, a manifest or shards, and say what is in them and which are broken.

    ValueError where there are no recordings.
    """
    found, broken = find_unpacked(source, split)
    report = Report(skipped=list(broken))
    for finding in inspect_all(found, num_workers=num_workers):
        report.add(finding)
    return report


# Work on one recording


class _WriteError(Exception):
    """What was decoded cannot be written: no fault of the recording."""


def _inspect(item: tuple[int, Recording], advance: Advance, *, parts: Parts | None) -> Finding | _WriteError:
    """Decode a recording in blocks, count, and write its part. Raises nothing, being run in another process."""
    number, recording = item
    finding = Finding(recording.path, recording.corpus, recording.speaker, recording.text)
    num_samples = num_clipped = num_windows = num_silent = num_prepared = 0
    try:
        with contextlib.ExitStack() as opened:
            reader = opened.enter_context(AudioReader(opened.enter_context(recording.opened())))
            part = opened.enter_context(_PartWriter(parts, number, reader.rate_hz)) if parts else None
            window = max(1, reader.rate_hz // 50)
            for block in reader.blocks(_BLOCK_WINDOWS * window):
                num_samples += block.shape[1]
                num_clipped += int(np.count_nonzero(np.abs(block) >= CLIPPED))
                starts = np.arange(0, block.shape[1], window)
                energies = np.add.reduceat(np.square(block).mean(axis=0), starts)
                powers = energies / np.diff(starts, append=block.shape[1])
                num_windows += len(powers)
                num_silent += int(np.count_nonzero(powers < 10.0 ** (SILENT_DB / 10.0)))
                if part is not None:
                    part.write(block)
            if part is not None:
                num_prepared = part.finish()
    except _WriteError as error:
        return error
    except (AudioError, OSError) as error:
        return replace(finding, reason=reason_of(error, recording))
    return replace(
        finding,
        sample_rate_hz=reader.rate_hz,
        num_channels=reader.num_channels,
        num_samples=num_samples,
        num_clipped=num_clipped,
        num_windows=num_windows,
        num_silent=num_silent,
        num_prepared=num_prepared,
    )


class _PartWriter:
    """Takes blocks of a recording at its own rate."""

    def __init__(self, parts: Parts, number: int, from_hz: int) -> None:
        self._parts = parts
        self._resampler = Resampler(from_hz, parts.sample_rate_hz, parts.num_channels)
        self._num_written = 0
        with _failing_to_write(), contextlib.ExitStack() as opened:
            file = parts.file(number)
            if parts.suffix == ".flac":
                writer = AudioWriter(file, parts.sample_rate_hz, parts.num_channels)
                self._flac: AudioWriter | None = opened.enter_context(writer)
            else:
                self._flac = None
                self._raw = opened.enter_context(file.open("wb"))
            self._opened = opened.pop_all()

    def write(self, block: np.ndarray) -> None:
        """Append [C, n]."""
        self._put(self._resampler.push(to_channels(block, self._parts.num_channels)))

    def finish(self) -> int:
        """Complete the part; returns its samples per channel."""
        self._put(self._resampler.flush())
        if self._flac is not None:
            with _failing_to_write():
                self._flac.finish()
        return self._num_written

    def _put(self, audio: np.ndarray) -> None:
        self._num_written += audio.shape[1]
        with _failing_to_write():
            if self._flac is not None:
                self._flac.write(audio)
            else:
                self._raw.write(np.clip(np.round(audio.T * 32768.0), -32768, 32767).astype("<i2").tobytes())

    def __enter__(self) -> _PartWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        with _failing_to_write():
            self._opened.close()


@contextlib.contextmanager
def _failing_to_write() -> Iterator[None]:
    try:
        yield
    except (AudioError, OSError) as error:
        raise _WriteError(str(error)) from error


def _died(item: tuple[int, Recording], process: int) -> Finding:
    recording = item[1]
    reason = "the process that read it was ended"
    return Finding(recording.path, recording.corpus, recording.speaker, recording.text, reason)


def inspect_all(
    recordings: Sequence[Recording], *, first: int = 0, parts: Parts | None = None, num_workers: int = 1
) -> Generator[Finding, None, None]:
    """The findings of all recordings from the first on, in their order, whoever is done first.

    OSError where a part cannot be written.
    """
    if num_workers < 1:
        raise ValueError(f"num_workers must be positive, not {num_workers}")
    work = partial(_inspect, parts=parts)
    items = list(enumerate(recordings))[first:]
    results: Iterator[tuple[int, Finding | _WriteError]]
    with progress_bar() as advance:
        if num_workers == 1:
            results = ((place, work(item, advance)) for place, item in enumerate(items))
        else:
            results = in_processes(items, work, _died, num_processes=min(num_workers, len(items)))
        waiting: dict[int, Finding] = {}
        next_place = 0
        for place, finding in results:
            if isinstance(finding, _WriteError):
                raise OSError(str(finding))
            waiting[place] = finding
            advance(1, len(items))
            while next_place in waiting:
                yield waiting.pop(next_place)
                next_place += 1


def find_unpacked(source: Path, split: str | None) -> tuple[list[Recording], list[Skipped]]:
    """As `find_recordings`; ValueError where the source is packed already."""
    if is_packed(source):
        raise ValueError(f"{source} is packed already")
    return find_recordings(source, split=split)
