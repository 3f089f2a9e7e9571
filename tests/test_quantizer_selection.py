"""Any quantizer in any model: `quantizer=NAME` on the command line of a run, for each file of `configs/quantizer`."""

import csv
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from runs import CONFIGS, LIGHTNING_WARNINGS, compose, tiny_run, write_recordings
from teachers import compose_experiment
from torch import Tensor

import codec
from codec import config as codec_config
from codec.config import build, from_dict
from codec.models.dac import DACConfig
from codec.models.interface import Codec
from codec.models.seanet import SEANetConfig
from codec.quantizers.factorized import FactorizedVQConfig
from codec.quantizers.interface import QuantizerConfig
from codec.quantizers.product import KMeansVQConfig
from codec.quantizers.split import SplitVQConfig
from codec.testing import speech_like, tiny_codec
from codec.windows import FRAMES_PER_WINDOW, WindowedEncoder
from recipes.module import CodecTraining
from recipes.optimizers import MuonAdamW
from recipes.settings import Settings, parse
from recipes.train import build_codec, train
from tools.export import export

NAMES = sorted(file.stem for file in (CONFIGS / "quantizer").glob("*.yaml"))
EXPERIMENTS = sorted(file.stem for file in (CONFIGS / "experiment").glob("*.yaml"))
SEMANTIC = [name for name in EXPERIMENTS if name.startswith("semantic_global")]
# What makes published sizes small: so few entries are set by k-means from the latents of one step.
SMALL = {"codebook_size": 8, "codebook_dim": 8}
FLOAT64_TOLERANCE = 1e-12
pytestmark = [pytest.mark.filterwarnings(warning) for warning in LIGHTNING_WARNINGS]


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recordings(tmp_path_factory.mktemp("audio"))


def _composed(experiment: str, name: str, *overrides: str) -> DictConfig:
    places = ("output_dir=x", "data.train_dir=x", "data.dev_dir=x")
    return compose_experiment(experiment, f"quantizer={name}", *places, *overrides)


def _small(name: str) -> list[str]:
    values = _composed("speech_16k_tiny", name).quantizer
    return [f"quantizer.{key}={value}" for key, value in SMALL.items() if key in values]


def _streamed_and_whole(model: Codec, audio: Tensor) -> tuple[Tensor, Tensor]:
    """What streams of uneven pieces decode, and what whole recordings [1, C, T] do; of both the codes are the same."""
    tokens = model.encode(audio)
    heard = model.decode(tokens)
    assert heard.shape == audio.shape
    encoder, decoder = codec.StreamingEncoder(model), codec.StreamingDecoder(model)
    sizes = [0, 1, 333, 320, 7, 1500]
    sizes.append(audio.shape[2] - sum(sizes))
    codes = torch.cat([*(encoder.push(piece) for piece in audio[0].split(sizes, dim=1)), encoder.flush()], dim=1)
    parts = [decoder.push(piece) for piece in (codes[:, :1], codes[:, 1:4], codes[:, 4:])]
    assert torch.equal(codes, tokens.codes[0])
    return torch.cat([*parts, decoder.flush()], dim=1)[:, : audio.shape[2]], heard[0]


def test_the_whole_family_can_be_chosen() -> None:
    known = {name for name, kind in codec_config._config_classes.items() if issubclass(kind, QuantizerConfig)}
    chosen = {OmegaConf.load(CONFIGS / "quantizer" / f"{name}.yaml")["type"] for name in NAMES}
    # The semantic one belongs to the one model that has an encoder for its first row.
    assert chosen == known - {"residual_vq_as_published", "semantic_acoustic"}


@pytest.mark.parametrize("name", NAMES)
def test_a_model_trains_with_any_quantizer(name: str, recordings: Path, tmp_path: Path) -> None:
    config = compose(
        *("experiment=speech_16k_tiny", f"quantizer={name}", *_small(name), f"output_dir={tmp_path / 'run'}"),
        *(f"data.train_dir={recordings}", f"data.dev_dir={recordings}", "data.crop_samples=12800"),
        *("data.num_dev_items=1", "data.dev_crop_samples=6400", "data.num_workers=0"),
        *("trainer.max_steps=2", "trainer.log_every_n_steps=1", "trainer.enable_progress_bar=false"),
        *("quantization.start_step=0", "quantization.ramp_steps=0", "validation.num_examples=0"),
    )
    settings = parse(config)
    torch.manual_seed(settings.seed)
    before = {key: value.clone() for key, value in build_codec(settings).quantizer.state_dict().items()}
    module = train(config)
    assert module.quantization.since == 0
    after = module.codec.quantizer.state_dict()
    assert all(value.isfinite().all() for value in after.values())
    frozen = {"codebooks"} if settings.model["quantizer"]["type"] == "simvq" else set()
    assert {key for key in before if torch.equal(after[key], before[key])} == frozen, "the rest learns"

    with (tmp_path / "run" / "logs" / "version_0" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    trained = [row for row in rows if row["train/total"]]
    validated = [row for row in rows if row["val/total/unquantized"]]
    names = [f"val/total/{rows}_quantizers" for rows in module.dev_num_quantizers]
    assert (len(trained), len(validated), len(names)) == (2, 1, min(2, len(module.codec.valid_num_quantizers)))
    inner = {f"train/{loss}" for loss in settings.loss.weights if not loss.startswith("spectral_")}
    told = [row[key] for row in trained for key in ("train/total", *inner)] + [validated[0][key] for key in names]
    assert all(math.isfinite(float(value)) for value in told)

    export(tmp_path / "run", tmp_path / "model", name=f"{name}@1")
    loaded = codec.load(tmp_path / "model")
    assert type(loaded.quantizer) is type(module.codec.quantizer)
    assert loaded.codebook_sizes == module.codec.codebook_sizes
    audio = torch.from_numpy(speech_like(4000, seed=5))[None, None]
    assert torch.equal(*_streamed_and_whole(loaded, audio))
    tokens = loaded.encode(audio)
    for num_quantizers in loaded.valid_num_quantizers:
        assert loaded.decode(tokens.prefix(num_quantizers)).shape == audio.shape
        shorter = loaded.encode(audio, num_quantizers=num_quantizers)
        assert torch.equal(shorter.codes, tokens.codes[:, :num_quantizers])


@pytest.mark.parametrize("name", NAMES)
def test_stereo_streams_through_convolutions_with_any_quantizer(name: str) -> None:
    """Dense convolutions are not bit-equal in pieces: in float64 their rounding is too small for another code."""
    settings = parse(_composed("soundstream_16k_tiny", name, "model.num_channels=2", *_small(name)))
    torch.manual_seed(0)
    model = build_codec(settings).double().eval()
    quantizer = model.quantizer
    if quantizer.num_frames_to_initialize:
        quantizer.initialize(torch.randn(1, 16, quantizer.num_frames_to_initialize, dtype=torch.float64))
    audio = torch.stack([torch.from_numpy(speech_like(4000, seed=seed)) for seed in range(2)])[None]
    torch.testing.assert_close(*_streamed_and_whole(model, audio), rtol=0, atol=FLOAT64_TOLERANCE)


@pytest.mark.parametrize("experiment", SEMANTIC)
def test_a_model_with_a_semantic_encoder_keeps_its_quantizer(experiment: str) -> None:
    settings = parse(_composed(experiment, "fsq"))
    with pytest.raises(ValueError, match="model: quantizer must be of type 'semantic_acoustic'"):
        build_codec(settings)


@pytest.mark.parametrize("experiment", [name for name in EXPERIMENTS if name not in SEMANTIC])
def test_every_experiment_takes_another_quantizer(experiment: str) -> None:
    """One with other losses and a single valid number of rows, which no list of prefixes fits."""
    own = parse(compose_experiment(experiment, "output_dir=x", "data.train_dir=x", "data.dev_dir=x"))
    for name, losses, rows in (("gumbel_vq", {"diversity"}, (2,)), ("residual_fsq", set(), tuple(range(1, 9)))):
        settings = parse(_composed(experiment, name))
        model = from_dict(settings.model, "model")
        assert model.quantizer.latent_dim == own.model["quantizer"]["latent_dim"]
        assert build(model.quantizer).valid_num_quantizers == rows
        heard = own.loss.weights.keys() - {"commitment", "codebook"}
        assert settings.loss.weights.keys() == heard | losses
        assert {key: settings.loss.weights[key] for key in heard} == {key: own.loss.weights[key] for key in heard}
        assert settings.quantization.prefixes is None or set(settings.quantization.prefixes) <= set(rows)


def test_what_the_new_quantizer_has_not_is_left_out() -> None:
    rows = ("quantization.prefixes=[1,2,9]", "validation.num_quantizers=[2,11]")
    settings = parse(_composed("speech_16k_tiny", "residual_vq", *rows))
    assert (settings.quantization.prefixes, settings.validation.num_quantizers) == ((1, 2), (2,))
    settings = parse(_composed("speech_16k_tiny", "multi_codebook_vq", *rows))
    assert (settings.quantization.prefixes, settings.validation.num_quantizers) == (None, None)


def test_latents_have_the_model_s_width_unless_told() -> None:
    def width(*overrides: str) -> int:
        settings = parse(_composed("speech_16k_tiny", "fsq", *overrides))
        dim: int = settings.model["quantizer"]["latent_dim"]
        return dim

    assert width() == 16
    assert width("model.quantizer.latent_dim=24") == 24
    assert width("+quantizer.latent_dim=40", "model.quantizer.latent_dim=24") == 40


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["+quantizer.colour=red"], "quantizer.colour: fsq has no such setting"),
        (["quantizer.levels=[2]"], r"quantizer: levels=\(2,\): each must be 3 or more"),
        (["quantizer.levels=many"], "quantizer.levels: expected a list, got 'many'"),
        (["quantizer.type=fsk"], "quantizer.type: 'fsk' is unknown"),
        (["quantizer={type:mel}", "~quantizer.levels", "~quantizer.num_stages"], "quantizer.latent_dim: mel has no"),
        (["+quantizer.weights.commitment=1"], "quantizer.weights.commitment: there is no such loss .there are none"),
        (["quantizer=simvq", "~quantizer.weights.codebook"], "quantizer.weights.codebook is needed"),
        (["quantizer=simvq", "quantizer.weights.codebook=much"], "quantizer.weights.codebook: expected float"),
        (["+loss.weights.diversity=1.0"], "loss.weights.diversity: there is no such loss"),
        (["model.strides=[2]"], "model: encoder_channels must name 2 rates"),
        (["quantizer=kmeans_vq", "quantizer.norm=utterance"], "model: a model that streams needs a quantizer whose"),
        (["quantizer=kmeans_vq", "quantizer.num_groups=5"], "quantizer: latent_dim=16 is not a multiple of"),
    ],
)
def test_mistakes_are_named_with_their_path(overrides: list[str], message: str) -> None:
    chosen = [override for override in overrides if override.startswith("quantizer=") and "{" not in override]
    rest = [override for override in overrides if override not in chosen]
    places = ("output_dir=x", "data.train_dir=x", "data.dev_dir=x")
    config = compose("experiment=speech_16k_tiny", *(chosen or ["quantizer=fsq"]), *places, *rest)

    def begin() -> None:
        settings = parse(config)
        CodecTraining(build_codec(settings), settings)

    with pytest.raises(ValueError, match=f"^{message}") as told:
        begin()
    assert "\n" not in str(told.value)


def test_a_quantizer_is_not_put_into_the_model_that_a_run_starts_from(recordings: Path, tmp_path: Path) -> None:
    codec.save(tiny_codec(), tmp_path / "other", name="other@1")
    start = (f"init_from={tmp_path / 'other'}", "quantizer=fsq")
    with pytest.raises(ValueError, match=r"^quantizer: model is null, so there is nothing to put it into \(init_from"):
        parse(tiny_run(recordings, tmp_path / "run", *start, model=None))
    settings = parse(tiny_run(recordings, tmp_path / "run", *start))
    with pytest.raises(ValueError, match=r"has another architecture than model: model\.quantizer\.type is residual_vq"):
        build_codec(settings)


def test_a_run_with_a_chosen_quantizer_goes_on(recordings: Path, tmp_path: Path) -> None:
    start = ("quantizer=fsq", "quantizer.levels=[5,5]", "validation.num_quantizers=null")
    train(tiny_run(recordings, tmp_path, "trainer.max_steps=1", *start))
    resumed = train(tiny_run(recordings, tmp_path, "trainer.max_steps=2", "resume=true", *start))
    assert (resumed.trainer.global_step, resumed.codec.codebook_sizes) == (2, (25,))
    with pytest.raises(ValueError, match=r"this is not the run in .*: .*model\.quantizer\.levels was \[5, 5\]"):
        train(tiny_run(recordings, tmp_path, "resume=true", *start, "quantizer.levels=[5,5,5]"))


def test_a_run_says_that_its_quantizer_never_comes_in(
    recordings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It waits for 16 frames per entry, 800 in a step of four times 200."""
    rows = ("validation.num_quantizers=null", "quantization.start_step=0", "trainer.max_steps=1")
    cases: tuple[tuple[str, list[str], int | None], ...] = (
        ("fsq", [], None),
        ("residual_vq", ["quantizer.codebook_size=50"], None),
        ("residual_vq", ["quantizer.codebook_size=51"], 1),
        ("residual_vq", [], 20),
        ("fsq", ["quantization.start_step=1"], 1),
    )
    for number, (name, overrides, first) in enumerate(cases):
        train(tiny_run(recordings, tmp_path / str(number), *rows, f"quantizer={name}", *overrides))
        told = capsys.readouterr().err
        assert (f"before its quantizer is in use, at step {first}:" in told) == (first is not None)
        assert ("warning" in told) == (first is not None)


def test_muon_takes_the_weights_of_linear_layers_only() -> None:
    for name in ("factorized_vq", "latent_scalars", "kmeans_vq", "simvq", "split_vq"):
        model = build_codec(parse(_composed("speech_16k_tiny", name, *_small(name))))
        optimizer = MuonAdamW(model, lr=1e-3, weight_decay=0.0, betas=(0.9, 0.98))
        matrices = {id(parameter) for parameter in optimizer.param_groups[0]["params"]}
        for key, parameter in model.named_parameters():
            assert (id(parameter) in matrices) == (key.endswith(".weight") and parameter.ndim == 2), key


# Quantizers whose codes depend on more than their frame


def _utterance(latent_dim: int) -> KMeansVQConfig:
    return KMeansVQConfig(latent_dim=latent_dim, codebook_size=8, norm="utterance")


def _seanet(**changes: Any) -> SEANetConfig:
    return SEANetConfig(sample_rate_hz=16000, quantizer=_utterance(8), ratios=(4, 2), num_filters=4, **changes)


def test_models_that_stream_refuse_codes_of_a_whole_utterance() -> None:
    message = r"^a model that streams needs a quantizer .* KMeansVQ depend on others, too$"
    with pytest.raises(ValueError, match=message):
        tiny_codec(quantizer=_utterance(12))
    with pytest.raises(ValueError, match=message):
        build(_seanet())
    assert not build(_seanet(causal=False)).quantizer.is_framewise
    assert tiny_codec(quantizer=KMeansVQConfig(latent_dim=12, norm="frame")).quantizer.is_framewise


@pytest.mark.parametrize("is_framewise", [False, True])
def test_windows_wait_for_the_end_where_codes_do(is_framewise: bool) -> None:
    """Else the codes of a long recording would differ from those that the model gives."""
    quantizer = FactorizedVQConfig(latent_dim=8, num_stages=1, codebook_size=8) if is_framewise else _utterance(8)
    torch.manual_seed(0)
    rates = {"encoder_rates": (2,), "decoder_rates": (2,)}
    config = DACConfig(sample_rate_hz=16000, quantizer=quantizer, encoder_dim=4, decoder_dim=4, **rates)
    model = build(config).eval()
    audio = torch.from_numpy(speech_like(2 * 2 * FRAMES_PER_WINDOW + 100))[None, None]
    encoder = WindowedEncoder(model, 1)
    early = encoder.push(audio)
    assert (early.shape[2] > 0) == is_framewise
    codes = torch.cat([early, encoder.flush()], dim=2)
    assert torch.equal(codes, model.encode(audio).codes)


def test_an_adversary_and_a_balancer_go_with_a_quantizer_without_losses(tmp_path: Path) -> None:
    recordings = write_recordings(tmp_path / "audio", rate_hz=24000)
    config = compose(
        *("experiment=encodec_24k_tiny", "quantizer=residual_fsq", f"output_dir={tmp_path / 'run'}"),
        *(f"data.train_dir={recordings}", f"data.dev_dir={recordings}", "data.batch_size=2", "data.crop_samples=6400"),
        *("data.num_dev_items=1", "data.dev_crop_samples=6400", "data.num_workers=0", "validation.num_examples=0"),
        *("trainer.max_steps=2", "trainer.enable_progress_bar=false"),
    )
    module = train(config)
    assert (module.trainer.global_step, module.dev_num_quantizers) == (2, (2, 4, 8))


def test_settings_hold_what_comes_out() -> None:
    settings: Settings = parse(_composed("encodec_24k_tiny", "split_vq", "quantizer.weights.commitment=3.0"))
    quantizer = from_dict(settings.model, "model").quantizer
    assert quantizer == SplitVQConfig(latent_dim=16, num_stages=8, codebook_size=2048, codebook_dim=256)
    assert settings.loss.weights == {"waveform": 0.1, "mel": 2.0, "commitment": 3.0}
    assert settings.quantization.prefixes == (2, 4, 8)
