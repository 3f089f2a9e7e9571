"""Pack recordings for training: `python -m tools.prepare_data SOURCE OUT`.

SOURCE is a folder of audio files, or a manifest: a file without header whose tab-separated columns are path (relative
to it), split, corpus, speaker, rate, seconds, text. OUT receives `audio.i16` and `index.json`.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from recipes.data import pack_audio


def main() -> None:
    """Parse arguments and pack; a mistake in them is one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--split", default="train", help="rows of the manifest to take (default: train)")
    parser.add_argument("--sample-rate-hz", type=int, default=16000)
    parser.add_argument("--num-workers", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    try:
        num_samples = pack_audio(
            args.source,
            args.out,
            sample_rate_hz=args.sample_rate_hz,
            split=args.split,
            num_workers=args.num_workers,
        )
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(f"{args.out}: {num_samples / args.sample_rate_hz / 3600:.2f} h at {args.sample_rate_hz} Hz")


if __name__ == "__main__":
    main()
