"""The numbers of an evaluation as cells of text, and as tables in a terminal."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

from codec.evaluation.metrics import METRICS, Metric
from codec.evaluation.results import Evaluation, Summary, SystemResult

_SCORES = {
    metric.name: metric
    for metric in (
        Metric(
            *("wer", "WER", "", "lower"),
            "Word errors of the recogniser named below, over the words of the texts; no case, no punctuation.",
        ),
        Metric(
            *("speaker_similarity", "speaker similarity", "", "higher"),
            "Cosine similarity of what the model named below makes of the voices in original and decoded speech.",
        ),
    )
}
_SEMANTICS = {
    metric.name: metric
    for metric in (
        Metric(
            *("purity", "purity", "", "higher"),
            "Share of labelled frames whose label is the most frequent one of their code (Hsu et al. 2021); it grows "
            "with the size of the codebook.",
        ),
        Metric(
            *("unseen_purity", "purity, unseen", "", "higher"),
            "Share of labelled frames whose label is the most frequent one of their code in other recordings: purity "
            "without what large codebooks gain by themselves. Cross-validated.",
        ),
        Metric(
            *("cluster_purity", "cluster purity", "", "higher"),
            "Share of labelled frames whose code is the most frequent one of their label; it falls as codebooks grow.",
        ),
        Metric(
            *("pnmi", "PNMI", "", "higher"),
            "Mutual information of codes and labels over the entropy of labels (Hsu et al. 2021), from counts: it "
            "grows with the size of the codebook, and is too high where frames are few.",
        ),
        Metric(
            *("pnmi_by_chance", "PNMI by chance", "", ""),
            "The same where labels come a quarter, half, three quarters of all frames too late, on average.",
        ),
        Metric(
            *("probe", "probe", "", "higher"),
            "Share of labelled frames whose label a logistic regression tells from the quantized latents, on "
            "recordings (of other speakers, where there are enough) that it has not learned from; cross-validated.",
        ),
        Metric(
            *("abx_within", "ABX within", "", "lower"),
            "How often a segment's quantized latents are nearer to those of a segment of another label than to those "
            "of one of its own, all of one speaker, whatever stands beside them (Schatz et al. 2013; Hallap et al. "
            "2023): angles along the best way through both. Chance is 0.5.",
        ),
        Metric(
            *("abx_across", "ABX across", "", "lower"),
            "The same, where the segment is another speaker's than both that it is compared with.",
        ),
    )
}
ARROWS = {"higher": "↑", "lower": "↓", "": ""}


@dataclass(frozen=True)
class Table:
    """A head, and rows of cells as long as it; the first cell of a row is its name."""

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def described(name: str) -> Metric:
    """What is known of a metric or a scorer's value."""
    return (
        METRICS.get(name)
        or _SCORES.get(name)
        or _SEMANTICS.get(name)
        or Metric(name, name, "", "", "A value of a scorer.")
    )


def number(value: float | None, like: float | None = None) -> str:
    """Three digits or so, or as many decimals as another number has; a dash for what is not there."""
    if value is None or not math.isfinite(value):
        return "–"  # noqa: RUF001
    size = abs(value if like is None else like)
    digits = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3
    return f"{value:.{digits}f}".replace("-", "−")  # noqa: RUF001


def interval(summary: Summary) -> str:
    """The mean, and how far its interval reaches on the wider side, where it has one."""
    if not summary.num_files or not math.isfinite(summary.high):
        return number(summary.mean)
    reach = max(summary.high - summary.mean, summary.mean - summary.low)
    return f"{number(summary.mean)} ±{number(reach, like=summary.mean)}"


def kbps(rate_bps: float | None) -> str:
    """A bit rate."""
    return "–" if rate_bps is None else f"{rate_bps / 1000:.2f}"  # noqa: RUF001


def quality_table(evaluation: Evaluation) -> Table:
    """Every metric of every codec."""
    metrics = [described(name) for name in evaluation.metrics]
    rows = [
        (system.name, kbps(system.rate_bps), *(interval(system.summaries[metric.name]) for metric in metrics))
        for system in evaluation.systems
    ]
    head = ("codec", "kbps", *(_head(metric) for metric in metrics))
    return Table("Means over files, with 95 % bootstrap intervals", head, tuple(rows))


def median_table(evaluation: Evaluation) -> Table:
    """The medians of the same."""
    metrics = [described(name) for name in evaluation.metrics]
    rows = [
        (system.name, *(number(system.summaries[metric.name].median) for metric in metrics))
        for system in evaluation.systems
    ]
    head = ("codec", *(_head(metric) for metric in metrics))
    return Table("Medians over files", head, tuple(rows))


def cost_table(evaluation: Evaluation) -> Table:
    """What every codec costs: bits, time, memory, delay."""
    head = ("codec", "codes, kbps", "coded, kbps", "file, kbps", "encode, × real time", "decode, × real time")  # noqa: RUF001
    rows = [
        (
            system.name,
            *(kbps(rate) for rate in (system.packed_bps, system.coded_bps, system.file_bps)),
            *(number(speed) for speed in (system.encode_times_real_time, system.decode_times_real_time)),
            number(system.peak_memory_mb),
            f"{system.delay_ms:.2f}".replace("-", "−"),  # noqa: RUF001
            str(system.num_wrong_lengths),
        )
        for system in _codecs(evaluation)
    ]
    return Table(
        "Bits per second of audio, times real time on one thread, delay, lengths",
        (*head, "memory, MB", "delay, ms", "other length, files"),
        tuple(rows),
    )


def difference_table(evaluation: Evaluation) -> Table:
    """Paired differences."""
    metrics = [described(name) for name in evaluation.metrics]
    rows = []
    for comparison in evaluation.comparisons:
        summaries = [comparison.differences[metric.name] for metric in metrics]
        num_files = str(max((summary.num_files for summary in summaries), default=0))
        cells = [("+" if summary.mean >= 0 else "") + interval(summary) for summary in summaries]
        rows.append((f"{comparison.other} − {comparison.baseline}", num_files, *cells))  # noqa: RUF001
    head = ("difference", "n", *(_head(metric) for metric in metrics))
    return Table(
        "Mean differences file by file, at the nearest bit rate, with 95 % bootstrap intervals", head, tuple(rows)
    )


def codebook_table(evaluation: Evaluation) -> Table:
    """Use of every codebook: entries used, perplexity."""
    used = [(system.coder, system.codebooks) for system in evaluation.systems if system.codebooks]
    most = max((len(use.usage) for _, use in used), default=0)
    head = ("row", *(f"{coder}, {use.num_frames} frames" for coder, use in used))
    rows = []
    for i in range(most):
        cells = [
            f"{100 * use.usage[i]:.0f} %, {use.perplexity[i]:.0f} of {use.codebook_sizes[i]}"
            if i < len(use.usage)
            else number(None)
            for _, use in used
        ]
        rows.append((str(i), *cells))
    return Table("Entries used, and perplexity of their use, for every row of codes", head, tuple(rows))


def semantics_table(evaluation: Evaluation) -> Table:
    """What codes tell of labels."""
    rows = [
        (system.coder, told.rows, *(_interval_of(told.values.get(name)) for name in _SEMANTICS))
        for system in evaluation.systems
        for told in system.semantics
    ]
    head = ("codec", "rows", *(_head(metric) for metric in _SEMANTICS.values()))
    return Table("What codes, and their quantized latents, tell of the labels", head, tuple(rows))


def semantics_metrics(evaluation: Evaluation) -> tuple[Metric, ...]:
    """The values of that table, where it has rows."""
    return tuple(_SEMANTICS.values()) if any(system.semantics for system in evaluation.systems) else ()


def _interval_of(summary: Summary | None) -> str:
    return number(None) if summary is None else interval(summary)


def _head(metric: Metric) -> str:
    return f"{metric.title}\N{NO-BREAK SPACE}{ARROWS[metric.better]}" if metric.better else metric.title


def _codecs(evaluation: Evaluation) -> Sequence[SystemResult]:
    return [system for system in evaluation.systems if system.setting is not None]


def tables(evaluation: Evaluation) -> list[Table]:
    """All that have rows."""
    made = (quality_table, cost_table, difference_table, semantics_table, codebook_table)
    return [table for table in (make(evaluation) for make in made) if table.rows]


def remarks(evaluation: Evaluation) -> list[str]:
    """What was not measured, and what failed."""
    said = [f"{described(name).label} was not measured: it {why}" for name, why in evaluation.left_out.items()]
    said += [f"{file}: {why}" for file, why in evaluation.failures.items()]
    for system in evaluation.systems:
        said += [f"{file}, {system.name}: {why}" for file, why in system.failures.items()]
    return said


def text(evaluation: Evaluation, width: int | None = None) -> str:
    """All tables for a terminal; as wide as they are, or `width`."""
    from rich.console import Console
    from rich.table import Table as RichTable

    console = Console(file=io.StringIO(), width=width or 400, no_color=True, highlight=False, markup=False)
    console.print(f"{evaluation.num_files} recordings, {evaluation.seconds / 60:.1f} minutes")
    for table in tables(evaluation):
        shown = RichTable(box=None, pad_edge=False)
        for i, name in enumerate(table.head):
            shown.add_column(name, justify="left" if i == 0 else "right", no_wrap=width is None or i == 0)
        for row in table.rows:
            shown.add_row(*row)
        console.print(f"\n{table.caption}\n")
        console.print(shown)
    if missing := [described(name).label for name in evaluation.left_out]:
        console.print(f"\nnot measured: {', '.join(missing)} ({'; '.join(sorted(set(evaluation.left_out.values())))})")
    output = console.file
    assert isinstance(output, io.StringIO)
    return "\n".join(line.rstrip() for line in output.getvalue().splitlines()) + "\n"
