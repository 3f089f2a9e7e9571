"""What the codes of a model tell of labels, over recordings: every row of codes, the first stage, and all rows."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from codec.evaluation.abx import Token, abx
from codec.evaluation.coders import UsageError
from codec.evaluation.labels import Segment, check_labels, find_labels, frame_labels, vocabulary
from codec.evaluation.recordings import Recording, spread
from codec.evaluation.results import Semantics, Summary
from codec.evaluation.semantics import (
    PROBE_FOLDS,
    Counts,
    most_frequent,
    over_files,
    pnmi_by_chance,
    probe,
    unseen_purity,
)

if TYPE_CHECKING:
    from codec.models.interface import Codec

MAX_LATENT_FRAMES = 100_000  # that probes and ABX look at
_GAP_SECONDS = 0.03  # between neighbours that follow one another
_SLACK_SECONDS = 0.1


@dataclass(frozen=True)
class LabelledRecording:
    """A recording with its labels. `num_seconds` is its duration."""

    speaker: str
    num_seconds: float
    segments: tuple[Segment, ...]


def labels_for(
    recordings: Sequence[Recording], source: str | os.PathLike[str] | None, tier: str | None, *, has_models: bool
) -> tuple[dict[str, tuple[Segment, ...]], dict[str, str]]:
    """See `find_labels`; nothing where no source is named. UsageError where labels would be of no use."""
    if source is None:
        if tier is not None:
            raise UsageError(f"tier {tier!r} is one of labels, and none are named")
        return {}, {}
    if not has_models:
        raise UsageError("labels are compared with the codes of models, and no model is named")
    if importlib.util.find_spec("sklearn") is None:
        raise UsageError("labels need the extra 'semantics'")
    return find_labels(source, [recording.name for recording in recordings], tier=tier)


def fitting_labels(
    labels: Mapping[str, tuple[Segment, ...]], recordings: Sequence[Recording], seconds: Mapping[str, float]
) -> tuple[dict[str, LabelledRecording], dict[str, str]]:
    """The recordings that their labels fit, of those whose `seconds` are known; and why others have none.

    ValueError where there are labels, but they fit none.
    """
    known: dict[str, LabelledRecording] = {}
    failures: dict[str, str] = {}
    for recording in recordings:
        if recording.name in labels and recording.name in seconds:
            given = LabelledRecording(recording.speaker, seconds[recording.name], labels[recording.name])
            try:
                check_labels(given.segments, given.num_seconds)
            except ValueError as error:
                failures[f"{recording.name}, labels"] = str(error)
            else:
                known[recording.name] = given
    if failures and not known:
        raise ValueError(": ".join(next(iter(failures.items()))))
    return known, failures


def semantics_of(
    codec: Codec, codes: Mapping[str, np.ndarray], recordings: Mapping[str, LabelledRecording]
) -> tuple[Semantics, ...]:
    """Of every row of codes int64 [K, F], by recordings: purities, PNMI, and what that is by chance.

    And of the quantized latents of the first stage (the fewest rows that the model can be decoded from), and of all
    rows: a linear probe and ABX. Those look at `MAX_LATENT_FRAMES` frames at the most, from recordings evenly spread;
    the probe is tested on speakers that it has not learned from where there are `PROBE_FOLDS` of them or more, and else
    on recordings.

    ValueError where frames do not lie on one grid, as those of overlapping segments, or none has a label.
    """
    rate_hz = codec.sample_rate_hz / codec.hop_length
    names = [name for name in recordings if name in codes]
    for name in names:
        if abs(codes[name].shape[1] / rate_hz - recordings[name].num_seconds) > _SLACK_SECONDS:
            raise ValueError(f"{name} has {codes[name].shape[1]} frames, which do not lie one after the other")
    numbers = vocabulary(recordings[name].segments for name in names)
    labels = [frame_labels(recordings[name].segments, codes[name].shape[1], rate_hz, numbers) for name in names]
    if not any((given >= 0).any() for given in labels):
        raise ValueError("no frame has a label")
    files = np.repeat(np.arange(len(names)), [len(given) for given in labels])
    joined, whole = np.concatenate(labels), np.concatenate([codes[name] for name in names], axis=1)
    measures = {"purity": Counts.purity, "cluster_purity": Counts.cluster_purity, "pnmi": Counts.pnmi}
    found = {}
    for row, own in enumerate(whole):
        found[row, row] = {name: over_files(measure, own, joined, files) for name, measure in measures.items()}
        found[row, row]["pnmi_by_chance"] = _plain(pnmi_by_chance(own, joined), len(names))
        if len(np.unique(files[joined >= 0])) > 1:
            found[row, row]["unseen_purity"] = unseen_purity(own, joined, files)
    share = MAX_LATENT_FRAMES / len(joined)
    taken = spread(range(len(names)), max(2, math.floor(len(names) * share)))
    for num_rows in sorted({codec.valid_num_quantizers[0], len(whole)}):
        latents = [_latents(codec, codes[names[i]][:num_rows]) for i in taken]
        values = _of_latents(latents, [labels[i] for i in taken], [recordings[names[i]] for i in taken], rate_hz)
        found[0, num_rows - 1] = found.get((0, num_rows - 1), {}) | values
    return tuple(
        Semantics(str(first) if first == last else f"{first} to {last}", found[first, last])
        for first, last in sorted(found, key=lambda rows: (rows[1] - rows[0] > 0, rows))
    )


def label_facts(recordings: Mapping[str, LabelledRecording]) -> dict[str, object]:
    """What has to be known of labels to read the values: how many there are, and how common the most common one is."""
    numbers = vocabulary(r.segments for r in recordings.values())
    labels = [frame_labels(r.segments, math.ceil(100 * r.num_seconds), 100, numbers) for r in recordings.values()]
    return {
        "num_files": len(recordings),
        "num_labels": len(numbers),
        "num_segments": sum(len(r.segments) for r in recordings.values()),
        "most_frequent": most_frequent(np.concatenate(labels)),
        "is_by_speaker": _is_by_speaker(list(recordings.values())),
    }


def _latents(codec: Codec, codes: np.ndarray) -> np.ndarray:
    """Quantized latents float32 [F, D] of codes [K, F]."""
    import torch

    with torch.inference_mode():
        decoded = codec.quantizer.decode(torch.from_numpy(codes.astype(np.int64))[None])
    latents: np.ndarray = decoded[0].T.float().numpy()
    return latents


def _of_latents(
    latents: Sequence[np.ndarray], labels: Sequence[np.ndarray], recordings: Sequence[LabelledRecording], rate_hz: float
) -> dict[str, Summary]:
    """A probe and ABX; NaN where they are not defined."""
    files = np.repeat(np.arange(len(labels)), [len(given) for given in labels])
    speakers = np.unique([recording.speaker for recording in recordings], return_inverse=True)[1]
    groups = speakers[files] if _is_by_speaker(recordings) else files
    try:
        told = probe(np.concatenate(latents), np.concatenate(labels), files, groups=groups)
    except ValueError:  # one group or one label
        told = Summary(math.nan, math.nan, math.nan, math.nan, 0)
    tokens = [token for own, recording in zip(latents, recordings, strict=True)
              for token in tokens_of(own, recording.segments, rate_hz, recording.speaker)]  # fmt: skip
    values = {"probe": told}
    for name, across in (("abx_within", False), ("abx_across", True)):
        error = abx(tokens, across=across, by_context=False)
        values[name] = _plain(error, len(recordings))
    return values


def _plain(value: float, num_files: int) -> Summary:
    """A value without an interval."""
    return Summary(value, math.nan, math.nan, value, 0 if math.isnan(value) else num_files)


def _is_by_speaker(recordings: Sequence[LabelledRecording]) -> bool:
    speakers = {recording.speaker for recording in recordings}
    return len(speakers) >= PROBE_FOLDS and "" not in speakers


def tokens_of(latents: np.ndarray, segments: Sequence[Segment], frame_rate_hz: float, speaker: str = "") -> list[Token]:
    """The labelled segments of a recording with their latents, from [F, D]; those that hold no frame's centre left out.

    The context of a token is what is said right before and after it, "" for silence.
    """
    tokens = []
    for i, segment in enumerate(segments):
        first, last = (
            math.ceil(seconds * frame_rate_hz - 0.5) for seconds in (segment.start_seconds, segment.stop_seconds)
        )
        if first >= min(last, len(latents)):
            continue
        before, after = (_neighbour(segments, i, step) for step in (-1, 1))
        tokens.append(Token(segment.label, latents[first:last], speaker, (before, after)))
    return tokens


def _neighbour(segments: Sequence[Segment], i: int, step: int) -> str:
    if not 0 <= i + step < len(segments):
        return ""
    first, second = sorted((segments[i], segments[i + step]), key=lambda segment: segment.start_seconds)
    return segments[i + step].label if second.start_seconds - first.stop_seconds < _GAP_SECONDS else ""
