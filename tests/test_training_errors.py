"""Mistakes are one clear line before the first step."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from runs import ADVERSARY, LIGHTNING_WARNINGS, compose, tiny_run, write_recordings

import codec
from codec.config import to_dict
from codec.testing import tiny_codec, tiny_config
from recipes.module import CodecTraining
from recipes.settings import parse
from recipes.train import build_codec, train
from tools.export import export

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [pytest.mark.filterwarnings(warning) for warning in LIGHTNING_WARNINGS]


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recordings(tmp_path_factory.mktemp("audio"))


@pytest.fixture
def no_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    def training_step(*_: Any) -> None:
        raise AssertionError("a step was taken")

    monkeypatch.setattr(CodecTraining, "training_step", training_step)


def _message(config: Any) -> str:
    with pytest.raises(ValueError, match=r".") as told:
        train(config)
    message = str(told.value)
    assert "\n" not in message
    return message


@pytest.mark.usefixtures("no_steps")
@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("nothing", 1, "nothing: the configuration has no such setting (it has adversary,"),
        ("optimizer.learning_rate", 1, "optimizer.learning_rate: optimizer has no such setting"),
        ("optimizer.lr", "fast", "optimizer.lr: expected float, got 'fast'"),
        ("optimizer.lr", 0.0, "optimizer: lr must be positive"),
        ("optimizer.betas", [0.9], "optimizer: betas must be two numbers in [0, 1)"),
        ("optimizer.clip_norm", 0.0, "optimizer: clip_norm must be positive"),
        ("optimizer.schedule.warmup", 1, "optimizer.schedule.warmup: optimizer.schedule has no such setting"),
        ("optimizer.schedule.decay", 1.5, "optimizer.schedule: final_fraction must lie in 0..1 and decay in (0, 1]"),
        ("optimizer.algorithm", "sgd", "optimizer.algorithm='sgd' is not one of muon, adamw, adam"),
        ("quantization.dropout", "row", "quantization: dropout='row' is not one of ('item', 'first_items', 'batch',"),
        ("quantization.dropout_share", 2.0, "quantization: dropout_share=2.0 is not in 0..1"),
        ("quantization.prefixes", [1, 9], "quantization.prefixes: [9] are not of (1, 2, 3)"),
        ("validation.num_quantizers", [7], "validation.num_quantizers: [7] are not of (1, 2, 3)"),
        ("validation.monitor", "pesq", "validation.monitor='pesq' is not one of"),
        ("loss.weights.spectral_mel", "much", "loss.weights.spectral_mel: expected float"),
        ("loss.weights.waveform", 1.0, "loss.weights.waveform: there is no such loss (there are commitment,"),
        ("loss.weights", {"spectral_mel": 1.0}, "loss.weights.commitment is needed"),
        ("loss.terms.spectral.windows", [1], "loss.terms.spectral.windows: spectral has no such setting"),
        ("model.colour", "red", "model.colour: multirate has no such setting"),
        ("model.strides", [2], "model: encoder_channels must name 2 rates, one more than strides"),
        ("model.quantizer.num_groups", 5, "model.quantizer: latent_dim=12 is not a multiple of num_groups=5"),
        ("model", None, "model or init_from is needed"),
        ("trainer.max_stepz", 3, "trainer.max_stepz: there is no such setting of pytorch_lightning.Trainer"),
        ("trainer.max_steps", 0, "trainer.max_steps must be a positive number"),
        ("trainer.max_time", "an hour", "trainer.max_time='an hour' is not of the form DD:HH:MM:SS"),
        ("trainer.precision", "16-mixed", "trainer.precision='16-mixed' is not one of ('32-true', 'bf16-mixed')"),
        ("trainer.accumulate_grad_batches", 2, "trainer.accumulate_grad_batches cannot be set here; raise"),
        ("trainer.gradient_clip_val", 1.0, "trainer.gradient_clip_val cannot be set here; set optimizer.clip_norm"),
        ("data.train_dir", "nowhere", "nowhere"),
        ("data.dev_dir", "nowhere", "nowhere"),
        ("data.crop_sample", 1, "data.crop_sample"),
        ("data.crop_samples", 10**6, "recordings are shorter than data.crop_samples=1000000"),
        ("data.dev_crop_samples", 100, "data.dev_crop_samples=100 is too short for the loss"),
        ("init_from", "nowhere", "'nowhere' is neither a bundled model"),
        ("weight_norm", True, "weight_norm=true, but this model has no convolutions"),
    ],
)
def test_mistakes_are_named_with_their_path(
    path: str, value: Any, message: str, recordings: Path, tmp_path: Path
) -> None:
    config = tiny_run(recordings, tmp_path / "run")
    OmegaConf.update(config, path, value, merge=False, force_add=True)
    assert message in _message(config)
    assert not (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()


@pytest.mark.usefixtures("no_steps")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"discriminators": []}, "adversary: discriminators is empty"),
        ({"discriminators": [{"type": "multi_perod"}]}, "discriminators[0].type: 'multi_perod' is unknown"),
        (
            {"discriminators": [{"type": "multi_period", "period": [2]}]},
            "discriminators[0].period: multi_period",
        ),
        ({"loss": "wasserstein"}, "adversary: loss='wasserstein' is not one of"),
        ({"weights": {"feature": 1.0}}, "adversary: weights must be of adversarial and feature"),
        ({"crop_samples": 10}, "the discriminators need crops of"),
        ({"every_n_steps": 0}, "adversary: start_step and head_start_steps must not be negative, every_n_steps"),
        ({"num_active": 7}, "adversary.num_active=7 is not in 1..3"),
        ({"optimizer": {"algorithm": "adam"}}, "adversary.optimizer: adversary.optimizer needs betas, lr"),
    ],
)
def test_mistakes_about_the_adversary_are_named(
    changes: dict[str, Any], message: str, recordings: Path, tmp_path: Path
) -> None:
    assert message in _message(tiny_run(recordings, tmp_path / "run", adversary=ADVERSARY | changes))


@pytest.fixture(scope="module")
def run(recordings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    train(tiny_run(recordings, folder, "trainer.max_steps=3"))
    return folder


def test_an_output_folder_is_used_once(run: Path, recordings: Path, tmp_path: Path) -> None:
    assert "holds a run already; pass resume=true to continue it" in _message(tiny_run(recordings, run))
    config = tiny_run(recordings, tmp_path / "new", "resume=true")
    assert "holds no checkpoint to resume from" in _message(config)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("optimizer.lr", 0.5, "optimizer.lr was 0.004, now 0.5"),
        ("seed", 3, "seed was 0, now 3"),
        ("data.batch_size", 2, "data.batch_size was 4, now 2"),
        ("adversary", ADVERSARY, "adversary was None, now {"),
        ("model", to_dict(tiny_config(kernel_size=5)), "model.kernel_size was 3, now 5"),
    ],
)
def test_a_changed_run_is_not_resumed(path: str, value: Any, message: str, run: Path, recordings: Path) -> None:
    config = tiny_run(recordings, run, "resume=true")
    OmegaConf.update(config, path, value, merge=False)
    assert message in _message(config)


def test_what_changes_no_step_may_change(run: Path, recordings: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "copy")
    config = tiny_run(
        recordings, tmp_path / "copy", "resume=true", "trainer.max_steps=4", "trainer.log_every_n_steps=2"
    )
    assert train(config).trainer.global_step == 4
    # The model of a run need not be told again, nor the one that it began with be there any more.
    config = tiny_run(recordings, tmp_path / "copy", "resume=true", "trainer.max_steps=5", model=None)
    assert train(config).trainer.global_step == 5


def test_a_start_with_another_architecture_is_refused(recordings: Path, tmp_path: Path) -> None:
    codec.save(tiny_codec(kernel_size=5), tmp_path / "other", name="other@1")
    start = f"init_from={tmp_path / 'other'}"
    message = _message(tiny_run(recordings, tmp_path / "run", start))
    assert "has another architecture than model: model.kernel_size is 5, not 3 (model=none takes" in message
    settings = parse(tiny_run(recordings, tmp_path / "run", start, model=None))
    assert settings.model is None


def test_a_start_may_have_a_quantizer_that_learns_otherwise(recordings: Path, tmp_path: Path) -> None:
    before = tiny_codec()
    codec.save(before, tmp_path / "before", name="before@1", dtype="float32")
    model = to_dict(before.config)
    model["quantizer"] |= {"ema_decay": 0.9, "dead_threshold": 0.3}
    settings = parse(tiny_run(recordings, tmp_path / "run", f"init_from={tmp_path / 'before'}", model=model))
    tuned = build_codec(settings)
    assert tuned.config.quantizer.ema_decay == 0.9
    assert tuned.training
    assert all(parameter.requires_grad for parameter in tuned.parameters())
    for name, value in before.state_dict().items():
        assert torch.equal(tuned.state_dict()[name], value), name
    model["quantizer"]["num_groups"] = 2
    message = _message(tiny_run(recordings, tmp_path / "run", f"init_from={tmp_path / 'before'}", model=model))
    assert "model.quantizer.num_groups is 1, not 2" in message


def test_a_checkpoint_of_another_architecture_is_not_exported(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "copy")
    config = OmegaConf.load(tmp_path / "copy" / "config.yaml")
    OmegaConf.update(config, "model.expansion", 3)
    OmegaConf.save(config, tmp_path / "copy" / "config.yaml")
    with pytest.raises(ValueError, match=r"last\.ckpt does not fit .*config\.yaml"):
        export(tmp_path / "copy", tmp_path / "out", name="tiny@1")
    with pytest.raises(ValueError, match=r"none\.ckpt does not exist"):
        export(tmp_path / "copy", tmp_path / "out", name="tiny@1", checkpoint="none.ckpt")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trainer.max_stepz=3", "output_dir=x"], "error: Could not override 'trainer.max_stepz'"),
        (["output_dir=x", "data.train_dir=nowhere", "data.dev_dir=nowhere"], "error: data.train: nowhere"),
    ],
)
def test_the_command_says_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "recipes.train", *arguments],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith(message)
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_value_that_is_missing_is_named() -> None:
    with pytest.raises(ValueError, match="output_dir"):
        parse(compose())
