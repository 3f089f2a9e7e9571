"""The text teacher: which pieces a crop has, when they are said, and what a real, small model makes of them."""

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from codec.config import build, from_dict, to_dict
from recipes.crops import Place
from recipes.data import Batch, SpeechData
from recipes.recordings import Recording
from recipes.targets import PADDING, PIECE, SPECIAL, Pieces
from recipes.text_teacher import TextTeacher, TextTeacherConfig, _places
from recipes.words import Entry, Word

pytest.importorskip("transformers")

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "don", "'", "t", "talk", "##ing", "##s", ",", "."]
PIECES += ["a", "##b", "##c", "i", "OK", "the", "man"]
RATE_HZ, DIM, NUM_LAYERS, NUM_POSITIONS = 16000, 8, 2, 16


def _tokenizer(folder: Path, *, lowercase: bool = True, max_length: int | None = None) -> None:
    """A WordPiece tokenizer as BERT's, of a few pieces."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import BertTokenizerFast

    made = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(PIECES)}, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", PIECES.index("[CLS]")), ("[SEP]", PIECES.index("[SEP]"))]
    )
    made.decoder = decoders.WordPiece()
    options = {} if max_length is None else {"model_max_length": max_length}
    BertTokenizerFast(tokenizer_object=made, do_lower_case=lowercase, **options).save_pretrained(folder)


def _model(folder: Path, kind: str = "Bert", **changes: Any) -> Path:
    import transformers

    torch.manual_seed(0)
    values = {
        "vocab_size": len(PIECES),
        "hidden_size": DIM,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "max_position_embeddings": NUM_POSITIONS,
        "pad_token_id": 0,
    } | changes
    config = getattr(transformers, f"{kind}Config")(**values)
    getattr(transformers, f"{kind}Model")(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = _model(tmp_path_factory.mktemp("bert") / "small")
    _tokenizer(folder)
    return folder


def _words(*words: tuple[str, float, float]) -> tuple[Word, ...]:
    return tuple(Word(*word) for word in words)


# Letters take 0.1 s each, and words are 0.1 s apart, from 0.1 s on.
TALK = _words(("DON'T", 0.1, 0.5), ("TALKING", 0.6, 1.3), ("ABC", 1.4, 1.7), ("THE", 1.8, 2.1), ("MAN", 2.2, 2.5))
SPOKEN = {
    "talk.wav": TALK,
    "mixed.wav": _words(("The", 0.1, 0.4), ("OK", 0.5, 0.7), ("man,", 0.8, 1.1)),
    "silent.wav": (),
    "unknown.wav": None,
    "long.wav": tuple(Word("abc", float(i), i + 0.5) for i in range(20)),
}


@pytest.fixture(scope="module")
def times(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("words") / "words.jsonl"
    lines = []
    for path, words in SPOKEN.items():
        about = (path, 30 * RATE_HZ, RATE_HZ, "by hand", None)
        entry = Entry(*about, reason="no") if words is None else Entry(*about, words=words, score=-0.1)
        lines.append(entry.to_line() + "\n")
    file.write_text("".join(lines))
    return file


def _batch(*crops: tuple[str, float], seconds: float = 3.0) -> Batch:
    places = [
        Place("data", Recording(path, sample_rate_hz=RATE_HZ, num_samples=30 * RATE_HZ), round(start * RATE_HZ))
        for path, start in crops
    ]
    audio = torch.zeros(len(crops), 1, round(seconds * RATE_HZ))
    return Batch(audio, torch.arange(len(crops)), tuple(places))


def _teacher(source: Path, words: Path, **settings: Any) -> TextTeacher:
    teacher = build(from_dict({"type": "text_teacher", "source": str(source), "words": str(words), **settings}))
    assert isinstance(teacher, TextTeacher)
    return teacher


def _spans(pieces: Pieces, row: int = 0) -> list[tuple[float, float]]:
    """Of the word pieces of a row, rounded."""
    return [(round(a, 4), round(b, 4)) for a, b in pieces.spans[row, pieces.kinds[row] == PIECE].tolist()]


def _reference(folder: Path, text: str, **tokenizing: Any) -> list[torch.Tensor]:
    """The hidden states of a text, each [S, D]."""
    from transformers import AutoModel, AutoTokenizer

    encoded = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt", **tokenizing)
    with torch.no_grad():
        states = AutoModel.from_pretrained(folder).eval()(**encoded, output_hidden_states=True).hidden_states
    return [state[0] for state in states]


def test_pieces_are_said_during_their_letters(bert: Path, times: Path) -> None:
    pieces = _teacher(bert, times).pieces(_batch(("talk.wav", 0.0)), seconds=3.0)
    assert pieces.kinds.tolist() == [[SPECIAL, *[PIECE] * 10, SPECIAL]]
    assert _spans(pieces) == [
        (0.1, 0.4),  # don
        (0.4, 0.4),  # the apostrophe takes no time
        (0.4, 0.5),  # t
        (0.6, 1.0),  # talk
        (1.0, 1.3),  # ##ing
        (1.4, 1.5),  # a
        (1.5, 1.6),
        (1.6, 1.7),
        (1.8, 2.1),  # the
        (2.2, 2.5),  # man
    ]
    assert not pieces.spans[0, [0, 11]].any()
    assert (pieces.values.dtype, pieces.kinds.dtype, pieces.spans.dtype) == (
        torch.float32,
        torch.int64,
        torch.float64,
    )
    expected = _reference(bert, "don't talking abc the man")[-1]
    torch.testing.assert_close(pieces.values[0], expected, rtol=0, atol=1e-6)


def test_pieces_with_spaces_belong_to_the_word_of_their_last_letter() -> None:
    """As byte-level and unigram tokenizers may give them: "oh no," with pieces of any kind."""
    offsets = [(0, 0), (0, 2), (2, 3), (2, 5), (3, 5), (5, 6), (6, 6), (0, 0)]
    is_piece = [False, True, True, True, True, True, True, False]
    numbers, shares = _places(["oh", "no,"], offsets, is_piece)
    assert numbers == [0, 0, 0, 1, 1, 1, 1, 0]
    assert shares == [(0, 0), (0, 1), (1, 1), (0, 1), (0, 1), (1, 1), (1, 1), (0, 0)]
    assert _places(["..."], [(0, 1), (0, 0)], [True, True]) == ([0, 0], [(0, 0), (0, 0)])


def test_crops_have_the_words_that_are_at_least_half_inside(bert: Path, times: Path) -> None:
    """TALKING has 0.7 s, THE has 0.3 s."""
    teacher = _teacher(bert, times)
    pieces = teacher.pieces(_batch(("talk.wav", 0.94)), seconds=1.02)  # 0.36 s and 0.16 s of them
    assert _spans(pieces) == [(0.0, 0.06), (0.06, 0.36), (0.46, 0.56), (0.56, 0.66), (0.66, 0.76), (0.86, 1.02)]
    torch.testing.assert_close(pieces.values[0], _reference(bert, "talking abc the")[-1], rtol=0, atol=1e-6)
    shorter = teacher.pieces(_batch(("talk.wav", 0.96)), seconds=0.98)  # 0.34 s and 0.14 s
    assert _spans(shorter) == [(0.44, 0.54), (0.54, 0.64), (0.64, 0.74)]
    torch.testing.assert_close(shorter.values[0], _reference(bert, "abc")[-1], rtol=0, atol=1e-6)
    inside = teacher.pieces(_batch(("talk.wav", 0.2)), seconds=0.3)  # 0.3 of 0.4 s: a piece begins before the crop
    assert _spans(inside) == [(0.0, 0.2), (0.2, 0.2), (0.2, 0.3)]


def test_rows_have_kinds_for_what_lacks(bert: Path, times: Path) -> None:
    batch = _batch(
        ("talk.wav", 1.3), ("silent.wav", 0.0), ("unknown.wav", 0.0), ("nowhere.wav", 0.0), ("talk.wav", 9.0)
    )
    for context in ("crop", "recording"):
        pieces = _teacher(bert, times, context=context).pieces(batch, seconds=1.0)
        assert pieces.kinds.tolist() == [
            [SPECIAL, *[PIECE] * 4, SPECIAL],
            [SPECIAL, SPECIAL, *[PADDING] * 4],
            [PADDING] * 6,
            [PADDING] * 6,
            [SPECIAL, SPECIAL, *[PADDING] * 4],
        ]
        assert not pieces.values[pieces.kinds == PADDING].any()
        assert not pieces.spans[pieces.kinds != PIECE].any()
        empty = _reference(bert, "" if context == "crop" else "don't talking abc the man")[-1]
        torch.testing.assert_close(pieces.values[4, :2], empty[[0, -1]], rtol=0, atol=1e-6)
    nothing = _teacher(bert, times).pieces(_batch(("unknown.wav", 0.0)), seconds=1.0)
    assert nothing.kinds.tolist() == [[PADDING]]


def test_rows_do_not_influence_one_another(bert: Path, times: Path) -> None:
    crops = [("talk.wav", 0.0), ("mixed.wav", 0.0), ("talk.wav", 1.75), ("silent.wav", 0.0)]
    for context in ("crop", "recording"):
        teacher = _teacher(bert, times, context=context)
        together = teacher.pieces(_batch(*crops), seconds=2.0)
        for row, crop in enumerate(crops):
            alone = _teacher(bert, times, context=context).pieces(_batch(crop), seconds=2.0)
            num_slots = alone.kinds.shape[1]
            torch.testing.assert_close(together.values[row, :num_slots], alone.values[0], rtol=0, atol=1e-6)
            assert torch.equal(together.kinds[row, :num_slots], alone.kinds[0])
            assert torch.equal(together.spans[row, :num_slots], alone.spans[0])


def test_slots_as_published(bert: Path, times: Path) -> None:
    """A fixed length; [PAD] holds what the model makes of it, with the attention mask passed."""
    teacher = _teacher(bert, times, num_slots=9)
    pieces = teacher.pieces(_batch(("talk.wav", 1.3), ("unknown.wav", 0.0), ("talk.wav", 0.0)), seconds=3.0)
    assert pieces.kinds[0].tolist() == [SPECIAL, *[PIECE] * 5, SPECIAL, PADDING, PADDING]
    expected = _reference(bert, "abc the man", padding="max_length", max_length=9)[-1]
    torch.testing.assert_close(pieces.values[0], expected, rtol=0, atol=1e-6)
    assert pieces.values[0, 7].abs().sum() > 0.1
    assert pieces.kinds[1].tolist() == [PADDING] * 9
    assert not pieces.values[1].any()
    assert pieces.kinds[2].tolist() == [SPECIAL, *[PIECE] * 7, SPECIAL]  # ten pieces are cut off
    assert not pieces.spans[0, 6:].any()


def test_the_context_may_be_the_whole_recording(bert: Path, times: Path) -> None:
    teacher = _teacher(bert, times, context="recording")
    pieces = teacher.pieces(_batch(("talk.wav", 1.3), ("talk.wav", 1.75)), seconds=1.0)
    whole = _reference(bert, "don't talking abc the man")[-1]  # [CLS] don ' t talk ing a b c the man [SEP]
    torch.testing.assert_close(pieces.values[0], whole[[0, 6, 7, 8, 9, 11]], rtol=0, atol=1e-6)
    torch.testing.assert_close(pieces.values[1, :4], whole[[0, 9, 10, 11]], rtol=0, atol=1e-6)
    assert _spans(pieces, 0) == [(0.1, 0.2), (0.2, 0.3), (0.3, 0.4), (0.5, 0.8)]
    assert _spans(pieces, 1) == [(0.05, 0.35), (0.45, 0.75)]


def test_recordings_are_encoded_once_and_not_kept_without_end(
    bert: Path, times: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = _teacher(bert, times, context="recording")
    texts: list[str] = []
    encode = TextTeacher._encode

    def counted(self: TextTeacher, asked: list[list[str]]) -> Any:
        texts.extend(" ".join(words) for words in asked)
        return encode(self, asked)

    monkeypatch.setattr(TextTeacher, "_encode", counted)
    first = teacher.pieces(_batch(("talk.wav", 0.0), ("mixed.wav", 0.0), ("talk.wav", 0.5)), seconds=1.0)
    again = teacher.pieces(_batch(("talk.wav", 0.0), ("mixed.wav", 0.0), ("talk.wav", 0.5)), seconds=1.0)
    assert texts == ["don't talking abc the man", "The OK man,"]
    assert torch.equal(first.values, again.values)
    monkeypatch.setattr("recipes.text_teacher._KEPT_BYTES", 12 * DIM * 4)  # the slots of the longer one
    teacher.pieces(_batch(("mixed.wav", 0.0)), seconds=1.0)
    assert [key[1] for key in teacher._kept] == ["mixed.wav"]
    teacher.pieces(_batch(("silent.wav", 0.0)), seconds=1.0)
    teacher.pieces(_batch(("mixed.wav", 0.0)), seconds=1.0)
    assert [key[1] for key in teacher._kept] == ["silent.wav", "mixed.wav"]
    assert teacher._num_kept_bytes == 8 * DIM * 4
    teacher.pieces(_batch(("talk.wav", 0.0)), seconds=1.0)
    assert [key[1] for key in teacher._kept] == ["talk.wav"]
    assert texts[2:] == ["", "don't talking abc the man"]


def test_texts_in_capitals_are_shown_in_lower_case(times: Path, tmp_path: Path) -> None:
    cased = _model(tmp_path / "cased")
    _tokenizer(cased, lowercase=False)
    teacher = _teacher(cased, times)
    pieces = teacher.pieces(_batch(("talk.wav", 1.3), ("mixed.wav", 0.0)), seconds=1.5)
    torch.testing.assert_close(pieces.values[0, :7], _reference(cased, "abc the man")[-1], rtol=0, atol=1e-6)
    torch.testing.assert_close(pieces.values[1, :6], _reference(cased, "The OK man,")[-1], rtol=0, atol=1e-6)
    assert _spans(pieces, 1) == [(0.1, 0.4), (0.5, 0.7), (0.8, 1.1), (1.1, 1.1)]


def test_texts_that_are_too_long(bert: Path, times: Path) -> None:
    """20 words of three pieces, where there are 16 positions: 14 for pieces."""
    crop = _teacher(bert, times).pieces(_batch(("long.wav", 0.0)), seconds=20.0)
    assert crop.kinds[0].tolist() == [SPECIAL, *[PIECE] * 14, SPECIAL]
    teacher = _teacher(bert, times, context="recording")
    pieces = teacher.pieces(_batch(("long.wav", 0.0)), seconds=20.0)
    assert pieces.kinds[0].tolist() == [SPECIAL, *[PIECE] * 60, SPECIAL]
    thirds = [round(word + part / 6, 4) for word in range(20) for part in range(4)]
    assert _spans(pieces) == [(a, b) for a, b in itertools.pairwise(thirds) if b - a < 0.2]
    # It was halved three times: 2, 3, 2, 3, ... words by themselves.
    two, three = (_reference(bert, " ".join(["abc"] * count))[-1] for count in (2, 3))
    torch.testing.assert_close(pieces.values[0, 1:7], two[1:-1], rtol=0, atol=1e-6)
    torch.testing.assert_close(pieces.values[0, 7:16], three[1:-1], rtol=0, atol=1e-6)
    torch.testing.assert_close(pieces.values[0, -1], three[-1], rtol=0, atol=1e-6)
    later = teacher.pieces(_batch(("long.wav", 10.0)), seconds=2.0)
    assert _spans(later)[0] == (0.0, round(1 / 6, 4))
    torch.testing.assert_close(later.values[0, 1:7], two[1:-1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("layers", ["last", 0, 2, [0, 1, 2], [1, 2], "weighted"])
def test_layers(bert: Path, times: Path, layers: Any) -> None:
    teacher = _teacher(bert, times, layers=layers)
    states = _reference(bert, "the man")
    values = teacher.pieces(_batch(("talk.wav", 1.75)), seconds=1.0).values[0]
    assert teacher.feature_dim == DIM
    if layers == "weighted":
        assert teacher.num_mixed_layers == 3
        expected = torch.stack(states, dim=1)
    else:
        assert teacher.num_mixed_layers is None
        numbers = {"last": [2]}.get(layers, [layers]) if not isinstance(layers, list) else layers
        expected = torch.stack([states[number] for number in numbers]).mean(0)
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-6)
    assert not values.requires_grad


def test_it_is_frozen_and_computes_in_float32(bert: Path, times: Path) -> None:
    teacher = _teacher(bert, times)
    batch = _batch(("talk.wav", 0.0))
    expected = teacher.pieces(batch, seconds=3.0).values
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(teacher.pieces(batch, seconds=3.0).values, expected)
    weight = torch.ones(DIM, requires_grad=True)
    (expected * weight).sum().backward()  # inference tensors would refuse
    assert not any(parameter.requires_grad for parameter in teacher._network.parameters())
    assert teacher.version.startswith("small, weights ")


@pytest.mark.parametrize("kind", ["Electra", "Roberta", "DistilBert"])
def test_other_families(kind: str, times: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"embedding_size": 4} if kind == "Electra" else {}
    if kind == "DistilBert":
        changes = {"dim": DIM, "n_layers": NUM_LAYERS, "n_heads": 2, "hidden_dim": 16}
    folder = _model(tmp_path / "model", kind, **changes)
    _tokenizer(folder)
    teacher = _teacher(folder, times, layers="weighted", context="recording")
    pieces = teacher.pieces(_batch(("talk.wav", 0.0), ("long.wav", 0.0)), seconds=20.0)
    tokenizing = {"return_token_type_ids": False} if kind == "DistilBert" else {}
    expected = torch.stack(_reference(folder, "don't talking abc the man", **tokenizing), dim=1)
    torch.testing.assert_close(pieces.values[0, :12], expected, rtol=0, atol=1e-6)
    assert (pieces.kinds[1] == PIECE).sum() == 60


def test_a_bert_for_masked_words_has_no_pooler(bert: Path, times: Path, tmp_path: Path) -> None:
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.from_pretrained(bert)
    model = transformers.BertForMaskedLM(config)
    model.save_pretrained(tmp_path / "masked")
    _tokenizer(tmp_path / "masked")
    pieces = _teacher(tmp_path / "masked", times).pieces(_batch(("talk.wav", 1.75)), seconds=1.0)
    torch.testing.assert_close(pieces.values[0], _reference(tmp_path / "masked", "the man")[-1], rtol=0, atol=1e-6)


# What cannot be


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"layers": "nine"}, r"layers='nine' is neither \"last\" nor \"weighted\""),
        ({"layers": -1}, "layers=-1 is neither"),
        ({"layers": []}, r"layers=\(\) is neither"),
        ({"layers": True}, "layers=True is neither"),
        ({"layers": [0, "last"]}, "is neither"),
        ({"layers": 3}, "layers=3: .* has hidden states 0 to 2"),
        ({"layers": [0, 3]}, "has hidden states 0 to 2"),
        ({"context": "file"}, "context='file' is not one of 'crop', 'recording'"),
        ({"context": "recording", "num_slots": 12}, "num_slots=12 goes with context='crop'"),
        ({"num_slots": 2}, "num_slots=2 must be 3 or more"),
        ({"num_slots": 17}, "num_slots=17: .* has positions for 16"),
        ({"source": "nowhere"}, "nowhere holds no model.safetensors"),
        ({"words": "nowhere.jsonl"}, "nowhere.jsonl is no file of word times"),
    ],
)
def test_settings_that_cannot_be(bert: Path, times: Path, settings: dict[str, Any], reason: str) -> None:
    values = {"type": "text_teacher", "source": str(bert), "words": str(times)} | settings
    with pytest.raises(ValueError, match=reason) as raised:
        build(from_dict(values))
    assert "\n" not in str(raised.value)


def test_settings_come_back(bert: Path) -> None:
    config = TextTeacherConfig(source="a", words="b", layers=[0, 2], num_slots=149)
    assert from_dict(to_dict(config)) == config


def test_folders_that_are_no_text_models(bert: Path, times: Path, tmp_path: Path) -> None:
    import transformers

    tiny = {"vocab_size": len(PIECES), "d_model": 8, "d_ff": 8, "d_kv": 4, "num_layers": 1, "num_heads": 2}
    transformers.T5Model(transformers.T5Config(**tiny)).save_pretrained(tmp_path / "t5")
    _tokenizer(tmp_path / "t5")
    with pytest.raises(ValueError, match="kind 't5', which is no encoder of text"):
        _teacher(tmp_path / "t5", times)
    _model(tmp_path / "few", vocab_size=5)
    _tokenizer(tmp_path / "few")
    with pytest.raises(ValueError, match=f"its tokenizer has {len(PIECES)} pieces, its model knows 5"):
        _teacher(tmp_path / "few", times)
    with pytest.raises(ValueError, match=r"it holds no tokenizer: none of tokenizer\.json, vocab\.txt"):
        _teacher(_model(tmp_path / "without"), times)


# Before the first step


@pytest.fixture
def corpus(tmp_path: Path) -> tuple[Path, SpeechData]:
    rng = np.random.default_rng(0)
    for name, seconds in (("train/a.wav", 3), ("train/b.wav", 1), ("dev/c.wav", 1)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        soundfile.write(tmp_path / name, 0.1 * rng.standard_normal(seconds * RATE_HZ), RATE_HZ)
    settings = {
        "train_dir": str(tmp_path / "train"),
        "dev_dir": str(tmp_path / "dev"),
        "crop_samples": 8000,
        "dev_crop_samples": 8000,
    }
    return tmp_path / "words.jsonl", SpeechData(settings, sample_rate_hz=RATE_HZ, seed=0)


def _entry(path: str, seconds: float, **changes: Any) -> str:
    values = {"words": _words(("the", 0.1, 0.3)), "score": -0.1} | changes
    return Entry(path, round(seconds * RATE_HZ), RATE_HZ, "by hand", None, **values).to_line() + "\n"


def test_data_is_checked(bert: Path, corpus: tuple[Path, SpeechData]) -> None:
    file, data = corpus
    file.write_text(_entry("a.wav", 3))
    _teacher(bert, file).check(data)  # 3 of 4 seconds
    file.write_text(_entry("b.wav", 1) + _entry("c.wav", 1))  # the latter is for validation, which asks no teacher
    with pytest.warns(RuntimeWarning, match=r"has words for 25.0% of the speech of data"):
        _teacher(bert, file).check(data)
    file.write_text(_entry("d.wav", 1))
    with pytest.raises(ValueError, match="names none of the recordings of data"):
        _teacher(bert, file).check(data)
    file.write_text(
        "".join(_entry(path, n, words=(), reason="it has no text") for path, n in (("a.wav", 3), ("b.wav", 1)))
    )
    with pytest.raises(ValueError, match="has a reason instead of words for every recording"):
        _teacher(bert, file).check(data)
    file.write_text(_entry("a.wav", 3) + _entry("b.wav", math.pi))
    with pytest.raises(ValueError, match=r"is stale: its line for b\.wav"):
        _teacher(bert, file).check(data)
