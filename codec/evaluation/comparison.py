"""Codecs over recordings: delay and speed first, each codec in a process of its own, then every file, in many."""

from __future__ import annotations

import datetime
import functools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from codec.batch import Advance, in_processes, progress_bar
from codec.evaluation.coders import Coder, ModelCoder, UsageError, classic_coder, model_coders
from codec.evaluation.delay import aligned, find_delay
from codec.evaluation.environment import environment, peak_memory_mb
from codec.evaluation.labelled import LabelledRecording, fitting_labels, label_facts, labels_for, semantics_of
from codec.evaluation.metrics import METRICS, available_metrics, measure
from codec.evaluation.recordings import Recording, find_recordings, spread
from codec.evaluation.results import (
    WEIGHT_SUFFIX,
    CodebookUse,
    Evaluation,
    Example,
    FileResult,
    SystemResult,
    comparisons_of,
    summaries_of,
)
from codec.evaluation.scorers import Scorer, load_scorer

PROFILE_FILES = 6
PROFILE_SECONDS = 10  # of each
EXAMPLE_SECONDS = 8
_RANKING = ("pesq_wb", "stoi", "mel_db")  # what examples are chosen by, the first that was measured
_SHORTEST_FOR_DELAY_SECONDS = 0.2


def evaluate(
    models: Sequence[str | os.PathLike[str]] = (),
    *,
    data: str | os.PathLike[str],
    split: str | None = None,
    max_files: int | None = None,
    num_quantizers: Sequence[int] = (),
    opus_kbps: Sequence[int] = (),
    codec2_bps: Sequence[int] = (),
    speex_kbps: Sequence[int] = (),
    metrics: Sequence[str] | None = None,
    scorers: Sequence[str | Scorer] = (),
    labels: str | os.PathLike[str] | None = None,
    tier: str | None = None,
    measures_speed: bool = True,
    num_examples: int = 0,
    num_processes: int = 1,
) -> Evaluation:
    """Measure models and classic codecs on the same recordings, mixed down to mono, at their own rate.

    `models`: bundled names or folders; `num_quantizers`: their rows of codes, by default up to four choices. `data`,
    `split`, `max_files`: see `find_recordings`. `metrics`: names of `METRICS`, by default all whose packages are
    installed. `scorers`: see `load_scorer`, or objects that can be pickled. `labels`, `tier`: see `find_labels`; what
    the codes of models tell of them, see `semantics_of` (extra `semantics`). Speed and memory take a fresh process for
    each codec, alone on the machine as far as this function can help it. `num_examples`: how many recordings to keep,
    with what the codecs make of them, for reports.

    A file that cannot be read, or that one codec cannot take, is left out and told in the result. ValueError where
    nothing can be measured at all; UsageError, a kind of it, for rates, metrics and programs that are not there.
    """
    recordings = find_recordings(data, split=split, max_files=max_files)
    names = _checked_metrics(metrics)
    loaded = [load_scorer(scorer) if isinstance(scorer, str) else scorer for scorer in scorers]
    doubled = {scorer.name for scorer in loaded if [other.name for other in loaded].count(scorer.name) > 1}
    if doubled:
        raise UsageError(f"two scorers are called {min(doubled)!r}; measure them one by one")
    classics = (("opus", opus_kbps), ("codec2", codec2_bps), ("speex", speex_kbps))
    coders: list[Coder] = [classic_coder(kind, settings) for kind, settings in classics if settings]
    if not (models or coders):
        raise UsageError("there is no codec to measure: name a model, or rates of Opus, Codec2 or Speex")
    labelled, unlabelled = labels_for(recordings, labels, tier, has_models=bool(models))
    coders = [*model_coders(models, num_quantizers), *coders]
    profiles = _profiles(coders, _excerpts(recordings), in_own_process=measures_speed)
    task = _Task(tuple(coders), names, tuple(scorers), tuple(profile.delays for profile in profiles), bool(labelled))
    measured = _measure_all(recordings, task, num_processes)
    failures = {r.name: m for r, m in zip(recordings, measured, strict=True) if isinstance(m, str)}
    good = [m for m in measured if not isinstance(m, str)]
    if not good:
        raise ValueError(next(iter(failures.values())))
    failures |= {f"{m.name}, scorer {scorer}": reason for m in good for scorer, reason in m.unscored.items()}
    failures |= {f"{m.name}, labels": unlabelled[m.name] for m in good if m.name in unlabelled}
    known, reasons = fitting_labels(labelled, recordings, {m.name: m.seconds for m in good})
    failures |= reasons
    found = {name for m in good for file in m.files.values() if isinstance(file, FileResult) for name in file.values}
    extra = sorted(name for name in found - set(names) if not name.endswith(WEIGHT_SUFFIX))
    systems = _systems(coders, profiles, good, (*names, *extra))
    if known:
        systems, reasons = _with_semantics(systems, coders, good, known)
        failures |= reasons
    examples = _examples(recordings, task, systems, names, num_examples) if num_examples else ()
    return Evaluation(
        systems=tuple(systems),
        comparisons=comparisons_of([system for system in systems if system.setting is not None], (*names, *extra)),
        metrics=(*names, *extra),
        left_out={name: f"needs the extra '{m.extra}'" for name, m in METRICS.items() if not m.is_available}
        if metrics is None
        else {},
        failures=failures,
        num_files=len(good),
        seconds=sum(m.seconds for m in good),
        facts={
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "data": Path(data).resolve().name,
            "split": split,
            "scorers": {scorer.name: scorer.version for scorer in loaded},
            "labels": {"source": Path(labels).resolve().name, "tier": tier} | label_facts(known)
            if labels is not None and known
            else None,
            "num_processes": num_processes,
        }
        | environment(),
        examples=examples,
    )


def _checked_metrics(metrics: Sequence[str] | None) -> tuple[str, ...]:
    if metrics is None:
        return available_metrics()
    for name in metrics:
        if name not in METRICS:
            raise UsageError(f"there is no metric {name!r} (there are: {', '.join(METRICS)})")
        if not METRICS[name].is_available:
            raise UsageError(f"the metric {name!r} needs the extra {METRICS[name].extra!r}")
    return tuple(name for name in METRICS if name in metrics)


# --- delay, speed, memory


@dataclass(frozen=True)
class _Excerpt:
    audio: np.ndarray
    rate_hz: int


@dataclass(frozen=True)
class _Profile:
    """Of a coder, setting by setting: delay in seconds, times real time each way; and the most memory it took."""

    delays: dict[int, float]
    encode_times: dict[int, float]
    decode_times: dict[int, float]
    peak_memory_mb: float | None


def _excerpts(recordings: Sequence[Recording]) -> list[_Excerpt]:
    """The beginnings of a few recordings of one rate. ValueError where none can be read."""
    found: list[_Excerpt] = []
    reason = ""
    for recording in spread(recordings, PROFILE_FILES):
        try:
            audio, rate_hz = recording.read()
        except (ValueError, OSError) as error:
            reason = str(error)
            continue
        if not found or rate_hz == found[0].rate_hz:
            found.append(_Excerpt(audio[: PROFILE_SECONDS * rate_hz], rate_hz))
    if not found:
        raise ValueError(reason)
    return found


def _profiles(coders: Sequence[Coder], excerpts: list[_Excerpt], *, in_own_process: bool) -> list[_Profile]:
    work = functools.partial(_profile, excerpts=excerpts, measures_speed=in_own_process)
    found: list[_Profile] = []
    for coder in coders:
        if in_own_process:
            ((_, profile),) = in_processes([coder], work, _died, num_processes=1)
        else:
            profile = work(coder, lambda done, total: None)
        if isinstance(profile, str):
            raise ValueError(f"{coder.name}: {profile}")
        found.append(profile)
    return found


def _died(item: object, process: int) -> str:
    return "its process was ended"


def _profile(coder: Coder, advance: Advance, *, excerpts: list[_Excerpt], measures_speed: bool) -> _Profile | str:
    """A coder alone on some excerpts, or why it cannot take them."""
    delays, encode_times, decode_times = {}, {}, {}
    try:
        if measures_speed:
            coder.code(excerpts[0].audio, excerpts[0].rate_hz, coder.settings[-1])  # loads and warms up
        for setting in coder.settings:
            coded = [coder.code(excerpt.audio, excerpt.rate_hz, setting) for excerpt in excerpts]
            rate_hz = excerpts[0].rate_hz
            pairs = [(excerpt.audio, result.audio) for excerpt, result in zip(excerpts, coded, strict=True)]
            shortest = _SHORTEST_FOR_DELAY_SECONDS * rate_hz
            delays[setting] = find_delay([p for p in pairs if min(map(len, p)) >= shortest], rate_hz) / rate_hz
            seconds = sum(len(excerpt.audio) for excerpt in excerpts) / rate_hz
            encode_times[setting] = seconds / sum(result.encode_seconds for result in coded)
            decode_times[setting] = seconds / sum(result.decode_seconds for result in coded)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        return _reason(error)
    if not measures_speed:
        return _Profile(delays, {}, {}, None)
    is_model = bool(coded[0].packed_bits)
    return _Profile(delays, encode_times, decode_times, peak_memory_mb() if is_model else None)


# --- files


@dataclass(frozen=True)
class _Task:
    """What is done with every recording; goes to other processes."""

    coders: tuple[Coder, ...]
    metrics: tuple[str, ...]
    scorers: tuple[str | Scorer, ...]
    delays: tuple[dict[int, float], ...]  # seconds, for every coder and setting
    keeps_codes: bool = False


_Key = tuple[int, int | None]  # of a coder, and a setting; (-1, None) is the original


@dataclass(frozen=True)
class _Measured:
    """A recording by every system, and of every model how often its codes occurred, row by row, or the codes, too."""

    name: str
    seconds: float
    files: dict[_Key, FileResult | str]
    counts: dict[int, list[np.ndarray]]
    unscored: dict[str, str]  # scorer -> why it could not judge some of it
    codes: dict[int, np.ndarray]


def _measure_all(recordings: list[Recording], task: _Task, num_processes: int) -> list[_Measured | str]:
    work = functools.partial(_measure, task=task)
    measured: dict[int, _Measured | str] = {}
    with progress_bar() as advance:
        if num_processes == 1 or len(recordings) == 1:
            for number, recording in enumerate(recordings):
                measured[number] = work(recording, advance)
                advance(1, len(recordings))
        else:
            for number, result in in_processes(recordings, work, _died, num_processes=num_processes):
                measured[number] = result
                advance(1, len(recordings))
    return [measured[number] for number in range(len(recordings))]


def _measure(recording: Recording, advance: Advance, *, task: _Task) -> _Measured | str:
    """A recording by every coder, or why it cannot be read."""
    try:
        audio, rate_hz = recording.read()
    except (ValueError, OSError, MemoryError) as error:
        return _reason(error)
    scorers = [load_scorer(scorer) if isinstance(scorer, str) else scorer for scorer in task.scorers]

    def scored(reference: np.ndarray, decoded: np.ndarray) -> dict[str, float]:
        values: dict[str, float] = {}
        for scorer in scorers:
            try:
                values |= scorer.score(reference, decoded, rate_hz, recording.text)
            except (ValueError, RuntimeError) as error:  # too short for its layers, for example
                measured.unscored[scorer.name] = _reason(error)
        return values

    def result(num_samples_out: int, values: dict[str, float], sizes: Sequence[int | None]) -> FileResult:
        seconds = len(audio) / rate_hz
        return FileResult(
            recording.name,
            recording.speaker,
            seconds,
            len(audio),
            num_samples_out,
            sizes[0],
            sizes[1],
            sizes[2],
            values,
        )

    measured = _Measured(recording.name, len(audio) / rate_hz, {}, {}, {}, {})
    if scorers:
        measured.files[-1, None] = result(len(audio), scored(audio, audio), (None, None, None))
    for number, coder in enumerate(task.coders):
        for setting in coder.settings:
            try:
                coded = coder.code(audio, rate_hz, setting)
                pair = aligned(audio, coded.audio, round(task.delays[number][setting] * rate_hz))
                values = measure(*pair, rate_hz, task.metrics) | scored(*pair)
            except (ValueError, OSError, RuntimeError, MemoryError) as error:
                measured.files[number, setting] = _reason(error)
                continue
            sizes = (coded.packed_bits, coded.coded_bytes, coded.file_bytes)
            measured.files[number, setting] = result(len(coded.audio), values, sizes)
            if coded.codes is not None and setting == max(coder.settings):
                sizes_of_rows = getattr(coder, "codebook_sizes", ())
                measured.counts[number] = [
                    np.bincount(row, minlength=size) for row, size in zip(coded.codes, sizes_of_rows, strict=False)
                ]
                if task.keeps_codes:
                    measured.codes[number] = coded.codes
    return measured


def _reason(error: Exception) -> str:
    return " ".join((str(error) or "out of memory").split())


# --- results


def _systems(
    coders: Sequence[Coder], profiles: Sequence[_Profile], measured: Sequence[_Measured], names: Sequence[str]
) -> list[SystemResult]:
    keys: list[_Key] = [(number, setting) for number, coder in enumerate(coders) for setting in coder.settings]
    if any((-1, None) in m.files for m in measured):
        keys.insert(0, (-1, None))
    systems = []
    for number, setting in keys:
        taken = [m.files[number, setting] for m in measured]
        files = tuple(file for file in taken if isinstance(file, FileResult))
        failures = {m.name: file for m, file in zip(measured, taken, strict=True) if isinstance(file, str)}
        coder, profile = coders[number], profiles[number]
        is_original = setting is None
        systems.append(
            SystemResult(
                name="original" if setting is None else coder.label(setting),
                coder="original" if is_original else coder.name,
                setting=setting,
                version="" if is_original else coder.version,
                delay_ms=0.0 if setting is None else 1000 * profile.delays[setting],
                packed_bps=_rate_bps(files, [file.packed_bits for file in files]),
                coded_bps=_rate_bps(files, [file.coded_bytes for file in files], 8),
                file_bps=_rate_bps(files, [file.file_bytes for file in files], 8),
                encode_times_real_time=None if setting is None else profile.encode_times.get(setting),
                decode_times_real_time=None if setting is None else profile.decode_times.get(setting),
                peak_memory_mb=None if is_original else profile.peak_memory_mb,
                codebooks=None if is_original else _codebook_use(number, setting, coder, measured),
                files=files,
                failures=failures,
                summaries=summaries_of(files, names),
            )
        )
    return systems


def _rate_bps(files: Sequence[FileResult], sizes: Sequence[int | None], scale: int = 1) -> float | None:
    """Of all files together; None where one has no such size."""
    given = [size for size in sizes if size is not None]
    if not files or len(given) < len(files):
        return None
    return scale * sum(given) / sum(file.seconds for file in files)


def _codebook_use(number: int, setting: int | None, coder: Coder, measured: Sequence[_Measured]) -> CodebookUse | None:
    """Over all files, at the highest setting: lower ones use the first rows of the same."""
    counts = [m.counts[number] for m in measured if number in m.counts]
    if not counts or setting != max(coder.settings):
        return None
    return CodebookUse.of_counts([np.sum(rows, axis=0) for rows in zip(*counts, strict=True)])


def _with_semantics(
    systems: Sequence[SystemResult],
    coders: Sequence[Coder],
    measured: Sequence[_Measured],
    recordings: dict[str, LabelledRecording],
) -> tuple[list[SystemResult], dict[str, str]]:
    """The systems, models at their highest setting with what their codes tell of labels; and why some have no such."""
    found = list(systems)
    failures = {}
    for number, coder in enumerate(coders):
        codes = {m.name: m.codes[number] for m in measured if number in m.codes and m.name in recordings}
        place = next((i for i, system in enumerate(systems) if system.name == coder.label(max(coder.settings))), None)
        if place is None or not isinstance(coder, ModelCoder):
            continue
        try:
            found[place] = replace(systems[place], semantics=semantics_of(coder.codec, codes, recordings))
        except ValueError as error:
            failures[f"labels, {coder.name}"] = _reason(error)
    return found, failures


def _examples(
    recordings: Sequence[Recording], task: _Task, systems: Sequence[SystemResult], metrics: Sequence[str], count: int
) -> tuple[Example, ...]:
    """So many recordings, from the one that the first codec does worst, at its highest setting, to the best."""
    system = next((s for s in systems if s.setting == max(task.coders[0].settings)), systems[0])
    ranking = next((name for name in (*_RANKING, *metrics) if name in metrics), None)
    sign = -1 if ranking in METRICS and METRICS[ranking or ""].better == "lower" else 1
    defined = [f for f in system.files if ranking is None or math.isfinite(f.values.get(ranking, math.nan))]
    ranked = sorted(defined, key=lambda file: (sign * file.values[ranking] if ranking else 0.0, file.file))
    count = min(count, len(ranked))
    chosen = [ranked[round(i * (len(ranked) - 1) / max(count - 1, 1))] for i in range(count)]
    by_name = {recording.name: recording for recording in recordings}
    found = []
    for file in chosen if count > 1 else ranked[len(ranked) // 2 : len(ranked) // 2 + count]:
        recording = by_name[file.file]
        audio, rate_hz = recording.read()
        heard = {}
        for number, coder in enumerate(task.coders):
            for setting in coder.settings:
                try:
                    coded = coder.code(audio, rate_hz, setting)
                except (ValueError, OSError, RuntimeError, MemoryError):  # among the failures already
                    continue
                delay = round(task.delays[number][setting] * rate_hz)
                heard[coder.label(setting)] = aligned(audio, coded.audio, delay)[1][: EXAMPLE_SECONDS * rate_hz]
        value = None if ranking is None else file.values[ranking]
        found.append(
            Example(
                *(file.file, recording.text, rate_hz, audio[: EXAMPLE_SECONDS * rate_hz], heard),
                *(system.name, ranking, value),
            )
        )
    return tuple(found)
