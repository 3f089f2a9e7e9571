"""Training, small: it runs, learns, exports and loads; and every experiment is one that can run."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from runs import CONFIGS, LIGHTNING_WARNINGS, compose, tiny_run, write_recordings
from teachers import compose_experiment, needs_teachers, small_teachers

import codec
from codec.config import build, from_dict
from codec.importers.encodec import ENCODEC_24KHZ, ENCODEC_48KHZ
from codec.importers.speechtokenizer import SPEECHTOKENIZER_16KHZ
from codec.models.bicodec import BiCodecConfig
from codec.models.dac import DAC_16KHZ, DAC_24KHZ, DAC_44KHZ
from codec.models.hificodec import HIFICODEC_16K_320D, HIFICODEC_24K_240D, HIFICODEC_24K_320D
from codec.models.mimi import MimiConfig
from codec.models.seanet import SOUNDSTREAM_16KHZ
from codec.testing import speech_like, tiny_codec
from recipes.data import parse_data
from recipes.losses import ENCODEC_MEL, HIFICODEC_16K_MEL, HIFICODEC_24K_MEL, SpectralLoss, si_sdr_db
from recipes.module import CodecTraining
from recipes.optimizers import MuonAdamW, build_optimizer, schedule_factor
from recipes.settings import OptimizerSettings, ScheduleSettings, parse
from recipes.train import build_codec, train
from tools.export import export

EXPERIMENTS = sorted(file.stem for file in (CONFIGS / "experiment").glob("*.yaml"))
PUBLISHED = {
    "bicodec_16k": BiCodecConfig(feature_padding="end"),
    "soundstream_16k": SOUNDSTREAM_16KHZ,
    "encodec_24k": ENCODEC_24KHZ,
    "encodec_48k": ENCODEC_48KHZ,
    "hificodec_16k_320d": HIFICODEC_16K_320D,
    "hificodec_24k_320d": HIFICODEC_24K_320D,
    "hificodec_24k_240d": HIFICODEC_24K_240D,
    "dac_16k": DAC_16KHZ,
    "dac_24k": DAC_24KHZ,
    "dac_44k": DAC_44KHZ,
    "speechtokenizer_16k": SPEECHTOKENIZER_16KHZ,
    "dm_codec_lm_16k": SPEECHTOKENIZER_16KHZ,
    "dm_codec_lm_sm_16k": SPEECHTOKENIZER_16KHZ,
    "mimi_24k": MimiConfig(),
}
pytestmark = [pytest.mark.filterwarnings(warning) for warning in LIGHTNING_WARNINGS]


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recordings(tmp_path_factory.mktemp("audio"))


def test_a_run_trains_exports_loads_and_is_where_the_next_one_starts(recordings: Path, tmp_path: Path) -> None:
    whole = train(tiny_run(recordings, tmp_path / "whole"))
    assert whole.quantization.since == 1
    codec_id = export(tmp_path / "whole", tmp_path / "exported", name="tiny@1", dtype="float32")
    loaded = codec.load(tmp_path / "exported")
    assert (loaded.codec_id, loaded.name) == (codec_id, "tiny@1")
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, whole.codec.state_dict()[key]), key
    audio = torch.from_numpy(speech_like(1000))[None, None]
    assert loaded.decode(loaded.encode(audio)).shape == audio.shape

    # A trained model's quantizer is in use from the first step, with all items.
    config = tiny_run(recordings, tmp_path / "next", "trainer.max_steps=3", f"init_from={tmp_path / 'exported'}")
    settings = parse(config)
    fresh = CodecTraining(build_codec(settings), settings)
    assert fresh.quantization.share_in(0) == 1.0
    tuned = train(config)
    for key, value in loaded.state_dict().items():
        assert not torch.equal(value, tuned.codec.state_dict()[key]), key
    export(tmp_path / "next", tmp_path / "exported_next", name="tiny@2")
    assert codec.load(tmp_path / "exported_next").config == loaded.config

    metrics = (tmp_path / "whole" / "logs" / "version_0" / "metrics.csv").read_text().splitlines()[0].split(",")
    for name in (
        *("train/spectral_mel", "train/commitment", "train/total", "perplexity/2", "dead_fraction/0"),
        *("gradient_norm/encoder", "gradient_norm/2", "learning_rate/codec"),
        *("val/si_sdr_db/1_quantizers", "val/si_sdr_db/3_quantizers", "val/total/unquantized"),
    ):
        assert name in metrics, name
    assert list((tmp_path / "whole" / "tensorboard" / "version_0").glob("events.*"))


def test_one_batch_can_be_overfitted() -> None:
    torch.manual_seed(0)
    model = build(tiny_codec().config)
    optimizer = MuonAdamW(model, lr=5e-3, weight_decay=0.0, betas=(0.9, 0.98))
    loss_of = SpectralLoss(sample_rate_hz=16000, window_samples=(256, 64), num_mels=(16, 8))
    audio = torch.stack([torch.from_numpy(speech_like(6400, seed=seed)) for seed in range(2)])[:, None]
    errors = []
    for step in range(80):
        if step == 20:
            model.quantizer.initialize(model.analyze(audio).repeat(1, 1, 4))
        latents = model.analyze(audio)
        quantized = model.quantizer(latents) if step >= 20 else None
        estimate = model.synthesize(quantized.latents if quantized else latents, 6400)
        losses = loss_of(estimate[:, 0], audio[:, 0])
        loss = losses["mel"] + 3 * losses["complex"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if quantized:
            model.quantizer.update(quantized)
        errors.append(float(loss.detach()))
    assert errors[-1] < 0.5 * errors[0]


# Experiments


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes_to_settings_that_can_be(experiment: str) -> None:
    settings = parse(compose_experiment(experiment, "output_dir=x", "data.train_dir=x", "data.dev_dir=x"))
    parse_data(settings.data)
    model = from_dict(settings.model, "model")
    if experiment in PUBLISHED:
        assert model == PUBLISHED[experiment]
        assert f"{experiment}_tiny" in EXPERIMENTS
    ours = {"speech_16k", "speech_16k_distilled", "semantic_global_16k"}
    assert (settings.adversary is None) == (experiment.removesuffix("_tiny") in ours)


@pytest.mark.parametrize("experiment", [name for name in EXPERIMENTS if name.endswith("_tiny")])
def test_every_tiny_experiment_takes_steps(experiment: str, tmp_path: Path) -> None:
    shown = compose(f"experiment={experiment}", "output_dir=x", "data.train_dir=x", "data.dev_dir=x")
    model = shown.model
    rate_hz, num_channels = model.sample_rate_hz, model.get("num_channels", 1)
    crop = 4 * shown.loss.terms[next(iter(shown.loss.terms))].get("window_samples", [2048])[-1] + 2048
    recordings = write_recordings(tmp_path / "audio", rate_hz=rate_hz, num_channels=num_channels)
    teachers = small_teachers(tmp_path, recordings) if needs_teachers(shown) else {}
    trained = train(
        compose_experiment(
            experiment,
            f"output_dir={tmp_path / 'run'}",
            f"data.train_dir={recordings}",
            f"data.dev_dir={recordings}",
            f"data.crop_samples={crop}",
            f"data.dev_crop_samples={crop}",
            *("data.batch_size=2", "data.num_dev_items=1", "data.num_workers=0", "trainer.max_steps=1"),
            *("trainer.enable_progress_bar=false", "quantization.start_step=0", "validation.num_examples=0"),
            *(["adversary.start_step=0"] if shown.adversary else []),
            **teachers,
        )
    )
    # A model that is trained on says more than one that is new: its quantizer is in use.
    export(tmp_path / "run", tmp_path / "model", name=f"{experiment}@1")
    loaded = codec.load(tmp_path / "model")
    audio = torch.from_numpy(speech_like(num_channels * 2000, rate_hz=rate_hz)).view(1, num_channels, -1)
    assert loaded.decode(loaded.encode(audio)).shape == audio.shape
    assert all("parametrizations" not in key for key in loaded.state_dict())
    assert trained.trainer.global_step == 1


@pytest.mark.parametrize(
    ("loss", "published"),
    [("encodec", ENCODEC_MEL), ("hificodec_24k", HIFICODEC_24K_MEL), ("hificodec_16k", HIFICODEC_16K_MEL)],
)
def test_published_losses_stand_in_the_files(loss: str, published: Any) -> None:
    terms = compose(f"loss={loss}", "output_dir=x").loss.terms
    assert from_dict(OmegaConf.to_container(terms.mel)) == published


def test_the_bundled_model_is_what_its_experiment_trains() -> None:
    settings = parse(compose("experiment=speech_16k", "output_dir=x", "data.train_dir=x", "data.dev_dir=x"))
    model = build_codec(settings)
    assert model.config == codec.load().config
    CodecTraining(model, settings)


# Optimizers


def test_the_optimizer_is_muon_and_adamw_and_resumes() -> None:
    def made(seed: int) -> tuple[torch.nn.Module, MuonAdamW]:
        module = tiny_codec(seed=seed).requires_grad_(True)
        return module, MuonAdamW(module, lr=1e-2, weight_decay=0.0, betas=(0.9, 0.98))

    def step(module: Any, optimizer: MuonAdamW) -> None:
        audio = torch.from_numpy(speech_like(640))[None, None]
        heard = module.synthesize(module.analyze(audio), 640)
        optimizer.zero_grad()
        (heard - audio).square().mean().backward()
        optimizer.step()

    one, first = made(0)
    before = {name: value.clone() for name, value in one.named_parameters()}
    step(one, first)
    assert all(not torch.equal(value, before[name]) for name, value in one.named_parameters())
    # Muon moves a matrix by an orthogonal one: all its singular values are alike.
    change = one.encoder.layers[1].weight - before["encoder.layers.1.weight"]  # type: ignore[union-attr, index, operator]
    singular = torch.linalg.svdvals(change.detach())
    assert float(singular.min() / singular.max()) > 0.5

    two, second = made(1)
    two.load_state_dict(one.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))  # loading shares the tensors it is given
    for module, optimizer in ((one, first), (two, second)):
        step(module, optimizer)
    for (name, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_optimizers_are_known_by_name() -> None:
    linear = torch.nn.Linear(2, 2)
    for algorithm, kind in (("muon", MuonAdamW), ("adamw", torch.optim.AdamW), ("adam", torch.optim.Adam)):
        settings = OptimizerSettings(algorithm=algorithm, lr=0.1, betas=(0.5, 0.9), weight_decay=0.25)
        optimizer = build_optimizer(settings, linear, "optimizer")
        assert type(optimizer) is kind
        assert optimizer.param_groups[0]["weight_decay"] == 0.25
    with pytest.raises(ValueError, match=r"optimizer\.algorithm='sgd' is not one of muon, adamw, adam"):
        build_optimizer(OptimizerSettings(algorithm="sgd", lr=0.1, betas=(0.5, 0.9)), linear, "optimizer")
    muon = OptimizerSettings(algorithm="muon", lr=0.1, betas=(0.5, 0.9))
    with pytest.raises(ValueError, match="optimizer: muon needs weight matrices"):
        build_optimizer(muon, torch.nn.Conv1d(1, 1, 3), "optimizer")


@pytest.mark.parametrize(
    ("schedule", "steps", "factors"),
    [
        (ScheduleSettings(), (0, 110, 500), (1.0, 1.0, 1.0)),
        (
            ScheduleSettings(warmup_steps=10, final_fraction=0.01),
            (0, 9, 10, 60, 110, 500),
            (0.1, 1.0, 1.0, 0.505, 0.01, 0.01),
        ),
        (ScheduleSettings(decay=0.5, decay_every_steps=10), (0, 9, 10, 19, 20), (1.0, 1.0, 0.5, 0.5, 0.25)),
        (ScheduleSettings(warmup_steps=2, decay=0.5), (0, 1, 2), (0.5, 0.5, 0.25)),
    ],
)
def test_the_learning_rate_follows_the_step(
    schedule: ScheduleSettings, steps: tuple[int, ...], factors: tuple[float, ...]
) -> None:
    assert [schedule_factor(schedule, step, total_steps=110) for step in steps] == pytest.approx(list(factors))


# Losses


def test_losses_are_zero_for_equals_and_relative_to_the_target() -> None:
    loss = SpectralLoss(sample_rate_hz=16000, window_samples=(256, 64), num_mels=(16, 8))
    audio = torch.from_numpy(speech_like(4000))[None]
    assert all(float(value) == 0.0 for value in loss(audio, audio).values())
    # Silence is wrong by the whole target, at any level of it.
    for gain in (1.0, 0.1):
        values = loss(torch.zeros_like(audio), gain * audio)
        assert float(values["complex"]) == pytest.approx(1.0, abs=0.02)
    estimate = (audio + 0.01 * torch.randn(audio.shape)).requires_grad_()
    sum(loss(estimate, audio).values()).backward()  # type: ignore[union-attr]
    assert estimate.grad is not None
    assert torch.isfinite(estimate.grad).all()
    assert float(si_sdr_db(3 * audio, audio)) > 60
