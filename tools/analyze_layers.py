"""Which layer of a speech model knows most of phones: a table of its layers, to choose a teacher's.

    python -m tools.align_phones DATA LABELS --split dev
    python -m tools.analyze_layers MODEL DATA LABELS --split dev

MODEL is a folder of `transformers`, or `torchaudio:NAME`, see `codec.features.load_speech_model`. DATA is a manifest or
a folder of audio, LABELS a folder of TextGrid or CTM files, or one CTM file. Labelled frames are drawn evenly from all
recordings. Layer 0 is what goes into the first transformer layer.

PWCCA: correlation of a layer with the labels, weighted by how much of the layer it accounts for (Pasad et al. 2021).
PNMI: what k-means clusters of a layer tell of the labels, of all there is to tell (Hsu et al. 2021).
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from codec.audio import resample
from codec.evaluation.labels import Segment, check_labels, find_labels, frame_labels, vocabulary
from codec.evaluation.layers import NUM_CLUSTERS, LayerKnowledge, analyze_layers
from codec.evaluation.recordings import Recording, find_recordings
from codec.features import SpeechModel, load_speech_model


def main() -> None:
    """Parse arguments and analyze; a mistake in them is one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("labels", type=Path)
    parser.add_argument("--tier", help="of TextGrids (default: phones, or the only one)")
    parser.add_argument("--split", help="rows of the manifest to take (default: all)")
    parser.add_argument("--max-files", type=int, help="take so many recordings, evenly spread")
    parser.add_argument("--max-frames", type=int, default=20_000, help="labelled frames to keep (default: 20000)")
    parser.add_argument("--num-clusters", type=int, default=NUM_CLUSTERS, help="of k-means (default: 100)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args()
    try:
        if args.max_frames < 1 or args.num_clusters < 2:
            raise ValueError("--max-frames must be positive, and --num-clusters at least 2")
        recordings = find_recordings(args.data, split=args.split, max_files=args.max_files)
        labels, _ = find_labels(args.labels, [recording.name for recording in recordings], tier=args.tier)
        model = load_speech_model(args.model)
        hidden, numbers = _frames(model, [r for r in recordings if r.name in labels], labels, args.max_frames)
        layers = analyze_layers(hidden, numbers, num_clusters=args.num_clusters)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(_told(model, layers, len(numbers), as_json=args.json))


def _frames(
    model: SpeechModel, recordings: list[Recording], labels: dict[str, tuple[Segment, ...]], max_frames: int
) -> tuple[np.ndarray, np.ndarray]:
    """Hidden states float32 [L, F, D] of labelled frames, as many from each recording, and their labels int64 [F]."""
    numbers = vocabulary(labels.values())
    share = -(-max_frames // len(recordings))
    rng = np.random.default_rng(0)
    hidden, given = [], []
    for recording in recordings:
        audio, rate_hz = recording.read()
        try:
            check_labels(labels[recording.name], len(audio) / rate_hz)
        except ValueError as error:
            raise ValueError(f"{recording.name}: {error}") from error
        at_rate = np.array(resample(audio[None], rate_hz, model.sample_rate_hz), np.float32)
        states, num_frames = model.hidden(torch.from_numpy(at_rate))
        frame_rate_hz = model.sample_rate_hz / model.stride_samples
        own = frame_labels(labels[recording.name], int(num_frames[0]), frame_rate_hz, numbers)
        labelled = np.flatnonzero(own >= 0)
        taken = np.sort(rng.permutation(labelled)[:share])
        hidden.append(states[:, 0, torch.from_numpy(taken)].numpy())
        given.append(own[taken])
    return np.concatenate(hidden, axis=1), np.concatenate(given)


def _told(model: SpeechModel, layers: list[LayerKnowledge], num_frames: int, *, as_json: bool) -> str:
    if as_json:
        facts = {"model": model.version, "num_frames": num_frames, "layers": [asdict(layer) for layer in layers]}
        return json.dumps(facts)
    best = {name: max(layers, key=lambda layer: getattr(layer, name)).layer for name in ("pwcca", "pnmi")}
    lines = [f"{model.version}: {num_frames} labelled frames", "", "layer   PWCCA    PNMI"]
    lines += [f"{layer.layer:5}  {layer.pwcca:6.3f}  {layer.pnmi:6.3f}" for layer in layers]
    return "\n".join([*lines, "", f"best: layer {best['pwcca']} by PWCCA, layer {best['pnmi']} by PNMI"])


if __name__ == "__main__":
    main()
