"""Labels of recordings, such as their phones with times: TextGrid and CTM files, and the label of every frame."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from codec.evaluation.coders import UsageError
from codec.files import AtomicFile

NOT_SPEECH = frozenset({"", "sil", "sp", "spn", "<sil>", "<eps>", "<unk>", "h#", "pau"})
_SUFFIXES = (".textgrid", ".ctm")
_DEFAULT_TIER = "phones"
_TOLERANCE_SECONDS = 0.1  # by which labels may end after the audio: aligners round


@dataclass(frozen=True)
class Segment:
    """What is said from one second of a recording up to another."""

    label: str
    start_seconds: float
    stop_seconds: float


def read_textgrid(path: str | os.PathLike[str], tier: str | None = None) -> list[Segment]:
    """The intervals of one tier of a TextGrid file, those without text left out; needs the extra `semantics`.

    `tier` is by default `phones`, or the only tier. ValueError, with the file's name, where there is no such tier of
    intervals, or the file is no TextGrid.
    """
    textgrid = _praatio()
    try:
        grid = textgrid.openTextgrid(os.fspath(path), includeEmptyIntervals=False, reportingMode="silence")
    except Exception as error:  # praatio has no exception of its own for a broken file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} cannot be read as a TextGrid: {reason}") from error
    names = [name for name in grid.tierNames if isinstance(grid.getTier(name), textgrid.IntervalTier)]
    if tier is None:
        if _DEFAULT_TIER not in names and len(names) != 1:
            raise ValueError(f"{path}: which tier holds the labels? It has {names}")
        tier = _DEFAULT_TIER if _DEFAULT_TIER in names else names[0]
    if tier not in names:
        raise ValueError(f"{path} has no tier {tier!r} of intervals (it has {names})")
    return [Segment(str(label), float(start), float(stop)) for start, stop, label in grid.getTier(tier).entries]


def write_textgrid(path: str | os.PathLike[str], tiers: Mapping[str, Sequence[Segment]], num_seconds: float) -> None:
    """A TextGrid file with these tiers, whole or not at all; needs the extra `semantics`.

    ValueError where the segments of a tier overlap, or end after `num_seconds`.
    """
    textgrid = _praatio()
    grid = textgrid.Textgrid(0.0, num_seconds)
    for name, segments in tiers.items():
        entries = [(segment.start_seconds, segment.stop_seconds, segment.label) for segment in segments]
        for (_, stop, label), following in zip(
            entries, [*[entry[0] for entry in entries[1:]], num_seconds], strict=True
        ):
            if stop > following + 1e-9:
                raise ValueError(
                    f"{path}, tier {name!r}: {label!r} ends at {stop:.3f} s, which is after {following:.3f} s"
                )
        grid.addTier(textgrid.IntervalTier(name, entries, 0.0, num_seconds))
    with AtomicFile(path) as new:
        grid.save(os.fspath(new.path), "long_textgrid", includeBlankSpaces=True, reportingMode="silence")
        new.commit()


def read_ctm(path: str | os.PathLike[str]) -> dict[str, list[Segment]]:
    """The segments of every recording that a CTM file names, in the order of time.

    A line is: recording, channel, start, duration, label, and maybe more that is not read. ValueError, with file and
    line, where one is not.

    Source: the format of NIST's `sclite`; lines that begin with `;;` are comments.
    """
    found: dict[str, list[Segment]] = {}
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        cells = line.split()
        if not cells or cells[0].startswith(";;"):
            continue
        try:
            start, duration = float(cells[2]), float(cells[3])
            label = cells[4]
        except (IndexError, ValueError):
            raise ValueError(f"{path}:{number}: expected recording, channel, start, duration and label") from None
        if not (math.isfinite(start) and math.isfinite(duration) and start >= 0.0 and duration >= 0.0):
            raise ValueError(f"{path}:{number}: a stretch cannot begin at {start} s and take {duration} s")
        if duration:
            found.setdefault(cells[0], []).append(Segment(label, start, start + duration))
    return {name: sorted(segments, key=lambda segment: segment.start_seconds) for name, segments in found.items()}


def find_labels(
    source: str | os.PathLike[str], names: Sequence[str], *, tier: str | None = None
) -> tuple[dict[str, tuple[Segment, ...]], dict[str, str]]:
    """The labels of recordings, by their names, and why there are none for the others.

    `source` is a CTM file of many recordings, or a folder of TextGrid and CTM files, each with the labels of one. They
    are known by the recording's name without its suffix: as a path below the folder, or else by its last part alone.
    Silence and noise (`NOT_SPEECH`, in any case) are no labels.

    ValueError where there are labels for none of the recordings; UsageError for a tier of a CTM file, which has none.
    """
    root = Path(source)
    if root.is_dir():
        files = sorted(file for file in root.rglob("*") if file.suffix.lower() in _SUFFIXES and file.is_file())
        keys = _keyed({file.relative_to(root).with_suffix("").as_posix(): file for file in files})
    elif root.is_file():
        if root.suffix.lower() != ".ctm":
            raise ValueError(f"{root} is neither a folder of labels nor a CTM file")
        keys = _keyed(read_ctm(root))
    else:
        raise ValueError(f"{root} is neither a folder of labels nor a CTM file")
    if tier is not None and root.is_file():
        raise UsageError(f"{root} is a CTM file, which has no tiers such as {tier!r}")
    found: dict[str, tuple[Segment, ...]] = {}
    failures: dict[str, str] = {}
    for name in names:
        whole = PurePosixPath(name).with_suffix("").as_posix()
        matches = keys.get(whole) or keys.get(whole.rpartition("/")[2]) or []
        try:
            if len(matches) != 1:
                told = " and ".join(sorted(str(match) for match in matches[:2]))
                raise ValueError(f"{told} could both hold its labels" if matches else f"{root} holds no labels of it")
            segments = matches[0] if isinstance(matches[0], list) else _of_file(matches[0], tier)
            found[name] = tuple(segment for segment in segments if segment.label.lower() not in NOT_SPEECH)
            if not found[name]:
                raise ValueError(f"{root} has nothing but silence for it")
        except ValueError as error:
            found.pop(name, None)
            failures[name] = str(error)
    if not found:
        first = next(iter(failures.items()), ("", "there are no recordings"))
        raise ValueError(f"there are labels for none of {len(names)} recordings; {first[0]}: {first[1]}")
    return found, failures


def check_labels(segments: Sequence[Segment], num_seconds: float) -> None:
    """ValueError where labels lie after the end of the audio, and so are those of another recording."""
    last = max((segment.stop_seconds for segment in segments), default=0.0)
    if last > num_seconds + _TOLERANCE_SECONDS:
        raise ValueError(f"its labels end at {last:.2f} s, but the audio at {num_seconds:.2f} s")


def vocabulary(labels: Iterable[Sequence[Segment]]) -> dict[str, int]:
    """A number for every label that occurs, in alphabetical order."""
    return {label: i for i, label in enumerate(sorted({segment.label for segments in labels for segment in segments}))}


def frame_labels(
    segments: Sequence[Segment], num_frames: int, frame_rate_hz: float, numbers: Mapping[str, int]
) -> np.ndarray:
    """The number of the label at the centre of every frame: int64 [F], -1 where nothing is labelled.

    Frame i lasts from i / `frame_rate_hz` to (i + 1) / `frame_rate_hz` seconds. A segment holds its start, but not its
    stop; where two overlap, the one that starts later counts.

    >>> frame_labels([Segment("a", 0.0, 0.05), Segment("b", 0.06, 0.1)], 5, 50.0, {"a": 0, "b": 1}).tolist()
    [0, 0, -1, 1, 1]
    """
    ordered = sorted(segments, key=lambda segment: segment.start_seconds)
    if not ordered:
        return np.full(num_frames, -1)
    starts, stops = (
        np.array([getattr(segment, name) for segment in ordered]) for name in ("start_seconds", "stop_seconds")
    )
    values = np.array([numbers[segment.label] for segment in ordered])
    centres = (np.arange(num_frames) + 0.5) / frame_rate_hz
    last = np.searchsorted(starts, centres, side="right") - 1
    is_inside = (last >= 0) & (centres < stops[last])
    return np.where(is_inside, values[last], -1)


def _keyed(items: Mapping[str, object]) -> dict[str, list[Any]]:
    """By whole names, and by their last parts; several where those are the same."""
    keys: dict[str, list[Any]] = {name: [item] for name, item in items.items()}
    short: dict[str, list[Any]] = {}
    for name, item in items.items():
        short.setdefault(name.rpartition("/")[2], []).append(item)
    return short | keys


def _of_file(path: Path, tier: str | None) -> list[Segment]:
    """The labels of one recording."""
    if path.suffix.lower() == ".textgrid":
        return read_textgrid(path, tier)
    if tier is not None:
        raise UsageError(f"{path} is a CTM file, which has no tiers such as {tier!r}")
    recordings = read_ctm(path)
    if len(recordings) != 1:
        raise ValueError(f"{path} holds the labels of {len(recordings)} recordings, not of one")
    return next(iter(recordings.values()))


def _praatio() -> Any:
    if importlib.util.find_spec("praatio") is None:
        raise UsageError("TextGrid files need the extra 'semantics'")
    from praatio import textgrid

    return textgrid
