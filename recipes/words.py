"""Which word of a recording is said when: found by a CTC recogniser, kept in a file, asked for by recording.

`align` puts a known text in time (forced alignment), `transcribe` writes down what is heard. `tools/align_words.py`
does either for a whole corpus; `open_word_times` opens what it wrote.

A recogniser's frame i stands for samples i * stride to (i + 1) * stride. CTC models show a character in a frame or two
and are blank in between, so a word begins with the frame of its first character and ends with that of its last one: its
end is early rather than late, by what its last sound lasts.

Source: Graves et al., "Connectionist temporal classification" (2006), for paths, blanks and repeated labels.
"""

from __future__ import annotations

import itertools
import json
import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from recipes.recordings import Recording

# A model that knew no more than how often English letters occur would give each the logarithm of -2.9 (4.2 bits of
# entropy): a text that scores below this is explained no better by the sound than by that.
MIN_SCORE = -3.0
_SENTENCE_MARKS = ".,;:!?"


@dataclass(frozen=True, slots=True)
class Word:
    """A word as its text writes it, and when it is said, in seconds from the beginning of the recording."""

    text: str
    start_second: float
    stop_second: float


@dataclass(frozen=True, slots=True)
class Transcript:
    """Words in time. `score`: natural log-probability of the best path through all frames, per character."""

    words: tuple[Word, ...]
    score: float


class Recogniser(Protocol):
    """What this file needs of a CTC model: `codec.features.CTCModel` is one.

    `labels[i]` is what column i stands for; only single characters, `blank` and `delimiter` are used. The latter stands
    between words, and is "" where there is none.
    """

    labels: tuple[str, ...]
    blank: int
    delimiter: str
    version: str
    sample_rate_hz: int
    stride_samples: int

    def log_probs(self, audio: Tensor, num_samples: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Audio [B, T] -> natural log-probabilities [B, F, V], and the number of frames of each row [B]."""


class AlignmentError(ValueError):
    """Why a recording has no word times, in one line."""


def align(recogniser: Recogniser, audio: Tensor, text: str, *, min_score: float = MIN_SCORE) -> Transcript:
    """When the words of `text` are said in `audio`, float32 [T] at the recogniser's rate.

    Letters are taken in the case that the model has; an apostrophe counts where the model has one. Quotes, dashes and
    brackets separate words, sentence marks stay with theirs and take no time.

    AlignmentError where the text has no words, has digits or letters that the model lacks, is longer than the audio
    could be, or does not belong to it: where the score is below `min_score`. Words that the text lacks lower the score
    as wrong ones do, since all frames count.
    """
    from torchaudio.functional import forced_align

    words = split_words(text)
    if not words:
        raise AlignmentError("its text has no words" if text.strip() else "it has no text")
    columns = _columns(recogniser)
    delimiter = _delimiter(recogniser)
    targets: list[int] = []
    stretches: list[tuple[int, int]] = []  # of `targets`, for each word
    for word in words:
        if targets and delimiter is not None:
            targets.append(delimiter)
        spelled = _spelled(word, columns)
        stretches.append((len(targets), len(targets) + len(spelled)))
        targets += spelled
    log_probs_FV = _log_probs(recogniser, audio)
    num_needed = len(targets) + sum(a == b for a, b in itertools.pairwise(targets))
    if len(log_probs_FV) < num_needed:
        raise AlignmentError(f"its text needs {num_needed} frames of the recogniser, it has {len(log_probs_FV)}")
    path, scores = forced_align(log_probs_FV[None], torch.tensor([targets]), blank=recogniser.blank)
    num_characters = sum(stop - start for start, stop in stretches)
    score = _checked(float(scores.double().sum()) / num_characters, min_score, "the text does not fit what is heard")
    shown = [(first, stop) for column, first, stop in _runs(path[0]) if column != recogniser.blank]
    times = [(shown[start][0], shown[stop - 1][1]) for start, stop in stretches]
    return Transcript(_in_time(recogniser, audio, words, times), score)


def transcribe(recogniser: Recogniser, audio: Tensor, *, min_score: float = MIN_SCORE) -> Transcript:
    """What the recogniser hears in `audio`, float32 [T] at its rate, and when: the best label of every frame.

    AlignmentError where it hears no words, or is so unsure that the score is below `min_score`.
    """
    log_probs_FV = _log_probs(recogniser, audio)
    best, path = log_probs_FV.max(dim=1)
    characters = {column: character for character, column in _columns(recogniser).items()}
    words: list[str] = []
    times: list[tuple[int, int]] = []
    is_new = True
    for column, first, stop in _runs(path):
        if column == _delimiter(recogniser):
            is_new = True
        elif column in characters:
            if is_new:
                words.append("")
                times.append((first, stop))
            words[-1] += characters[column]
            times[-1] = (times[-1][0], stop)
            is_new = False
    if not words:
        raise AlignmentError("no words are heard in it")
    score = float(best.double().sum()) / sum(map(len, words))
    return Transcript(_in_time(recogniser, audio, words, times), _checked(score, min_score, "it is heard too unsurely"))


def split_words(text: str) -> list[str]:
    """The words of a text as it writes them: letters, digits, apostrophes and sentence marks.

    >>> split_words("\u201cDon\u2019t \u2013 it's twenty-one, Anna!\u201d")
    ["Don't", "it's", 'twenty', 'one,', 'Anna!']
    """
    composed = unicodedata.normalize("NFC", text).replace("\u2019", "'")
    kept = "".join(c if is_spoken(c) or c in f"'{_SENTENCE_MARKS}" else " " for c in composed)
    return [word for word in kept.split() if any(map(is_spoken, word))]


def is_spoken(character: str) -> bool:
    """Whether it is a letter, a mark upon one, or a digit."""
    return unicodedata.category(character)[0] in "LMN"


def _columns(recogniser: Recogniser) -> dict[str, int]:
    special = (recogniser.labels[recogniser.blank], recogniser.delimiter)
    return {label: i for i, label in enumerate(recogniser.labels) if len(label) == 1 and label not in special}


def _delimiter(recogniser: Recogniser) -> int | None:
    is_there = recogniser.delimiter != "" and recogniser.delimiter in recogniser.labels
    return recogniser.labels.index(recogniser.delimiter) if is_there else None


def _spelled(word: str, columns: Mapping[str, int]) -> list[int]:
    """The columns of a word's characters."""
    spelled = []
    for character in word:
        forms = (character, character.upper(), character.lower())
        column = next((columns[form] for form in forms if form in columns), None)
        if is_spoken(character):
            if column is None and character.isdigit():
                raise AlignmentError(f"its text has digits ({word!r}), which must be written as words")
            if column is None:
                raise AlignmentError(f"the recogniser has no character {character!r} (in {word!r})")
            spelled.append(column)
        elif character == "'" and column is not None:
            spelled.append(column)
    return spelled


def _log_probs(recogniser: Recogniser, audio: Tensor) -> Tensor:
    """Float32 [F, V] on the CPU."""
    if audio.dim() != 1 or not len(audio):
        raise ValueError(f"expected audio [T] with T > 0, got {tuple(audio.shape)}")
    with torch.inference_mode():
        log_probs, num_frames = recogniser.log_probs(audio[None])
    return log_probs[0, : int(num_frames[0])].float().cpu()


def _runs(path: Tensor) -> list[tuple[int, int, int]]:
    """Equal labels that follow one another, as (label, first frame, frame after the last)."""
    labels, counts = torch.unique_consecutive(path, return_counts=True)
    stops = counts.cumsum(0)
    return list(zip(labels.tolist(), (stops - counts).tolist(), stops.tolist(), strict=True))


def _in_time(
    recogniser: Recogniser, audio: Tensor, words: Sequence[str], frames: Sequence[tuple[int, int]]
) -> tuple[Word, ...]:
    def second(frame: int) -> float:
        return min(frame * recogniser.stride_samples, len(audio)) / recogniser.sample_rate_hz

    return tuple(Word(text, second(first), second(stop)) for text, (first, stop) in zip(words, frames, strict=True))


def _checked(score: float, min_score: float, complaint: str) -> float:
    if not score >= min_score:  # not a number is not enough either
        raise AlignmentError(f"{complaint}: {score:.2f} per character, at least {min_score:g} is needed")
    return score


# The file


@dataclass(frozen=True, slots=True)
class Entry:
    """What is known of one recording: its words, or the reason why it has none. It is one line of a file.

    `aligner` names the model and the least score. `text` is what was aligned, None where the words were heard.
    """

    path: str
    num_samples: int
    sample_rate_hz: int
    aligner: str
    text: str | None
    words: tuple[Word, ...] = ()
    score: float | None = None
    reason: str | None = None

    def belongs_to(self, recording: Recording) -> bool:
        """Whether it was made from a recording of this length, at any rate."""
        if self.sample_rate_hz == recording.sample_rate_hz:
            return self.num_samples == recording.num_samples
        rates = self.sample_rate_hz, recording.sample_rate_hz
        return abs(self.num_samples / rates[0] - recording.num_samples / rates[1]) <= 1 / min(rates)

    def to_line(self) -> str:
        """A JSON object; a word is [text, start, stop]."""
        values: dict[str, Any] = {name: getattr(self, name) for name in _KEPT}
        if self.reason is None:
            words = [[word.text, round(word.start_second, 6), round(word.stop_second, 6)] for word in self.words]
            values |= {"score": None if self.score is None else round(self.score, 4), "words": words}
        else:
            values["reason"] = self.reason
        return json.dumps(values, ensure_ascii=False)


_KEPT = ("path", "num_samples", "sample_rate_hz", "aligner", "text")
_BEGINNING = '{"path": "'  # of every line that we write


class WordTimes:
    """The words of many recordings, from a file of one JSON object a line; see `Entry`.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = Path(folder, "words.jsonl")
    ...     entry = Entry("a.wav", 8000, 16000, "by hand", "oh no", (Word("oh", 0.1, 0.2), Word("no", 0.3, 0.5)))
    ...     _ = file.write_text(entry.to_line())
    ...     open_word_times(file).of(Recording("a.wav", text="oh no", sample_rate_hz=16000, num_samples=8000))
    (Word(text='oh', start_second=0.1, stop_second=0.2), Word(text='no', start_second=0.3, stop_second=0.5))
    """

    def __init__(self, file: Path, entries: Mapping[str, Entry]) -> None:
        self.file, self.entries = file, entries

    def of(self, recording: Recording) -> tuple[Word, ...] | None:
        """Its words; None where it is not in the file, or where the file gives a reason why it has none.

        ValueError where the file was made from another recording or another text of the same name.
        """
        entry = self.entries.get(recording.path)
        if entry is None:
            return None
        if not entry.belongs_to(recording):
            lengths = f"{entry.num_samples} samples at {entry.sample_rate_hz} Hz, it has {recording.num_samples} at "
            raise ValueError(f"{self._stale(recording)}: of {lengths}{recording.sample_rate_hz} Hz")
        if entry.text is not None and entry.text != recording.text:
            raise ValueError(f"{self._stale(recording)}: of another text, {entry.text[:40]!r}")
        return None if entry.reason is not None else entry.words

    def _stale(self, recording: Recording) -> str:
        return f"{self.file} is stale: its line for {recording.path} is"


def open_word_times(file: Path) -> WordTimes:
    """Read a file of word times. ValueError, with the line, where it is none, is cut off or names a recording twice."""
    if not file.is_file():
        raise ValueError(f"{file} is no file of word times; tools/align_words.py makes one")
    entries, is_whole = read_entries(file)
    if not is_whole:
        raise ValueError(f"{file} is cut off; start tools/align_words.py again to complete it")
    if not entries:
        raise ValueError(f"{file} holds no word times")
    return WordTimes(file, entries)


def read_entries(file: Path) -> tuple[dict[str, Entry], bool]:
    """The entries by the path of their recording; and whether the last line is whole. ValueError as above."""
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no text of UTF-8: {error}") from error
    entries: dict[str, Entry] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = _entry(json.loads(line))
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines) and line[: len(_BEGINNING)] == _BEGINNING[: len(line)]:  # no newline after it
                return entries, False
            raise ValueError(f"{file}:{number} is no line of word times: {type(error).__name__}, {error}") from error
        if entry.path in entries:
            raise ValueError(f"{file}:{number} names {entry.path} for the second time")
        entries[entry.path] = entry
    return entries, True


def _entry(values: Any) -> Entry:
    """What a line's JSON says; ValueError, TypeError or KeyError where it is no entry."""
    if not isinstance(values, dict) or ("words" in values) == ("reason" in values):
        raise ValueError("expected an object with either words or a reason")
    kept = {name: values[name] for name in _KEPT}
    if not (isinstance(kept["path"], str) and kept["num_samples"] > 0 and kept["sample_rate_hz"] > 0):
        raise ValueError("path, num_samples or sample_rate_hz is wrong")
    words = []
    for text, start, stop in values.get("words", ()):
        if not (isinstance(text, str) and text and 0 <= start <= stop and math.isfinite(stop)):
            raise ValueError(f"{[text, start, stop]} is no word in time")
        words.append(Word(text, float(start), float(stop)))
    return Entry(**kept, words=tuple(words), score=values.get("score"), reason=values.get("reason"))
