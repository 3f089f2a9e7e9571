"""Train speech units for `codec units apply`: units that distortions do not change, or that tell what comes next.

    codec units train DATA UNITS --teacher MODEL --layer 6 --num-units 200
    python -m tools.train_units invariant SOURCE OUT --units UNITS --noise NOISE

    python -m tools.train_units predictive SOURCE OUT --quantizer gumbel_vq
    python -m tools.train_units predictive SOURCE OUT --quantizer kmeans_vq --teacher MODEL --layer 6

SOURCE and NOISE are anything that tools.prepare_data takes, or folders that it packed. `recipes.unit_training` says
what is learned, and how; `tools.measure_units` what came of it.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path

import torch

from codec.config import from_dict
from codec.files import check_new_folder
from codec.units import SpeechUnits, UnitSource, codec_source, load_units, log_mel_source, speech_model_source
from codec.units.speech_units import CONFIG, WEIGHTS
from recipes.augment import Distortion, DistortionConfig
from recipes.corpora import open_corpus
from recipes.crops import Pool
from recipes.runs import hush_lightning
from recipes.unit_training import UnitTrainingSettings, train_invariant_units, train_predictive_units


def main() -> None:
    """Parse arguments and train; a mistake in them is one line."""
    hush_lightning()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    invariant = kinds.add_parser("invariant", help="units that distortions do not change")
    predictive = kinds.add_parser("predictive", help="units that tell what comes next")
    for kind in (invariant, predictive):
        kind.add_argument("source", type=Path)
        kind.add_argument("out", type=Path)
        kind.add_argument("--split", default="train", help="rows of a manifest to take (default: train)")
        kind.add_argument("--num-threads", type=int)
        for field in fields(UnitTrainingSettings):
            kind.add_argument(
                f"--{field.name.replace('_', '-')}",
                type=type(field.default),
                default=field.default,
                help=f"(default: {field.default})",
            )
    invariant.add_argument("--units", required=True, help="what the first round learns from")
    invariant.add_argument("--noise", type=Path, help="recordings of noise (default: no noise)")
    invariant.add_argument("--num-rounds", type=int, default=1, help="each learns from the one before (default: 1)")
    invariant.add_argument("--width", type=int, default=256)
    invariant.add_argument("--num-layers", type=int, default=2)
    invariant.add_argument("--kernel-size", type=int, default=5, help="frames that a layer hears (default: 5)")
    predictive.add_argument("--quantizer", choices=("gumbel_vq", "kmeans_vq"), required=True)
    predictive.add_argument("--num-groups", type=int, default=2, help="(default: 2)")
    predictive.add_argument("--codebook-size", type=int, default=320, help="entries of a group (default: 320)")
    predictive.add_argument("--width", type=int, default=256, help="of latents, (default: 256)")
    predictive.add_argument("--num-layers", type=int, default=2)
    predictive.add_argument("--kernel-size", type=int, default=3, help="frames that a layer hears (default: 3)")
    predictive.add_argument("--teacher", help="a speech model (default: log-mels)")
    predictive.add_argument("--layer", type=int, help="of the teacher")
    predictive.add_argument("--codec", help="a codec, whose latents stand for a teacher's features")
    args = parser.parse_args()
    if args.num_threads is not None:
        torch.set_num_threads(args.num_threads)
    try:
        check_new_folder(args.out, replaceable={CONFIG, WEIGHTS})
        if (args.out / CONFIG).exists():
            raise ValueError(f"{args.out} holds units already")
        units = _invariant(args) if args.kind == "invariant" else _predictive(args)
        units.save(args.out)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def _settings(args: argparse.Namespace) -> UnitTrainingSettings:
    return UnitTrainingSettings(**{field.name: getattr(args, field.name) for field in fields(UnitTrainingSettings)})


def _pool(source: Path, sample_rate_hz: int, split: str | None = None) -> Pool:
    return Pool([(open_corpus(source, split=split), 1.0)], sample_rate_hz=sample_rate_hz)


def _invariant(args: argparse.Namespace) -> SpeechUnits:
    settings, units = _settings(args), load_units(args.units)
    rate_hz = units.sample_rate_hz
    noise = _pool(args.noise, rate_hz).draw_loop if args.noise is not None else None
    return train_invariant_units(
        _pool(args.source, rate_hz, args.split),
        units,
        Distortion(DistortionConfig(), sample_rate_hz=rate_hz, noise=noise),
        settings,
        num_rounds=args.num_rounds,
        width=args.width,
        num_layers=args.num_layers,
        kernel_size=args.kernel_size,
    )


def _predictive(args: argparse.Namespace) -> SpeechUnits:
    settings, source = _settings(args), _source(args)
    quantizer = from_dict(
        {
            "type": args.quantizer,
            "latent_dim": args.width,
            "num_groups": args.num_groups,
            "codebook_size": args.codebook_size,
        }
    )
    return train_predictive_units(
        _pool(args.source, source.sample_rate_hz, args.split),
        source,
        quantizer,
        settings,
        num_layers=args.num_layers,
        kernel_size=args.kernel_size,
    )


def _source(args: argparse.Namespace) -> UnitSource:
    if (args.teacher is None) != (args.layer is None) or (args.teacher is not None and args.codec is not None):
        raise ValueError("--teacher needs --layer, and no --codec beside it")
    if args.teacher is not None:
        return speech_model_source(args.teacher, args.layer)
    return log_mel_source() if args.codec is None else codec_source(args.codec)


if __name__ == "__main__":
    main()
