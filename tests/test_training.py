"""What a run promises: the same numbers when it is resumed, steps of the codec, a guard against NaN, a clean stop."""

import csv
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from runs import ADVERSARY, LIGHTNING_WARNINGS, tiny_run, write_recordings
from torch import Tensor

import codec
from codec.config import build, from_dict
from codec.quantizers.interface import Quantizer
from codec.quantizers.residual import ResidualVQ, ResidualVQConfig
from codec.testing import tiny_codec
from recipes.adversary import Adversary
from recipes.callbacks import parse_duration, spectrogram_image
from recipes.data import Batch
from recipes.module import CodecTraining, NonFiniteError
from recipes.quantization import QuantizerTraining
from recipes.settings import AdversarySettings, OptimizerSettings, QuantizationSettings, parse
from recipes.train import train
from tools.export import export

pytestmark = [pytest.mark.filterwarnings(warning) for warning in LIGHTNING_WARNINGS]

SEANET = {
    "type": "seanet",
    "sample_rate_hz": 16000,
    "ratios": [8, 4],
    "num_filters": 4,
    "num_lstm_layers": 1,
    "norm": "weight",
    "pad_mode": "reflect",
    "quantizer": {"type": "residual_vq", "latent_dim": 8, "num_stages": 3, "codebook_size": 128},
}
OPTIMIZER = {"algorithm": "adam", "lr": 1e-3, "betas": [0.5, 0.9], "clip_norm": 1.0, "schedule": {"decay": 0.9}}
EVERYTHING: dict[str, Any] = {
    "model": SEANET,
    "optimizer": OPTIMIZER,
    "average": {"decay": 0.5},
    "adversary": ADVERSARY | {"start_step": 1, "head_start_steps": 1, "num_active": 2, "crop_samples": 3000},
    "loss": {
        "terms": {"waveform": {"type": "waveform"}, "mel": {"type": "mel", "window_samples": [256], "num_mels": [16]}},
        "weights": {"waveform": 1.0, "mel": 2.0, "commitment": 1.0},
        "balancer": {"decay": 0.9},
    },
    "quantization": {"start_step": 1, "ramp_steps": 3, "dropout_share": 0.5},
}


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recordings(tmp_path_factory.mktemp("audio"))


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> dict[int, Callable[[CodecTraining, Batch], None]]:
    """Step number -> what happens just before the step."""
    before: dict[int, Callable[[CodecTraining, Batch], None]] = {}
    take = CodecTraining.training_step

    def training_step(self: CodecTraining, batch: Batch, batch_index: int) -> None:
        before.get(self.global_step, lambda module, batch: None)(self, batch)
        take(self, batch, batch_index)

    monkeypatch.setattr(CodecTraining, "training_step", training_step)
    return before


def _checkpoint(folder: Path, name: str = "last.ckpt") -> dict[str, Any]:
    state: dict[str, Any] = torch.load(folder / "checkpoints" / name, weights_only=True)
    return state


def _assert_equal(one: Any, two: Any, path: str = "") -> None:
    """Bit for bit, however deep."""
    if isinstance(one, Tensor):
        assert torch.equal(one, two), path
    elif isinstance(one, dict):
        assert one.keys() == two.keys(), path
        for key in one:
            _assert_equal(one[key], two[key], f"{path}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(two), path
        for index, (a, b) in enumerate(zip(one, two, strict=True)):
            _assert_equal(a, b, f"{path}[{index}]")
    else:
        assert one == two, path


# Resuming


@pytest.fixture(scope="module")
def whole(recordings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven uninterrupted steps with everything that there is."""
    folder = tmp_path_factory.mktemp("whole")
    train(tiny_run(recordings, folder, "trainer.max_steps=7", **EVERYTHING))
    return folder


_KEPT = ("state_dict", "optimizer_states", "quantization", "average", "balancer", "global_step")


@pytest.mark.parametrize("num_first_steps", [2, 3, 5])
def test_a_run_that_was_interrupted_comes_to_the_same_numbers(
    num_first_steps: int, whole: Path, recordings: Path, tmp_path: Path
) -> None:
    """While latents for the codebooks are collected (2048, 1600 a step), at the end of an epoch, in the middle."""
    train(tiny_run(recordings, tmp_path, f"trainer.max_steps={num_first_steps}", **EVERYTHING))
    assert _checkpoint(tmp_path)["global_step"] == num_first_steps
    resumed = train(tiny_run(recordings, tmp_path, "trainer.max_steps=7", "resume=true", **EVERYTHING))
    ours, theirs = _checkpoint(tmp_path), _checkpoint(whole)
    for key in _KEPT:
        _assert_equal(ours[key], theirs[key], key)
    assert resumed.adversary is not None
    assert resumed.trainer.global_step == 7


def test_sigterm_ends_a_run_after_its_step_and_it_can_go_on(
    whole: Path, recordings: Path, tmp_path: Path, at_step: dict[int, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    at_step[3] = lambda module, batch: os.kill(os.getpid(), signal.SIGTERM)
    config = tiny_run(recordings, tmp_path, "trainer.max_steps=7", **EVERYTHING)
    with pytest.raises(SystemExit) as stopped:
        train(config)
    assert stopped.value.code == 143
    assert "stopped by SIGTERM after step 4 of 7; resume=true goes on" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == handler
    at_step.clear()
    config.resume = True
    train(config)
    for key in _KEPT:
        _assert_equal(_checkpoint(tmp_path)[key], _checkpoint(whole)[key], key)
    # Validation fell on the same step as in the whole run, not three steps after the stop.
    best, other = _checkpoint(tmp_path, "best.ckpt"), _checkpoint(whole, "best.ckpt")
    assert best["global_step"] == other["global_step"]


def test_a_run_ends_when_its_time_is_up(recordings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = train(tiny_run(recordings, tmp_path, "trainer.max_time=00:00:00:00"))
    assert _checkpoint(tmp_path)["global_step"] == module.trainer.global_step == 1
    assert "stopped by trainer.max_time after step 1 of 6" in capsys.readouterr().err
    assert parse_duration("01:02:03:04").total_seconds() == 93784


# Steps


def test_steps_are_those_of_the_codec(recordings: Path, tmp_path: Path) -> None:
    adversary = ADVERSARY | {"start_step": 1, "every_n_steps": 2}
    config = tiny_run(recordings, tmp_path, "trainer.log_every_n_steps=2", adversary=adversary, optimizer=OPTIMIZER)
    module = train(config)
    assert module.trainer.global_step == 6
    codec_state, other_state = (optimizer.state_dict() for optimizer in module.optimizers())
    assert {int(state["step"]) for state in codec_state["state"].values()} == {6}
    assert {int(state["step"]) for state in other_state["state"].values()} == {3}  # of steps 1, 3 and 5
    # Rates are factors of the steps of each: the last ones were step 5 of the codec, and 4 after the start.
    assert codec_state["param_groups"][0]["lr"] == pytest.approx(1e-3 * 0.9**5)
    assert other_state["param_groups"][0]["lr"] == pytest.approx(1e-3 * 0.9**4)
    with (tmp_path / "logs" / "version_0" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    rates = {int(row["step"]): float(row["learning_rate/codec"]) for row in rows if row["learning_rate/codec"]}
    assert rates == {step: pytest.approx(1e-3 * 0.9**step) for step in (1, 3, 5)}
    assert [int(row["step"]) for row in rows if row["val/total/unquantized"]] == [2, 5]


def _adversary(**changes: Any) -> Adversary:
    torch.manual_seed(0)
    optimizer = OptimizerSettings(algorithm="adamw", lr=1e-3, betas=(0.8, 0.99))
    values = ADVERSARY | {"discriminators": tuple(ADVERSARY["discriminators"]), "optimizer": optimizer}  # type: ignore[arg-type]
    return Adversary(AdversarySettings(**values | changes))


def test_each_side_learns_from_its_own_losses() -> None:
    adversary, draws = _adversary(), torch.Generator().manual_seed(0)
    audio = torch.randn(2, 1, 1000)
    estimate = torch.randn(2, 1, 1000, requires_grad=True)
    heard = adversary.listen(audio, estimate, 0, draws)
    sum(adversary.losses_for_codec(heard).values()).backward()  # type: ignore[union-attr]
    assert estimate.grad is not None
    assert estimate.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in adversary.parameters())
    estimate.grad = None
    adversary.own_loss(heard).backward()
    assert estimate.grad is None
    assert all(parameter.grad is not None for parameter in adversary.parameters())


def test_discriminators_start_late_and_are_heard_later() -> None:
    adversary = _adversary(start_step=10, head_start_steps=5, every_n_steps=2)
    assert [step for step in range(20) if adversary.learns_in(step)] == [10, 12, 14, 16, 18]
    assert [step for step in range(20) if adversary.is_heard_in(step)] == [15, 16, 17, 18, 19]


@pytest.mark.parametrize("every_n_steps", [1, 2, 3])
def test_every_discriminator_gets_its_turns_to_learn(every_n_steps: int) -> None:
    adversary = _adversary(start_step=1, every_n_steps=every_n_steps, num_active=1, crop_samples=600)
    draws = torch.Generator().manual_seed(0)
    audio = torch.arange(2000.0).repeat(2, 1, 1)
    turns = [0, 0, 0]
    for step in range(1, 1 + 6 * every_n_steps):
        heard = adversary.listen(audio, -audio, step, draws)
        assert torch.equal(heard.real, -heard.fake)
        assert heard.real.shape == (2, 1, 600)
        assert heard.active is not None
        if adversary.learns_in(step):
            turns[heard.active[0]] += 1
    assert turns == [2, 2, 2]


def test_adversaries_that_cannot_be_are_errors() -> None:
    with pytest.raises(ValueError, match=r"adversary\.num_active=9 is not in 1\.\.3"):
        _adversary(num_active=9)
    with pytest.raises(ValueError, match="weights must be of adversarial and feature"):
        _adversary(weights={"adversarial": 1.0})


# The quantizer


def _quantization(quantizer: Quantizer | None = None, **settings: Any) -> QuantizerTraining:
    quantizer = quantizer or ResidualVQ(ResidualVQConfig(latent_dim=4, num_stages=4, codebook_size=4))
    return QuantizerTraining(quantizer, QuantizationSettings(**settings), seed=0, is_trained=False)


def test_the_quantizer_comes_in_gradually() -> None:
    """64 frames set codebooks of 4 entries: two batches of 4 x 10 frames, from step 3 on."""
    part = _quantization(start_step=3, ramp_steps=4)
    draws, shares = torch.Generator().manual_seed(0), []
    for step in range(10):
        latents = torch.randn(4, 4, 10, generator=draws)
        mixed, quantized = part(latents, step, draws)
        is_same = (mixed == latents).flatten(1).all(1)
        assert (quantized is None) == (step < 4)
        shares.append(part.share_in(step))
        if shares[-1] == 1.0:
            assert not is_same.any()
        part.update()
    assert shares == [0.0, 0.0, 0.0, 0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert part.since == 4


def test_a_quantizer_that_learns_by_gradient_needs_no_latents() -> None:
    config = ResidualVQConfig(latent_dim=4, num_stages=2, codebook_size=4, learning="gradient")
    part = _quantization(ResidualVQ(config), start_step=1)
    draws = torch.Generator().manual_seed(0)
    assert part(torch.randn(1, 4, 1), 0, draws)[1] is None
    assert part(torch.randn(1, 4, 1), 1, draws)[1] is not None


def test_dropout_is_drawn_as_published() -> None:
    draws = torch.Generator().manual_seed(0)

    def draw(**settings: Any) -> Tensor:
        part = _quantization(**settings)
        return torch.stack([part.draw_prefixes(64, draws) for _ in range(50)])

    assert (draw() == 4).all()
    items = draw(dropout_share=0.5)
    # Half of them draw, and a quarter of these draw all rows.
    assert (items < 4).float().mean() == pytest.approx(0.375, abs=0.03)
    assert set(items.flatten().tolist()) == {1, 2, 3, 4}
    firsts = draw(dropout_share=0.5, dropout="first_items")
    assert (firsts[:, 32:] == 4).all()
    assert (firsts[:, :32] < 4).float().mean() == pytest.approx(0.75, abs=0.05)
    batches = draw(dropout_share=1.0, dropout="batch", prefixes=(2, 4))
    assert (batches == batches[:, :1]).all()
    assert set(batches[:, 0].tolist()) == {2, 4}
    with pytest.raises(ValueError, match=r"quantization\.prefixes: \[5\] are not of \(1, 2, 3, 4\)"):
        _quantization(prefixes=(1, 5))


# Averages, weight norm, checkpoints


def test_validation_and_export_take_the_average(recordings: Path, tmp_path: Path) -> None:
    module = train(tiny_run(recordings, tmp_path / "run", average={"decay": 0.5}))
    assert module.average is not None
    last = {key: value.clone() for key, value in module.codec.state_dict().items()}
    mean = _checkpoint(tmp_path / "run")["average"]["values"]
    assert not torch.equal(mean["encoder.layers.1.weight"], last["encoder.layers.1.weight"])
    audio = torch.randn(1, 1, 640)
    heard = module.reconstructions(audio)["3_quantizers"]
    _assert_equal(dict(module.codec.state_dict()), last)
    export(tmp_path / "run", tmp_path / "out", name="mean@1", dtype="float32")
    exported = codec.load(tmp_path / "out")
    _assert_equal(dict(exported.state_dict()), dict(mean))
    with torch.no_grad():
        latents = exported.quantizer.decode(exported.quantizer.encode(exported.analyze(audio)))
        assert torch.equal(exported.synthesize(latents, 640), heard)
    # It began when the codebooks were set, so none of it is of the random ones before: 5 of 6 steps.
    assert module.average.num_updates == 5


def test_weight_norm_is_trained_and_folded(recordings: Path, tmp_path: Path) -> None:
    module = train(tiny_run(recordings, tmp_path / "run", model=SEANET, optimizer=OPTIMIZER))
    assert any("parametrizations" in name for name in module.codec.state_dict())
    export(tmp_path / "run", tmp_path / "out", name="folded@1", dtype="float32")
    exported, audio = codec.load(tmp_path / "out"), torch.randn(1, 1, 640)
    assert not any("parametrizations" in name for name in exported.state_dict())
    with torch.no_grad():
        heard = module.codec.reconstruct(audio, lambda latents: latents)
        torch.testing.assert_close(exported.reconstruct(audio, lambda latents: latents), heard)
    # The model says how it is trained; the settings may say otherwise.
    for weight_norm, expected in ((None, True), (False, False), (True, True)):
        settings = parse(tiny_run(recordings, tmp_path, model=SEANET, optimizer=OPTIMIZER, weight_norm=weight_norm))
        names = CodecTraining(build(from_dict(SEANET)), settings).codec.state_dict()
        assert any("parametrizations" in name for name in names) == expected


def test_any_model_can_be_the_start_of_a_run_with_fresh_discriminators(recordings: Path, tmp_path: Path) -> None:
    """As an imported one: its architecture, its quantizer in use from the first step on, discriminators at once."""
    model = build(from_dict(SEANET))
    codec.save(model, tmp_path / "imported", name="imported@1", dtype="float32")
    changes = EVERYTHING | {"model": None, "adversary": ADVERSARY}
    start = (f"init_from={tmp_path / 'imported'}", "trainer.max_steps=1", "data.steps_per_epoch=1")
    tuned = train(tiny_run(recordings, tmp_path / "run", *start, **changes))
    assert tuned.codec.config == model.config
    metrics = (tmp_path / "run" / "logs" / "version_0" / "metrics.csv").read_text()
    assert all(name in metrics for name in ("train/adversarial", "train/discriminators", "perplexity/0"))
    export(tmp_path / "run", tmp_path / "tuned", name="tuned@1", dtype="float32")
    before, after = codec.load(tmp_path / "imported").state_dict(), codec.load(tmp_path / "tuned").state_dict()
    weights = [name for name in before if name.endswith("weight")]
    assert all(not torch.equal(before[name], after[name]) for name in weights)
    assert max(float((before[name] - after[name]).abs().max()) for name in weights) < 0.01  # one step away


def test_the_best_checkpoint_is_kept(recordings: Path, tmp_path: Path, at_step: dict[int, Any]) -> None:
    def spoil(module: CodecTraining, batch: Batch) -> None:
        for parameter in module.codec.decoder.parameters():  # type: ignore[union-attr, operator]
            parameter.data.mul_(10)

    at_step[5] = spoil
    train(tiny_run(recordings, tmp_path, "trainer.max_steps=9"))
    assert _checkpoint(tmp_path)["global_step"] == 9
    assert _checkpoint(tmp_path, "best.ckpt")["global_step"] == 3
    assert not list((tmp_path / "checkpoints").glob("*.partial"))


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_bfloat16_runs(share: float, recordings: Path, tmp_path: Path) -> None:
    quantization = {"dropout_share": share}
    module = train(
        tiny_run(recordings, tmp_path, "trainer.precision=bf16-mixed", **EVERYTHING | {"quantization": quantization})
    )
    assert all(torch.isfinite(value).all() for value in module.state_dict().values())
    assert {value.dtype for value in module.state_dict().values()} == {torch.float32}


# The guard


def test_nan_stops_the_run_before_weights_are_touched(
    recordings: Path, tmp_path: Path, at_step: dict[int, Any]
) -> None:
    before: dict[str, Tensor] = {}

    def poison(module: CodecTraining, batch: Batch) -> None:
        before.update({key: value.clone() for key, value in module.state_dict().items()})
        before["module"] = module  # type: ignore[assignment]
        batch.audio[2, 0, 100] = float("nan")

    at_step[2] = poison
    with pytest.raises(NonFiniteError, match=r"the loss .*mel.* is not finite in step 2, from .*\.wav") as told:
        train(tiny_run(recordings, tmp_path, adversary=ADVERSARY))
    assert str(told.value).count(".wav") == 1  # the other items are not at fault
    module: Any = before.pop("module")
    _assert_equal(dict(module.state_dict()), before)


def test_an_infinite_gradient_stops_the_run(
    recordings: Path, tmp_path: Path, at_step: dict[int, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recipes.module.average_gradients", lambda parameters: parameters[0].grad.fill_(torch.inf))
    with pytest.raises(NonFiniteError, match=r"a gradient of the codec is not finite in step 0, from .*wav"):
        train(tiny_run(recordings, tmp_path))
    assert not (tmp_path / "checkpoints" / "last.ckpt").exists()


# What is heard and seen


def test_a_progress_bar_counts_the_steps_of_the_run(
    recordings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tiny_run(recordings, tmp_path, "trainer.max_steps=3", "trainer.enable_progress_bar=true"))
    shown = capsys.readouterr().err
    assert "3/3" in shown
    assert "train/total" in shown


def test_dev_crops_can_be_heard_and_seen(recordings: Path, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(tiny_run(recordings, tmp_path, "trainer.max_steps=3"))
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard" / "version_0"))
    events.Reload()
    names = {"recording/0", "unquantized/0", "1_quantizers/0", "3_quantizers/0"}
    assert set(events.Tags()["audio"]) == set(events.Tags()["images"]) == names
    assert "val/si_sdr_db/3_quantizers" in events.Tags()["scalars"]
    clip = events.Audio("recording/0")[0]
    assert (clip.sample_rate, clip.length_frames) == (16000, 6400)


def test_spectrograms_are_pictures_with_low_frequencies_below() -> None:
    tone = torch.sin(2 * torch.pi * 500 * torch.arange(16000) / 16000)
    picture = spectrogram_image(0.01 * tone)
    assert picture.shape == (1, 257, 126)
    assert 0.0 <= float(picture.min()) <= float(picture.max()) <= 1.0
    assert int(picture[0, :, 60].argmax()) == 256 - 16


def test_a_module_outside_of_a_run_can_be_listened_to(recordings: Path, tmp_path: Path) -> None:
    settings = parse(tiny_run(recordings, tmp_path))
    module = CodecTraining(tiny_codec(), settings)
    assert isinstance(module, pl.LightningModule)
    assert set(module.reconstructions(torch.zeros(1, 1, 100))) == {"unquantized"}
    assert module.monitored == "val/total/3_quantizers"
