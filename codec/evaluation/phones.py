"""English words and phones by pocketsphinx (extra `semantics`): where they lie, and what is heard.

Its package carries all that is used: the acoustic model en-us, the CMU dictionary and a 3-gram language model. It is an
old kind of recogniser, of Gaussian mixtures, and shares nothing with any codec: an independent judge, not a good ear.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from codec.audio import resample
from codec.evaluation.coders import UsageError
from codec.evaluation.labels import Segment
from codec.evaluation.scorers import words

UNKNOWN = "spn"  # the phone of a word that the dictionary lacks: spoken noise, as the Montreal Forced Aligner calls it
PHONES = (
    *(
        "AA",
        "AE",
        "AH",
        "AO",
        "AW",
        "AY",
        "B",
        "CH",
        "D",
        "DH",
        "EH",
        "ER",
        "EY",
        "F",
        "G",
        "HH",
        "IH",
        "IY",
        "JH",
        "K",
    ),
    *("L", "M", "N", "NG", "OW", "OY", "P", "R", "S", "SH", "T", "TH", "UH", "UW", "V", "W", "Y", "Z", "ZH"),
)
_RATE_HZ = 16000
_FRAME_SECONDS = 0.01
# A frame is what its window of 25.625 ms is about, so it stands for the 10 ms in the middle of that.
_OFFSET_SECONDS = (0.025625 - _FRAME_SECONDS) / 2
_SHORTEST_SECONDS = 0.1
# The second pass gives up where a word that the first one found is too short for its phones; it is tried again with
# other beginnings of the frames.
_SILENCES_SECONDS = (0.0, 0.105, 0.2, 0.307, 0.05, 0.402, 0.153, 0.255, 0.503, 0.354)
_UNKNOWN_SHARE = 4  # of so many words, one may be unknown
_ANOTHER_PHONE = 0.02  # probability that an unknown word goes on with one phone or another


@dataclass(frozen=True)
class Alignment:
    """The words and the phones of a recording, in the order of time; silence lies between them."""

    words: tuple[Segment, ...]
    phones: tuple[Segment, ...]


def align_phones(audio: np.ndarray, rate_hz: int, text: str) -> Alignment:
    """Where the words of a text, and their phones, lie in a recording float [T] of it. Forced alignment, in two passes.

    Phones are the 39 of the CMU dictionary, without stress; of several pronunciations the likeliest is taken. A word
    that the dictionary lacks may be any row of phones: it gets its place, and `UNKNOWN` for a phone.

    ValueError where the text has no words, or too many that are unknown (all, or more than one and a quarter of them:
    another language), and where the recording does not fit the text. UsageError where pocketsphinx is missing.

    Source: pocketsphinx's documentation of `Decoder.set_alignment`, for the two passes.
    """
    said = words(text)
    if not said:
        raise ValueError("there is no text to align")
    pcm = _pcm(audio, rate_hz)
    dictionary = _decoder(lm=None)
    is_known = [dictionary.lookup_word(word) is not None for word in said]
    unknown = [word for word, known in zip(said, is_known, strict=True) if not known]
    if len(unknown) == len(said) or len(unknown) > max(1, len(said) // _UNKNOWN_SHARE):
        shown = ", ".join(list(dict.fromkeys(unknown))[:3])
        raise ValueError(f"{len(unknown)} of its {len(said)} words are not in the English dictionary ({shown}, ...)")
    for silence in _SILENCES_SECONDS:
        entries = _entries(bytes(2 * round(silence * _RATE_HZ)) + pcm, said, is_known)
        if entries is not None:
            found = _collected(entries, said, len(audio) / rate_hz, silence)
            if [segment.label for segment in found.words] == said:
                return found
    raise ValueError("the recording does not fit its text")


_Span = tuple[str, int, int]  # a name, its first frame, and the first after it
_Entry = tuple[_Span, list[_Span]]  # a word or silence, and its phones


def _entries(pcm: bytes, said: Sequence[str], is_known: Sequence[bool]) -> list[_Entry] | None:
    """Both passes; None where one of them does not come to the end of the text."""
    decoder = _decoder(lm=None)
    for parity in () if all(is_known) else (0, 1):
        for phone in PHONES:
            # The decoder learns of them all with the last one.
            decoder.add_word(f"?{parity}{phone}", phone, (parity, phone) == (1, PHONES[-1]))
    decoder.add_fsg("text", _grammar(decoder, said, is_known))
    decoder.activate_search("text")
    _decode(decoder, pcm)
    if decoder.hyp() is None:
        return None
    decoder.set_alignment()
    try:
        _decode(decoder, pcm)
    except RuntimeError:
        return None
    alignment = decoder.get_alignment()
    # Within the loop: an entry that outlives its turn points to freed memory.
    return [(_span(entry), [_span(phone) for phone in entry]) for entry in alignment]


def _grammar(decoder: Any, said: Sequence[str], is_known: Sequence[bool]) -> Any:
    """The words one after the other; phones in any number where one is unknown."""
    transitions: list[tuple[Any, ...]] = []
    state = 0
    for number, (word, known) in enumerate(zip(said, is_known, strict=True)):
        if known:
            transitions.append((state, state + 1, 1.0, word))
            state += 1
            continue
        for phone in PHONES:
            # Neighbours have phones of other names, or nobody could tell where one ends.
            name = f"?{number % 2}{phone}"
            transitions.append((state, state + 1, 1 / len(PHONES), name))
            transitions.append((state + 1, state + 1, _ANOTHER_PHONE, name))
        transitions.append((state + 1, state + 2, 1.0))
        state += 2
    return decoder.create_fsg("text", 0, state, transitions)


def _span(entry: Any) -> _Span:
    return (
        re.sub(r"\(\d+\)$", "", entry.name),
        entry.start,
        entry.start + entry.duration,
    )  # "read(2)" is a way to say it


def _collected(entries: Sequence[_Entry], said: Sequence[str], num_seconds: float, before: float) -> Alignment:
    """What the decoder found, as segments; where it gave up early, that is not all of the text."""
    found: list[Segment] = []
    phones: list[Segment] = []
    last = ""
    for span, parts in entries:
        name = span[0]
        if name[0] in "<[":  # silence and noise
            continue
        segment = _segment(span, num_seconds, before)
        if not name.startswith("?"):
            found.append(segment)
            phones += [_segment(part, num_seconds, before) for part in parts]
        elif last[:2] == name[:2]:  # one more phone of an unknown word
            found[-1], phones[-1] = (replace(s, stop_seconds=segment.stop_seconds) for s in (found[-1], phones[-1]))
        else:
            word = said[len(found)] if len(found) < len(said) else ""
            found.append(replace(segment, label=word))
            phones.append(replace(segment, label=UNKNOWN))
        last = name
    return Alignment(tuple(found), tuple(phones))


def _segment(span: _Span, num_seconds: float, before: float) -> Segment:
    """As a stretch of the recording, which has so many seconds, and so many of silence before it."""
    label, *frames = span
    times = (frame * _FRAME_SECONDS + _OFFSET_SECONDS - before if frame else 0.0 for frame in frames)
    start, stop = (round(min(max(time, 0.0), num_seconds), 4) for time in times)
    return Segment(label, start, stop)


class PocketsphinxRecogniser:
    """What pocketsphinx hears in English speech, with its own language model of many words.

    The same samples give the same text, in whatever order and process.
    """

    name = "pocketsphinx"

    def __init__(self) -> None:
        _check_installed()
        self.version = f"pocketsphinx {importlib.metadata.version('pocketsphinx')}, its en-us model"

    def transcribe(self, audio: np.ndarray, rate_hz: int) -> str:
        """The words, in lower case; "" where there are none. Audio is float [T]."""
        if len(audio) < _SHORTEST_SECONDS * rate_hz or not audio.any():  # it hears words in digital silence
            return ""
        decoder = _decoder()
        _decode(decoder, _pcm(audio, rate_hz))
        heard = decoder.hyp()
        return "" if heard is None else str(heard.hypstr)


def _decoder(**settings: Any) -> Any:
    """A new decoder: one that is used again remembers, and its scores would depend on what it heard before."""
    _check_installed()
    import pocketsphinx

    return pocketsphinx.Decoder(loglevel="FATAL", cmn="batch", **settings)


def _decode(decoder: Any, pcm: bytes) -> None:
    decoder.start_utt()
    decoder.process_raw(pcm, full_utt=True)
    decoder.end_utt()


def _pcm(audio: np.ndarray, rate_hz: int) -> bytes:
    """16-bit samples at the model's rate. ValueError where there is too little, or no audio."""
    if audio.ndim != 1 or not np.isfinite(audio).all():
        raise ValueError(f"expected finite audio [T], got {audio.dtype} {audio.shape}")
    if len(audio) < _SHORTEST_SECONDS * rate_hz:
        raise ValueError(f"{len(audio) / rate_hz:.3f} s are too short for pocketsphinx")
    at_rate = resample(audio[None], rate_hz, _RATE_HZ)[0]
    samples: np.ndarray = np.round(32767.0 * np.clip(at_rate, -1.0, 1.0)).astype("<i2")
    return samples.tobytes()


def _check_installed() -> None:
    if importlib.util.find_spec("pocketsphinx") is None:
        raise UsageError("pocketsphinx needs the extra 'semantics'")
