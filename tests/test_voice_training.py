"""How codecs with global codes are trained: references, x-vectors, disguises, warm starts, whole runs."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from runs import LIGHTNING_WARNINGS, tiny_run, write_recordings
from stub_teachers import FRAMES
from torch import Tensor

import codec
from codec.config import to_dict
from codec.quantizers.residual import ResidualVQConfig
from codec.testing import speech_like, tiny_codec, tiny_voiced_codec, tiny_voiced_config
from recipes.crops import Place
from recipes.data import Batch, SpeechData, collate
from recipes.distillation import Students
from recipes.module import CodecTraining
from recipes.recordings import Recording
from recipes.settings import VoiceSettings, parse
from recipes.train import build_codec, train
from recipes.voice import VoiceTraining
from tools.export import export

pytestmark = [pytest.mark.filterwarnings(warning) for warning in LIGHTNING_WARNINGS]

WEIGHTS = {"semantic_commitment": 0.5, "prediction": 0.5, "pitch": 0.5}
VOICE: dict[str, Any] = {"warmup_steps": 1, "speaker_weight": 0.5, "disguise": [0.8, 1.25]}
SECTIONS: dict[str, Any] = {
    "model": to_dict(tiny_voiced_config(voice_samples=3200)),
    "voice": VOICE,
    "distillation": {"speech": {**FRAMES, "weight": 1.0, "stages": [0]}},
}
OVERRIDES = (
    "data.reference_samples=6400",
    "quantization.dropout_share=0.5",
    *(f"++loss.weights.{name}={weight}" for name, weight in WEIGHTS.items()),
)


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recordings(tmp_path_factory.mktemp("audio"), num_samples=32000)


def _batch(*, reference: Tensor | None = None) -> Batch:
    audio = torch.stack([torch.from_numpy(speech_like(6400, seed=seed))[None] for seed in range(2)])
    return Batch(audio, torch.arange(2), 2 * (Place("here", Recording("a.wav"), 0),), reference)


def _draws() -> torch.Generator:
    return torch.Generator().manual_seed(0)


# References


def _data(folder: Path, **values: object) -> SpeechData:
    settings = {"train_dir": str(folder), "dev_dir": str(folder), "num_workers": 0, "crop_samples": 4000}
    data = SpeechData({**settings, "dev_crop_samples": 4000, **values}, sample_rate_hz=16000, seed=3)
    data.setup()
    return data


def _ramp(folder: Path, num_samples: int) -> Path:
    """A recording whose samples tell where they are."""
    folder.mkdir()
    soundfile.write(folder / "ramp.wav", 0.1 + np.arange(num_samples) / 2**16, 16000, subtype="FLOAT")
    return folder


def test_a_reference_is_another_stretch_with_the_crop_silenced(tmp_path: Path) -> None:
    data = _data(_ramp(tmp_path / "a", 30000), reference_samples=8000)
    num_overlapping = 0
    for item in range(30):
        crop = data.crops()[item]
        assert crop.reference is not None
        assert crop.reference.shape == (1, 8000)
        heard = crop.reference[0].numpy()
        expected = 0.1 + (np.arange(8000) + round((heard[heard > 0][0] - 0.1) * 2**16 - heard.nonzero()[0][0])) / 2**16
        places = np.rint((expected - 0.1) * 2**16)
        is_crop = (places >= crop.place.first_sample) & (places < crop.place.first_sample + 4000)
        np.testing.assert_allclose(heard, np.where(is_crop, 0.0, expected), atol=1e-6)
        num_overlapping += is_crop.any()
    assert 0 < num_overlapping < 30


def test_the_crop_is_kept_where_too_little_would_be_left(tmp_path: Path) -> None:
    crop = _data(_ramp(tmp_path / "a", 5000), reference_samples=4500).crops()[0]
    assert crop.reference is not None
    assert (crop.reference > 0).all()


def test_a_recording_that_is_shorter_than_a_reference_is_repeated(tmp_path: Path) -> None:
    crop = _data(_ramp(tmp_path / "a", 4100), reference_samples=9000).crops()[0]
    assert crop.reference is not None
    assert torch.equal(crop.reference[:, 4100:8200], crop.reference[:, :4100])
    assert crop.reference.shape == (1, 9000)


def test_references_change_no_crop_and_follow_from_seed_and_item(tmp_path: Path) -> None:
    folder = _ramp(tmp_path / "a", 30000)
    with_references, without = _data(folder, reference_samples=8000).crops(), _data(folder).crops()
    for item in range(5):
        assert torch.equal(with_references[item].audio, without[item].audio)
        assert without[item].reference is None
        first, again = with_references[item].reference, with_references[item].reference
        assert first is not None
        assert again is not None
        assert torch.equal(first, again)
    batch = collate([with_references[item] for item in range(3)])
    assert batch.reference is not None
    assert batch.reference.shape == (3, 1, 8000)
    assert collate([without[0]]).reference is None
    with pytest.raises(ValueError, match=r"data\.reference_samples must be positive or null, not 0"):
        _data(folder, reference_samples=0)


def test_references_of_recordings_at_another_rate(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    time = np.arange(24000) / 24000
    soundfile.write(tmp_path / "a" / "tone.wav", np.where(time < 0.5, 0.3, 0.6) * np.sin(2000 * time), 24000)
    data = _data(tmp_path / "a", reference_samples=16000)
    crop = data.crops()[1]
    assert crop.reference is not None
    begin = crop.place.first_sample * 2 // 3
    is_silent = crop.reference[0] == 0.0
    assert is_silent[begin : begin + 4000].all()
    assert is_silent.float().mean() < 0.3


# Voices and disguises


def test_the_x_vector_comes_first_and_the_voice_is_drawn_to_it() -> None:
    model = tiny_voiced_codec().requires_grad_(True)
    training = VoiceTraining(model, VoiceSettings(warmup_steps=2))
    references = _batch().audio
    early, losses = training.voices(references, step=1)
    assert losses == {}
    assert torch.equal(early, model.hear_voice(references).x_vector)
    late, losses = training.voices(references, step=2)
    codes = model.encode_global(references[:, :, :4000])
    torch.testing.assert_close(training.voices(references[:, :, :4000], step=2)[0], model.voice_of(codes))
    assert losses["speaker"].item() == pytest.approx((late - early).square().mean().item())
    # It draws the voice vector to the x-vector, and not the other way round.
    heard = model.hear_voice(references)
    (gradient,) = torch.autograd.grad(losses["speaker"], late)
    torch.testing.assert_close(gradient, 2 * (late - heard.x_vector) / late.numel())
    assert training.weights == {"speaker": 1.0}


def test_the_reference_says_the_voice_and_else_the_item_itself() -> None:
    model = tiny_voiced_codec()
    training = VoiceTraining(model, None)
    other = torch.randn(2, 1, 6400, generator=_draws())

    def heard(batch: Batch) -> Tensor:
        return training.reconstruct(batch, lambda latents: latents, 5, _draws())[0]

    own = heard(_batch())
    assert torch.equal(heard(_batch(reference=_batch().audio)), own)
    assert not torch.allclose(heard(_batch(reference=other)), own, atol=1e-4)


def test_disguises_are_drawn_for_every_item_and_from_the_draws_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_voiced_codec()
    training = VoiceTraining(model, VoiceSettings(disguise=(0.5, 2.0)))
    seen: list[Any] = []
    analyze = type(model).analyze

    def spied(self: Any, audio: Tensor, disguise: Tensor | None = None) -> Tensor:
        seen.append(disguise)
        return analyze(self, audio, disguise)

    monkeypatch.setattr(type(model), "analyze", spied)
    for _ in range(2):
        training.reconstruct(_batch(), lambda latents: latents, 5, _draws())
    VoiceTraining(model, None).reconstruct(_batch(), lambda latents: latents, 5, _draws())
    assert torch.equal(seen[0], seen[1])
    assert seen[0][0] != seen[0][1]
    assert seen[2] is None
    many = torch.cat([training._draw_disguise(100, torch.Generator().manual_seed(i)) for i in range(5)])  # type: ignore[misc]
    assert 0.5 <= many.min() < 0.55
    assert 1.8 < many.max() <= 2.0
    assert abs(many.log().mean()) < 0.1


def test_settings_that_cannot_be(recordings: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"disguise must be \[lowest, highest\], both positive, got \[1.2, 0.8\]"):
        VoiceSettings(disguise=(1.2, 0.8))
    with pytest.raises(ValueError, match="must not be negative"):
        VoiceSettings(warmup_steps=-1)
    plain = parse(tiny_run(recordings, tmp_path, voice=VOICE))
    with pytest.raises(ValueError, match="voice: this model has no global codes"):
        CodecTraining(tiny_codec(), plain)

    class Undisguisable(type(tiny_voiced_codec())):  # type: ignore[misc]
        is_disguisable = False

    with pytest.raises(ValueError, match=r"voice\.disguise: this model cannot hide voices"):
        VoiceTraining(Undisguisable(tiny_voiced_config()), VoiceSettings(disguise=(0.8, 1.2)))


# Distillation of row 0


def test_what_row_0_learns_reaches_the_semantic_dims_alone() -> None:
    model = tiny_voiced_codec().requires_grad_(True)
    latents = torch.randn(2, 20, 7, requires_grad=True)
    quantized = model.quantizer(latents)
    for given in (quantized, None):
        frames, _ = Students(model.quantizer, latents, given).stage(0)
        assert frames.shape == (2, 7, 8)
        (gradient,) = torch.autograd.grad(frames.square().sum(), latents)
        assert gradient[:, :8].any()
        assert not gradient[:, 8:].any()
    frames, _ = Students(model.quantizer, latents, quantized).stage(2)
    torch.testing.assert_close(
        frames,
        (model.quantizer.decode(quantized.codes[:, :3]) - model.quantizer.decode(quantized.codes[:, :2]))[
            :, 8:
        ].transpose(1, 2),
    )


# Whole runs


def _last(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    return state


@pytest.fixture(scope="module")
def whole(recordings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    train(tiny_run(recordings, folder, *OVERRIDES, **SECTIONS))
    return folder


def test_a_run_logs_learns_and_exports(whole: Path, tmp_path: Path) -> None:
    header = (whole / "logs" / "version_0" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"train/speaker", "train/prediction", "train/semantic_commitment", "perplexity/3"} <= set(header)
    before = tiny_voiced_codec(voice_samples=3200).state_dict()
    after = {name.removeprefix("codec."): value for name, value in _last(whole).items() if name.startswith("codec.")}
    for part in ("semantic_encoder", "encoder", "decoder", "speaker_encoder", "to_voice_latents", "quantizer"):
        assert any(not torch.equal(after[name], before[name]) for name in before if name.startswith(part)), part
    export(whole, tmp_path / "model", name="tiny@1")
    model = codec.load(tmp_path / "model")
    tokens = model.encode(torch.from_numpy(speech_like(9000))[None, None])
    assert tokens.global_codes is not None
    assert model.decode(tokens).shape == (1, 1, 9000)


def test_a_resumed_run_comes_to_the_same_numbers(whole: Path, recordings: Path, tmp_path: Path) -> None:
    train(tiny_run(recordings, tmp_path, "trainer.max_steps=3", *OVERRIDES, **SECTIONS))
    train(tiny_run(recordings, tmp_path, "resume=true", *OVERRIDES, **SECTIONS))
    for name, value in _last(whole).items():
        assert torch.equal(_last(tmp_path)[name], value), name


def test_one_item_is_learned_by_heart(tmp_path: Path) -> None:
    write_recordings(tmp_path / "audio", num_samples=6400)
    for extra in ("1.wav", "2.wav"):
        (tmp_path / "audio" / extra).unlink()
    overrides = (
        *(*OVERRIDES, "trainer.max_steps=80", "quantization.start_step=20", "data.steps_per_epoch=80"),
        *("data.batch_size=1", "data.crop_samples=6400", "data.gain_db=[0,0]", "optimizer.lr=2e-2"),
    )
    train(tiny_run(tmp_path / "audio", tmp_path / "run", *overrides, **SECTIONS | {"voice": {"speaker_weight": 0.1}}))
    rows = (tmp_path / "run" / "logs" / "version_0" / "metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("train/spectral_mel")
    losses = [float(row.split(",")[column]) for row in rows[1:] if row.split(",")[column]]
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])


def test_a_warm_start_takes_what_fits(recordings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tiny_codec(seed=5)
    codec.save(source, tmp_path / "source", name="source@1", dtype="float32")
    settings = parse(tiny_run(recordings, tmp_path / "run", f"warm_start={tmp_path / 'source'}", **SECTIONS))
    model = build_codec(settings)
    shared = [name for name in source.state_dict() if name.startswith(("encoder.", "decoder."))]
    for name in shared:
        assert torch.equal(model.state_dict()[name], source.state_dict()[name])
    assert f"warm_start: {len(shared)} of {len(model.state_dict())} tensors" in capsys.readouterr().out


def test_warm_starts_that_cannot_be(recordings: Path, tmp_path: Path) -> None:
    shape: dict[str, Any] = {"patch_samples": 8, "strides": (2, 4), "kernel_size": 5}
    channels: dict[str, Any] = {"encoder_channels": (9, 13, 17), "decoder_channels": (9, 13, 17)}
    quantizer = ResidualVQConfig(latent_dim=14, num_stages=1, codebook_size=8)
    codec.save(tiny_codec(quantizer=quantizer, **shape, **channels), tmp_path / "source", name="source@1")
    settings = parse(tiny_run(recordings, tmp_path, f"warm_start={tmp_path / 'source'}", **SECTIONS))
    with pytest.raises(ValueError, match="none of its weights has the name and shape of one of this model's"):
        build_codec(settings)
    with pytest.raises(ValueError, match="only one of them"):
        parse(tiny_run(recordings, tmp_path, "warm_start=a", "init_from=b", **SECTIONS))
    with pytest.raises(ValueError, match="'nowhere' is neither a bundled model"):
        build_codec(parse(tiny_run(recordings, tmp_path, "warm_start=nowhere", **SECTIONS)))
