"""What layers of a speech model know of labels: canonical correlation, clusters, and the program for them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from codec.evaluation.layers import analyze_layers, cluster_pnmi, pwcca, pwcca_with_labels
from codec.testing import speech_like

ROOT = Path(__file__).resolve().parent.parent


def noise(num_frames: int, dim: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((num_frames, dim))


def test_correlation_is_one_for_what_is_the_same_but_turned() -> None:
    features = noise(500, 6)
    turned = features @ noise(6, 6, seed=1) + 3
    assert pwcca(features, turned) == pytest.approx(1, abs=0.02)  # what holds under 1 % of the variance is left out
    assert pwcca(features, features) == pytest.approx(1, abs=1e-9)
    assert pwcca(features.astype(np.float32), 1000 * features) == pytest.approx(1, abs=1e-5)


def test_correlation_of_noise_is_as_high_as_chance_makes_it() -> None:
    assert pwcca(noise(20_000, 4), noise(20_000, 4, seed=1)) < 0.03
    assert 0.2 < pwcca(noise(60, 4), noise(60, 4, seed=1)) < 0.6  # few frames


def test_directions_weigh_by_what_they_account_for() -> None:
    # Two directions, one shared with the others and one not: by hand, the weights are their shares of absolute size.
    shared, own = noise(40_000, 1), noise(40_000, 1, seed=1)
    for size in (0.5, 1.0, 3.0):
        features = np.concatenate([size * shared, own], axis=1)
        others = np.concatenate([shared, noise(40_000, 1, seed=2)], axis=1)
        assert pwcca(features, others) == pytest.approx(size / (1 + size), abs=0.03)


def test_correlation_of_one_label() -> None:
    # One dim that is the label itself, among two labels: correlation 1. A dim that knows half of it: its correlation.
    labels = np.arange(4000) % 2
    assert pwcca_with_labels(labels[:, None].astype(float), labels) == pytest.approx(1)
    rough = labels[:, None] + noise(4000, 1)
    assert pwcca_with_labels(rough, labels) == pytest.approx(np.corrcoef(rough[:, 0], labels)[0, 1], abs=1e-6)
    silent = np.concatenate([labels, np.full(500, -1)])
    assert pwcca_with_labels(np.concatenate([rough, 9 * noise(500, 1)]), silent) == pwcca_with_labels(rough, labels)


def test_mistakes_are_told() -> None:
    for features, others in ((noise(4, 4), noise(4, 1)), (noise(9, 2), noise(8, 2))):
        with pytest.raises(ValueError, match="frames are too few"):
            pwcca(features, others)
    with pytest.raises(ValueError, match="all frames are alike"):
        pwcca(np.ones((50, 2)), noise(50, 2))
    with pytest.raises(ValueError, match="5 labelled frames are too few for 9 clusters"):
        cluster_pnmi(noise(6, 2), np.array([0, 1, 0, 1, 0, -1]), num_clusters=9)


def test_the_layer_that_knows_most_is_found() -> None:
    labels = np.random.default_rng(3).integers(-1, 5, 3000)
    signs = np.where(labels[:, None] >= 0, np.eye(8)[labels], 0)
    hidden = np.stack([noise(3000, 8, seed=i) + gain * signs for i, gain in enumerate((0.0, 2.0, 6.0, 1.0))])
    layers = analyze_layers(hidden.astype(np.float32), labels, num_clusters=10)
    for name in ("pwcca", "pnmi"):
        values = [getattr(layer, name) for layer in layers]
        assert values[0] < values[3] < values[1] < values[2]
        assert values[0] < 0.1
    assert layers[2].pnmi > 0.9
    assert [layer.layer for layer in layers] == [0, 1, 2, 3]
    assert layers == analyze_layers(hidden.astype(np.float32), labels, num_clusters=10)


def test_a_model_from_its_folder(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    import torch

    torch.manual_seed(0)
    config = transformers.HubertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, conv_dim=(8, 8),
        conv_stride=(10, 8), conv_kernel=(10, 8), num_feat_extract_layers=2, num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    transformers.HubertModel(config).save_pretrained(tmp_path / "small")
    transformers.Wav2Vec2FeatureExtractor(sampling_rate=16000).save_pretrained(tmp_path / "small")
    (tmp_path / "data").mkdir()
    lines = []
    for name in ("a", "b"):
        soundfile.write(tmp_path / "data" / f"{name}.wav", speech_like(16000, seed=len(lines)), 16000)
        lines += [f"{name} 1 {i / 10} 0.1 {'xyz'[i % 3]}" for i in range(10)]
    (tmp_path / "all.ctm").write_text("\n".join(lines))

    def analyze(labels: Path, *more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "tools.analyze_layers", tmp_path / "small", tmp_path / "data", labels, *more]
        return subprocess.run(
            list(map(str, command)),
            cwd=ROOT,
            env=os.environ | {"PYTHONWARNINGS": "ignore"},
            capture_output=True,
            text=True,
            check=False,
        )

    done = analyze(tmp_path / "all.ctm", "--max-frames", "300", "--num-clusters", "4", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["model"].startswith("small")
    assert told["num_frames"] == 300
    assert [layer["layer"] for layer in told["layers"]] == [0, 1, 2]
    assert all(0 <= layer["pwcca"] <= 1 and 0 <= layer["pnmi"] <= 1 for layer in told["layers"])
    (tmp_path / "other.ctm").write_text("c 1 0 1 x\n")
    wrong = analyze(tmp_path / "other.ctm")
    assert wrong.returncode == 1
    assert wrong.stderr.startswith("error: there are labels for none of 2 recordings")
    assert wrong.stderr.count("\n") == 1
