"""What an evaluation found, its statistics, and its CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

NUM_RESAMPLES = 2000
_RESAMPLES_AT_ONCE = 100  # for memory's sake
WEIGHT_SUFFIX = "_weight"


@dataclass(frozen=True)
class Summary:
    """Of one value over files. `low` and `high` bound the mean with 95 % confidence (percentile bootstrap)."""

    mean: float
    low: float
    high: float
    median: float
    num_files: int


@dataclass(frozen=True)
class FileResult:
    """One recording by one codec at one setting. Values are NaN where they are not defined."""

    file: str
    speaker: str
    seconds: float
    num_samples_in: int
    num_samples_out: int
    packed_bits: int | None
    coded_bytes: int | None
    file_bytes: int | None
    values: Mapping[str, float]


@dataclass(frozen=True)
class CodebookUse:
    """Of every row of codes: the share of entries that occurred, and the perplexity of how often they did."""

    codebook_sizes: tuple[int, ...]
    usage: tuple[float, ...]
    perplexity: tuple[float, ...]
    num_frames: int

    @staticmethod
    def of_counts(counts: Sequence[np.ndarray]) -> CodebookUse:
        """Of how often each entry of each row occurred."""
        perplexity = []
        for row in counts:
            shares = row[row > 0] / max(int(row.sum()), 1)
            perplexity.append(float(2 ** -(shares * np.log2(shares)).sum()))
        return CodebookUse(
            codebook_sizes=tuple(len(row) for row in counts),
            usage=tuple(float((row > 0).mean()) for row in counts),
            perplexity=tuple(perplexity),
            num_frames=int(counts[0].sum()),
        )


@dataclass(frozen=True)
class Semantics:
    """What some rows of codes tell of the labels that recordings have, such as phones, over all files.

    Of single rows: `purity`, `cluster_purity` and `pnmi`, with intervals by the jackknife over files, `unseen_purity`,
    with a bootstrap interval, and `pnmi_by_chance`. Of the quantized latents of the first stage, and of all rows:
    `probe`, with a bootstrap interval, `abx_within` and `abx_across`.
    """

    rows: str  # "0", or "0 to 7"
    values: Mapping[str, Summary]


@dataclass(frozen=True)
class SystemResult:
    """A codec at one setting. Rates are bits of all files over seconds of all files; None where there is no such thing.

    `packed_bps`: codes without any coding. `coded_bps`: what the coder makes of them (entropy-coded blocks, Opus
    packets), without file format. `file_bps`: whole files. Speeds are of one thread, in times real time. `codebooks`
    and `semantics` are told at a model's highest setting.
    """

    name: str
    coder: str
    setting: int | None
    version: str
    delay_ms: float
    packed_bps: float | None
    coded_bps: float | None
    file_bps: float | None
    encode_times_real_time: float | None
    decode_times_real_time: float | None
    peak_memory_mb: float | None
    codebooks: CodebookUse | None
    files: tuple[FileResult, ...]
    failures: Mapping[str, str]  # file -> why the codec could not take it
    summaries: Mapping[str, Summary]
    semantics: tuple[Semantics, ...] = ()

    @property
    def rate_bps(self) -> float | None:
        """The rate that codecs are compared at: as coded, without file format, where that is known."""
        return self.packed_bps if self.coded_bps is None else self.coded_bps

    @property
    def num_wrong_lengths(self) -> int:
        """Files that came back with another number of samples."""
        return sum(file.num_samples_in != file.num_samples_out for file in self.files)


@dataclass(frozen=True)
class Comparison:
    """`other` minus `baseline` over the files that both have, file by file."""

    baseline: str
    other: str
    differences: Mapping[str, Summary]


@dataclass(frozen=True)
class Example:
    """A recording to listen to. Audio is float32 [T], its beginning; `heard` by the names of systems."""

    file: str
    text: str
    rate_hz: int
    original: np.ndarray
    heard: Mapping[str, np.ndarray]
    chosen_for: str  # the system whose values chose it
    metric: str | None
    value: float | None


@dataclass(frozen=True)
class Evaluation:
    """All of it. `left_out`: metrics that could not be measured, and why; `failures`: files that could not be read."""

    systems: tuple[SystemResult, ...]
    comparisons: tuple[Comparison, ...]
    metrics: tuple[str, ...]  # names of the values, in the order of reports
    left_out: Mapping[str, str]
    failures: Mapping[str, str]
    num_files: int
    seconds: float
    facts: Mapping[str, Any]  # versions, machine, how it was done
    examples: tuple[Example, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """For JSON: without files and examples, which the CSV and the page have; None for NaN."""
        data = asdict(replace(self, examples=()))
        del data["examples"]
        for system in data["systems"]:
            system["num_wrong_lengths"] = sum(f["num_samples_in"] != f["num_samples_out"] for f in system["files"])
            del system["files"]
        cleaned: dict[str, Any] = without_nan(data)
        return cleaned

    def to_json(self) -> str:
        """One JSON object, for a file."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def to_csv(self) -> str:
        """A line per codec and file, under a header; an undefined value is empty."""
        names = (*self.metrics, *sorted({n for s in self.systems for f in s.files for n in f.values} - {*self.metrics}))
        text = io.StringIO()
        lines = csv.writer(text, lineterminator="\n")
        head = ("codec", "setting", "file", "speaker", "seconds", "num_samples_in", "num_samples_out")
        lines.writerow((*head, "packed_bits", "coded_bytes", "file_bytes", *names))
        for system in self.systems:
            for file in system.files:
                values = (file.values.get(name, math.nan) for name in names)
                sizes = (file.packed_bits, file.coded_bytes, file.file_bytes)
                lines.writerow(
                    (
                        *(system.coder, "" if system.setting is None else system.setting, file.file, file.speaker),
                        *(f"{file.seconds:.6f}", file.num_samples_in, file.num_samples_out),
                        *("" if size is None else size for size in sizes),
                        *("" if math.isnan(value) else f"{value:.6g}" for value in values),
                    )
                )
        return text.getvalue()


def without_nan(data: Any) -> Any:
    """For JSON, which knows neither NaN nor infinity: None in their places."""
    if isinstance(data, Mapping):
        return {key: without_nan(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [without_nan(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def summarize(values: Sequence[float], weights: Sequence[float] | None = None) -> Summary:
    """Mean and median of the values that are defined, weighted, and a 95 % bootstrap interval of the mean over files.

    The same values give the same interval.

    Source: Efron and Tibshirani, "An introduction to the bootstrap" (1993), chapter 13, the percentile interval.
    """
    given = np.array(values, np.float64)
    heavy = np.ones(len(given)) if weights is None else np.array(weights, np.float64)
    defined = np.isfinite(given) & (heavy > 0)
    given, heavy = given[defined], heavy[defined]
    if not len(given):
        return Summary(math.nan, math.nan, math.nan, math.nan, 0)
    rng = np.random.default_rng(0)
    means = []
    for _ in range(0, NUM_RESAMPLES, _RESAMPLES_AT_ONCE):
        drawn = rng.integers(len(given), size=(_RESAMPLES_AT_ONCE, len(given)))
        means.append((given * heavy)[drawn].sum(axis=1) / heavy[drawn].sum(axis=1))
    low, high = np.quantile(np.concatenate(means), (0.025, 0.975))
    mean = float(np.average(given, weights=heavy))
    return Summary(mean, float(low), float(high), float(np.median(given)), len(given))


def summaries_of(files: Sequence[FileResult], names: Sequence[str]) -> dict[str, Summary]:
    """Of every named value, over files."""
    return {
        name: summarize(
            [file.values.get(name, math.nan) for file in files],
            [file.values.get(name + WEIGHT_SUFFIX, 1.0) for file in files],
        )
        for name in names
    }


def compare(baseline: SystemResult, other: SystemResult, names: Sequence[str]) -> Comparison:
    """Differences file by file, which say far more than those of means: files differ more than codecs do."""
    first = {file.file: file for file in baseline.files}
    pairs = [(first[file.file], file) for file in other.files if file.file in first]
    differences = {}
    for name in names:
        gains = [b.values.get(name, math.nan) - a.values.get(name, math.nan) for a, b in pairs]
        differences[name] = summarize(gains, [b.values.get(name + WEIGHT_SUFFIX, 1.0) for _, b in pairs])
    return Comparison(baseline.name, other.name, differences)


def comparisons_of(systems: Sequence[SystemResult], names: Sequence[str]) -> tuple[Comparison, ...]:
    """Every other codec at each of its settings against the first codec at the setting of the nearest bit rate."""
    baselines = [system for system in systems if system.coder == systems[0].coder and system.rate_bps]
    found = []
    for system in systems:
        if system.coder != systems[0].coder and system.rate_bps and baselines:
            rate = math.log(system.rate_bps)
            nearest = min(baselines, key=lambda baseline: abs(math.log(baseline.rate_bps or 1) - rate))
            found.append(compare(nearest, system, names))
    return tuple(found)
