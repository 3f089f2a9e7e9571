"""Look at recordings, and make them ready for training.

    python -m tools.prepare_data SOURCE OUT             # decode once into one file: the fastest to train from
    python -m tools.prepare_data SOURCE OUT --shards    # or into WebDataset shards of FLAC
    python -m tools.prepare_data SOURCE --check         # only report: hours, rates, channels, clipping, silence, broken
    python -m tools.prepare_data SOURCE --measure       # crops a second that one process reads

SOURCE is a folder of audio files; a manifest, TSV with a header (path, and any of split, corpus, speaker, text,
sample_rate_hz, num_channels, num_samples) or without one and with seven columns (path, split, corpus, speaker, rate,
seconds, text), or JSONL with the same keys; or WebDataset shards. Paths are relative to the manifest.

Recordings that cannot be used are left out and listed, on stderr and in OUT/skipped.tsv; the exit status is 1 then,
unless --skip-broken is given. A run that was interrupted goes on when it is started again.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from recipes.inspection import Report, check_audio
from recipes.packing import pack_audio, write_shards

_SHOWN = 10  # recordings that cannot be used, on stderr
_MEASURED_SECONDS = 5.0


def main() -> None:
    """Parse arguments and do it; a mistake in them is one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path, nargs="?")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--shards", action="store_true", help="write WebDataset shards")
    kind.add_argument("--check", action="store_true", help="decode and report, write nothing")
    kind.add_argument("--measure", action="store_true", help="draw random crops of a second, write nothing")
    parser.add_argument("--split", default="train", help="rows of the manifest to take (default: train)")
    parser.add_argument("--sample-rate-hz", type=int, default=16000)
    parser.add_argument("--num-channels", type=int, default=1, help="1 mixes down; 2 repeats what is mono")
    parser.add_argument("--shard-mib", type=int, default=256, help="size at which a shard is closed (default: 256)")
    parser.add_argument("--num-workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--skip-broken", action="store_true", help="exit with 0 although recordings were left out")
    args = parser.parse_args()
    if (args.out is None) != (args.check or args.measure):
        parser.error("OUT is needed" if args.out is None else "--check and --measure take no OUT")
    try:
        is_whole = _measure(args) if args.measure else _prepare(args)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    sys.exit(0 if is_whole or args.skip_broken else 1)


def _prepare(args: argparse.Namespace) -> bool:
    """Check, pack or write shards; whether nothing was left out."""
    if args.check:
        report = check_audio(args.source, split=args.split, num_workers=args.num_workers)
    elif args.shards:
        report = write_shards(
            args.source,
            args.out,
            sample_rate_hz=args.sample_rate_hz,
            num_channels=args.num_channels,
            split=args.split,
            num_workers=args.num_workers,
            shard_bytes=args.shard_mib * 2**20,
        )
    else:
        report = pack_audio(
            args.source,
            args.out,
            sample_rate_hz=args.sample_rate_hz,
            num_channels=args.num_channels,
            split=args.split,
            num_workers=args.num_workers,
        )
    _show(report)
    if not args.check:
        hours = report.num_samples / args.sample_rate_hz / 3600
        print(f"{args.out}: {hours:.2f} h at {args.sample_rate_hz} Hz, channels: {args.num_channels}")
    return not report.skipped


def _show(report: Report) -> None:
    """The table on stdout, what cannot be used on stderr."""
    row = "{:<20} {:>7} {:>8} {:>8} {:>8} {:>7}  {}"
    print(
        row.format("corpus", "files", "hours", "clipped", "silent", "broken", "rates in Hz (hours); channels (hours)")
    )
    for name, corpus in sorted(report.corpora.items()):
        print(
            row.format(
                name,
                corpus.num_recordings,
                f"{corpus.seconds / 3600:.2f}",
                f"{corpus.clipped_share:.3%}",
                f"{corpus.silent_share:.1%}",
                corpus.num_broken,
                f"{_hours(corpus.seconds_of_rate)}; {_hours(corpus.seconds_of_channels)}",
            )
        )
    for skipped in report.skipped[:_SHOWN]:
        print(f"left out: {skipped}", file=sys.stderr)
    if len(report.skipped) > _SHOWN:
        print(f"left out: {len(report.skipped)} in all", file=sys.stderr)


def _hours(seconds: Mapping[int, float]) -> str:
    return ", ".join(f"{value} ({part / 3600:.2f})" for value, part in sorted(seconds.items()))


def _measure(args: argparse.Namespace) -> bool:
    """Print how fast one process draws crops; whether nothing was left out."""
    from recipes.augment import Augmentation, AugmentConfig  # needs PyTorch, which packing does not
    from recipes.corpora import open_corpus
    from recipes.crops import Crops, Pool

    begin = time.perf_counter()
    corpus = open_corpus(args.source, split=args.split)
    opened = time.perf_counter()
    target = {"sample_rate_hz": args.sample_rate_hz, "num_channels": args.num_channels}
    pool = Pool([(corpus, 1.0)], **target)
    augmentation = Augmentation(AugmentConfig(), **target)
    crops = Crops(pool, crop_samples=args.sample_rate_hz, seed=0, augmentation=augmentation)
    first = time.perf_counter()
    num_items = 0
    while (taken := time.perf_counter() - first) < _MEASURED_SECONDS:
        crops[num_items]
        num_items += 1
    print(f"{args.source}: {pool.num_recordings} recordings, opened in {opened - begin:.1f} s")
    print(f"{num_items / taken:.0f} crops of one second, each second, from one process")
    for skipped in pool.skipped[:_SHOWN]:
        print(f"left out: {skipped}", file=sys.stderr)
    return not pool.skipped


if __name__ == "__main__":
    main()
