"""Small teachers of one's own: what they learn from, in which order, what they write, and that they go on exactly."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st
from runs import LIGHTNING_WARNINGS, write_recordings

from codec.testing import speech_like
from recipes import small_teachers
from recipes.corpora import open_corpus
from recipes.small_teachers import (
    LETTERS,
    TeacherSettings,
    _Batches,
    _by_seconds,
    spoken_text,
    train_speech_teacher,
    train_text_teacher,
    transcripts,
)
from tools.train_teacher import main

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [pytest.mark.filterwarnings(warning) for warning in LIGHTNING_WARNINGS]
TEXTS = ["The cat sat on the mat.", "A dog sat", "the mat, the dog!", "on", "The CAT is a cat; it's the cat", "it is"]
TINY: dict[str, Any] = {"max_steps": 3, "num_layers": 1, "width": 16, "warmup_steps": 1, "precision": "32-true"}
SPEECH, TEXT = {"batch_size": 2}, {"batch_size": 3}


def _manifest(folder: Path, texts: Sequence[str], corpora: Sequence[str] = ("one",)) -> Path:
    """Recordings of about half a second with these texts, whose corpora take turns."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = ["path\tsplit\tcorpus\ttext"]
    for number, text in enumerate(texts):
        audio = speech_like(4000 + 500 * number, rate_hz=8000, seed=number)
        soundfile.write(folder / f"{number}.wav", audio, 8000)
        rows.append(f"{number}.wav\ttrain\t{corpora[number % len(corpora)]}\t{text}")
    (folder / "all.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder / "all.tsv"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _manifest(tmp_path_factory.mktemp("spoken"), TEXTS, ("one", "two"))


# What is said


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The cat, sat!", "the cat sat"),
        ("  it\u2019s   late ", "it's late"),
        ("well-known_words\u2014here", "well known words here"),
        ("'Tis", "'tis"),
        ("", None),
        ("...", None),
        ("' '", None),
        ("room 101", None),
        ("café", None),
        ("cafe\u0301", None),  # the same, in two code points
        ("кот", None),
        ("²", None),
    ],
)
def test_texts_are_taken_in_letters_or_not_at_all(text: str, expected: str | None) -> None:
    assert spoken_text(text) == expected


@given(st.text())
def test_whatever_is_taken_is_in_letters_and_single_spaces(text: str) -> None:
    cleaned = spoken_text(text)
    if cleaned is not None:
        assert set(cleaned) <= {*LETTERS, " "}
        assert cleaned == " ".join(cleaned.split())
        assert spoken_text(cleaned) == cleaned


def test_recordings_without_a_usable_text_are_left_out(tmp_path: Path) -> None:
    corpus = open_corpus(_manifest(tmp_path, ["one", "", "2", "Two", "drei"], ("a", "b")))
    assert transcripts(corpus, None) == [(0, "one"), (3, "two"), (4, "drei")]
    assert transcripts(corpus, ["a"]) == [(0, "one"), (4, "drei")]
    with pytest.raises(ValueError, match=r"has no corpora \['c'\] \(it has \['a', 'b'\]\)"):
        transcripts(corpus, ["a", "c"])


def test_long_recordings_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = open_corpus(_manifest(tmp_path, ["one", "two", "three"]))  # 0.5, 0.5625 and 0.625 s
    monkeypatch.setattr(small_teachers, "_LONGEST_SECONDS", 0.5625)
    assert transcripts(corpus, None) == [(0, "one"), (1, "two")]


def test_a_source_without_transcripts_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no recordings of up to 20 s with a transcript$"):
        transcripts(open_corpus(write_recordings(tmp_path)), None)


# The order of things


@given(st.lists(st.floats(0.1, 30.0), min_size=1, max_size=40), st.floats(0.5, 60.0))
def test_batches_hold_all_items_once_and_not_too_much_of_them(seconds: list[float], wanted: float) -> None:
    batches = _by_seconds(seconds, wanted)
    assert sorted(item for batch in batches for item in batch) == list(range(len(seconds)))
    ends = 0.0
    for batch in batches:
        durations = [seconds[item] for item in batch]
        assert len(batch) == 1 or max(durations) * len(batch) <= wanted  # padding included
        assert min(durations) >= ends  # about the same length
        ends = max(durations)


def test_every_round_has_all_batches_in_an_order_of_its_own() -> None:
    batches = [[number] for number in range(20)]

    def rounds(seed: int) -> list[list[int]]:
        drawn = _Batches(batches, seed)
        return [[drawn[20 * turn + place][1][0] for place in range(20)] for turn in range(3)]

    first = rounds(0)
    assert all(sorted(turn) == list(range(20)) for turn in first)
    assert len({tuple(turn) for turn in first}) == 3
    assert rounds(0) == first
    assert rounds(1) != first
    assert _Batches(batches, 0)[47] == (47, [first[2][7]])  # whichever was asked for before


# Runs


Train = Callable[..., None]
BOTH = pytest.mark.parametrize(
    ("train", "batch"), [(train_speech_teacher, SPEECH), (train_text_teacher, TEXT)], ids=["speech", "text"]
)


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def _keep_pieces(whole: Path, out: Path) -> None:
    """Let a run have the pieces that another one had."""
    from transformers import AutoTokenizer

    numbers = AutoTokenizer.from_pretrained(whole).get_vocab()
    (out / "checkpoints").mkdir(parents=True)
    (out / "checkpoints" / "pieces.txt").write_text("\n".join(sorted(numbers, key=lambda piece: numbers[piece])))


def test_an_interrupted_run_keeps_its_pieces(tmp_path: Path) -> None:
    texts = ["the cat sat on the mat", "the dog sat on the log"] * 3
    file = tmp_path / "checkpoints" / "pieces.txt"
    pieces = small_teachers._word_pieces(texts, 30, file)
    assert pieces[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert pieces[5:] == sorted(pieces[5:])
    assert len(pieces) == len(set(pieces)) <= 30
    assert small_teachers._word_pieces(["other words"], 30, file) == pieces


@pytest.fixture(scope="module")
def taught(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both teachers after three steps, in the folders `speech` and `text`."""
    folder = tmp_path_factory.mktemp("taught")
    train_speech_teacher(source, folder / "speech", TeacherSettings(**TINY | SPEECH))
    train_text_teacher(source, folder / "text", TeacherSettings(**TINY | TEXT), vocabulary_size=60)
    return folder


def test_the_speech_teacher_is_loaded_by_transformers(taught: Path) -> None:
    from transformers import AutoModelForCTC, AutoProcessor

    model, processor = (
        AutoModelForCTC.from_pretrained(taught / "speech"),
        AutoProcessor.from_pretrained(taught / "speech"),
    )
    assert model.config.num_hidden_layers == 1
    assert model.config.hidden_size == 16
    batch = processor(speech_like(16000), sampling_rate=16000, return_tensors="pt")
    with torch.no_grad():
        found = model(**batch, output_hidden_states=True)
    assert found.logits.shape == (1, 49, len(LETTERS) + 3)  # frames of 20 ms
    assert torch.isfinite(found.logits).all()
    assert [hidden.shape for hidden in found.hidden_states] == 2 * [(1, 49, 16)]
    # Columns are letters: blank, unknown, word boundary, then the alphabet.
    vocabulary = processor.tokenizer.get_vocab()
    assert [vocabulary[token] for token in ("<pad>", "|", "a", "'")] == [0, 2, 3, 29]
    letters = [vocabulary[letter] for letter in "it's|me"]
    assert processor.tokenizer.decode(letters) == "it's me"
    assert processor.tokenizer("it's me").input_ids == letters
    assert not (taught / "speech" / "checkpoints").exists()


def test_the_text_teacher_is_loaded_by_transformers(taught: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    model, tokenizer = AutoModel.from_pretrained(taught / "text"), AutoTokenizer.from_pretrained(taught / "text")
    batch = tokenizer(["the cat sat", "it's"], padding=True, return_tensors="pt")
    first = tokenizer.convert_ids_to_tokens(batch["input_ids"][0].tolist())
    assert first[0] == "[CLS]"
    assert first[-1] == "[SEP]"
    assert "".join(piece.removeprefix("##") for piece in first[1:-1]) == "thecatsat"
    assert "[UNK]" not in tokenizer.convert_ids_to_tokens(batch["input_ids"].flatten().tolist())
    assert batch["attention_mask"][1].sum() < batch["attention_mask"][0].sum() or len(first) < 6
    with torch.no_grad():
        found = model(**batch).last_hidden_state
    assert found.shape == (*batch["input_ids"].shape, 16)
    assert torch.isfinite(found).all()
    assert tokenizer.is_fast  # it tells which word a piece belongs to
    assert batch.word_ids(0)[1] == 0
    assert not (taught / "text" / "checkpoints").exists()


@BOTH
def test_a_run_that_was_interrupted_comes_to_the_same_weights(
    train: Train, batch: dict[str, int], source: Path, taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is stopped in its third step, when the last checkpoint is of the second."""
    settings = TeacherSettings(**TINY | batch)
    more: dict[str, Any] = {"vocabulary_size": 60} if train is train_text_teacher else {}
    whole = taught / ("text" if train is train_text_teacher else "speech")
    monkeypatch.setattr(small_teachers, "_SAVE_EVERY_N_STEPS", 1)
    if train is train_text_teacher:  # ties between pieces are broken at random
        _keep_pieces(whole, tmp_path / "out")
    take = small_teachers._Learning.training_step

    def interrupted(self: Any, *arguments: Any) -> torch.Tensor:
        if self.global_step == 2:
            raise OSError("the power went off")
        return take(self, *arguments)

    monkeypatch.setattr(small_teachers._Learning, "training_step", interrupted)
    with pytest.raises(OSError, match="the power went off"):
        train(source, tmp_path / "out", settings, **more)
    assert not (tmp_path / "out" / "config.json").exists()
    # Whatever was drawn meanwhile.
    torch.rand(7)
    np.random.rand(7)
    # Another run does not go on from there.
    with pytest.raises(ValueError, match=r"out holds another run, which was interrupted: seed was 0, now 5$"):
        train(source, tmp_path / "out", TeacherSettings(**TINY | batch | {"seed": 5}), **more)
    with pytest.raises(ValueError, match=r"interrupted: corpora was None, now \['one'\]$"):
        train(source, tmp_path / "out", settings, corpora=["one"], **more)
    steps = []

    def counted(self: Any, *arguments: Any) -> torch.Tensor:
        steps.append(self.global_step)
        return take(self, *arguments)

    monkeypatch.setattr(small_teachers._Learning, "training_step", counted)
    train(source, tmp_path / "out", settings, **more)
    assert steps == [2]
    ours, theirs = _weights(tmp_path / "out"), _weights(whole)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == sorted(file.name for file in whole.iterdir())


@BOTH
def test_teachers_learn(train: Train, batch: dict[str, int], source: Path, tmp_path: Path, monkeypatch: Any) -> None:
    losses: list[float] = []
    take = small_teachers._Learning.training_step

    def told(self: Any, *arguments: Any) -> torch.Tensor:
        loss = take(self, *arguments)
        losses.append(loss.item())
        return loss

    monkeypatch.setattr(small_teachers._Learning, "training_step", told)
    settings = TeacherSettings(**TINY | batch | {"max_steps": 30, "lr": 0.02, "batch_size": 20})
    train(source, tmp_path / "out", settings)
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:2])


def test_a_text_too_short_to_hide_a_piece_of_is_no_nan(tmp_path: Path) -> None:
    """One piece a batch: mostly none of it would be hidden, and the loss the mean of nothing."""
    source = _manifest(tmp_path / "spoken", ["on", "on"])
    train_text_teacher(source, tmp_path / "out", TeacherSettings(**TINY | {"batch_size": 1, "max_steps": 8}))
    assert all(torch.isfinite(value).all() for value in _weights(tmp_path / "out").values())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_steps": 0}, "max_steps must be positive, not 0"),
        ({"num_layers": 0}, "num_layers must be positive, not 0"),
        ({"lr": 0.0}, "lr must be positive and warmup_steps not negative"),
        ({"warmup_steps": -1}, "lr must be positive and warmup_steps not negative"),
        ({"width": 20}, "width=20 is not a multiple of 8"),
    ],
)
def test_impossible_settings_are_errors(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r".") as told:
        TeacherSettings(**{"max_steps": 1, "batch_size": 1} | values)
    assert str(told.value) == message


# The command


def test_mistakes_are_one_line(source: Path, taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def says(*arguments: str | Path) -> str:
        monkeypatch.setattr(sys, "argv", ["train_teacher", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert isinstance(stopped.value.code, str)  # Python prints it, and exits with status 1
        assert stopped.value.code.startswith("error: ")
        assert "\n" not in stopped.value.code
        return stopped.value.code

    out = tmp_path / "out"
    assert says("speech", source, taught / "speech").endswith("speech holds a model already")
    assert says("text", source, taught / "text").endswith("text holds a model already")
    assert "has no corpora ['three'] (it has ['one', 'two'])" in says("text", source, out, "--corpora", "three")
    assert "has no rows of split 'dev' (it has ['train'])" in says("speech", source, out, "--split", "dev")
    assert "with a transcript" in says("speech", write_recordings(tmp_path / "silent"), out)
    assert "neither a folder of audio nor a manifest" in says("text", tmp_path / "nowhere", out)
    assert "width=6 is not a multiple of 8" in says("text", source, out, "--width", "6")
    assert not out.exists()


def test_the_command_writes_a_model(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["text", source, tmp_path / "out", "--max-steps", "2", "--batch-size", "3", "--num-layers", "1"]
    arguments += ["--width", "16", "--seed", "3", "--corpora", "two", "--precision", "32-true"]
    monkeypatch.setattr(sys, "argv", ["train_teacher", *map(str, arguments)])
    main()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["hidden_size"] == 16


def test_a_mistake_ends_the_command_with_status_1(taught: Path) -> None:
    command = [sys.executable, "-m", "tools.train_teacher", "text", "nowhere", str(taught / "text")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [f"error: {taught / 'text'} holds a model already"]
