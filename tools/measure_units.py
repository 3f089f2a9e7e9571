"""How robust speech units are, and what they know of phones: units side by side, on the same distorted recordings.

    python -m tools.measure_units DATA --units UNITS OTHERS --noise NOISE --split dev
    python -m tools.measure_units DATA --units UNITS OTHERS --noise NOISE --labels LABELS

DATA is a manifest or a folder of audio, UNITS are folders that `codec units train` or `tools.train_units` wrote, NOISE
is any source of recordings that `tools.prepare_data` takes, LABELS TextGrid or CTM files, as `codec evaluate` has them.

Every recording is stretched, shifted in pitch, put into noise, and into a room. UED, unit edit distance: how many
insertions, deletions and replacements there are between the de-duplicated units of the recording and those of its
distortion, over the recording's frames (Gat et al. 2022), as a mean over recordings; and the same over its units, in
brackets. Purity and PNMI tell what units know of phones, where labels are given. Percentages are against the first.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from codec.audio import resample
from codec.batch import progress_bar
from codec.evaluation.labels import Segment, check_labels, find_labels, frame_labels, vocabulary
from codec.evaluation.recordings import Recording, find_recordings
from codec.evaluation.semantics import Counts
from codec.evaluation.unit_distance import UnitDistance, runs, unit_distance
from codec.units import SpeechUnits, load_units
from recipes.augment import DISTORTIONS, Distortion, DistortionConfig, DrawAudio
from recipes.corpora import open_corpus
from recipes.crops import Pool


@dataclass(frozen=True)
class Robustness:
    """What was measured of units. `distances` by the kind of distortion; purity and PNMI where there are labels."""

    name: str
    num_units: int
    num_used: int
    units_per_second: float
    purity: float | None
    pnmi: float | None
    distances: dict[str, UnitDistance]


def main() -> None:
    """Parse arguments and measure; a mistake in them is one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--units", nargs="+", required=True, help="folders of units")
    parser.add_argument("--noise", type=Path, help="recordings of noise (default: noise is left out)")
    parser.add_argument("--labels", type=Path, help="of phones")
    parser.add_argument("--tier", help="of TextGrids (default: phones, or the only one)")
    parser.add_argument("--split", help="rows of the manifest to take (default: all)")
    parser.add_argument("--max-files", type=int, help="take so many recordings, evenly spread")
    parser.add_argument("--seed", type=int, default=0, help="of the distortions")
    parser.add_argument("--num-threads", type=int)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args()
    if args.num_threads is not None:
        torch.set_num_threads(args.num_threads)
    try:
        recordings = find_recordings(args.data, split=args.split, max_files=args.max_files)
        labels: dict[str, tuple[Segment, ...]] = {}
        if args.labels is not None:
            labels, _ = find_labels(args.labels, [recording.name for recording in recordings], tier=args.tier)
        all_units = {name: load_units(name) for name in args.units}
        rate_hz = next(iter(all_units.values())).sample_rate_hz
        noise = noise_from(args.noise, rate_hz) if args.noise is not None else None
        distortion = Distortion(DistortionConfig(), sample_rate_hz=rate_hz, noise=noise)
        measured = measure(all_units, recordings, distortion, labels, seed=args.seed)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(json.dumps([asdict(one) for one in measured]) if args.json else table(measured))


def noise_from(source: Path, sample_rate_hz: int) -> DrawAudio:
    """Draws noise from recordings."""
    return Pool([(open_corpus(source), 1.0)], sample_rate_hz=sample_rate_hz).draw_loop


def measure(
    all_units: dict[str, SpeechUnits],
    recordings: Sequence[Recording],
    distortion: Distortion,
    labels: dict[str, tuple[Segment, ...]],
    *,
    seed: int = 0,
) -> list[Robustness]:
    """All units hear the same distortions, drawn by (seed, recording, kind) alone."""
    pairs: dict[str, dict[str, list[tuple[np.ndarray, np.ndarray]]]] = {
        name: {kind: [] for kind in distortion.kinds} for name in all_units
    }
    known: dict[str, list[np.ndarray]] = {name: [] for name in all_units}
    phones: dict[str, list[np.ndarray]] = {name: [] for name in all_units}
    numbers = vocabulary(labels.values())
    with progress_bar() as advance:
        for number, recording in enumerate(recordings):
            audio, rate_hz = recording.read()
            clean = resample(audio[None], rate_hz, distortion.sample_rate_hz)
            before = _units_of(all_units, clean, distortion.sample_rate_hz)
            for kind in distortion.kinds:
                rng = np.random.default_rng((seed, number, DISTORTIONS.index(kind)))
                after = _units_of(all_units, distortion(kind, clean, rng), distortion.sample_rate_hz)
                for name in all_units:
                    pairs[name][kind].append((before[name], after[name]))
            if recording.name in labels:
                check_labels(labels[recording.name], len(audio) / rate_hz)
                for name, units in all_units.items():
                    known[name].append(before[name])
                    segments = labels[recording.name]
                    phones[name].append(frame_labels(segments, len(before[name]), units.frame_rate_hz, numbers))
            advance(1, len(recordings))
    measured = []
    for name, units in all_units.items():
        all_clean = [clean for clean, _ in pairs[name][distortion.kinds[0]]]
        seconds = sum(map(len, all_clean)) / units.frame_rate_hz
        counts = Counts.of(np.concatenate(known[name]), np.concatenate(phones[name])) if labels else None
        measured.append(
            Robustness(
                name=name,
                num_units=units.num_units,
                num_used=len(np.unique(np.concatenate(all_clean))),
                units_per_second=sum(len(runs(clean)) for clean in all_clean) / seconds,
                purity=counts.purity() if counts else None,
                pnmi=counts.pnmi() if counts else None,
                distances={kind: unit_distance(pairs[name][kind]) for kind in distortion.kinds},
            )
        )
    return measured


def _units_of(all_units: dict[str, SpeechUnits], audio: np.ndarray, rate_hz: int) -> dict[str, np.ndarray]:
    """The units of audio [1, T]; features that several are of are computed once."""
    features: dict[Any, torch.Tensor] = {}
    found = {}
    for name, units in all_units.items():
        if units.source.config not in features:
            heard = np.array(resample(audio, rate_hz, units.sample_rate_hz)[0], np.float32)
            features[units.source.config] = units.source.features(torch.from_numpy(heard))
        found[name] = units.assigner.assign(features[units.source.config]).numpy()
    return found


def table(measured: Sequence[Robustness]) -> str:
    """A row for each, for people."""
    kinds = list(measured[0].distances)
    rows = [["units", "of", "used", "a second", "purity", "PNMI", *kinds]]
    for one in measured:
        cells = []
        for kind in kinds:
            here, first = one.distances[kind], measured[0].distances[kind]
            told = f"{100 * here.per_frame.mean:.1f} ({100 * here.per_unit.mean:.0f})"
            if one is not measured[0] and first.per_frame.mean > 0:
                change = 100 * (here.per_frame.mean / first.per_frame.mean - 1)
                per_unit = 100 * (here.per_unit.mean / first.per_unit.mean - 1)
                told += f" {change:+.0f} % ({per_unit:+.0f} %)"
            cells.append(told)
        knowledge = ["-" if value is None else f"{value:.3f}" for value in (one.purity, one.pnmi)]
        name = Path(one.name).name
        about = [name, str(one.num_units), str(one.num_used), f"{one.units_per_second:.1f}", *knowledge]
        rows.append([*about, *cells])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, "", "UED in % of frames, in brackets of de-duplicated units; lower is more robust"])


if __name__ == "__main__":
    main()
