"""Find the words and phones of English recordings by their texts, and write them as TextGrid files.

    python -m tools.align_phones DATA OUT --split dev
    codec evaluate MODEL --data DATA --split dev --labels OUT

DATA is a manifest, or the folder of a `manifest.tsv` (path, split, corpus, speaker, rate, seconds, text). OUT gets a
file for each recording, with the tiers `words` and `phones`, below the same folders. pocketsphinx does it (extra
`semantics`), at about ten times real time.

Recordings that are done are skipped when it is started again. Those that cannot be aligned are left out and listed, on
stderr and in OUT/failed.tsv: without a text, of another language, with a text that was not said. The exit status is 1
then, unless --skip-broken is given.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from pathlib import Path, PurePosixPath

from codec.batch import Advance, in_processes, progress_bar
from codec.evaluation.labels import write_textgrid
from codec.evaluation.phones import align_phones
from codec.evaluation.recordings import Recording, find_recordings
from codec.files import AtomicFile

_SHOWN = 10  # failures on stderr


def main() -> None:
    """Parse arguments and align; a mistake in them is one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--split", help="rows of the manifest to take (default: all)")
    parser.add_argument("--max-files", type=int, help="take so many recordings, evenly spread")
    parser.add_argument("--num-processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--skip-broken", action="store_true", help="exit with 0 although recordings were left out")
    args = parser.parse_args()
    try:
        if args.num_processes < 1:
            raise ValueError(f"--num-processes {args.num_processes} must be positive")
        recordings = find_recordings(args.data, split=args.split, max_files=args.max_files)
        if not any(recording.text for recording in recordings):
            raise ValueError(f"{args.data} has no texts: a manifest with a column of them is needed")
        failures = _align_all(recordings, args.out, args.num_processes)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    for name, reason in list(failures.items())[:_SHOWN]:
        print(f"left out: {name}: {reason}", file=sys.stderr)
    if len(failures) > _SHOWN:
        print(f"left out: {len(failures)} in all", file=sys.stderr)
    sys.exit(1 if failures and not args.skip_broken else 0)


def _align_all(recordings: list[Recording], out: Path, num_processes: int) -> dict[str, str]:
    """Write what is not there yet; which recordings could not be aligned, and why."""
    todo = [recording for recording in recordings if not _target(recording, out).exists()]
    failures: dict[str, str] = {}
    with progress_bar() as advance:
        work = functools.partial(_align, out=out)
        for number, reason in in_processes(todo, work, _died, num_processes=num_processes):
            if reason:
                failures[todo[number].name] = reason
            advance(1, len(todo))
    out.mkdir(parents=True, exist_ok=True)
    failures = dict(sorted(failures.items()))
    with AtomicFile(out / "failed.tsv") as new:
        new.file.write("".join(f"{name}\t{reason}\n" for name, reason in failures.items()).encode())
        new.commit()
    num_new, num_old = len(todo) - len(failures), len(recordings) - len(todo)
    print(f"{out}: {num_new} aligned, {num_old} were there, {len(failures)} left out")
    return failures


def _align(recording: Recording, advance: Advance, *, out: Path) -> str:
    """Align one recording and write it; why that is not possible, or "" where it is done."""
    try:
        audio, rate_hz = recording.read()
        found = align_phones(audio, rate_hz, recording.text)
        target = _target(recording, out)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_textgrid(target, {"words": found.words, "phones": found.phones}, len(audio) / rate_hz)
    except (ValueError, OSError, RuntimeError) as error:
        return " ".join(str(error).split())
    return ""


def _died(recording: Recording, process: int) -> str:
    return "the process that aligned it was ended"


def _target(recording: Recording, out: Path) -> Path:
    """By the recording's name, which may lead out of the manifest's folder, but not out of this one."""
    parts = [part for part in PurePosixPath(recording.name).parts if part not in ("/", "..")]
    return out.joinpath(*parts).with_suffix(".TextGrid")


if __name__ == "__main__":
    main()
