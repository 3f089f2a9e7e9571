"""Words in time: paths of a recogniser that are made by hand, the file of words, and the program that writes it."""

import json
import math
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from codec.audio import resampled_length
from recipes.recordings import Recording
from recipes.words import (
    MIN_SCORE,
    AlignmentError,
    Entry,
    Transcript,
    Word,
    align,
    open_word_times,
    read_entries,
    split_words,
    transcribe,
)

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
STRIDE, RATE_HZ = 320, 16000  # a frame is 20 ms


class Script:
    """A recogniser that has made up its mind: a character of `frames` is what it hears in a frame, "-" is nothing.

    Each has the probability `certainty`, all others share the rest. Audio of level 0.1 n is given the n-th script.
    """

    sample_rate_hz, stride_samples, version = RATE_HZ, STRIDE, "script"

    def __init__(self, *frames: str, certainty: float = 0.9, alphabet: str = LETTERS, delimiter: str = "|") -> None:
        self.frames, self.certainty, self.delimiter = frames, certainty, delimiter
        self.labels = ("<pad>", "<s>", delimiter, *alphabet)
        self.blank = 0
        self.num_calls = 0

    def log_probs(self, audio: Tensor, num_samples: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.num_calls += 1
        frames = self.frames[round(float(audio.mean()) * 10)]
        assert (len(audio), math.ceil(audio.shape[1] / STRIDE)) == (1, len(frames))
        probs = torch.full((1, len(frames) + 3, len(self.labels)), (1 - self.certainty) / (len(self.labels) - 1))
        for frame, character in enumerate(frames):
            column = 0 if character == "-" else self.labels.index(character)
            probs[0, frame, column] = self.certainty
        return probs.log(), torch.tensor([len(frames)])  # what lies behind is no frame of it


def _audio(frames: str, level: float = 0.0) -> Tensor:
    return torch.full((STRIDE * len(frames),), level)


def _aligned(frames: str, text: str, **options: float) -> Transcript:
    return align(Script(frames), _audio(frames), text, **options)


def _frames(transcript: Transcript) -> list[tuple[str, int, int]]:
    """Words with their first frame and the one after their last."""
    frame = STRIDE / RATE_HZ
    return [(word.text, round(word.start_second / frame), round(word.stop_second / frame)) for word in transcript.words]


def test_words_are_where_their_characters_are() -> None:
    frames = "--A--N-|--OLDD-|MAN-"
    found = _aligned(frames, "an old man")
    assert found.words[0] == Word("an", 2 * 0.02, 6 * 0.02)
    assert _frames(found) == [("an", 2, 6), ("old", 10, 14), ("man", 16, 19)]
    assert found.score == pytest.approx(20 * math.log(0.9) / 8)  # all 20 frames, 8 characters


def test_repeated_letters_need_a_blank_between_them() -> None:
    assert _frames(_aligned("-BEL-L-|-", "bell")) == [("bell", 1, 6)]
    with pytest.raises(AlignmentError, match="needs 5 frames of the recogniser, it has 4"):
        _aligned("BELL", "bell")
    assert _frames(_aligned("BEL-L", "bell")) == [("bell", 0, 5)]


def test_the_last_frame_ends_with_the_audio() -> None:
    frames = "-NO"
    found = align(Script(frames), torch.zeros(STRIDE * 2 + 80), "no")
    assert found.words == (Word("no", 0.02, (2 * STRIDE + 80) / RATE_HZ),)


def test_letters_have_the_case_of_the_model_and_apostrophes_count_where_it_has_them() -> None:
    for text in ("don't", "DON'T", "Don\u2019t"):
        word = split_words(text)[0]
        assert _frames(_aligned("-DONT-", text)) == [(word, 1, 5)]
        with_apostrophe = Script("-DON'T-", alphabet=LETTERS + "'")
        found = align(with_apostrophe, _audio("-DON'T-"), text)
        assert (_frames(found), found.score) == ([(word, 1, 6)], pytest.approx(7 * math.log(0.9) / 5))
    lower = Script("don't", alphabet=LETTERS.lower() + "'")
    assert _frames(align(lower, _audio("don't"), "DON'T")) == [("DON'T", 0, 5)]
    both = Script("-aA-", alphabet="aA")
    assert _frames(align(both, _audio("-aA-"), "aA")) == [("aA", 1, 3)]


def test_marks_stay_with_their_words_and_take_no_time() -> None:
    assert split_words(' "Well -- well-known, (isn\u2019t he?)" ... 3.5') == [
        "Well",
        "well",
        "known,",
        "isn't",
        "he?",
        "3.5",
    ]
    assert split_words("cafe\u0301") == ["caf\u00e9"]
    assert split_words("\u0939\u093f\u0928\u094d\u0926\u0940 \u092d\u093e\u0937\u093e") == ["हिन्दी", "भाषा"]
    assert _frames(_aligned("-OH|-NO-", "\u201cOh, no!\u201d")) == [("Oh,", 1, 3), ("no!", 5, 7)]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "it has no text"),
        (" \n", "it has no text"),
        ("-- ...", "its text has no words"),
        ("room 101", r"its text has digits \('101'\), which must be written as words"),
        ("een \u00e9\u00e9n", "the recogniser has no character '\u00e9' \\(in '\u00e9\u00e9n'\\)"),
        ("stra\u00dfe", "the recogniser has no character '\u00df'"),
        ("goedemorgen allemaal", "its text needs 22 frames of the recogniser, it has 20"),
        ("de kat", "the text does not fit what is heard: -[0-9.]+ per character, at least -3 is needed"),
    ],
)
def test_texts_that_do_not_belong_are_refused(text: str, reason: str) -> None:
    with pytest.raises(AlignmentError, match=reason):
        _aligned("--A--N-|--OLDD-|MAN-", text)


def test_a_text_that_leaves_out_words_scores_low() -> None:
    frames = "-MEN-|-WITH-|-HIS-|-DOG-|-AND-|-CAT-"
    whole = _aligned(frames, "men with his dog and cat")
    part = _aligned(frames, "cat", min_score=-99)
    assert whole.score > -0.5
    assert part.score < MIN_SCORE
    assert _frames(part) == [("cat", 32, 35)]


def test_a_recogniser_that_knows_nothing_scores_low() -> None:
    frames = "-MAN-|"
    ignorant = Script(frames, certainty=1 / 29)
    with pytest.raises(AlignmentError, match="does not fit"):
        align(ignorant, _audio(frames), "man")
    with pytest.raises(AlignmentError, match="heard too unsurely"):
        transcribe(Script(frames, certainty=0.04), _audio(frames))
    impossible = Script("AB", certainty=1.0)
    with pytest.raises(AlignmentError, match="-inf per character"):
        align(impossible, _audio("AB"), "ac")
    broken = Script("AB", certainty=math.nan)
    with pytest.raises(AlignmentError, match="nan per character"):
        align(broken, _audio("AB"), "ab")


def test_what_is_heard_has_times_too() -> None:
    frames = "|-HE-LL-L-O-||--WW-E-|"
    found = transcribe(Script(frames), _audio(frames))
    assert _frames(found) == [("HELLO", 2, 11), ("WE", 16, 20)]
    assert found.score == pytest.approx(len(frames) * math.log(0.9) / 7)
    specials = Script("A-B", alphabet="AB")
    specials.labels = ("<pad>", "A", "|", "<unk>", "B")  # what is no character is not heard
    assert [word.text for word in transcribe(specials, _audio("A-B")).words] == ["AB"]
    for silent in ("-----", "|--|"):
        with pytest.raises(AlignmentError, match="no words are heard"):
            transcribe(Script(silent), _audio(silent))


def test_a_model_without_a_delimiter_hears_one_word() -> None:
    without = Script("-A-B-", delimiter="")  # and its third column stands for nothing
    assert _frames(align(without, _audio("-A-B-"), "a b")) == [("a", 1, 2), ("b", 3, 4)]
    assert _frames(transcribe(without, _audio("-A-B-"))) == [("AB", 1, 4)]


@given(st.lists(st.text("ABC", min_size=1, max_size=4), min_size=1, max_size=4), st.randoms())
def test_forced_and_greedy_agree_on_what_was_heard(words: list[str], random: object) -> None:
    """Any text, with any pauses: both find each word exactly where the script has it."""
    randint: Callable[[int, int], int] = random.randint  # type: ignore[attr-defined]
    frames, expected = "", []
    for word in words:
        frames += "-" * randint(0, 2) + ("|" * randint(1, 2) if frames else "") + "-" * randint(0, 2)
        start = len(frames)
        for place, letter in enumerate(word):
            blanks = randint(1 if place and word[place - 1] == letter else 0, 2) if place else 0
            frames += "-" * blanks + letter * randint(1, 3)
        expected.append((word, start, len(frames)))
    script = Script(frames, certainty=0.99)
    assert _frames(align(script, _audio(frames), " ".join(words))) == expected
    assert _frames(transcribe(script, _audio(frames))) == expected


def test_audio_must_be_one_signal() -> None:
    for audio in (torch.zeros(0), torch.zeros(1, 320)):
        with pytest.raises(ValueError, match="expected audio"):
            align(Script("A"), audio, "a")


# The file

ENTRY = Entry("a/\u00e4.wav", 24000, 24000, "script", "Oh, no", (Word("Oh,", 0.1, 0.3), Word("no", 0.5, 0.75)), -0.25)
FAILED = Entry("b.wav", 16000, 16000, "script", "", reason="it has no text")
HEARD = Entry("c.wav", 16000, 16000, "script", None, (Word("HI", 0.0, 0.5),), -1.0)


def _written(folder: Path, *entries: Entry) -> Path:
    file = folder / "words.jsonl"
    file.write_text("".join(f"{entry.to_line()}\n" for entry in entries), encoding="utf-8")
    return file


def test_entries_come_back_from_their_lines(tmp_path: Path) -> None:
    entries, is_whole = read_entries(_written(tmp_path, ENTRY, FAILED, HEARD))
    assert (list(entries.values()), is_whole) == ([ENTRY, FAILED, HEARD], True)


def test_words_of_recordings(tmp_path: Path) -> None:
    times = open_word_times(_written(tmp_path, ENTRY, FAILED, HEARD))
    recording = Recording(ENTRY.path, text="Oh, no", sample_rate_hz=24000, num_samples=24000)
    assert times.of(recording) == ENTRY.words
    assert times.of(Recording("b.wav", sample_rate_hz=16000, num_samples=16000)) is None
    assert times.of(Recording("d.wav", sample_rate_hz=16000, num_samples=16000)) is None
    assert times.of(Recording("c.wav", text="any", sample_rate_hz=16000, num_samples=16000)) == HEARD.words


def test_stale_lines_are_told(tmp_path: Path) -> None:
    times = open_word_times(_written(tmp_path, ENTRY, FAILED))
    with pytest.raises(ValueError, match=r"stale: its line for a/ä.wav is: of 24000 samples at 24000 Hz, it has 23999"):
        times.of(Recording(ENTRY.path, text="Oh, no", sample_rate_hz=24000, num_samples=23999))
    with pytest.raises(ValueError, match=r"stale.*of another text, 'Oh, no'"):
        times.of(Recording(ENTRY.path, text="oh no", sample_rate_hz=24000, num_samples=24000))
    with pytest.raises(ValueError, match="stale"):  # also where there are no words
        times.of(Recording("b.wav", sample_rate_hz=16000, num_samples=1))


@given(st.integers(1, 10**7), st.sampled_from([8000, 22050, 44100, 48000]))
def test_the_same_recording_at_another_rate_is_no_other(num_samples: int, rate_hz: int) -> None:
    entry = Entry("a", num_samples, 16000, "script", None)
    there = resampled_length(num_samples, 16000, rate_hz)
    assert entry.belongs_to(Recording("a", sample_rate_hz=rate_hz, num_samples=there))
    longer = there + 2 * max(rate_hz, 16000) // 8000
    assert not entry.belongs_to(Recording("a", sample_rate_hz=rate_hz, num_samples=longer))


def _line(**changes: object) -> str:
    return json.dumps(json.loads(HEARD.to_line()) | changes) + "\n"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "holds no word times"),
        ("{}\n", ":1 is no line of word times"),
        ("[]\n", ":1 is no line of word times"),
        ("path\ttext\n", ":1 is no line of word times"),
        ("anything else", ":1 is no line of word times"),  # what is not ours must not be taken for cut off
        (_line(words=[["HI", 0.5, 0.2]]), "no word in time"),
        (_line(words=[["HI", -0.1, 0.2]]), "no word in time"),
        (_line(words=[["HI", 0.1, math.inf]]), "no word in time"),
        (_line(words=[["HI", 0.1]]), ":1 is no line"),
        (_line(words=[["HI", "0.1", "0.2"]]), ":1 is no line"),
        (_line(reason="both"), "either words or a reason"),
        (_line(num_samples=0), "num_samples"),
        (_line() + _line(), ":2 names c.wav for the second time"),
        (_line() + FAILED.to_line()[:-3], "is cut off"),
        (_line() + '{"', "is cut off"),
    ],
)
def test_files_that_are_none(tmp_path: Path, content: str, reason: str) -> None:
    file = tmp_path / "words.jsonl"
    file.write_text(content)
    with pytest.raises(ValueError, match=reason) as raised:
        open_word_times(file)
    assert "\n" not in str(raised.value)


def test_files_that_are_not_there_or_no_text(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is no file of word times; tools/align_words.py makes one"):
        open_word_times(tmp_path / "words.jsonl")
    (tmp_path / "words.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is no text of UTF-8"):
        open_word_times(tmp_path / "words.jsonl")


# The program

SCRIPTS = ("-OH-|-NO-", "-A|MAN--", "------", "-YES-")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A manifest of three recordings; the first is said at twice the rate and has two channels."""
    rows = [("0.wav", "oh no", 2, 32000), ("1.wav", "A man.", 1, 16000), ("2.wav", "kat", 1, 16000)]
    with (tmp_path / "all.jsonl").open("w") as manifest:
        for number, (path, text, num_channels, rate_hz) in enumerate(rows):
            samples = np.full((len(SCRIPTS[number]) * STRIDE * rate_hz // RATE_HZ, num_channels), 0.1 * number)
            soundfile.write(tmp_path / path, samples, rate_hz, subtype="FLOAT")
            manifest.write(json.dumps({"path": path, "text": text, "split": "dev" if number == 1 else "train"}) + "\n")
    return tmp_path / "all.jsonl"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    """The recogniser that the program finds, whatever its name."""
    from tools import align_words

    made = Script(*SCRIPTS)
    align_words._load.cache_clear()
    monkeypatch.setattr(align_words, "load_ctc_model", lambda source: made)
    return made


def _run(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int | str:
    """Exit status, or the message in its place."""
    from tools import align_words

    monkeypatch.setattr(sys, "argv", ["align_words", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        align_words.main()
    assert isinstance(ended.value.code, int | str)
    return ended.value.code


def test_a_corpus_is_aligned(
    corpus: Path, script: Script, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = corpus.with_name("words.jsonl")
    assert _run(monkeypatch, corpus, "model", out) == 1
    said = capsys.readouterr()
    assert said.err.startswith("no words: 2.wav: the text does not fit what is heard: -")
    assert "4 words in 2 recordings" in said.out
    entries, _ = read_entries(out)
    assert [entry.reason is None for entry in entries.values()] == [True, True, False]
    assert entries["1.wav"].words == (Word("A", 0.02, 0.04), Word("man.", 0.06, 0.12))
    assert entries["0.wav"].num_samples == 2 * 9 * STRIDE
    assert {entry.aligner for entry in entries.values()} == {"script, at least -3"}
    assert _run(monkeypatch, corpus, "model", corpus.with_name("other.jsonl"), "--skip-broken") == 0


def test_a_run_goes_on_where_it_was(corpus: Path, script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    out, whole = corpus.with_name("words.jsonl"), corpus.with_name("whole.jsonl")
    _run(monkeypatch, corpus, "model", whole)
    content = whole.read_text()
    for cut in (0, 5, content.index("\n") + 1, content.index("\n") + 40, len(content) - 1, len(content)):
        out.write_text(content[:cut])
        script.num_calls = 0
        _run(monkeypatch, corpus, "model", out)
        num_whole = 3 if cut == len(content) - 1 else content[:cut].count("\n")
        assert (out.read_text(), script.num_calls) == (content, 3 - num_whole), cut


def test_splits_share_a_file_and_what_changed_is_made_anew(
    corpus: Path, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = corpus.with_name("words.jsonl")
    _run(monkeypatch, corpus, "model", out, "--split", "dev")
    assert list(read_entries(out)[0]) == ["1.wav"]
    _run(monkeypatch, corpus, "model", out, "--split", "train")
    assert list(read_entries(out)[0]) == ["1.wav", "0.wav", "2.wav"]
    corpus.write_text(corpus.read_text().replace("A man.", "A MAN"))
    soundfile.write(corpus.with_name("2.wav"), np.full(5 * STRIDE, 0.3), 16000, subtype="FLOAT")
    corpus.write_text(corpus.read_text().replace("kat", "yes"))
    soundfile.write(corpus.with_name("0.wav"), np.zeros(9 * STRIDE), 16000)  # as long as it was
    script.num_calls = 0
    assert _run(monkeypatch, corpus, "model", out) == 0
    assert script.num_calls == 2
    soundfile.write(corpus.with_name("0.wav"), np.zeros(9 * STRIDE - 10), 16000)
    assert _run(monkeypatch, corpus, "model", out) == 0
    assert script.num_calls == 3
    entries, _ = read_entries(out)
    assert [word.text for word in entries["1.wav"].words] == ["A", "MAN"]
    assert [word.text for word in entries["2.wav"].words] == ["yes"]


def test_what_is_heard_can_take_the_place_of_texts(
    corpus: Path, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus.write_text(corpus.read_text().replace("A man.", ""))
    missing, everywhere = corpus.with_name("missing.jsonl"), corpus.with_name("all_heard.jsonl")
    _run(monkeypatch, corpus, "model", missing)
    assert read_entries(missing)[0]["1.wav"].reason == "it has no text"
    _run(monkeypatch, corpus, "model", missing, "--transcribe")
    entries = read_entries(missing)[0]
    assert [(e.text, [word.text for word in e.words]) for p, e in sorted(entries.items()) if p != "2.wav"] == [
        ("oh no", ["oh", "no"]),
        (None, ["A", "MAN"]),
    ]
    _run(monkeypatch, corpus, "model", everywhere, "--transcribe", "all")
    entries = read_entries(everywhere)[0]
    assert [word.text for word in entries["0.wav"].words] == ["OH", "NO"]
    assert entries["2.wav"].reason == "no words are heard in it"
    assert all(entry.text is None for entry in entries.values())


def test_bad_recordings_are_told(
    corpus: Path, script: Script, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = corpus.with_name("words.jsonl")
    soundfile.write(corpus.with_name("2.wav"), np.full(STRIDE, math.nan), 16000, subtype="FLOAT")
    _run(monkeypatch, corpus, "model", out, "--max-seconds", "0.17")
    assert capsys.readouterr().err.splitlines() == [
        "no words: 0.wav: it has 0.2 s, more than --max-seconds 0.17",
        "no words: 2.wav: holds NaN or infinite samples",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--min-score", "0"], "none of 3 recordings has words; the first, 0.wav: the text does not fit"),
        (["--split", "test"], "has no rows of split 'test'"),
        (["--num-workers", "0"], "--num-workers must be positive"),
    ],
)
def test_mistakes_are_one_line(
    corpus: Path, script: Script, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    ended = _run(monkeypatch, corpus, "model", corpus.with_name("words.jsonl"), *arguments)
    assert str(ended).startswith("error: ")
    assert message in str(ended)
    assert "\n" not in str(ended)


def test_words_of_another_aligner_are_kept(corpus: Path, script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    out = corpus.with_name("words.jsonl")
    _run(monkeypatch, corpus, "model", out)
    content = out.read_text()
    ended = str(_run(monkeypatch, corpus, "model", out, "--min-score", "-2"))
    assert "was made by 'script, at least -3', not 'script, at least -2': remove it, or name another" in ended
    assert out.read_text() == content
    corpus.write_text(corpus.read_text() * 2)
    assert "names 0.wav 2 times" in str(_run(monkeypatch, corpus, "model", out))


def test_several_processes_find_the_same(corpus: Path, script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    """`codec.batch.in_processes` has tests of its own; here processes are played by this one."""
    from tools import align_words

    asked = []

    def in_this_process(
        items: list[int], work: object, died: Callable[[int, int], Entry], *, num_processes: int
    ) -> Iterator[tuple[int, Entry]]:
        asked.append(num_processes)
        sent = pickle.loads(pickle.dumps(work))
        yield 0, died(items[0], 1234)
        for place, item in reversed(list(enumerate(items))[1:]):
            yield place, sent(item, lambda num_done, num_in_all: None)

    alone, together = corpus.with_name("alone.jsonl"), corpus.with_name("together.jsonl")
    _run(monkeypatch, corpus, "model", alone)
    monkeypatch.setattr(align_words, "in_processes", in_this_process)
    assert _run(monkeypatch, corpus, "model", together, "--num-workers", "8") == 1
    assert list(read_entries(together)[0]) == ["2.wav", "1.wav"]  # one whose process was killed is tried again
    _run(monkeypatch, corpus, "model", together, "--num-workers", "8")
    assert read_entries(together) == read_entries(alone)
    assert asked == [3]


def test_a_real_model(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the format that is published; its weights are random, so any score will do."""
    transformers = pytest.importorskip("transformers")
    folder = corpus.with_name("ctc")
    folder.mkdir()
    vocabulary = {label: i for i, label in enumerate(["<pad>", "<s>", "</s>", "<unk>", "|", *LETTERS])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    transformers.Wav2Vec2CTCTokenizer(str(folder / "vocab.json")).save_pretrained(folder)
    transformers.Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.Wav2Vec2Config(
        vocab_size=len(vocabulary),
        pad_token_id=0,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        conv_dim=(8, 8),
        conv_stride=(10, 8),
        conv_kernel=(10, 8),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )
    transformers.Wav2Vec2ForCTC(config).save_pretrained(folder)
    rng = np.random.default_rng(0)
    for name in ("0.wav", "1.wav", "2.wav"):
        soundfile.write(corpus.with_name(name), 0.1 * rng.standard_normal(4000), 16000, subtype="FLOAT")
    out = corpus.with_name("words.jsonl")
    assert _run(monkeypatch, corpus, folder, out, "--min-score", "-99") == 0
    entries, _ = read_entries(out)
    assert entries["1.wav"].aligner.startswith("ctc, weights ")
    for entry in entries.values():
        assert [word.text for word in entry.words] == split_words(entry.text or "")
        assert all(0 <= word.start_second < word.stop_second <= 0.25 for word in entry.words)
