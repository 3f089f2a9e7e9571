"""Find out when which word is said in every recording of a corpus, by a CTC recogniser, and keep it in a file.

    python -m tools.align_words SOURCE CTC_MODEL OUT.jsonl                     # the texts that the recordings come with
    python -m tools.align_words SOURCE CTC_MODEL OUT.jsonl --transcribe        # and what is heard in those without
    python -m tools.align_words SOURCE CTC_MODEL OUT.jsonl --transcribe all    # what is heard, whatever the texts say

SOURCE is anything to train from: a folder of audio, a manifest, shards, or a packed folder. CTC_MODEL is a folder of
`transformers` or a bundle of torchaudio, "torchaudio:NAME". Every recording gets a line, with its words or the reason
why it has none: no text, digits, another language, a text that is not what is said. These are listed on stderr too; the
exit status is 1 then, unless --skip-broken is given.

A run that was interrupted goes on when it is started again, and lines of recordings or texts that have changed are made
anew. Several sources may share a file, as long as no two of their recordings have the same path.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from codec.audio import AudioError, resample
from codec.batch import Advance, in_processes, progress_bar
from codec.features import load_ctc_model
from codec.files import AtomicFile
from recipes.corpora import Corpus, open_corpus, to_channels
from recipes.recordings import Recording, Skipped
from recipes.words import MIN_SCORE, AlignmentError, Entry, Recogniser, align, read_entries, transcribe

_SHOWN = 10  # recordings without words, on stderr
_ENDED = "the process that aligned it was ended"  # not kept: the next run tries again


@dataclass(frozen=True)
class Job:
    """How words are found. `transcribes` is "none", "missing" (where a recording has no text) or "all"."""

    corpus: Corpus
    model: str
    transcribes: str
    min_score: float
    max_seconds: float

    @property
    def aligner(self) -> str:
        """What decides the result, apart from the recording and its text."""
        return f"{self.recogniser.version}, at least {self.min_score:g}"

    @property
    def recogniser(self) -> Recogniser:
        """Loaded once in each process."""
        return _load(self.model)

    def text_of(self, recording: Recording) -> str | None:
        """The text to align; None where words are to be heard."""
        is_heard = self.transcribes == "all" or (self.transcribes == "missing" and not recording.text.strip())
        return None if is_heard else recording.text

    def entry(self, number: int, *, reason: str | None = None) -> Entry:
        """That of a recording, still without words."""
        recording = self.corpus.recordings[number]
        about = recording.path, recording.num_samples, recording.sample_rate_hz
        return Entry(*about, self.aligner, self.text_of(recording), reason=reason)

    def __call__(self, number: int, advance: Advance) -> Entry:
        """Find the words of a recording."""
        recording = self.corpus.recordings[number]
        text = self.text_of(recording)
        try:
            if recording.seconds > self.max_seconds:
                raise AlignmentError(f"it has {recording.seconds:.1f} s, more than --max-seconds {self.max_seconds:g}")
            samples = to_channels(self.corpus.read(number, 0, recording.num_samples), 1)
            rate_hz = self.recogniser.sample_rate_hz
            audio = torch.from_numpy(resample(samples, recording.sample_rate_hz, rate_hz)[0])
            if text is None:
                found = transcribe(self.recogniser, audio, min_score=self.min_score)
            else:
                found = align(self.recogniser, audio, text, min_score=self.min_score)
        except AudioError as error:
            return self.entry(number, reason=str(error).removeprefix(f"{recording.path}: "))
        except ValueError as error:
            return self.entry(number, reason=str(error))
        about = recording.path, recording.num_samples, recording.sample_rate_hz
        return Entry(*about, self.aligner, text, found.words, found.score)

    def died(self, number: int, process: int) -> Entry:
        """What is known of a recording whose process was ended."""
        return self.entry(number, reason=_ENDED)


@functools.cache
def _load(model: str) -> Recogniser:
    return load_ctc_model(model)


def main() -> None:
    """Parse arguments and do it; a mistake in them is one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("model", metavar="ctc_model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--split", help="rows of the manifest to take (default: all)")
    parser.add_argument(
        "--transcribe",
        nargs="?",
        choices=("missing", "all"),
        const="missing",
        default="none",
        help="use what is heard where there is no text, or everywhere",
    )
    parser.add_argument(
        "--min-score",
        type=float,
        default=MIN_SCORE,
        help=f"log-probability per character below which a text does not belong (default: {MIN_SCORE:g})",
    )
    parser.add_argument("--max-seconds", type=float, default=60.0, help="longest recording (default: 60)")
    parser.add_argument("--num-workers", type=int, default=1, help="processes, of one thread each where several")
    parser.add_argument("--skip-broken", action="store_true", help="exit with 0 although some have no words")
    args = parser.parse_args()
    try:
        is_whole = _align_corpus(args)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    sys.exit(0 if is_whole or args.skip_broken else 1)


def _align_corpus(args: argparse.Namespace) -> bool:
    """Whether every recording has words in the end."""
    if args.num_workers < 1:
        raise ValueError(f"--num-workers must be positive, not {args.num_workers}")
    known = read_entries(args.out)[0] if args.out.exists() else {}
    corpus = open_corpus(args.source, split=args.split)
    paths = [recording.path for recording in corpus.recordings]
    most_common, count = Counter(paths).most_common(1)[0]
    if count > 1:
        raise ValueError(f"{args.source} names {most_common} {count} times")
    job = Job(corpus, args.model, args.transcribe, args.min_score, args.max_seconds)
    others = {entry.aligner for entry in known.values()} - {job.aligner}
    if others:
        raise ValueError(f"{args.out} was made by {others.pop()!r}, not {job.aligner!r}: remove it, or name another")
    stale = {
        recording.path
        for recording in corpus.recordings
        if (old := known.get(recording.path)) is not None
        and not (old.belongs_to(recording) and old.text == job.text_of(recording))
    }
    kept = {path: entry for path, entry in known.items() if path not in stale}
    with AtomicFile(args.out) as new:  # without what is stale or was cut off
        new.file.write("".join(f"{entry.to_line()}\n" for entry in kept.values()).encode())
        new.commit()
    waiting = [number for number, path in enumerate(paths) if path not in kept]
    with args.out.open("a", encoding="utf-8") as file, progress_bar() as advance:
        for entry in _entries(job, waiting, args.num_workers):
            kept[entry.path] = entry
            if entry.reason != _ENDED:
                file.write(f"{entry.to_line()}\n")
                file.flush()
            advance(1, len(waiting))
    return _report(args, corpus, [kept[path] for path in paths])


def _entries(job: Job, numbers: Sequence[int], num_workers: int) -> Iterator[Entry]:
    """Those of these recordings, as they are done."""
    if num_workers == 1 or len(numbers) < 2:
        for number in numbers:
            yield job(number, lambda num_done, num_in_all: None)
        return
    for _, entry in in_processes(numbers, _Single(job), job.died, num_processes=min(num_workers, len(numbers))):
        yield entry


@dataclass(frozen=True)
class _Single:
    """A job on one thread: several processes with several threads each would wait for one another."""

    job: Job

    def __call__(self, number: int, advance: Advance) -> Entry:
        torch.set_num_threads(1)
        return self.job(number, advance)


def _report(args: argparse.Namespace, corpus: Corpus, entries: Sequence[Entry]) -> bool:
    """What there is on stdout, what lacks on stderr; whether nothing lacks."""
    done = [entry for entry in entries if entry.reason is None]
    without = [Skipped(entry.path, entry.reason) for entry in entries if entry.reason is not None]
    without += corpus.skipped
    if not done:
        raise ValueError(f"{args.source}: none of {len(without)} recordings has words; the first, {without[0]}")
    hours = sum(entry.num_samples / entry.sample_rate_hz for entry in done) / 3600
    num_words = sum(len(entry.words) for entry in done)
    score = sum(entry.score or 0.0 for entry in done) / len(done)
    print(f"{args.out}: {num_words} words in {len(done)} recordings, {hours:.2f} h; mean score {score:.2f}")
    for skipped in without[:_SHOWN]:
        print(f"no words: {skipped}", file=sys.stderr)
    if len(without) > _SHOWN:
        print(f"no words: {len(without)} recordings in all; {args.out} gives the reasons", file=sys.stderr)
    return not without


if __name__ == "__main__":
    main()
