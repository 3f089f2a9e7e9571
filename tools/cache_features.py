"""Compute what a speech model makes of recordings once, for teachers to read (`recipes/speech_teacher.py`).

    python -m tools.cache_features SOURCE MODEL OUT --layers 9          # one layer
    python -m tools.cache_features SOURCE MODEL OUT --layers 1 3 9      # the mean of several
    python -m tools.cache_features SOURCE MODEL OUT --layers weighted   # all, for weights that are learned

SOURCE is a source of recordings as in training (recipes/corpora.py), given as the run will give it; MODEL a folder of
`transformers`, "torchaudio:NAME" or "torchaudio:NAME=FILE". A run that was interrupted goes on when it is started
again, and further sources are added to the same OUT by running it for each. A frame takes two bytes for each dimension
of each layer: an hour of 50 Hz and 768 dimensions 276 MB.

Recordings that cannot be read are left out and listed; the exit status is 1 then, unless --skip-broken is given.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from codec.features import load_speech_model
from recipes.corpora import open_corpus
from recipes.feature_cache import CacheKey, write_features

_SHOWN = 10


def main() -> None:
    """Parse arguments and do it; a mistake in them is one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", nargs="+", default=["last"], help='numbers, "last" or "weighted" (default: last)')
    parser.add_argument("--split", help="rows of the manifest to take (default: all)")
    parser.add_argument("--device", default="cpu", help="where the model computes, for example cuda (default: cpu)")
    parser.add_argument("--skip-broken", action="store_true", help="exit with 0 although recordings were left out")
    args = parser.parse_args()
    try:
        is_whole = _cache(args)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    sys.exit(0 if is_whole or args.skip_broken else 1)


def _cache(args: argparse.Namespace) -> bool:
    """Whether nothing was left out."""
    layers = _parsed(args.layers)
    model = load_speech_model(args.model)
    corpus = open_corpus(args.source, split=args.split)
    report = write_features(corpus, model, args.out, layers=layers, device=args.device)
    for skipped in report.skipped[:_SHOWN]:
        print(f"left out: {skipped}", file=sys.stderr)
    if len(report.skipped) > _SHOWN:
        print(f"left out: {len(report.skipped)} in all", file=sys.stderr)
    hours = report.num_frames / model.frame_rate_hz / 3600
    print(f"{args.out}: {hours:.2f} h of {CacheKey.of(model, layers)}")
    print(f"{args.source}: {report.num_added} recordings were added, {report.num_there} were there")
    return not report.skipped


def _parsed(layers: list[str]) -> str | list[int]:
    if layers in (["last"], ["weighted"]):
        return layers[0]
    try:
        return [int(layer) for layer in layers]
    except ValueError:
        raise ValueError(f'--layers {" ".join(layers)}: neither numbers nor "last" or "weighted"') from None


if __name__ == "__main__":
    main()
