r"""How well a codec that keeps the voice apart changes voices, and what is left of what was said.

    python -m tools.measure_conversion MODEL --data DIR --split dev --num-quantizers 1 9 --out table.json

For pairs of an utterance and a reference by somebody else, the utterance is decoded with its own global codes, and with
those of the reference, from each number of rows of codes. Of both, as of the two recordings themselves, there are

- the similarity to the target voice and to the source voice, cosines of what `--scorer` makes of it and of the mean
  over other recordings of that speaker: neither the utterance nor the reference is among these;
- how much nearer it is to the target voice, and in how many pairs it is nearer at all;
- edits of row 0: what the codec finds in it again, de-duplicated, against what it found in the utterance, per unit;
- what further scorers give, such as `--scorer pocketsphinx`: word errors.

Means have 95 % bootstrap intervals over pairs. The same seed draws the same pairs, as many from every speaker to every
other one as the number allows.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import multiprocessing
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from codec.audio import fit_length, resample
from codec.evaluation.recordings import Recording, find_recordings
from codec.evaluation.results import WEIGHT_SUFFIX, Summary, summarize, without_nan
from codec.evaluation.scorers import Scorer, SpeakerScorer, load_scorer
from codec.evaluation.unit_distance import edit_distance, runs
from codec.files import AtomicFile
from codec.models.voice import VoicedCodec, voiced
from codec.pretrained import load

_PER_VOICE = 8  # recordings that a speaker's voice is the mean of
TARGET, SOURCE, GAIN, NEARER, EDITS = "to target", "to source", "target - source", "nearer to target", "row 0 edits"


@dataclass(frozen=True)
class Pair:
    """Whose words in whose voice; and other recordings of both, that say what their voices are."""

    source: Recording
    reference: Recording
    of_source: tuple[Recording, ...]
    of_target: tuple[Recording, ...]


def draw_pairs(recordings: Sequence[Recording], num_pairs: int, seed: int) -> list[Pair]:
    """So many, the same for a seed. ValueError where there are not two speakers with two recordings each."""
    rng = np.random.default_rng(seed)
    by_speaker: dict[str, list[Recording]] = {}
    for recording in recordings:
        by_speaker.setdefault(recording.speaker, []).append(recording)
    shuffled = {speaker: [of[i] for i in rng.permutation(len(of))] for speaker, of in sorted(by_speaker.items())}
    if len(shuffled) < 2 or min(map(len, shuffled.values())) < 2:
        raise ValueError("conversion needs two speakers or more, each with two recordings or more")
    directions = list(itertools.permutations(shuffled, 2))
    pairs = []
    for number in range(num_pairs):
        turn, place = divmod(number, len(directions))
        of_source, of_target = (shuffled[speaker] for speaker in directions[place])
        source = of_source[turn % len(of_source)]
        reference = of_target[int(rng.integers(len(of_target)))]
        others = (tuple(r for r in of if r not in (source, reference))[:_PER_VOICE] for of in (of_source, of_target))
        pairs.append(Pair(source, reference, *others))
    return pairs


@dataclass(frozen=True)
class Measurement:
    """What is measured on each pair. Travels to other processes."""

    model: str
    num_quantizers: tuple[int, ...]
    scorers: tuple[str, ...]

    def __call__(self, pair: Pair) -> dict[str, dict[str, float]]:
        """Values by their names, by what was heard."""
        torch.set_num_threads(1)
        codec = _loaded(self.model)
        speaker, further = split_scorers(self.scorers)
        voices = [_voice(speaker, of) for of in (pair.of_target, pair.of_source)]
        original, rate_hz = pair.source.read()
        tokens = codec.encode(_batch(codec, original, rate_hz))
        units = runs(tokens.codes[0, 0].numpy())
        target = codec.encode_global(_batch(codec, *pair.reference.read()))
        heard = {"utterance": original, "reference": pair.reference.read()[0]}
        for num_rows in self.num_quantizers:
            part = tokens.prefix(num_rows)
            for name, given in (("own voice", part), ("converted", part.with_voice(target))):
                decoded = resample(codec.decode(given)[0].numpy(), codec.sample_rate_hz, rate_hz)
                heard[f"{name}, {_rows(num_rows)}"] = fit_length(decoded, len(original))[0]
        values: dict[str, dict[str, float]] = {}
        for name, audio in heard.items():
            to_target, to_source = (float(voice @ speaker.embed(audio, rate_hz)) for voice in voices)
            found = {TARGET: to_target, SOURCE: to_source, GAIN: to_target - to_source}
            values[name] = found | {NEARER: float(to_target > to_source)}
            if name != "reference":
                again = runs(codec.encode(_batch(codec, audio, rate_hz)).codes[0, 0].numpy())
                values[name][EDITS] = edit_distance(units, again) / len(units)
                for scorer in further:
                    values[name] |= scorer.score(original, audio, rate_hz, pair.source.text)
        return values


@functools.cache
def _loaded(model: str) -> VoicedCodec:
    return voiced(load(model))


def split_scorers(specs: Sequence[str]) -> tuple[SpeakerScorer, list[Scorer]]:
    """The one that tells voices apart, and the others. ValueError where there is none or more of these."""
    scorers = [load_scorer(spec) for spec in specs]
    speakers = [scorer for scorer in scorers if isinstance(scorer, SpeakerScorer)]
    if len(speakers) != 1:
        raise ValueError("it takes one --scorer that tells voices apart: resemblyzer or speaker=EMBEDDER")
    return speakers[0], [scorer for scorer in scorers if scorer is not speakers[0]]


@functools.cache
def _voice(scorer: SpeakerScorer, recordings: tuple[Recording, ...]) -> np.ndarray:
    mean = np.mean([_embedding(scorer, recording) for recording in recordings], axis=0)
    unit: np.ndarray = mean / np.linalg.norm(mean)
    return unit


@functools.cache
def _embedding(scorer: SpeakerScorer, recording: Recording) -> np.ndarray:
    return scorer.embed(*recording.read())


def _batch(codec: VoicedCodec, audio: np.ndarray, rate_hz: int) -> torch.Tensor:
    return torch.from_numpy(np.array(resample(audio[None], rate_hz, codec.sample_rate_hz), np.float32))[None]


def _rows(number: int) -> str:
    return f"{number} row{'' if number == 1 else 's'}"


def summaries(measured: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, Summary]]:
    """Over pairs: of everything that was heard, each value."""
    found: dict[str, dict[str, Summary]] = {}
    for heard in measured[0]:
        rows = [values[heard] for values in measured]
        found[heard] = {
            name: summarize(
                [row.get(name, math.nan) for row in rows], [row.get(name + WEIGHT_SUFFIX, 1.0) for row in rows]
            )
            for name in rows[0]
            if not name.endswith(WEIGHT_SUFFIX)
        }
    return found


def table(found: Mapping[str, Mapping[str, Summary]]) -> str:
    """Means and intervals, as Markdown."""
    columns = list(dict.fromkeys(name for values in found.values() for name in values))
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for heard, values in found.items():
        cells = [_cell(values.get(name)) for name in columns]
        lines.append(f"| {heard} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(summary: Summary | None) -> str:
    if summary is None or not summary.num_files:
        return ""
    return f"{summary.mean:.3f} ({summary.low:.3f} to {summary.high:.3f})"


def main() -> None:
    """Parse arguments, measure, print the table; a mistake is one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a bundled model or a folder, one that keeps the voice apart")
    parser.add_argument("--data", required=True, help="recordings with speakers and text, as codec evaluate takes them")
    parser.add_argument("--split", help="rows of the manifest to take (default: all)")
    parser.add_argument("--speakers", nargs="+", help="take these alone (default: all)")
    parser.add_argument("--num-quantizers", "-k", type=int, nargs="+", help="rows of codes (default: the fewest, all)")
    parser.add_argument(
        "--scorer", action="append", help="as for codec evaluate, again for more (default: resemblyzer)"
    )
    parser.add_argument("--num-pairs", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-processes", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write all values here, as JSON")
    args = parser.parse_args()
    try:
        if min(args.num_pairs, args.num_processes) < 1:
            raise ValueError("--num-pairs and --num-processes must be positive")
        codec = _loaded(args.model)
        num_rows = tuple(
            args.num_quantizers or dict.fromkeys((codec.num_semantic_quantizers, len(codec.codebook_sizes)))
        )
        for number in num_rows:
            codec.quantizer.check_num_quantizers(number)
        specs = tuple(args.scorer or ["resemblyzer"])
        speaker, further = split_scorers(specs)
        recordings = [
            recording
            for recording in find_recordings(args.data, split=args.split)
            if args.speakers is None or recording.speaker in args.speakers
        ]
        pairs = draw_pairs(recordings, args.num_pairs, args.seed)
        measurement = Measurement(args.model, num_rows, specs)
        if args.num_processes == 1:
            measured = list(map(measurement, pairs))
        else:
            with ProcessPoolExecutor(args.num_processes, multiprocessing.get_context("spawn")) as pool:
                measured = list(pool.map(measurement, pairs))
        found = summaries(measured)
        facts: dict[str, Any] = {
            "model": codec.name,
            "codec_id": codec.codec_id,
            "num_global_bits": codec.num_global_codes * (codec.global_codebook_size - 1).bit_length(),
            "bitrates_bps": {number: codec.bitrate_bps(number) for number in num_rows},
            "scorers": {scorer.name: scorer.version for scorer in (speaker, *further)},
            "speakers": sorted({recording.speaker for recording in recordings}),
            "seed": args.seed,
        }
        if args.out is not None:
            drawn = [
                {"source": pair.source.name, "reference": pair.reference.name, "values": values}
                for pair, values in zip(pairs, measured, strict=True)
            ]
            means = {heard: {name: asdict(s) for name, s in values.items()} for heard, values in found.items()}
            with AtomicFile(args.out) as new:
                new.file.write(
                    (json.dumps(without_nan(facts | {"means": means, "pairs": drawn}), indent=2) + "\n").encode()
                )
                new.commit()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(
        f"{codec.name}, id {codec.codec_id}: {len(pairs)} pairs of {len(facts['speakers'])} speakers, seed {args.seed}"
    )
    for name, version in facts["scorers"].items():
        print(f"{name}: {version}")
    print()
    print(table(found))


if __name__ == "__main__":
    main()
