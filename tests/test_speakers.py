"""The voice encoder of Resemblyzer, with random weights in its place: what it hears, and what it refuses."""

import importlib.metadata
from pathlib import Path

import librosa
import numpy as np
import pytest
import torch
from torch import nn

from codec.evaluation import UsageError, load_scorer
from codec.evaluation.scorers import SpeakerScorer, load_embedder
from codec.evaluation.speakers import ResemblyzerEmbedder, _mels, part_starts
from codec.testing import speech_like


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "random.pt"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        lstm, linear = nn.LSTM(40, 256, 3, batch_first=True), nn.Linear(256, 256)
    # Several times as large as usual, so that embeddings depend on what is heard.
    state = {f"lstm.{k}": 4 * v for k, v in lstm.state_dict().items()} | {"similarity_weight": torch.ones(1)}
    state |= {f"linear.{k}": v for k, v in linear.state_dict().items()}
    torch.save({"step": 1, "model_state": state}, path)
    return path


def by_hand(weights: Path, audio: np.ndarray) -> np.ndarray:
    """What the package computes of 16 kHz that is loud enough: mels by librosa, part by part."""
    state = torch.load(weights, weights_only=True)["model_state"]
    lstm = nn.LSTM(40, 256, 3, batch_first=True)
    lstm.load_state_dict({k[5:]: v for k, v in state.items() if k.startswith("lstm.")})
    starts = part_starts(len(audio))
    padded = np.pad(audio, (0, max(0, (starts[-1] + 160) * 160 - len(audio))))
    mels = librosa.feature.melspectrogram(y=padded, sr=16000, n_fft=400, hop_length=160, n_mels=40).T
    mean = np.zeros(256)
    for start in starts:
        with torch.inference_mode():
            hidden = lstm(torch.from_numpy(mels[start : start + 160].astype(np.float32))[None])[1][0][-1, 0]
            raw = torch.relu(state["linear.weight"] @ hidden + state["linear.bias"])
        mean += (raw / raw.norm()).numpy() / len(starts)
    unit: np.ndarray = mean / np.linalg.norm(mean)
    return unit


@pytest.mark.parametrize("num_samples", [1, 3000, 25600, 40000])
def test_embeddings_are_computed_as_published(weights: Path, num_samples: int) -> None:
    audio = speech_like(num_samples)
    found = ResemblyzerEmbedder(weights).embed(audio, 16000)
    assert found.dtype == np.float32
    assert found.shape == (256,)
    np.testing.assert_allclose(found, by_hand(weights, audio), rtol=0, atol=2e-6)  # sums of float32


def test_parts_cover_a_recording() -> None:
    """Source: `compute_partial_slices` of Resemblyzer 0.1.4, run by hand for these lengths."""
    assert [part_starts(n) for n in (1, 25600, 34000, 41000, 48000)] == [[0], [0], [0, 77], [0, 77], [0, 77, 154]]
    assert part_starts(60000) == [0, 77, 154, 231]
    assert _mels(torch.zeros(100), 160, torch.zeros(201, 40)).shape == (161, 40)


def test_softer_recordings_and_other_rates_have_the_same_voice(weights: Path) -> None:
    embedder, audio = ResemblyzerEmbedder(weights), speech_like(30000)
    voice = embedder.embed(audio, 16000)
    soft = [embedder.embed(factor * audio, 16000) for factor in (1e-2, 1e-3)]
    np.testing.assert_allclose(soft[0], soft[1], rtol=0, atol=1e-5)
    assert np.isfinite(embedder.embed(np.zeros(1000, np.float32), 16000)).all()
    other = embedder.embed(speech_like(90000, rate_hz=48000), 48000)
    assert float(voice @ other) > 0.999


def test_it_is_a_scorer(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = SpeakerScorer(ResemblyzerEmbedder(weights))
    assert scorer.version == f"weights {weights}"
    audio, noise = speech_like(20000), np.random.default_rng(0).uniform(-0.5, 0.5, 20000).astype(np.float32)
    assert scorer.score(audio, audio, 16000, "")["speaker_similarity"] == pytest.approx(1, abs=1e-6)
    similarity = scorer.score(audio, noise, 16000, "")["speaker_similarity"]
    assert similarity == pytest.approx(float(scorer.embed(audio, 16000) @ scorer.embed(noise, 16000)), abs=1e-6)
    assert similarity < 0.9999

    class Package:
        version = "0.1.4"

        def locate_file(self, name: str) -> Path:
            assert name == "resemblyzer/pretrained.pt"
            return weights

    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Package())
    load_scorer.cache_clear()
    for spec in ("resemblyzer", "speaker=resemblyzer"):
        loaded = load_scorer(spec)
        assert isinstance(loaded, SpeakerScorer)
        assert loaded.version == "resemblyzer 0.1.4, its GE2E encoder, pauses kept"
        np.testing.assert_array_equal(loaded.embed(audio, 16000), scorer.embed(audio, 16000))
    load_scorer.cache_clear()


def test_what_is_no_embedder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(UsageError, match="pip install --no-deps resemblyzer"):
        load_embedder("resemblyzer")
    (tmp_path / "text").write_text("no checkpoint")
    torch.save({"model_state": {"lstm.weight_ih_l0": torch.zeros(2, 2)}}, tmp_path / "other")
    for name in ("text", "other"):
        with pytest.raises(ValueError, match="is no checkpoint of Resemblyzer's voice encoder"):
            ResemblyzerEmbedder(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        ResemblyzerEmbedder(tmp_path / "nothing")
    with pytest.raises(UsageError, match="lacks one of name, version and embed"):
        load_embedder("test_speakers:Path")
