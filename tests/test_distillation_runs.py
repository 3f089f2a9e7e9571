"""Whole runs with teachers: what they log, that they resume, what they export, and who learns."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from runs import LIGHTNING_WARNINGS, tiny_run, write_recordings
from stub_teachers import FRAMES, StubFrames
from torch import Tensor

import codec
from codec.quantizers.interface import Quantized
from codec.testing import tiny_codec
from recipes.crops import Place
from recipes.data import Batch
from recipes.distillation import Students
from recipes.module import CodecTraining, NonFiniteError
from recipes.recordings import Recording
from recipes.settings import parse
from recipes.targets import Targets
from recipes.train import build_codec, train
from tools.export import export

pytestmark = [pytest.mark.filterwarnings(warning) for warning in LIGHTNING_WARNINGS]


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recordings(tmp_path_factory.mktemp("audio"))


# Nothing is said in the first step (items 0 to 3), in which the quantizer is not in use either.
BOTH: dict[str, Any] = {
    "speech": {"teacher": {"type": "stub_frames", "num_mixed_layers": 2}, "weight": 2.0, "stages": [0, 2]},
    "text": {
        "teacher": {"type": "stub_text", "silent_items": [0, 1, 2, 3]},
        "alignment": {"type": "attention", "dim": 4},
        "loss": {"type": "contrastive"},
        "weight": 0.5,
        "stages": None,
        "ramp_steps": 2,
    },
}
SECTIONS: dict[str, Any] = {
    "distillation": BOTH,
    "optimizer": {"algorithm": "adamw", "lr": 1e-2, "betas": [0.5, 0.9]},
    "quantization": {"start_step": 1, "ramp_steps": 2, "dropout_share": 0.5},
    "average": {"decay": 0.5},
    "loss": {
        "terms": {"waveform": {"type": "waveform"}, "mel": {"type": "mel", "window_samples": [256], "num_mels": [16]}},
        "weights": {"waveform": 1.0, "mel": 2.0, "commitment": 1.0},
        "balancer": {"decay": 0.9},
    },
}


def _checkpoint(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    return state


@pytest.fixture(scope="module")
def whole(recordings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four uninterrupted steps with two teachers, a balancer and quantizer dropout."""
    folder = tmp_path_factory.mktemp("whole")
    train(tiny_run(recordings, folder, "trainer.max_steps=4", **SECTIONS))
    return folder


def test_a_run_tells_what_was_distilled(whole: Path) -> None:
    with (whole / "logs" / "version_0" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["train/mel"]]
    assert [int(row["step"]) for row in rows] == [0, 1, 2, 3]
    for name in ("speech", "text"):
        losses = [float(row[f"train/distilled_{name}"]) for row in rows]
        cosines = [float(row[f"distillation/{name}_cosine"]) for row in rows]
        shares = [float(row[f"distillation/{name}_share"]) for row in rows]
        words = [name == "speech" or step > 0 for step in range(4)]
        assert shares == [float(there) for there in words]
        assert [loss != 0.0 for loss in losses] == words
        assert [cosine == cosine for cosine in cosines] == words  # NaN where there is nothing to compare


def test_a_run_that_was_interrupted_comes_to_the_same_numbers(whole: Path, recordings: Path, tmp_path: Path) -> None:
    train(tiny_run(recordings, tmp_path, "trainer.max_steps=2", **SECTIONS))
    train(tiny_run(recordings, tmp_path, "trainer.max_steps=4", "resume=true", **SECTIONS))
    ours, theirs = _checkpoint(tmp_path), _checkpoint(whole)
    heads = [name for name in theirs["state_dict"] if name.startswith("distillation.")]
    assert "distillation.objectives.text.alignment.query.weight" in heads
    assert "distillation.objectives.speech.heads.1.weight" in heads
    assert not any("teacher" in name for name in heads)
    assert ours["state_dict"].keys() == theirs["state_dict"].keys()
    for name, value in theirs["state_dict"].items():
        assert torch.equal(ours["state_dict"][name], value), name
    moments = [state["optimizer_states"][0]["state"] for state in (ours, theirs)]
    assert moments[0].keys() == moments[1].keys()
    assert all(torch.equal(moments[0][key]["exp_avg"], moments[1][key]["exp_avg"]) for key in moments[0])


def test_what_is_exported_has_no_heads(whole: Path, tmp_path: Path) -> None:
    export(whole, tmp_path / "out", name="distilled@1", dtype="float32")
    model, plain = codec.load(tmp_path / "out"), tiny_codec()
    assert type(model) is type(plain)
    assert model.config == plain.config
    assert model.state_dict().keys() == plain.state_dict().keys()


def test_another_teacher_is_another_run(whole: Path, recordings: Path) -> None:
    config = tiny_run(recordings, whole, "resume=true", **SECTIONS)
    OmegaConf.update(config, "distillation.speech.weight", 3.0)
    with pytest.raises(ValueError, match=r"distillation\.speech\.weight was 2\.0, now 3\.0"):
        train(config)


@pytest.mark.parametrize("start_step", [0, 9])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_encoder_learns_from_teachers_alone(
    start_step: int, precision: str, recordings: Path, tmp_path: Path
) -> None:
    """With and without the quantizer in use. What is behind the quantizer hears nothing of it."""
    sections = SECTIONS | {
        "loss": SECTIONS["loss"] | {"weights": {"waveform": 0.0, "mel": 0.0, "commitment": 0.0}, "balancer": None},
        "quantization": {"start_step": start_step},
        "optimizer": {"algorithm": "adam", "lr": 1e-2, "betas": [0.5, 0.9]},
    }
    config = tiny_run(recordings, tmp_path, "trainer.max_steps=2", f"trainer.precision={precision}", **sections)
    settings = parse(config)
    torch.manual_seed(settings.seed)
    before = dict(CodecTraining(build_codec(settings), settings).state_dict())
    module = train(config)
    assert (module.quantization.since is None) == (start_step == 9)
    for name, value in module.state_dict().items():
        assert torch.isfinite(value).all(), name
        if name.startswith("codec.decoder"):
            assert torch.equal(value, before[name]), name
        elif name.startswith(("codec.encoder", "distillation.")) and not name.endswith("key.bias"):
            assert not torch.equal(value, before[name]), name


def test_heads_learn(recordings: Path, tmp_path: Path) -> None:
    """Ten steps on a few recordings bring the cosines up."""
    distillation = {"speech": FRAMES | {"weight": 1.0, "stages": [0], "loss": {"type": "cosine_per_frame"}}}
    steps = ("trainer.max_steps=10", "data.steps_per_epoch=10", "data.dev_crop_samples=6400")
    train(tiny_run(recordings, tmp_path, *steps, **SECTIONS | {"distillation": distillation}))
    with (tmp_path / "logs" / "version_0" / "metrics.csv").open() as file:
        cosines = [float(row["distillation/speech_cosine"]) for row in csv.DictReader(file) if row["train/mel"]]
    assert cosines[-1] > cosines[0] + 0.2


def test_a_teacher_may_refuse_the_data_before_the_first_step(recordings: Path, tmp_path: Path) -> None:
    distillation = {"speech": {"teacher": {"type": "stub_frames", "is_picky": True}, "weight": 1.0}}
    with pytest.raises(ValueError, match=r"^distillation\.speech: no recording has what is needed$"):
        train(tiny_run(recordings, tmp_path, **SECTIONS | {"distillation": distillation}))
    assert not (tmp_path / "checkpoints" / "last.ckpt").exists()


def test_the_loss_of_a_teacher_takes_no_weight_elsewhere(recordings: Path, tmp_path: Path) -> None:
    config = tiny_run(recordings, tmp_path, **SECTIONS)
    OmegaConf.update(config, "loss.weights.distilled_speech", 1.0, force_add=True)
    with pytest.raises(ValueError, match=r"^loss\.weights\.distilled_speech: there is no such loss"):
        train(config)


def test_a_teacher_that_says_nan_stops_the_run(
    recordings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = StubFrames.targets

    def poisoned(self: StubFrames, *arguments: Any, **named: Any) -> Targets:
        targets = found(self, *arguments, **named)
        return Targets(targets.values * torch.nan, targets.mask)

    monkeypatch.setattr(StubFrames, "targets", poisoned)
    with pytest.raises(NonFiniteError, match=r"the loss distilled_speech is not finite in step 0, from .*\.wav"):
        train(tiny_run(recordings, tmp_path, **SECTIONS))


def test_without_the_section_nothing_is_distilled(recordings: Path, tmp_path: Path) -> None:
    module = CodecTraining(tiny_codec(), parse(tiny_run(recordings, tmp_path)))
    assert module.distillation is None
    assert not any("distil" in name for name in module.state_dict())


def test_a_stage_by_itself_reaches_the_whole_encoder(recordings: Path, tmp_path: Path) -> None:
    """A codec in training, the quantizer in use: for every stage, every weight of the encoder has a gradient."""
    for stage in (0, 1, 2, None):
        distillation = {"speech": FRAMES | {"weight": 1.0, "stages": None if stage is None else [stage]}}
        settings = parse(tiny_run(recordings, tmp_path, **SECTIONS | {"distillation": distillation}))
        module = CodecTraining(tiny_codec().requires_grad_(True).train(), settings)
        assert module.distillation is not None
        quantizer, found = module.codec.quantizer, []

        def quantize(latents: Tensor) -> Tensor:
            quantized: Quantized = quantizer(latents)  # noqa: B023
            found.append(Students(quantizer, latents, quantized))  # noqa: B023
            return quantized.latents

        batch = Batch(torch.randn(2, 1, 1280), torch.arange(2), 2 * (Place("here", Recording("a.wav"), 0),))
        module.codec.reconstruct(batch.audio, quantize)
        losses = module.distillation(batch, found[0], step=0, sample_rate_hz=16000).losses
        losses["distilled_speech"].backward()
        for name, parameter in module.codec.named_parameters():
            if name.startswith("encoder"):
                assert parameter.grad is not None, (stage, name)
                assert (parameter.grad != 0).any(), (stage, name)
