import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from codec.importers.dac import load_dac
from codec.models.dac import DAC_16KHZ, DAC_24KHZ, DAC_44KHZ, DAC_44KHZ_16KBPS, DACCodec, DACConfig
from codec.pretrained import load, save
from codec.quantizers.factorized import FactorizedVQConfig
from codec.testing import speech_like
from codec.tokens import Tokens

TINY = DACConfig(
    sample_rate_hz=8000,
    encoder_dim=4,
    encoder_rates=(2, 5),
    decoder_dim=12,
    decoder_rates=(5, 2),
    quantizer=FactorizedVQConfig(latent_dim=16, num_stages=4, codebook_size=16, codebook_dim=3),
)
# The published networks, but narrow.
THIN_16KHZ, THIN_44KHZ = (
    dataclasses.replace(
        config, encoder_dim=4, decoder_dim=48, quantizer=dataclasses.replace(config.quantizer, latent_dim=64)
    )
    for config in (DAC_16KHZ, DAC_44KHZ)
)
SPELLINGS = ["g_and_v", "parametrized", "folded"]


def _random_codec(config: DACConfig) -> DACCodec:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        codec = DACCodec(config).requires_grad_(False)
        for name, value in codec.named_parameters():
            if name.endswith("alpha"):
                value += torch.rand_like(value)
    return codec


def _audio(num_rows: int, num_samples: int) -> Tensor:
    return torch.stack([torch.from_numpy(speech_like(num_samples, seed=seed)) for seed in range(num_rows)])[:, None]


def _original(codec: DACCodec, spelling: str) -> dict[str, Tensor]:
    """The state dict that the `descript-audio-codec` package would write of the same model."""
    found: dict[str, Tensor] = {}
    for key, value in codec.state_dict().items():
        name = re.sub(r"\.layers\.(\d+)\.branch\.layers\.(\d+)\.", r".block.\1.block.\2.", key)
        name = re.sub(r"^(encoder|decoder)\.layers\.(\d+)\.layers\.(\d+)\.", r"\1.layers.\2.block.\3.", name)
        name = name.replace("encoder.layers.", "encoder.block.").replace("decoder.layers.", "decoder.model.")
        name = name.replace("quantizer.stages.", "quantizer.quantizers.")
        if name.endswith(".codebook"):
            found[f"{name}.weight"] = value
        elif name.endswith(".alpha"):
            found[name] = value.view(1, -1, 1)
        elif name.endswith(".weight") and spelling != "folded":
            # Any length of the direction gives the same weight.
            suffixes = {"g_and_v": ("weight_g", "weight_v")}.get(
                spelling, ("parametrizations.weight.original0", "parametrizations.weight.original1")
            )
            prefix = name.removesuffix("weight")
            found[prefix + suffixes[0]] = value.flatten(1).norm(dim=1).view(-1, 1, 1)
            found[prefix + suffixes[1]] = 3 * value
        else:
            found[name] = value
    return found


def _of_transformers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same state dict as `transformers` would write it."""
    renamed = {}
    num_rates = sum(bool(re.fullmatch(r"encoder\.block\.\d+\.block\.4\.bias", key)) for key in tensors)
    for key, value in tensors.items():
        name = re.sub(r"^(\w+)\.(block|model)\.", r"\1.", key)
        if match := re.fullmatch(r"(encoder|decoder)\.(\d+)\.(?:block\.(\d+)\.)?(?:block\.(\d+)\.)?(.*)", name):
            side, outer, inner, part, rest = match.groups()
            if inner is None:
                name = {"0": "conv1", str(num_rates + 1): "snake1", str(num_rates + 2): "conv2"}[outer]
            else:
                name = f"block.{int(outer) - 1}."
                first_unit = 0 if side == "encoder" else 2
                own = {"3": "snake1", "4": "conv1"} if side == "encoder" else {"0": "snake1", "1": "conv_t1"}
                if part is None:
                    name += own[inner]
                else:
                    unit = int(inner) - first_unit + 1
                    name += f"res_unit{unit}." + ("snake1", "conv1", "snake2", "conv2")[int(part)]
            name = f"{side}.{name}.{rest}"
        renamed[name] = value
    return renamed


def _kwargs(config: DACConfig, **changes: Any) -> dict[str, Any]:
    values = {
        "encoder_dim": config.encoder_dim,
        "encoder_rates": list(config.encoder_rates),
        "latent_dim": config.quantizer.latent_dim,
        "decoder_dim": config.decoder_dim,
        "decoder_rates": list(config.decoder_rates),
        "n_codebooks": config.quantizer.num_stages,
        "codebook_size": config.quantizer.codebook_size,
        "codebook_dim": config.quantizer.codebook_dim,
        "quantizer_dropout": 0.5,
        "sample_rate": config.sample_rate_hz,
    }
    return values | changes


def _transformers_config(config: DACConfig, **changes: Any) -> dict[str, Any]:
    values = {
        "model_type": "dac",
        "encoder_hidden_size": config.encoder_dim,
        "downsampling_ratios": list(config.encoder_rates),
        "decoder_hidden_size": config.decoder_dim,
        "upsampling_ratios": list(config.decoder_rates),
        "hidden_size": config.quantizer.latent_dim,
        "n_codebooks": config.quantizer.num_stages,
        "codebook_size": config.quantizer.codebook_size,
        "codebook_dim": config.quantizer.codebook_dim,
        "sampling_rate": config.sample_rate_hz,
    }
    return values | changes


def _assert_same_weights(codec: DACCodec, expected: DACCodec) -> None:
    theirs = expected.state_dict()
    assert codec.config == expected.config
    assert not codec.training
    assert not any(parameter.requires_grad for parameter in codec.parameters())
    for key, value in codec.state_dict().items():
        torch.testing.assert_close(value, theirs[key], rtol=1e-6, atol=0)  # g * v / |v| rounds


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_files_of_either_layout(tmp_path: Path, spelling: str) -> None:
    expected = _random_codec(TINY)
    tensors = _original(expected, spelling)
    save_file(tensors, tmp_path / "original.safetensors")
    _assert_same_weights(load_dac(tmp_path / "original.safetensors", config=TINY), expected)
    torch.save({"state_dict": tensors, "metadata": {"kwargs": _kwargs(TINY)}}, tmp_path / "weights.pth")
    _assert_same_weights(load_dac(tmp_path / "weights.pth", allow_pickle=True), expected)
    folder = tmp_path / "transformers"
    folder.mkdir()
    save_file(_of_transformers(tensors), folder / "model.safetensors")
    _assert_same_weights(load_dac(folder / "model.safetensors", config=TINY), expected)
    (folder / "config.json").write_text(json.dumps(_transformers_config(TINY)))
    _assert_same_weights(load_dac(folder), expected)


def test_pickles_are_read_on_request_only(tmp_path: Path) -> None:
    expected = _random_codec(TINY)
    path = tmp_path / "weights.pth"
    torch.save(_original(expected, "g_and_v"), path)
    with pytest.raises(ValueError, match=r"if you trust it, allow_pickle=True \(--allow-pickle\) reads it"):
        load_dac(path, config=TINY)
    _assert_same_weights(load_dac(path, config=TINY, allow_pickle=True), expected)
    folder = tmp_path / "transformers"
    folder.mkdir()
    torch.save(_of_transformers(_original(expected, "parametrized")), folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(_transformers_config(TINY)))
    _assert_same_weights(load_dac(folder, allow_pickle=True), expected)


def test_pickles_run_no_code(tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
            return Path.write_text, (tmp_path / "harm", "done")  # type: ignore[return-value]

    torch.save({"state_dict": {}, "metadata": Harmful()}, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match=r"bad\.pth cannot be read"):
        load_dac(tmp_path / "bad.pth", allow_pickle=True)
    assert not (tmp_path / "harm").exists()


def test_what_a_file_says_of_itself_decides(tmp_path: Path) -> None:
    """What need not be said follows from the rest, and what cannot be contradicted is not taken from the caller."""
    tensors = _original(_random_codec(TINY), "g_and_v")
    path = tmp_path / "weights.pth"
    torch.save(
        {"state_dict": tensors, "metadata": {"kwargs": _kwargs(TINY, latent_dim=None, codebook_dim=[3] * 4)}}, path
    )
    assert load_dac(path, allow_pickle=True).config == TINY
    with pytest.raises(ValueError, match=r"weights\.pth says what model it holds, so config= cannot be given"):
        load_dac(path, config=TINY, allow_pickle=True)
    data = _transformers_config(TINY)
    del data["hidden_size"]
    (tmp_path / "config.json").write_text(json.dumps(data))
    save_file(_of_transformers(tensors), tmp_path / "model.safetensors")
    assert load_dac(tmp_path).config == TINY
    with pytest.raises(ValueError, match="says what model it holds, so config= cannot be given"):
        load_dac(tmp_path, config=TINY)


def test_bare_tensors_are_taken_for_the_published_model_with_as_many_codebooks(tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, quantizer=dataclasses.replace(TINY.quantizer, num_stages=9))
    save_file(_original(_random_codec(config), "folded"), tmp_path / "nine.safetensors")
    with pytest.raises(ValueError, match=r"missing .*'encoder.layers.6.weight'\], unknown"):  # for there are four rates
        load_dac(tmp_path / "nine.safetensors")
    save_file(_original(_random_codec(TINY), "folded"), tmp_path / "four.safetensors")
    with pytest.raises(ValueError, match="has 4 codebooks, as no published DAC has; say what it is with config="):
        load_dac(tmp_path / "four.safetensors")


def test_a_saved_import_loads(tmp_path: Path) -> None:
    save_file(_original(_random_codec(TINY), "g_and_v"), tmp_path / "original.safetensors")
    codec = load_dac(tmp_path / "original.safetensors", config=TINY)
    save(codec, tmp_path / "ours", name="tiny@1", dtype="float32")
    audio = _audio(1, 1000)
    assert torch.equal(load(tmp_path / "ours").encode(audio).codes, codec.encode(audio).codes)


def _without(key: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.pop(key)


def _with(key: str, *shape: int) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({key: torch.zeros(shape)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without("encoder.block.0.bias"), r"missing \['encoder.layers.0.bias'\], unknown \[\]"),
        (_without("encoder.block.0.weight_g"), "missing the length of encoder.layers.0.weight"),
        (_without("quantizer.quantizers.1.in_proj.weight_v"), "missing the direction of quantizer.stages.1.in_proj"),
        (_without("decoder.model.3.alpha"), r"missing \['decoder.layers.3.alpha'\]"),
        (_without("quantizer.quantizers.3.codebook.weight"), r"missing \['quantizer.stages.3.codebook'\]"),
        (
            _with("quantizer.quantizers.4.codebook.weight", 16, 3),
            r"unknown \['quantizer.quantizers.4.codebook.weight'\]",
        ),
        (_with("encoder.block.9.bias", 4), r"unknown \['encoder.block.9.bias'\]"),
        (_with("encoder.block.0.weight", 4, 1, 7), "is there with and without weight norm"),
        (_with("encoder.layers.0.bias", 4), "are the same tensor"),
        (_with("encoder.block.0.bias", 5), r"encoder.layers.0.bias is \(5,\), the config asks for \(4,\)"),
        (_with("encoder.block.1.block.3.alpha", 1, 5, 1), r"alpha is \(5,\), the config asks for \(4,\)"),
        (_with("encoder.block.0.weight_g", 3, 1, 1), "has 3 lengths for 4 directions"),
        (_with("encoder.block.0.weight_v", 4, 1, 7), "encoder.layers.0.weight holds NaN"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    tensors = _original(_random_codec(TINY), "g_and_v")
    change(tensors)
    save_file(tensors, tmp_path / "original.safetensors")
    with pytest.raises(ValueError, match=message):
        load_dac(tmp_path / "original.safetensors", config=TINY)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "encodec"}, "does not describe a DAC model"),
        ({"encoder_hidden_size": "4"}, r"config\.json\.encoder_dim: expected int, got '4'"),
        ({"hidden_size": None, "downsampling_ratios": 10}, r"config\.json: object of type 'int' has no len"),
        ({"downsampling_ratios": 10}, r"config\.json\.encoder_rates: expected a list, got 10"),
        ({"downsampling_ratios": [2, 4]}, r"make 8 samples per frame, decoder_rates=\(5, 2\) 10"),
        ({"codebook_dim": [3, 3, 4, 3]}, "is not the same in all stages, which is not supported"),
        ({"n_codebooks": 5}, r"missing \['quantizer.stages.4.codebook'"),
        ({"codebook_size": 32}, "the config asks for"),
    ],
)
def test_configurations_that_do_not_fit_are_value_errors(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    save_file(_of_transformers(_original(_random_codec(TINY), "folded")), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(_transformers_config(TINY, **changes)))
    with pytest.raises(ValueError, match=message):
        load_dac(tmp_path)


def test_sources_that_are_no_checkpoints_are_value_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no file"):
        load_dac(tmp_path / "nothing.safetensors")
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
        load_dac(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "dac", "codebook_dim": 8, "sampling_rate": 8000}')
    with pytest.raises(ValueError, match=r"config\.json: codebook_size, .*, upsampling_ratios missing"):
        load_dac(tmp_path)
    (tmp_path / "noise.safetensors").write_bytes(b"noise")
    with pytest.raises(ValueError, match=r"noise\.safetensors cannot be read"):
        load_dac(tmp_path / "noise.safetensors")
    for content, message in (
        ([torch.ones(1)], "not a mapping of names to tensors"),
        ({"state_dict": {}, "metadata": {}}, "has a state_dict, but no metadata with kwargs"),
        ({"state_dict": 3, "metadata": {"kwargs": _kwargs(TINY)}}, "not a mapping of names to tensors"),
    ):
        torch.save(content, tmp_path / "odd.pth")
        with pytest.raises(ValueError, match=message):
            load_dac(tmp_path / "odd.pth", allow_pickle=True)


# Against the packages themselves. They convolve in other products, and so round otherwise: some 1e-7 of the largest
# value per layer, and Snake passes on what its argument has, not its result. Over thirty layers that comes to some 1e-5
# of the peak; deeper networks are compared in float64, where it is nothing. With weight norm, what stays there is that
# ours is folded into float32 weights.
FLOAT32_TOLERANCE = 1e-5
FLOAT64_TOLERANCE = 1e-11
FOLDED_TOLERANCE = 1e-5
LENGTHS = [10, 40, 90, 600, 6000]


def _liven(model: Any, audio: Tensor) -> None:
    """Make random weights behave like trained ones: latents, and what the stages see of them, that vary.

    Both packages begin with weights near zero, which leave little but biases.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith(("alpha", "codebook.weight")):
                value.copy_(torch.randn(value.shape, generator=generator).abs() + 0.1 if "alpha" in name else value)
                continue
            noise = torch.randn(value.shape, generator=generator)
            if name.endswith(("bias", "weight_g", "original0")):
                value.copy_(0.02 * noise if name.endswith("bias") else 0.6 + 0.1 * noise)
            else:
                value.copy_(0.6 * noise * value[0].numel() ** -0.5)
        latents = model.encoder(audio)
        for stage in model.quantizer.quantizers:
            seen = stage.in_proj(latents).transpose(1, 2).flatten(0, 1)
            entries = seen[torch.randint(len(seen), (len(stage.codebook.weight),), generator=generator)]
            noise = torch.randn(entries.shape, generator=generator)
            stage.codebook.weight.copy_(entries + 0.3 * seen.std(0) * noise)
            latents = latents - stage.out_proj(stage.decode_latents(stage.in_proj(latents))[0])
        quantized = model.quantizer(model.encoder(audio))[0]
        last = [layer for layer in model.decoder.modules() if isinstance(layer, torch.nn.Conv1d)][-1]
        while not 0.2 < (peak := model.decoder(quantized).abs().max()) < 0.9:  # louder, tanh would hide differences
            for value in (last.bias, last.weight_g if hasattr(last, "weight_g") else last.weight):
                value *= 1.5 if peak < 0.5 else 0.5


def _assert_same_codes(codec: DACCodec, codes: Tensor, expected: Tensor, latents: Tensor) -> None:
    """Codes equal the `expected` wherever the margin allows, which must be nearly everywhere; see `margins.py`.

    Distances are those of directions, in float64, along the expected codes.
    """
    rest, margins = latents.double(), []
    for row, stage in enumerate(codec.quantizer.stages):  # type: ignore[arg-type]
        double = [stage.in_proj, stage.out_proj]
        maps = [(layer.weight[:, :, 0].double(), layer.bias.double()[:, None]) for layer in double]
        codebook = stage.codebook.double()
        seen = (maps[0][0] @ rest + maps[0][1]).transpose(1, 2)
        distances = 2 - 2 * F.normalize(seen, dim=2) @ F.normalize(codebook, dim=1).t()
        best, second = distances.topk(2, dim=2, largest=False).values.unbind(2)
        margins.append((second - best) / best)
        rest = rest - maps[1][0] @ codebook[expected[:, row]].transpose(1, 2) - maps[1][1]
    is_clear = (torch.stack(margins, dim=1) > 1e-5).cumprod(1).bool()
    assert is_clear.float().mean() > 0.95
    assert torch.equal(codes[is_clear], expected[is_clear])
    assert len(expected[:, 0].unique()) > min(len(codebook), expected[:, 0].numel()) // 4


def _check_parity(
    codec: DACCodec, expected: Tensor, heard: Tensor, audio: Tensor, *, tolerance: float = FLOAT32_TOLERANCE
) -> None:
    """Codes and audio of the peer against ours, of a whole number of frames."""
    num_rows, _, num_samples = audio.shape
    tokens = codec.encode(audio)
    _assert_same_codes(codec, tokens.codes, expected, codec.analyze(audio))
    ours = codec.decode(Tokens(expected, torch.full((num_rows,), num_samples), ""))
    loudest, num_known = float(heard.abs().max()), heard.shape[2]
    assert 0.01 < loudest < 1.0
    assert 0 <= num_samples - num_known < 10
    torch.testing.assert_close(ours[:, :, :num_known], heard, rtol=0, atol=tolerance * loudest)
    assert not ours[:, :, num_known:].any()


def _values_for_transformers(config: DACConfig) -> dict[str, Any]:
    computed = ("model_type", "upsampling_ratios", "hidden_size")
    return {key: value for key, value in _transformers_config(config).items() if key not in computed}


def _transformers_peer(config: DACConfig) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    peer = transformers.DacModel(transformers.DacConfig(**_values_for_transformers(config))).eval()
    _liven(peer, _audio(2, 100 * config.hop_length))
    return peer


def _package_peer(config: DACConfig) -> Any:
    """The `descript-audio-codec` package's model of the same shape, with random weights."""
    dac = pytest.importorskip("dac")
    torch.manual_seed(0)
    peer = dac.DAC(**_kwargs(config)).eval()
    _liven(peer, _audio(2, 100 * config.hop_length))
    return peer


# Of packages of that time: their own `torch.jit.script` and weight norm, and what they import of others.
_old = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.mark.peer
@pytest.mark.parametrize("weight_norm", [False, True])
@torch.no_grad()
def test_parity_with_transformers(tmp_path: Path, weight_norm: bool) -> None:
    peer = _transformers_peer(TINY)
    if weight_norm:
        peer.apply_weight_norm()
    peer.save_pretrained(tmp_path)
    codec = load_dac(tmp_path)
    assert codec.config == TINY
    for num_samples in LENGTHS:
        audio = _audio(3, num_samples)
        codes = peer.encode(audio).audio_codes
        _check_parity(codec, codes, peer.decode(audio_codes=codes).audio_values[:, None], audio)


@pytest.mark.peer
@pytest.mark.parametrize("config", [THIN_16KHZ, THIN_44KHZ], ids=["16khz", "44khz"])
@torch.no_grad()
def test_parity_with_transformers_at_published_rates(tmp_path: Path, config: DACConfig) -> None:
    peer = _transformers_peer(config)
    peer.save_pretrained(tmp_path)
    peer, codec = peer.double(), load_dac(tmp_path).double()
    assert codec.config == config
    audio = _audio(1, 60 * config.hop_length).double()
    codes = peer.encode(audio).audio_codes
    heard = peer.decode(audio_codes=codes).audio_values[:, None]
    assert audio.shape[2] - heard.shape[2] == (8 if config is THIN_16KHZ else 0)
    _check_parity(codec, codes, heard, audio, tolerance=FLOAT64_TOLERANCE)


@_old
@pytest.mark.peer
@torch.no_grad()
def test_parity_with_the_package(tmp_path: Path) -> None:
    peer = _package_peer(TINY)
    peer.save(tmp_path / "weights.pth", package=False)
    codec = load_dac(tmp_path / "weights.pth", allow_pickle=True)
    assert codec.config == TINY
    for num_samples in LENGTHS:
        audio = _audio(3, num_samples)
        latents, codes, *_ = peer.encode(audio)
        _check_parity(codec, codes, peer.decode(latents), audio)
        for num_quantizers in (1, 3):
            latents, codes, *_ = peer.encode(audio, num_quantizers)
            assert torch.equal(codes, peer.encode(audio)[1][:, :num_quantizers])
            decoded = codec.quantizer.decode(codes)
            # Sums of the same addends; the weights of theirs were normalised in another order.
            torch.testing.assert_close(decoded, latents, rtol=0, atol=FLOAT32_TOLERANCE * float(latents.abs().max()))


@_old
@pytest.mark.peer
@pytest.mark.parametrize("config", [THIN_16KHZ, THIN_44KHZ], ids=["16khz", "44khz"])
@torch.no_grad()
def test_parity_with_the_package_at_published_rates(tmp_path: Path, config: DACConfig) -> None:
    peer = _package_peer(config)
    peer.save(tmp_path / "weights.pth", package=False)
    peer, codec = peer.double(), load_dac(tmp_path / "weights.pth", allow_pickle=True).double()
    assert codec.config == config
    audio = _audio(1, 60 * config.hop_length).double()
    latents, codes, *_ = peer.encode(audio)
    _check_parity(codec, codes, peer.decode(latents), audio, tolerance=FOLDED_TOLERANCE)


# The published models by names and shapes of their tensors only: values would take minutes and gigabytes.


@_old
@pytest.mark.peer
@pytest.mark.parametrize("config", [DAC_16KHZ, DAC_24KHZ, DAC_44KHZ, DAC_44KHZ_16KBPS])
def test_the_published_models_of_the_package_have_our_tensors(config: DACConfig) -> None:
    dac = pytest.importorskip("dac")
    with torch.device("meta"):
        expected = _original(DACCodec(config), "g_and_v")
        found = dac.DAC(**_kwargs(config)).state_dict()
    assert {key: value.shape for key, value in found.items()} == {key: value.shape for key, value in expected.items()}


@pytest.mark.peer
@pytest.mark.parametrize("config", [DAC_16KHZ, DAC_24KHZ, DAC_44KHZ])  # the other's latents it cannot configure
def test_the_published_models_of_transformers_have_our_tensors(config: DACConfig) -> None:
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        expected = _of_transformers(_original(DACCodec(config), "folded"))
        found = transformers.DacModel(transformers.DacConfig(**_values_for_transformers(config))).state_dict()
    assert {key: value.shape for key, value in found.items()} == {key: value.shape for key, value in expected.items()}


@_old
@pytest.mark.peer
def test_the_losses_are_those_of_the_package() -> None:
    """In value; what gradients they have is another matter, see `FactorizedVQ`."""
    peer, codec = _package_peer(TINY), _random_codec(TINY)
    codec.quantizer.requires_grad_(True)
    with torch.no_grad():
        for ours, theirs in zip(codec.quantizer.stages, peer.quantizer.quantizers, strict=True):  # type: ignore[arg-type]
            ours.codebook.copy_(theirs.codebook.weight)
            for name in ("in_proj", "out_proj"):
                getattr(ours, name).weight.copy_(getattr(theirs, name).weight)
                getattr(ours, name).bias.copy_(getattr(theirs, name).bias)
    latents = peer.encoder(_audio(3, 600)).detach()
    for num_quantizers in (1, 4):
        *_, commitment, codebook = peer.quantizer(latents, num_quantizers)
        losses = codec.quantizer(latents, num_quantizers=num_quantizers).losses
        # Means of float32 squares in another order.
        torch.testing.assert_close(losses["commitment"], commitment, rtol=1e-5, atol=0)
        torch.testing.assert_close(losses["codebook"], codebook, rtol=1e-5, atol=0)
