"""Speech teachers: targets at the codec's frames, from crops or from a cache, and all that is told before a step."""

from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from speech_models import save_model
from torch import Tensor
from torchaudio.functional import resample

from codec.config import build, from_dict, to_dict
from codec.features import Features, at_frames, load_speech_model
from codec.testing import speech_like
from recipes.corpora import open_corpus
from recipes.crops import Place
from recipes.data import Batch, SpeechData, collate
from recipes.distillation import FrameTeacher, PieceTeacher
from recipes.feature_cache import write_features
from recipes.recordings import Recording
from recipes.speech_teacher import SpeechTeacher, SpeechTeacherConfig

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose layer 0 hears a few milliseconds around a frame, 2000 frames a second."""
    return save_model(tmp_path_factory.mktemp("models") / "small", "xlsr", head="Model", normalize=False)


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two recordings of half a second, at two rates, and one that is shorter than a crop."""
    source = tmp_path_factory.mktemp("recordings")
    for index, (rate_hz, num_samples) in enumerate([(16000, 8000), (32000, 16000), (16000, 2500)]):
        soundfile.write(source / f"{index}.flac", speech_like(num_samples, rate_hz=rate_hz, seed=index), rate_hz)
    return source


def _teacher(source: Path, **values: Any) -> SpeechTeacher:
    teacher = build(from_dict({"type": "speech_teacher", "source": str(source), **values}, "teacher"))
    assert isinstance(teacher, SpeechTeacher)
    return teacher


def _batch(audio: Tensor, *, rate_hz: int = 16000, num_samples: int | None = None, first_sample: int = 0) -> Batch:
    """Crops of recordings that have so many samples, or go on behind them."""
    recording = Recording("a.wav", sample_rate_hz=rate_hz, num_channels=1, num_samples=num_samples or 10**6)
    return Batch(audio, torch.arange(len(audio)), (Place("in", recording, first_sample),) * len(audio))


def _audio(*shape: int) -> Tensor:
    return 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _data(recordings: Path, **values: Any) -> SpeechData:
    settings = {"train_dir": str(recordings), "dev_dir": str(recordings), "batch_size": 2, "num_workers": 0}
    settings |= {"crop_samples": 3200, "dev_crop_samples": 3200, **values}
    return SpeechData(settings, sample_rate_hz=16000, seed=0)


def test_targets_are_the_features_at_the_codecs_frames(folder: Path) -> None:
    teacher, model = _teacher(folder, layers=2), load_speech_model(str(folder))
    assert isinstance(teacher, FrameTeacher)
    assert not isinstance(teacher, PieceTeacher)
    assert (teacher.feature_dim, teacher.num_mixed_layers) == (16, None)
    assert teacher.version == f"{model.version}, mean of layers 2"
    audio = _audio(2, 2, 1600)
    targets = teacher.targets(_batch(audio), sample_rate_hz=16000, num_frames=5, frame_rate_hz=50.0)
    expected, mask = at_frames(model(audio.mean(1), layers=2), from_hz=2000.0, to_hz=50.0, num_frames=5)
    assert targets.values.dtype == torch.float32
    assert torch.equal(targets.values, expected)
    assert torch.equal(targets.mask, mask)
    assert mask.all()


def test_audio_comes_to_the_rate_of_the_teacher(folder: Path) -> None:
    teacher, model = _teacher(folder), load_speech_model(str(folder))
    audio = _audio(1, 1, 2400)
    targets = teacher.targets(_batch(audio, rate_hz=24000), sample_rate_hz=24000, num_frames=8, frame_rate_hz=75.0)
    features = model(resample(audio[:, 0], 24000, 16000), layers="last")
    expected, _ = at_frames(features, from_hz=2000.0, to_hz=75.0, num_frames=8)
    assert torch.equal(targets.values, expected)


def test_layers_are_averaged_or_left_to_be_mixed(folder: Path) -> None:
    audio = _batch(_audio(2, 1, 1600))
    rates: dict[str, Any] = {"sample_rate_hz": 16000, "num_frames": 5, "frame_rate_hz": 50.0}
    averaged, weighted = _teacher(folder, layers=[0, 1, 2, 3]), _teacher(folder, layers="weighted")
    assert (weighted.num_mixed_layers, weighted.feature_dim) == (4, 16)
    values = weighted.targets(audio, **rates).values
    assert values.shape == (2, 5, 4, 16)
    assert torch.allclose(values.mean(2), averaged.targets(audio, **rates).values, atol=1e-6)
    for layer in range(4):
        alone = _teacher(folder, layers=layer).targets(audio, **rates).values
        assert torch.allclose(values[:, :, layer], alone, atol=1e-6)


def test_nothing_is_said_of_what_lies_behind_a_recording(folder: Path) -> None:
    """A recording of 8 kHz that ends 0.05 s into a crop of 0.1 s: zeros there are neither heard nor learned from."""
    teacher, audio = _teacher(folder), _audio(1, 1, 1600)
    rates: dict[str, Any] = {"sample_rate_hz": 16000, "frame_rate_hz": 100.0}
    batch = _batch(audio, rate_hz=8000, num_samples=900, first_sample=500)
    targets = teacher.targets(batch, num_frames=10, **rates)
    assert targets.mask.tolist() == [[True] * 5 + [False] * 5]
    alone = teacher.targets(_batch(audio[..., :800]), num_frames=5, **rates)
    assert torch.allclose(targets.values[:, :5], alone.values, atol=1e-5)
    assert not targets.values[:, 5:].any()


def test_teachers_are_exact_and_without_gradient(folder: Path) -> None:
    teacher, audio = _teacher(folder), _audio(1, 1, 1600).requires_grad_()
    rates: dict[str, Any] = {"sample_rate_hz": 16000, "num_frames": 5, "frame_rate_hz": 50.0}
    expected = teacher.targets(_batch(audio), **rates).values
    with torch.autocast("cpu", torch.bfloat16):
        values = teacher.targets(_batch(audio), **rates).values
    assert torch.equal(values, expected)
    assert not values.requires_grad


@pytest.mark.parametrize("layers", [0, [0, 0], "weighted"])
def test_a_cache_gives_what_the_model_hears_in_the_crop(
    layers: Any, folder: Path, recordings: Path, tmp_path: Path
) -> None:
    """But at the ends of crops, beyond which the model without a cache hears nothing."""
    write_features(open_corpus(recordings), load_speech_model(str(folder)), tmp_path / "cache", layers=layers)
    live, cached = _teacher(folder, layers=layers), _teacher(folder, layers=layers, cache=str(tmp_path / "cache"))
    assert (cached.version, cached.feature_dim, cached.num_mixed_layers) == (
        live.version,
        live.feature_dim,
        live.num_mixed_layers,
    )
    assert cached.model is None
    data = _data(recordings)
    cached.check(data)
    live.check(data)
    drawn = [data.crops()[item] for item in range(120)]
    # Between its frames this model hears something else entirely.
    batch = collate([item for item in drawn if round(item[2].first_second * 16000) % 8 == 0])
    assert len({place.first_sample for place in batch.places}) > 6
    assert {place.recording.path for place in batch.places} == {"0.flac", "1.flac", "2.flac"}
    rates: dict[str, Any] = {"sample_rate_hz": 16000, "num_frames": 20, "frame_rate_hz": 100.0}
    expected, targets = live.targets(batch, **rates), cached.targets(batch, **rates)
    assert targets.values.shape == expected.values.shape
    ends = [20 if place.recording.num_samples != 2500 else 16 for place in batch.places]  # frames of 160 samples
    for row, end in enumerate(ends):
        assert int(expected.mask[row].sum()) == int(targets.mask[row].sum()) == end
        layer_0 = (row, slice(1, end - 1), 0) if layers == "weighted" else (row, slice(1, end - 1))
        assert (targets.values[layer_0] - expected.values[layer_0]).abs().max() < 1e-3
        assert expected.values[layer_0].diff(dim=0).abs().max() > 0.1


def test_crops_between_frames_are_interpolated(folder: Path, recordings: Path, tmp_path: Path) -> None:
    corpus, model = open_corpus(recordings), load_speech_model(str(folder))
    write_features(corpus, model, tmp_path / "cache", layers=1)
    teacher = _teacher(folder, layers=1, cache=str(tmp_path / "cache"))
    recording, crop_samples = corpus.recordings[0], 400
    audio = torch.from_numpy(corpus.read(0, 0, 8000))
    whole = model(audio, layers=1)
    places = tuple(Place(str(recordings), recording, first) for first in (0, 3, 1004, 8000 - crop_samples))
    batch = Batch(torch.zeros(len(places), 1, crop_samples), torch.arange(len(places)), places)
    targets = teacher.targets(batch, sample_rate_hz=16000, num_frames=5, frame_rate_hz=200.0)
    expected, mask = at_frames(
        Features(whole.values.expand(len(places), -1, -1), whole.num_frames.expand(len(places))),
        from_hz=2000.0,
        to_hz=200.0,
        num_frames=5,
        start_seconds=torch.tensor([place.first_second for place in places], dtype=torch.float64),
    )
    assert torch.allclose(targets.values, expected, atol=2e-3)
    assert torch.equal(targets.mask, mask)


def test_a_wrong_cache_is_told_before_the_first_step(folder: Path, recordings: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    write_features(open_corpus(recordings), load_speech_model(str(folder)), cache, layers=1)
    for layers in (2, "last", "weighted", [1, 2]):
        with pytest.raises(ValueError, match="cache is of another teacher: it holds small, weights"):
            _teacher(folder, layers=layers, cache=str(cache))
    other = save_model(tmp_path / "small", "wavlm", head="Model")  # of the same name
    with pytest.raises(ValueError, match="cache is of another teacher"):
        _teacher(other, layers=1, cache=str(cache))
    with pytest.raises(ValueError, match="nowhere is no cache of features"):
        _teacher(folder, layers=1, cache=str(tmp_path / "nowhere"))
    teacher = _teacher(folder, layers=1, cache=str(cache))
    teacher.check(_data(recordings))
    more = tmp_path / "more"
    more.mkdir()
    soundfile.write(more / "0.flac", speech_like(8000), 16000)
    teacher.check(_data(recordings, dev_dir=str(more)))  # validation asks no teacher
    with pytest.raises(ValueError, match=r"cache lacks 0\.flac of .*more: run tools\.cache_features for it"):
        teacher.check(_data(recordings, train_dir=str(more)))


def test_frames_of_another_rate_than_was_said_are_an_error(folder: Path) -> None:
    teacher, batch = _teacher(folder), _batch(_audio(1, 1, 16000))
    for num_frames in (49, 50, 51):
        targets = teacher.targets(batch, sample_rate_hz=16000, num_frames=num_frames, frame_rate_hz=50.0)
        assert int(targets.mask.sum()) == min(num_frames, 50)
    for num_frames, frame_rate_hz in ((25, 50.0), (75, 50.0), (50, 75.0)):
        with pytest.raises(ValueError, match=r"teacher rate against codec rate: .* are not the 1\.000 s of a crop"):
            teacher.targets(batch, sample_rate_hz=16000, num_frames=num_frames, frame_rate_hz=frame_rate_hz)


def test_settings_that_cannot_be_are_one_line_with_their_path(folder: Path) -> None:
    config = from_dict({"type": "speech_teacher", "source": "m", "layers": [1, 3]}, "teacher")
    assert config == SpeechTeacherConfig(source="m", layers=(1, 3))
    assert to_dict(config) == {"type": "speech_teacher", "source": "m", "layers": [1, 3], "cache": None}
    for layers in ("first", [], [1, "2"], 1.5, True, None, {"a": 1}):
        with pytest.raises(ValueError, match=r"^teacher: layers=.* is neither \"last\" nor"):
            from_dict({"type": "speech_teacher", "source": "m", "layers": layers}, "teacher")
    with pytest.raises(ValueError, match="teacher: speech_teacher needs source"):
        from_dict({"type": "speech_teacher"}, "teacher")
    with pytest.raises(ValueError, match='layers=9: small has "last" and 0 to 3'):
        _teacher(folder, layers=9)
    with pytest.raises(ValueError, match=r"holds no model\.safetensors"):
        _teacher(folder.parent)
