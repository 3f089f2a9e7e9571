"""Scorers: the protocol, words and their errors, and adapters of `transformers` models that tests make themselves."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from codec.evaluation import Scorer, UsageError, load_scorer
from codec.evaluation.scorers import SpeakerScorer, WordErrorScorer, edits, words
from codec.testing import speech_like


class Loudness:
    """A scorer of one's own; also used by other tests."""

    name = "loudness"
    version = "1"

    def __init__(self, factor: str = "1") -> None:
        self._factor = float(factor)

    def score(self, reference: np.ndarray, decoded: np.ndarray, rate_hz: int, text: str) -> dict[str, float]:
        return {"loudness": float(self._factor * np.abs(decoded).mean())}


class NotAScorer:
    name = "nothing"


def test_scorers_are_found_by_name() -> None:
    scorer = load_scorer("test_evaluation_scorers:Loudness=3")
    assert isinstance(scorer, Scorer)
    assert scorer.score(np.ones(4), np.ones(4), 16000, "") == {"loudness": 3.0}
    assert load_scorer("test_evaluation_scorers:Loudness").score(np.ones(4), np.ones(4), 8000, "") == {"loudness": 1.0}
    with pytest.raises(UsageError, match="lacks one of name, version and score"):
        load_scorer("test_evaluation_scorers:NotAScorer")
    with pytest.raises(UsageError, match="cannot be imported"):
        load_scorer("test_evaluation_scorers:Missing")


def test_words_have_no_case_and_no_punctuation() -> None:
    assert words("Don't STOP -- it's “fine”, says she.") == ["don't", "stop", "it's", "fine", "says", "she"]
    assert words("d\u2019accord l'été 1984") == ["d'accord", "l'été", "1984"]
    assert words(" -- ") == []


def test_edits() -> None:
    assert edits(["a", "b", "c"], ["a", "b", "c"]) == 0
    assert edits(["a", "b", "c"], []) == 3
    assert edits([], ["a", "b"]) == 2
    assert edits(["the", "cat", "sat"], ["a", "cat", "that", "sat"]) == 2


@given(*[st.lists(st.sampled_from("abc"), max_size=8)] * 3)
def test_edits_are_a_distance(a: list[str], b: list[str], c: list[str]) -> None:
    assert edits(a, b) == edits(b, a)
    assert (edits(a, b) == 0) == (a == b)
    assert edits(a, c) <= edits(a, b) + edits(b, c)
    assert abs(len(a) - len(b)) <= edits(a, b) <= max(len(a), len(b))


_SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "conv_dim": (8, 8),
    "conv_stride": (10, 8),
    "conv_kernel": (10, 8),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}


def _extractor(folder: Path) -> None:
    from transformers import Wav2Vec2FeatureExtractor

    Wav2Vec2FeatureExtractor(feature_size=1, sampling_rate=16000, do_normalize=True).save_pretrained(folder)


@pytest.fixture(scope="module")
def recogniser(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wav2vec2 CTC model of random weights, in the format that is published."""
    pytest.importorskip("transformers")
    import torch
    from transformers import Wav2Vec2Config, Wav2Vec2CTCTokenizer, Wav2Vec2ForCTC

    folder = tmp_path_factory.mktemp("ctc") / "small"
    folder.mkdir()
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", "|", *"ABCDEFGH"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    Wav2Vec2CTCTokenizer(str(folder / "vocab.json")).save_pretrained(folder)
    _extractor(folder)
    torch.manual_seed(0)
    model = Wav2Vec2ForCTC(Wav2Vec2Config(vocab_size=len(vocabulary), pad_token_id=0, **_SMALL))
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def verifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A WavLM x-vector model of random weights."""
    pytest.importorskip("transformers")
    import torch
    from transformers import WavLMConfig, WavLMForXVector

    folder = tmp_path_factory.mktemp("xvector") / "small-sv"
    torch.manual_seed(0)
    config = WavLMConfig(tdnn_dim=(8, 8), tdnn_dilation=(1, 1), tdnn_kernel=(3, 1), xvector_output_dim=8, **_SMALL)
    WavLMForXVector(config).save_pretrained(folder)
    _extractor(folder)
    return folder


def test_word_errors_of_what_a_recogniser_hears(recogniser: Path) -> None:
    scorer = load_scorer(f"wer={recogniser}")
    assert isinstance(scorer, WordErrorScorer)
    audio = speech_like(16000)
    heard = scorer.transcribe(audio, 16000)
    assert words(heard)
    assert scorer.score(audio, audio, 16000, heard) == {"wer": 0.0, "wer_weight": len(words(heard))}
    wrong = scorer.score(audio, audio, 16000, f"{heard} zzz zzz")
    assert wrong == {"wer": 2 / (len(words(heard)) + 2), "wer_weight": len(words(heard)) + 2}
    unknown = scorer.score(audio, audio, 16000, "")
    assert math.isnan(unknown["wer"])
    assert unknown["wer_weight"] == 0
    assert scorer.version.startswith("small, weights ")
    assert "transformers" in scorer.version


def test_speakers_are_alike_where_audio_is(verifier: Path) -> None:
    scorer = load_scorer(f"speaker={verifier}")
    assert isinstance(scorer, SpeakerScorer)
    audio, other = speech_like(16000), np.random.default_rng(0).standard_normal(16000).astype(np.float32)
    assert scorer.score(audio, audio, 16000, "")["speaker_similarity"] == pytest.approx(1, abs=1e-5)
    similarity = scorer.score(audio, other, 16000, "")["speaker_similarity"]
    assert -1 <= similarity < 0.9999
    assert scorer.score(other, audio, 16000, "")["speaker_similarity"] == pytest.approx(similarity, abs=1e-5)
    half = scorer.score(speech_like(24000, rate_hz=24000), speech_like(24000, rate_hz=24000), 24000, "")
    assert half["speaker_similarity"] == pytest.approx(1, abs=1e-5)


def test_folders_that_hold_no_such_model_are_one_line(recogniser: Path, verifier: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no model\.safetensors"):
        load_scorer(f"wer={tmp_path}")
    for spec in (f"wer={verifier}", f"speaker={recogniser}"):
        with pytest.raises(ValueError, match="cannot be loaded") as caught:
            load_scorer(spec)
        assert "\n" not in str(caught.value)
    (tmp_path / "model.safetensors").write_bytes(b"none")
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_scorer(f"wer={tmp_path}")
