"""Train a small teacher on one's own recordings, where no published one can be had.

    python -m tools.train_teacher speech SOURCE OUT --corpora mini_librispeech kathleen   # aligner and recogniser, too
    python -m tools.train_teacher text SOURCE OUT

SOURCE is anything that tools.prepare_data takes, or a folder that it packed, with transcripts. OUT is a folder in the
format of `transformers`. A run that was interrupted goes on when it is started again.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from recipes.small_teachers import TeacherSettings, train_speech_teacher, train_text_teacher


def main() -> None:
    """Parse arguments and do it; a mistake in them is one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("speech", "text"))
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--split", default="train", help="rows of the manifest to take (default: train)")
    parser.add_argument("--corpora", nargs="+", help="corpora of one language to take (default: all)")
    parser.add_argument("--max-steps", type=int, default=4000)
    parser.add_argument("--batch-size", type=int, default=32, help="seconds of speech, or transcripts, in a step")
    parser.add_argument("--num-layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-threads", type=int)
    parser.add_argument("--precision", choices=("bf16-mixed", "32-true"), default="bf16-mixed")
    args = parser.parse_args()
    if args.num_threads is not None:
        torch.set_num_threads(args.num_threads)
    train = train_speech_teacher if args.kind == "speech" else train_text_teacher
    try:
        if (args.out / "config.json").exists():
            raise ValueError(f"{args.out} holds a model already")
        settings = TeacherSettings(
            max_steps=args.max_steps,
            batch_size=args.batch_size,
            num_layers=args.num_layers,
            width=args.width,
            seed=args.seed,
            precision=args.precision,
        )
        train(args.source, args.out, settings, corpora=args.corpora, split=args.split)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
