"""pocketsphinx as a forced aligner and as a recogniser. Its package carries the model, so nothing is downloaded."""

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from codec.evaluation import Recogniser, UsageError, load_scorer
from codec.evaluation.labels import Segment, read_textgrid
from codec.evaluation.phones import PHONES, UNKNOWN, PocketsphinxRecogniser, align_phones
from codec.evaluation.scorers import WordErrorScorer, load_recogniser
from codec.testing import speech_like

pytest.importorskip("pocketsphinx")

ROOT = Path(__file__).resolve().parent.parent
TEXT = "open the window and close the door"


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> tuple[np.ndarray, int]:
    """A synthetic voice says `TEXT`."""
    if shutil.which("espeak-ng") is None:
        pytest.skip("espeak-ng is not installed")
    path = tmp_path_factory.mktemp("voice") / "a.wav"
    subprocess.run(["espeak-ng", "-v", "en-us", "-s", "140", "-w", str(path), TEXT], check=True)
    audio, rate_hz = soundfile.read(path, dtype="float32")
    return audio, rate_hz


def check_order(segments: tuple[Segment, ...], num_seconds: float) -> None:
    edges = [seconds for segment in segments for seconds in (segment.start_seconds, segment.stop_seconds)]
    assert edges == sorted(edges)
    assert edges[0] >= 0
    assert edges[-1] <= num_seconds
    assert all(segment.stop_seconds > segment.start_seconds for segment in segments)


def test_words_and_phones_of_a_synthetic_voice(speech: tuple[np.ndarray, int]) -> None:
    audio, rate_hz = speech
    found = align_phones(audio, rate_hz, TEXT.upper() + "!")
    assert [segment.label for segment in found.words] == TEXT.split()
    check_order(found.words, len(audio) / rate_hz)
    check_order(found.phones, len(audio) / rate_hz)
    assert {segment.label for segment in found.phones} <= set(PHONES)
    inside = [
        [p.label for p in found.phones if w.start_seconds <= p.start_seconds < w.stop_seconds] for w in found.words
    ]
    assert inside[2] == ["W", "IH", "N", "D", "OW"]
    assert inside[6] == ["D", "AO", "R"]
    assert found == align_phones(audio, rate_hz, TEXT)
    # A second of silence in front moves all by a second.
    later = align_phones(np.pad(audio, (rate_hz, 0)), rate_hz, TEXT)
    moves = [b.start_seconds - a.start_seconds for a, b in zip(found.words[1:], later.words[1:], strict=True)]
    assert np.median(moves) == pytest.approx(1, abs=0.03)


def test_words_that_no_dictionary_has_get_their_place(speech: tuple[np.ndarray, int]) -> None:
    audio, rate_hz = speech
    known = align_phones(audio, rate_hz, TEXT)
    text = TEXT.replace("door", "dxxr")
    found = align_phones(audio, rate_hz, text)
    assert [segment.label for segment in found.words] == text.split()
    assert found.words[-1].start_seconds == pytest.approx(known.words[-1].start_seconds, abs=0.1)
    assert found.words[-1].stop_seconds == pytest.approx(known.words[-1].stop_seconds, abs=0.1)
    unknown = [segment for segment in found.phones if segment.label == UNKNOWN]
    assert [(s.start_seconds, s.stop_seconds) for s in unknown] == [
        (found.words[-1].start_seconds, found.words[-1].stop_seconds)
    ]
    check_order(found.phones, len(audio) / rate_hz)


def test_texts_that_cannot_be_aligned_are_told() -> None:
    audio = speech_like(16000)
    for text, told in (
        ("  -- ", "no text"),
        ("Het raam staat al de hele dag open", r"3 of its 8 words are not in the English dictionary \(het, "),
        ("brrzt", "1 of its 1 words"),
    ):
        with pytest.raises(ValueError, match=told):
            align_phones(audio, 16000, text)
    with pytest.raises(ValueError, match="does not fit its text"):
        align_phones(audio[:8000], 16000, "one hundred and twenty three thousand four hundred and fifty six")
    for broken in (audio[:100], np.zeros(0, np.float32)):
        with pytest.raises(ValueError, match="too short"):
            align_phones(broken, 16000, "yes")
    with pytest.raises(ValueError, match="finite audio"):
        align_phones(np.full(16000, np.nan), 16000, "yes")


def test_what_is_heard_depends_on_the_audio_alone(speech: tuple[np.ndarray, int]) -> None:
    audio, rate_hz = speech
    recogniser = load_recogniser("pocketsphinx")
    assert isinstance(recogniser, Recogniser)
    assert "pocketsphinx 5" in recogniser.version
    heard = recogniser.transcribe(audio, rate_hz)
    assert {"and", "the"} <= set(heard.split())
    assert recogniser.transcribe(np.zeros(16000, np.float32), 16000) == ""
    assert recogniser.transcribe(np.zeros(3, np.float32), 16000) == ""
    assert recogniser.transcribe(audio, rate_hz) == heard
    scorer = load_scorer("pocketsphinx")
    assert isinstance(scorer, WordErrorScorer)
    assert scorer.score(audio, audio, rate_hz, heard) == {"wer": 0.0, "wer_weight": len(heard.split())}
    assert scorer.score(audio, 0 * audio, rate_hz, TEXT)["wer"] == 1
    assert math.isnan(scorer.score(audio, audio, rate_hz, "")["wer"])
    assert load_scorer("wer=pocketsphinx").version == scorer.version


class Parrot:
    """A recogniser of one's own: says what it was made with."""

    name, version = "parrot", "1"

    def __init__(self, text: str) -> None:
        self._text = text

    def transcribe(self, audio: np.ndarray, rate_hz: int) -> str:
        return self._text


def test_any_recogniser_can_be_plugged_in() -> None:
    audio = np.zeros(100, np.float32)
    for scorer in (WordErrorScorer(Parrot("yes no")), load_scorer("wer=test_phones:Parrot=yes no")):
        assert scorer.score(audio, audio, 16000, "Yes, yes!") == {"wer": 0.5, "wer_weight": 2.0}
        assert scorer.version == "1"
    with pytest.raises(UsageError, match="lacks one of name, version and transcribe"):
        load_recogniser("test_phones:Path")


def test_without_the_extra_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    for use in (PocketsphinxRecogniser, lambda: align_phones(speech_like(16000), 16000, "yes")):
        with pytest.raises(UsageError, match="extra 'semantics'"):
            use()


def test_a_manifest_is_aligned_and_failures_are_listed(speech: tuple[np.ndarray, int], tmp_path: Path) -> None:
    pytest.importorskip("praatio")
    audio, rate_hz = speech
    (tmp_path / "set" / "b").mkdir(parents=True)
    rows = []
    for name, text in (("a.wav", TEXT), ("b/c.wav", "dit is geen engels")):
        soundfile.write(tmp_path / "set" / name, audio, rate_hz)
        rows.append(f"{name}\tdev\tmade\tann\t{rate_hz}\t1.0\t{text}\n")
    (tmp_path / "set" / "manifest.tsv").write_text("".join(rows))

    def align(*more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "tools.align_phones", tmp_path / "set", tmp_path / "out", *more]
        return subprocess.run(
            [*map(str, command), "--num-processes", "1"],
            cwd=ROOT,
            env=os.environ | {"PYTHONWARNINGS": "ignore"},
            capture_output=True,
            text=True,
            check=False,
        )

    done = align("--split", "dev")
    assert done.returncode == 1
    assert "left out: b/c.wav: " in done.stderr
    assert "1 aligned, 0 were there, 1 left out" in done.stdout
    assert [s.label for s in read_textgrid(tmp_path / "out" / "a.TextGrid", "words")] == TEXT.split()
    assert (tmp_path / "out" / "failed.tsv").read_text().startswith("b/c.wav\t")
    before = (tmp_path / "out" / "a.TextGrid").stat().st_mtime_ns
    again = align("--skip-broken")
    assert again.returncode == 0
    assert "0 aligned, 1 were there, 1 left out" in again.stdout
    assert (tmp_path / "out" / "a.TextGrid").stat().st_mtime_ns == before
    wrong = align("--split", "test")
    assert wrong.returncode == 1
    assert wrong.stderr.count("\n") == 1
