"""Training, small: it runs, learns, resumes to the same numbers, exports and loads."""

import copy
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import pytest
import soundfile
import torch
from omegaconf import DictConfig, OmegaConf

import codec
from codec.config import from_dict, to_dict
from codec.testing import speech_like, tiny_codec, tiny_config
from recipes.data import PackedSpeech, RunSampler, pack_audio
from recipes.losses import SpectralLoss, si_sdr_db
from recipes.module import CodecTraining
from recipes.optimizers import MuonAdamW, warmup_cosine
from recipes.train import build_codec, train
from tools.export import export

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
EXPERIMENTS = sorted(file.stem for file in (CONFIGS / "experiment").glob("*.yaml"))
# Lightning speaks of its own plans, of loaders without workers, and of a log interval longer than a tiny run.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists and is not empty.*"),
    pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval.*"),
]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("audio")
    (folder / "one").mkdir()
    for index in range(3):
        soundfile.write(folder / "one" / f"{index}.wav", speech_like(24000, seed=index), 16000)
    soundfile.write(folder / "short.wav", speech_like(500, rate_hz=8000), 8000)
    pack_audio(folder, folder / "packed", sample_rate_hz=16000)
    return folder / "packed"


def _config(packed: Path, output_dir: Path, *overrides: str) -> DictConfig:
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = hydra.compose(
            "train",
            [
                f"output_dir={output_dir}",
                f"data.train_dir={packed}",
                f"data.dev_dir={packed}",
                "data.batch_size=4",
                "data.crop_samples=6400",
                "data.steps_per_epoch=3",
                "data.num_workers=0",
                "data.num_dev_items=2",
                "data.dev_crop_samples=6400",
                "data.dev_num_quantizers=[1,3]",
                "trainer.accelerator=cpu",
                "trainer.precision=32-true",
                "trainer.log_every_n_steps=1",
                "trainer.max_steps=6",
                "loss.window_samples=[256,64]",
                "loss.num_mels=[16,8]",
                "loss.quantizer_start_step=1",
                "loss.quantizer_ramp_steps=2",
                "loss.k_means_frames=400",
                "optimizer.warmup_steps=2",
                *overrides,
            ],
        )
    OmegaConf.update(config, "model", to_dict(tiny_config()), merge=False)
    return config


def test_a_run_trains_resumes_to_the_same_numbers_exports_and_loads(packed: Path, tmp_path: Path) -> None:
    whole = train(_config(packed, tmp_path / "whole"))
    train(_config(packed, tmp_path / "parts", "trainer.max_steps=3", "optimizer.final_fraction=1.0"))
    with pytest.raises(ValueError, match="pass resume=true"):
        train(_config(packed, tmp_path / "parts"))
    train(_config(packed, tmp_path / "whole_flat", "optimizer.final_fraction=1.0"))
    resumed = train(_config(packed, tmp_path / "parts", "resume=true", "optimizer.final_fraction=1.0"))
    flat = torch.load(tmp_path / "whole_flat" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert resumed.state_dict().keys() == flat.keys()
    for key, value in resumed.state_dict().items():
        assert torch.equal(value, flat[key]), key
    assert int(whole.quantizer_since) == 1

    codec_id = export(tmp_path / "whole", tmp_path / "exported", name="tiny@1", dtype="float32")
    loaded = codec.load(tmp_path / "exported")
    assert (loaded.codec_id, loaded.name) == (codec_id, "tiny@1")
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, whole.codec.state_dict()[key]), key
    audio = torch.from_numpy(speech_like(1000))[None, None]
    assert loaded.decode(loaded.encode(audio)).shape == audio.shape

    # A trained model is where the next run starts; its quantizer is in use from the first step.
    config = _config(packed, tmp_path / "next", "trainer.max_steps=3", f"init_from={tmp_path / 'exported'}")
    assert CodecTraining(build_codec(config), config)._quantized_share(torch.zeros(1, 12, 4)) == 1.0
    tuned = train(config)
    for key, value in loaded.state_dict().items():
        assert not torch.equal(value, tuned.codec.state_dict()[key]), key
    export(tmp_path / "next", tmp_path / "exported_next", name="tiny@2")
    assert codec.load(tmp_path / "exported_next").config == loaded.config
    metrics = (tmp_path / "whole" / "logs" / "version_0" / "metrics.csv").read_text().splitlines()[0].split(",")
    for name in ("train/mel", "perplexity/2", "dead_fraction/0", "gradient_norm/encoder", "val/si_sdr_db/3_quantizers"):
        assert name in metrics


def test_one_batch_can_be_overfitted(packed: Path, tmp_path: Path) -> None:
    config = _config(packed, tmp_path, "data.batch_size=2")
    torch.manual_seed(0)
    module = CodecTraining(build_codec(config), config)
    optimizer = MuonAdamW(module.codec, lr=5e-3, weight_decay=0.0, betas=(0.9, 0.98))
    audio = torch.stack([torch.from_numpy(speech_like(6400, seed=seed)) for seed in range(2)])
    errors = []
    for step in range(120):
        if step == 20:
            module.quantizer.initialize(module._encode(audio).repeat(1, 1, 4))
        latents = module._encode(audio)
        if step >= 20:
            quantized = module.quantizer(latents)
            latents = quantized.latents
        losses = module.loss(module._decode(latents, 6400), audio)
        loss = losses["mel"] + 3 * losses["complex"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step >= 20:
            module.quantizer.update(quantized)
        errors.append(float(loss.detach()))
    assert errors[-1] < 0.5 * errors[0]


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes_and_builds_its_model(experiment: str) -> None:
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = hydra.compose(
            "train", [f"experiment={experiment}", "output_dir=x", "data.train_dir=x", "data.dev_dir=x"]
        )
    model = build_codec(config)
    assert to_dict(model.config) == OmegaConf.to_container(config.model)
    for part in (model.encoder, model.decoder):
        assert sum(p.numel() for p in part.parameters()) <= 6_000_000
    assert set(config.loss.weights) == {"mel", "magnitude", "complex", "commitment"}
    CodecTraining(model, config)


def test_crops_depend_on_seed_and_number_alone(packed: Path) -> None:
    def draw(seed: int) -> PackedSpeech:
        return PackedSpeech(packed, sample_rate_hz=16000, crop_samples=2000, seed=seed, gain_db=(-6.0, 3.0))

    one, two, other = draw(1), draw(1), draw(2)
    assert all(torch.equal(one[i], two[i]) for i in (5, 0, 10**9))
    assert any(not torch.equal(one[i], other[i]) for i in range(5))
    assert one[0].shape == (1, 2000)
    assert all(float(one[i].abs().max()) <= 1.0 for i in range(20))


def test_short_recordings_are_padded_and_corpora_can_be_left_out(packed: Path) -> None:
    with pytest.raises(ValueError, match="leave nothing to draw"):
        PackedSpeech(packed, sample_rate_hz=16000, crop_samples=100, seed=0, corpus_weights={"audio": 0.0})
    with pytest.raises(ValueError, match="names \\['other'\\]"):
        PackedSpeech(packed, sample_rate_hz=16000, crop_samples=100, seed=0, corpus_weights={"other": 1.0})
    long = PackedSpeech(packed, sample_rate_hz=16000, crop_samples=50000, seed=0)[0]
    assert long.shape == (1, 50000)
    assert not long[0, 24000:].any()


def test_ranks_share_an_epoch_without_overlap() -> None:
    samplers = [RunSampler(10, lambda: 30, rank=rank, num_ranks=2) for rank in range(2)]
    assert sorted(item for sampler in samplers for item in sampler) == list(range(30, 40))


def test_packing_reads_manifests_and_names_what_is_wrong(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.stack([speech_like(8000, rate_hz=8000)] * 2, axis=1), 8000)
    (tmp_path / "list.tsv").write_text("a.wav\ttrain\tc\ts\t8000\t1.0\tHELLO\nb.wav\tdev\tc\ts\t8000\t1.0\t\n")
    assert pack_audio(tmp_path / "list.tsv", tmp_path / "out", sample_rate_hz=16000) == 16000
    clip = PackedSpeech(tmp_path / "out", sample_rate_hz=16000, crop_samples=100, seed=0).clips[0]
    assert (clip.corpus, clip.speaker, clip.text, clip.num_samples) == ("c", "s", "HELLO", 16000)
    with pytest.raises(ValueError, match="has no rows of split 'test'"):
        pack_audio(tmp_path / "list.tsv", tmp_path / "out", sample_rate_hz=16000, split="test")
    with pytest.raises(ValueError, match="neither a folder"):
        pack_audio(tmp_path / "nothing", tmp_path / "out", sample_rate_hz=16000)
    with pytest.raises(ValueError, match="packed at 16000 Hz"):
        PackedSpeech(tmp_path / "out", sample_rate_hz=24000, crop_samples=100, seed=0)
    with pytest.raises(ValueError, match=r"tools\.prepare_data"):
        PackedSpeech(tmp_path, sample_rate_hz=24000, crop_samples=100, seed=0)


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


def test_the_optimizer_is_muon_and_adamw_and_resumes() -> None:
    def build(seed: int) -> tuple[torch.nn.Module, MuonAdamW]:
        module = tiny_codec(seed=seed).requires_grad_(True)
        return module, MuonAdamW(module, lr=1e-2, weight_decay=0.0, betas=(0.9, 0.98))

    def step(module: Any, optimizer: MuonAdamW) -> None:
        audio = torch.from_numpy(speech_like(640))[None]
        latents, _ = module.encode_latents(audio, module.encoder.init_state(1))
        heard, _ = module.decode_latents(latents, module.decoder.init_state(1))
        optimizer.zero_grad()
        (heard - audio).square().mean().backward()
        optimizer.step()

    one, first = build(0)
    before = {name: value.clone() for name, value in one.named_parameters()}
    step(one, first)
    assert all(not torch.equal(value, before[name]) for name, value in one.named_parameters())
    # Muon moves a matrix by an orthogonal one: all its singular values are alike.
    change = one.encoder.layers[1].weight - before["encoder.layers.1.weight"]  # type: ignore[union-attr, index, operator]
    singular = torch.linalg.svdvals(change.detach())
    assert float(singular.min() / singular.max()) > 0.5

    two, second = build(1)
    two.load_state_dict(one.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))  # loading shares the tensors it is given
    for module, optimizer in ((one, first), (two, second)):
        step(module, optimizer)
    for (name, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_the_schedule_warms_up_and_ends_low() -> None:
    _, optimizer = (
        tiny_codec(),
        MuonAdamW(tiny_codec().requires_grad_(True), lr=1.0, weight_decay=0.0, betas=(0.9, 0.98)),
    )
    schedule = warmup_cosine(optimizer, warmup_steps=10, total_steps=110, final_fraction=0.01)
    factors = [schedule.lr_lambdas[0](step) for step in (0, 9, 10, 60, 110, 500)]
    assert factors == pytest.approx([0.1, 1.0, 1.0, 0.505, 0.01, 0.01])


def test_an_unknown_value_in_the_model_is_named() -> None:
    values = to_dict(tiny_config()) | {"colour": "red"}
    with pytest.raises(ValueError, match=r"model\.colour: multirate has no such setting"):
        from_dict(values, "model")
