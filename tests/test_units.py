"""Speech units: runs, k-means, sources, folders, and that the units of a recording depend on nothing else."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from speech_models import save_model
from torch import Tensor

from codec.config import build, from_dict, to_dict
from codec.evaluation.unit_distance import edit_distance, runs, unit_distance
from codec.pretrained import save
from codec.quantizers.product import GumbelVQConfig
from codec.testing import speech_like, tiny_codec
from codec.units import (
    Assigner,
    Centroids,
    PredictiveEncoder,
    SpeechUnits,
    UnitHead,
    codec_source,
    deduplicate,
    expand,
    kmeans,
    load_units,
    log_mel_source,
    speech_model_source,
    train_units,
)
from codec.units.assigners import CentroidsConfig, PredictiveEncoderConfig, UnitHeadConfig
from codec.units.speech_units import _drawn_evenly

UNITS = st.lists(st.integers(0, 3), max_size=40)


def speech(num_samples: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(speech_like(num_samples, seed=seed))


def noise(num_rows: int, dim: int, seed: int = 0) -> Tensor:
    return torch.randn(num_rows, dim, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def mel_units() -> SpeechUnits:
    return train_units(log_mel_source(), [speech(24000), speech(16000, 1)], 6)


# Runs


@given(UNITS)
def test_runs_and_their_durations_hold_all(units: list[int]) -> None:
    given_units = torch.tensor(units, dtype=torch.int64)
    kept, durations = deduplicate(given_units)
    assert torch.equal(expand(kept, durations), given_units)
    assert not (kept[1:] == kept[:-1]).any()
    assert bool((durations > 0).all())
    assert runs(np.array(units, np.int64)).tolist() == kept.tolist()


def test_what_are_no_runs_is_refused() -> None:
    with pytest.raises(ValueError, match="int64"):
        deduplicate(torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="cut the row"):
        deduplicate(torch.tensor([1, -1]))
    with pytest.raises(ValueError, match="both be"):
        expand(torch.tensor([1, 2]), torch.tensor([1]))
    with pytest.raises(ValueError, match="negative"):
        expand(torch.tensor([1]), torch.tensor([-1]))


# Edits


def edits_by_recursion(first: list[int], second: list[int]) -> int:
    if not first or not second:
        return len(first) + len(second)
    if first[0] == second[0]:
        return edits_by_recursion(first[1:], second[1:])
    return 1 + min(
        edits_by_recursion(first[1:], second),
        edits_by_recursion(first, second[1:]),
        edits_by_recursion(first[1:], second[1:]),
    )


@given(st.lists(st.integers(0, 2), max_size=6), st.lists(st.integers(0, 2), max_size=6))
def test_edits_are_the_fewest(first: list[int], second: list[int]) -> None:
    assert edit_distance(np.array(first, int), np.array(second, int)) == edits_by_recursion(first, second)


def test_distances_are_over_frames_and_over_runs() -> None:
    clean, distorted = np.array([1, 1, 2, 2, 3, 3, 3, 3]), np.array([1, 2, 2, 2, 2, 4])
    told = unit_distance([(clean, distorted), (clean, clean)])
    assert told.per_frame.mean == pytest.approx((1 / 8 + 0) / 2)
    assert told.per_unit.mean == pytest.approx((1 / 3 + 0) / 2)
    with pytest.raises(ValueError, match="without frames"):
        unit_distance([(clean[:0], clean)])


# k-means


def test_clusters_that_are_far_apart_are_found() -> None:
    centres = 20 * torch.eye(5)
    points = centres.repeat_interleave(40, 0) + 0.1 * noise(200, 5)
    found = kmeans(points[torch.randperm(200, generator=torch.Generator().manual_seed(1))], 5)
    order = found.argmax(1).argsort()
    means = points.view(5, 40, 5).mean(1)
    assert torch.allclose(found[order], means, atol=1e-4)  # sums in another order


def test_no_cluster_is_left_empty_and_nothing_is_drawn_twice() -> None:
    points = torch.cat([torch.zeros(500, 1), torch.tensor([[1.0], [2.0], [3.0]])])
    assert kmeans(points, 4).flatten().sort().values.tolist() == [0.0, 1.0, 2.0, 3.0]
    with pytest.raises(ValueError, match="only 4 distinct points for 5 clusters"):
        kmeans(points, 5)


def test_a_cluster_that_loses_all_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    points = torch.tensor([[100.0], [101.0], [109.0], [110.0]])
    monkeypatch.setattr("codec.units.clustering._first_centroids", lambda *_: torch.tensor([[105.0], [500.0]]))
    assert kmeans(points, 2).flatten().sort().values.tolist() == [100.5, 109.5]


def test_centroids_depend_on_the_seed_alone(num_threads: int) -> None:
    points = noise(3000, 8)
    first = kmeans(points, 12, seed=3)
    assert torch.equal(first, kmeans(points, 12, seed=3))
    assert not torch.equal(first, kmeans(points, 12, seed=4))
    # Later iterations only improve it.
    errors = [
        float((torch.cdist(points, kmeans(points, 12, seed=3, num_iterations=n)).min(1).values ** 2).mean())
        for n in (1, 2, 8)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.97 * errors[0]


def test_points_that_cannot_be_are_refused() -> None:
    for points in (torch.zeros(3), torch.tensor([[torch.nan]])):
        with pytest.raises(ValueError, match="finite"):
            kmeans(points, 1)
    with pytest.raises(ValueError, match="only 0 distinct"):
        kmeans(torch.zeros(0, 2), 1)


def test_frames_are_drawn_evenly_in_their_order() -> None:
    parts = [torch.arange(100 * i, 100 * (i + 1))[:, None].float() for i in range(50)]
    drawn = _drawn_evenly(parts, 1000, 0)[:, 0]
    assert len(drawn) == 1000
    assert bool((drawn[1:] > drawn[:-1]).all())
    halves = float((drawn < 2500).float().mean())
    assert 0.42 < halves < 0.58  # five standard deviations
    assert torch.equal(_drawn_evenly(parts, 5000, 0)[:, 0], torch.arange(5000.0))
    with pytest.raises(ValueError, match="no recordings"):
        _drawn_evenly([], 5, 0)


# Sources


def test_every_source_has_the_frames_of_its_stride(tmp_path: Path) -> None:
    save(tiny_codec(), tmp_path / "tiny", name="tiny@1", dtype="float32")
    sources = [
        speech_model_source(str(save_model(tmp_path / "hubert")), 2),
        codec_source(str(tmp_path / "tiny")),
        codec_source(str(tmp_path / "tiny"), num_quantizers=1),
        log_mel_source(num_bands=20),
    ]
    for source in sources:
        for num_samples in (1, source.stride_samples, source.stride_samples + 1, 3 * source.stride_samples):
            features = source.features(speech(num_samples))
            assert features.shape == (-(-num_samples // source.stride_samples), source.feature_dim)
            assert features.dtype == torch.float32
        assert source.features(torch.zeros(0)).shape == (0, source.feature_dim)
        again = build(from_dict(to_dict(source.config)))
        assert torch.equal(again.features(speech(4000)), source.features(speech(4000)))


def test_features_of_a_codec_are_its_latents_and_of_its_rows(tmp_path: Path) -> None:
    codec = tiny_codec()
    save(codec, tmp_path / "tiny", name="tiny@1", dtype="float32")
    audio = speech(1000)
    with torch.no_grad():
        latents = codec.analyze(audio[None, None])[0].T[:16]  # as many as there are codes
        rows = codec.quantizer.decode(codec.encode(audio[None, None], num_quantizers=2).codes)[0].T
    assert torch.equal(codec_source(str(tmp_path / "tiny")).features(audio), latents)
    assert torch.equal(codec_source(str(tmp_path / "tiny"), num_quantizers=2).features(audio), rows)
    with pytest.raises(ValueError, match="num_quantizers=4 is not one of"):
        codec_source(str(tmp_path / "tiny"), num_quantizers=4)


def test_log_mels_tell_tones_apart() -> None:
    # A tone is loudest in the band that its frequency lies in, against noise everywhere.
    source = log_mel_source(num_bands=40)
    time = torch.arange(32000) / 16000
    tones = torch.cat([torch.sin(2 * torch.pi * hz * time[:16000]) for hz in (300.0, 1500.0, 4000.0)])
    features = source.features(tones + 0.01 * noise(48000, 1)[:, 0])
    bands = features.view(150, 2, 40).mean(1)
    loudest = [int(bands[start + 5 : start + 45].mean(0).argmax()) for start in (0, 50, 100)]
    assert loudest == sorted(loudest)
    assert len(set(loudest)) == 3
    mels = [1127 * np.log1p(hz / 700) for hz in (20, 300, 1500, 4000, 8000)]
    expected = [round((mel - mels[0]) / (mels[4] - mels[0]) * 41) - 1 for mel in mels[1:4]]
    assert loudest == expected


def test_long_recordings_are_heard_in_pieces(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    save(tiny_codec(), tmp_path / "tiny", name="tiny@1", dtype="float32")
    source = codec_source(str(tmp_path / "tiny"))
    audio = speech(64 * 1000 + 7)
    whole = source.features(audio)
    heard = []
    hear = source._hear

    def noted(piece: Tensor) -> Tensor:
        heard.append(len(piece))
        return hear(piece)

    monkeypatch.setattr(source, "_hear", noted)
    monkeypatch.setattr("codec.units.sources._PIECE_SECONDS", 1)  # 250 frames
    monkeypatch.setattr("codec.units.sources._CONTEXT_SECONDS", 0.4)
    # The context is longer than what the codec hears, so pieces are as the whole.
    assert torch.equal(source.features(audio), whole)
    assert heard == [350 * 64, 450 * 64, 450 * 64, 350 * 64 + 7]


def test_audio_that_cannot_be_heard_is_refused(mel_units: SpeechUnits) -> None:
    with pytest.raises(ValueError, match="floating-point"):
        mel_units.source.features(torch.zeros(5, dtype=torch.int64))
    with pytest.raises(ValueError, match="NaN"):
        mel_units.encode(torch.full((1, 400), torch.nan))
    with pytest.raises(ValueError, match=r"must be \[B, T\]"):
        mel_units.encode(torch.zeros(400))
    with pytest.raises(ValueError, match=r"num_samples must be 1 numbers in 0\.\.400"):
        mel_units.encode(torch.zeros(1, 400), torch.tensor([401]))


# Units


def head_of(dim: int, num_units: int = 9, **changes: Any) -> UnitHead:
    torch.manual_seed(0)
    head = UnitHead(UnitHeadConfig(feature_dim=dim, num_units=num_units, width=8, **changes))
    torch.nn.init.normal_(head.scores.weight)
    return head


def predictive_of(dim: int) -> PredictiveEncoder:
    torch.manual_seed(0)
    quantizer = GumbelVQConfig(latent_dim=8, num_groups=2, codebook_size=5)
    return PredictiveEncoder(PredictiveEncoderConfig(feature_dim=dim, quantizer=quantizer))


@pytest.mark.parametrize("kind", ["centroids", "head", "predictive"])
def test_units_depend_on_their_recording_alone(kind: str, mel_units: SpeechUnits, num_threads: int) -> None:
    source = mel_units.source
    made: dict[str, Callable[[int], Assigner]] = {"head": head_of, "predictive": predictive_of}
    units = mel_units if kind == "centroids" else SpeechUnits(source, made[kind](source.feature_dim))
    lengths = [16000, 7001, 0, 3200, 16000]
    batch = torch.zeros(5, 16000)
    alone = []
    for row, length in enumerate(lengths):
        batch[row, :length] = speech(16000, seed=row)[:length]
        alone.append(units.encode(batch[row : row + 1, :length])[0][0])
    batch[1, 7001:] = 0.7  # what stands past the end is not heard
    ids, num_frames = units.encode(batch, torch.tensor(lengths))
    assert num_frames.tolist() == [50, 22, 0, 10, 50]
    for row, count in enumerate(num_frames.tolist()):
        assert torch.equal(ids[row, :count], alone[row])
        assert bool((ids[row, count:] == -1).all())
    found = ids[ids >= 0]
    assert int(found.max()) < units.num_units
    assert len(found.unique()) > 2


def test_units_are_those_of_the_nearest_centroid(mel_units: SpeechUnits) -> None:
    audio = speech(9000, seed=5)
    assigner = mel_units.assigner
    assert isinstance(assigner, Centroids)
    points = (mel_units.source.features(audio) - assigner.mean) / assigner.scale
    nearest = torch.cdist(points.double(), assigner.centroids.double()).argmin(1)
    assert torch.equal(mel_units.encode(audio[None])[0][0], nearest)


def test_features_are_standardized_or_not() -> None:
    source, recordings = log_mel_source(num_bands=5), [speech(16000), speech(16000, 1)]
    features = torch.cat([source.features(audio) for audio in recordings])
    scaled = train_units(source, recordings, 3)
    assert torch.allclose(scaled.assigner.standardized(features).mean(0), torch.zeros(10), atol=1e-5)
    assert torch.allclose(scaled.assigner.standardized(features).std(0, correction=0), torch.ones(10), atol=1e-4)
    plain = train_units(source, recordings, 3, standardize=False)
    assert sorted(plain.assigner.state_dict()) == ["centroids"]
    assert torch.equal(plain.assigner.state_dict()["centroids"], kmeans(features, 3))
    # A dim that never varies is no reason to divide by nothing.
    still = Centroids(CentroidsConfig(feature_dim=2, num_units=1))
    still.set_statistics(torch.tensor([[1.0, 5.0], [3.0, 5.0]]))
    assert still.standardized(torch.tensor([[3.0, 5.0]])).tolist() == [[1.0, 0.0]]


def test_units_are_trained_alike_from_the_same_recordings() -> None:
    source, recordings = log_mel_source(num_bands=5), [speech(16000), speech(16000, 1)]
    first, again = (train_units(source, recordings, 4, max_frames=60, seed=2) for _ in range(2))
    for key, value in first.assigner.state_dict().items():
        assert torch.equal(value, again.assigner.state_dict()[key])
    with pytest.raises(ValueError, match="100 frames are too few for 101 units"):
        train_units(source, recordings, 101)


def test_padding_is_not_heard_by_networks() -> None:
    head, features = head_of(4, kernel_size=5), noise(2 * 9, 4).view(2, 9, 4)
    mask = torch.arange(9) < torch.tensor([[9], [6]])
    together = head(features, mask)
    # Only rounding may differ.
    assert torch.allclose(together[1, :6], head(features[1:, :6])[0], atol=1e-6)
    assert not torch.allclose(head(features)[1, :6], head(features[1:, :6])[0], atol=1e-3)


def test_a_frame_of_a_head_hears_its_kernel() -> None:
    for kernel_size, heard in ((1, 1), (3, 5)):
        head = head_of(4, kernel_size=kernel_size)
        features = noise(20, 4)[None].requires_grad_()
        head(features)[0, 10].sum().backward()
        assert features.grad is not None
        assert int((features.grad[0].abs().sum(1) > 0).sum()) == heard  # two layers


def test_codes_of_groups_are_joined_and_split() -> None:
    encoder = predictive_of(4)
    assert encoder.num_units == 25
    codes = torch.randint(5, (2, 2, 7), generator=torch.Generator().manual_seed(0))
    units = encoder.joined(codes)
    assert torch.equal(units, 5 * codes[:, 0] + codes[:, 1])
    assert torch.equal(encoder.split(units), codes)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"type": "centroids", "feature_dim": 4, "num_units": 0}, "must be positive"),
        ({"type": "unit_head", "feature_dim": 4, "num_units": 3, "kernel_size": 2}, "kernel_size must be odd"),
        ({"type": "unit_head", "feature_dim": 4, "num_units": 3, "width": 0}, "must be positive"),
        ({"type": "log_mel", "sample_rate_hz": 11025}, "no multiple of 200"),
        ({"type": "log_mel", "num_bands": 0}, "num_bands must be positive"),
    ],
)
def test_configurations_that_cannot_be_are_refused(config: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        from_dict(config)


# Folders


def same(first: SpeechUnits, second: SpeechUnits) -> bool:
    audio = torch.stack([speech(8000, 7), speech(8000, 8)])
    return torch.equal(first.encode(audio)[0], second.encode(audio)[0])


def test_units_of_a_speech_model_know_their_model(tmp_path: Path) -> None:
    model = save_model(tmp_path / "one")
    units = train_units(speech_model_source(str(model), 2), [speech(16000)], 5)
    units.save(tmp_path / "units")
    assert same(load_units(tmp_path / "units"), units)
    config = json.loads((tmp_path / "units" / "units.json").read_text())
    assert (config["num_units"], config["frame_rate_hz"]) == (5, 2000.0)
    assert config["source"]["version"].startswith("one, weights ")
    # Moved and renamed, it is the same model; another one is not.
    model.rename(tmp_path / "two")
    with pytest.raises(ValueError, match="holds no model"):
        load_units(tmp_path / "units")
    assert same(load_units(tmp_path / "units", model=str(tmp_path / "two")), units)
    weights = tmp_path / "two" / "model.safetensors"
    changed = {key: value + 0.1 for key, value in load_file(weights).items()}
    save_file(changed, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="these units are of one, weights "):
        load_units(tmp_path / "units", model=str(tmp_path / "two"))


def test_units_of_a_codec_know_their_codec(tmp_path: Path) -> None:
    save(tiny_codec(), tmp_path / "one", name="one@1", dtype="float32")
    save(tiny_codec(seed=1), tmp_path / "other", name="one@1", dtype="float32")
    units = train_units(codec_source(str(tmp_path / "one"), num_quantizers=1), [speech(16000)], 5)
    units.save(tmp_path / "units")
    assert same(load_units(tmp_path / "units"), units)
    with pytest.raises(ValueError, match="these units are of id"):
        load_units(tmp_path / "units", model=str(tmp_path / "other"))


def test_all_assigners_come_back(tmp_path: Path, mel_units: SpeechUnits) -> None:
    dim = mel_units.source.feature_dim
    for number, assigner in enumerate((head_of(dim), predictive_of(dim), mel_units.assigner)):
        units = SpeechUnits(mel_units.source, assigner)
        units.save(tmp_path / str(number))
        assert same(load_units(tmp_path / str(number)), units)
    units.save(tmp_path / "0")  # in place of others
    assert same(load_units(tmp_path / "0"), mel_units)
    with pytest.raises(ValueError, match="of no model"):
        load_units(tmp_path / "0", model="anything")


def test_folders_that_are_broken_are_refused(tmp_path: Path, mel_units: SpeechUnits) -> None:
    with pytest.raises(ValueError, match=r"holds no units\.json"):
        load_units(tmp_path)
    folder = tmp_path / "units"
    mel_units.save(folder)
    config, weights = folder / "units.json", folder / "units.safetensors"
    good, tensors = json.loads(config.read_text()), load_file(weights)

    def refused(told: str, change: dict[str, Any] | str) -> None:
        config.write_text(change if isinstance(change, str) else json.dumps(good | change))
        with pytest.raises(ValueError, match=told):
            load_units(folder)
        config.write_text(json.dumps(good))

    refused("cannot be read", "{")
    refused("num_units is 6, not 7", {"num_units": 7})
    refused(r"frame_rate_hz is 50.0, not 25.0", {"frame_rate_hz": 25.0})
    refused("no such setting", {"more": 1})
    refused("describes no speech units", json.dumps(to_dict(mel_units.source.config)))
    refused("does not fit", {"assigner": good["assigner"] | {"num_units": 7}, "num_units": 7})
    refused("has 10 dims, these units are of 160", {"source": {"type": "log_mel", "num_bands": 5}})
    for changed, told in (
        ({**tensors, "more": torch.zeros(1)}, "Unexpected key"),
        ({key: value for key, value in tensors.items() if key != "mean"}, "Missing key"),
        ({**tensors, "mean": torch.full_like(tensors["mean"], torch.nan)}, "NaN"),
    ):
        save_file(changed, weights)
        with pytest.raises(ValueError, match=told):
            load_units(folder)
    weights.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="cannot be read"):
        load_units(folder)
