"""SpeechTokenizer and DM-Codec: their layout, written down here by hand, and the package where it is installed."""

import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import test_import_encodec as encodec
import torch
import torch.nn.functional as F
from commands import assert_wav, refusal, succeed, write_wav
from margins import assert_same_codes
from omegaconf import OmegaConf
from runs import CONFIGS
from safetensors.torch import save_file
from torch import Tensor, nn

from codec import windows
from codec.config import from_dict
from codec.importers.checkpoint import renamed
from codec.importers.detect import detect_kind, load_checkpoint
from codec.importers.encodec import RENAMINGS
from codec.importers.speechtokenizer import SPEECHTOKENIZER_16KHZ, load_speechtokenizer
from codec.models.seanet import SEANetCodec, SEANetConfig
from codec.quantizers.residual import ResidualVQConfig
from codec.streaming import StreamingDecoder, StreamingEncoder
from codec.testing import speech_like
from codec.tokens import Tokens

pytest_plugins = ["commands"]

# Of their settings, those that describe the network, and one that does not.
PUBLISHED: dict[str, Any] = {
    "n_filters": 64,
    "strides": [8, 5, 4, 2],
    "dimension": 1024,
    "semantic_dimension": 768,
    "bidirectional": True,
    "dilation_base": 2,
    "residual_kernel_size": 3,
    "n_residual_layers": 1,
    "lstm_layers": 2,
    "activation": "ELU",
    "codebook_size": 1024,
    "n_q": 8,
    "sample_rate": 16000,
    "learning_rate": 1e-4,
}
TINY = PUBLISHED | {
    "n_filters": 4,
    "strides": [3, 2],
    "dimension": 6,
    "semantic_dimension": 5,
    "codebook_size": 16,
    "n_q": 4,
}
SNAKE = TINY | {"activation": "Snake"}
TINY_CONFIG = SEANetConfig(
    sample_rate_hz=16000,
    ratios=(3, 2),
    num_filters=4,
    bidirectional_lstm=True,
    causal=False,
    pad_mode="reflect",
    quantizer=ResidualVQConfig(latent_dim=6, num_stages=4, codebook_size=16),
)
HOP = 6
# Weight norm rounds otherwise than folded weights do, some ten layers deep.
RELATIVE_TOLERANCE = 1e-5


def _shapes(settings: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The names and shapes of the published state dict, for one residual unit per stride."""
    width, strides, dim = settings["n_filters"], settings["strides"], settings["dimension"]
    kernel, is_snake = settings["residual_kernel_size"], settings["activation"] == "Snake"
    found: dict[str, tuple[int, ...]] = {}

    def activation(name: str, channels: int) -> None:
        if is_snake:
            found[f"{name}.alpha"] = (1, channels, 1)

    def convolution(name: str, *shape: int, num_outputs: int = 0) -> None:
        found[f"{name}.bias"] = (num_outputs or shape[0],)
        found[f"{name}.weight_g"] = (shape[0], 1, 1)
        found[f"{name}.weight_v"] = shape

    def unit(name: str, channels: int) -> None:
        activation(f"{name}.block.0", channels)
        convolution(f"{name}.block.1.conv.conv", channels // 2, channels, kernel)
        activation(f"{name}.block.2", channels // 2)
        convolution(f"{name}.block.3.conv.conv", channels, channels // 2, 1)
        convolution(f"{name}.shortcut.conv.conv", channels, channels, 1)

    def lstm(name: str, channels: int, directions: tuple[str, ...]) -> None:
        for layer in range(settings["lstm_layers"]):
            for direction in directions:
                inputs = channels * len(directions) if layer else channels
                found[f"{name}.lstm.weight_ih_l{layer}{direction}"] = (4 * channels, inputs)
                found[f"{name}.lstm.weight_hh_l{layer}{direction}"] = (4 * channels, channels)
                found[f"{name}.lstm.bias_ih_l{layer}{direction}"] = (4 * channels,)
                found[f"{name}.lstm.bias_hh_l{layer}{direction}"] = (4 * channels,)

    convolution("encoder.model.0.conv.conv", width, 1, 7)
    for i, stride in enumerate(reversed(strides)):
        unit(f"encoder.model.{3 * i + 1}", width)
        activation(f"encoder.model.{3 * i + 2}", width)
        convolution(f"encoder.model.{3 * i + 3}.conv.conv", 2 * width, width, 2 * stride)
        width *= 2
    after = 3 * len(strides) + 1
    lstm(f"encoder.model.{after}", width, ("", "_reverse"))
    activation(f"encoder.model.{after + 1}", 2 * width)
    convolution(f"encoder.model.{after + 2}.conv.conv", dim, 2 * width, 7)
    if dim != settings["semantic_dimension"]:
        found["transform.weight"] = (settings["semantic_dimension"], dim)
        found["transform.bias"] = (settings["semantic_dimension"],)
    for stage in range(settings["n_q"]):
        size = settings["codebook_size"]
        parts = {"inited": (1,), "cluster_size": (size,), "embed": (size, dim), "embed_avg": (size, dim)}
        found |= {f"quantizer.vq.layers.{stage}._codebook.{part}": shape for part, shape in parts.items()}
    convolution("decoder.model.0.conv.conv", width, dim, 7)
    lstm("decoder.model.1", width, ("",))
    for i, stride in enumerate(strides):
        activation(f"decoder.model.{3 * i + 2}", width)
        convolution(f"decoder.model.{3 * i + 3}.convtr.convtr", width, width // 2, 2 * stride, num_outputs=width // 2)
        width //= 2
        unit(f"decoder.model.{3 * i + 4}", width)
    activation(f"decoder.model.{after + 1}", width)
    convolution(f"decoder.model.{after + 2}.conv.conv", 1, width, 7)
    return found


def _tensors(settings: dict[str, Any], spelling: str = "g_and_v") -> dict[str, Tensor]:
    """A checkpoint of random weights; its codebooks hold what there is to code, so that codes vary."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in _shapes(settings).items():
        value = torch.randn(shape, generator=generator) * (0.5 if len(shape) > 1 else 0.1)
        value = value.abs() + 1.0 if name.endswith((".alpha", "weight_g")) else value
        tensors[name] = torch.ones(1) if name.endswith("inited") else value
    rest = _Reference(tensors, settings).latents(_audio(1, 12000))[0].T
    for name, shape in _shapes(settings).items():
        if name.endswith(".embed"):
            tensors[name] = rest[torch.randperm(len(rest), generator=generator)[: shape[0]]]
            rest = rest - tensors[name][torch.cdist(rest, tensors[name]).argmin(1)]
    if spelling == "folded":
        lengths = [name for name in tensors if name.endswith("weight_g")]
        for name in lengths:
            direction = tensors.pop(f"{name[:-1]}v")
            norm = direction.square().sum((1, 2), keepdim=True).sqrt()
            tensors[name.removesuffix("_g")] = tensors.pop(name) * direction / norm
    if spelling == "parametrized":
        names = {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"}
        for theirs, ours in names.items():
            tensors = {name.replace(theirs, ours): value for name, value in tensors.items()}
    return tensors


def _folder(path: Path, settings: dict[str, Any], tensors: dict[str, Tensor], name: str = "model.safetensors") -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(settings))
    save_file(tensors, path / name)
    return path


def _audio(num_rows: int, num_samples: int) -> Tensor:
    return torch.stack([torch.from_numpy(speech_like(num_samples, seed=seed)) for seed in range(num_rows)])[:, None]


class _Reference:
    """What a checkpoint computes, from its tensors by their published names and nothing of ours."""

    def __init__(self, tensors: dict[str, Tensor], settings: dict[str, Any]) -> None:
        self.tensors, self.strides = tensors, settings["strides"]
        self.codebooks = torch.stack([value for name, value in tensors.items() if name.endswith(".embed")])

    def latents(self, audio: Tensor) -> Tensor:
        x, at = self._conv(audio, "encoder.model.0.conv.conv"), 1
        for stride in reversed(self.strides):
            x = self._activated(self._unit(x, f"encoder.model.{at}"), f"encoder.model.{at + 1}")
            x = self._conv(x, f"encoder.model.{at + 2}.conv.conv", stride)
            at += 3
        x = self._lstm(x, f"encoder.model.{at}.lstm.")
        return self._conv(self._activated(x, f"encoder.model.{at + 1}"), f"encoder.model.{at + 2}.conv.conv")

    def codes(self, latents: Tensor) -> Tensor:
        rest, found = latents.transpose(1, 2), []
        for codebook in self.codebooks:
            found.append((rest[:, :, None] - codebook).square().sum(3).argmin(2))
            rest = rest - codebook[found[-1]]
        return torch.stack(found, dim=1)

    def audio(self, codes: Tensor) -> Tensor:
        x = sum(codebook[row] for codebook, row in zip(self.codebooks, codes.unbind(1), strict=True))
        assert isinstance(x, Tensor)
        x = self._lstm(self._conv(x.transpose(1, 2), "decoder.model.0.conv.conv"), "decoder.model.1.lstm.")
        at = 2
        for stride in self.strides:
            x, name = self._activated(x, f"decoder.model.{at}"), f"decoder.model.{at + 1}.convtr.convtr"
            y = F.conv_transpose1d(x, self._weight(name), self.tensors[f"{name}.bias"], stride=stride)
            x = self._unit(y[:, :, (stride + 1) // 2 :][:, :, : stride * x.shape[2]], f"decoder.model.{at + 2}")
            at += 3
        return self._conv(self._activated(x, f"decoder.model.{at}"), f"decoder.model.{at + 1}.conv.conv")

    def _weight(self, name: str) -> Tensor:
        length, direction = self.tensors[f"{name}.weight_g"], self.tensors[f"{name}.weight_v"]
        return length * direction / direction.square().sum((1, 2), keepdim=True).sqrt()

    def _conv(self, x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight = self._weight(name)
        padded = weight.shape[2] - stride
        x = F.pad(x, (padded - padded // 2, padded // 2 + -x.shape[2] % stride), "reflect")
        return F.conv1d(x, weight, self.tensors[f"{name}.bias"], stride=stride)

    def _activated(self, x: Tensor, name: str) -> Tensor:
        alpha = self.tensors.get(f"{name}.alpha")
        return F.elu(x) if alpha is None else x + (alpha * x).sin().square() / alpha

    def _unit(self, x: Tensor, name: str) -> Tensor:
        y = self._conv(self._activated(x, f"{name}.block.0"), f"{name}.block.1.conv.conv")
        y = self._conv(self._activated(y, f"{name}.block.2"), f"{name}.block.3.conv.conv")
        return y + self._conv(x, f"{name}.shortcut.conv.conv")

    def _lstm(self, x: Tensor, prefix: str) -> Tensor:
        weights = {name.removeprefix(prefix): value for name, value in self.tensors.items() if name.startswith(prefix)}
        num_directions = 2 if "weight_ih_l0_reverse" in weights else 1
        network = nn.LSTM(x.shape[1], x.shape[1], len(weights) // 4 // num_directions, bidirectional=num_directions > 1)
        network.load_state_dict(weights)
        rows = x.permute(2, 0, 1)
        return (network(rows)[0] + torch.cat([rows] * num_directions, dim=2)).permute(1, 2, 0)


@pytest.mark.parametrize("settings", [TINY, SNAKE], ids=["elu", "snake"])
@torch.no_grad()
def test_it_computes_what_was_published(tmp_path: Path, settings: dict[str, Any]) -> None:
    tensors = _tensors(settings)
    codec = load_speechtokenizer(_folder(tmp_path / "source", settings, tensors))
    reference = _Reference(tensors, settings)
    for num_samples in (60 * HOP, 60 * HOP + 1, 61 * HOP - 1, 1003):
        audio = _audio(2, num_samples)
        latents = reference.latents(audio)
        expected = reference.codes(latents)
        tokens = codec.encode(audio)
        assert tokens.codes.shape == expected.shape == (2, 4, -(-num_samples // HOP))
        assert min(len(row.unique()) for row in expected[0]) > 8
        assert_same_codes(tokens.codes, expected, latents, codec.quantizer.codebooks)
        heard = reference.audio(expected)[:, :, :num_samples]
        given = Tokens(expected, torch.tensor([num_samples] * 2), "")
        loudest = float(heard.abs().max())
        torch.testing.assert_close(codec.decode(given), heard, rtol=0, atol=RELATIVE_TOLERANCE * loudest)


def test_the_published_network_has_the_published_size() -> None:
    with torch.device("meta"):
        codec = SEANetCodec(SPEECHTOKENIZER_16KHZ)
        theirs = {name: torch.empty(shape) for name, shape in _shapes(PUBLISHED).items()}
    folded = {name.removesuffix("_v"): value for name, value in theirs.items() if not name.endswith("_g")}
    parameters = {name: value for name, value in theirs.items() if "_codebook" not in name}
    assert sum(value.numel() for value in parameters.values()) == 103_675_586  # 103.68 M, as the package counts them
    lengths = sum(value.numel() for name, value in parameters.items() if name.endswith("weight_g"))
    transform = 768 * 1024 + 768
    assert sum(value.numel() for value in codec.parameters()) == 103_675_586 - lengths - transform
    assert codec.quantizer.codebooks.shape == (8, 1024, 1024)
    assert theirs["encoder.model.15.conv.conv.weight_v"].shape == (1024, 2048, 7)
    assert theirs["decoder.model.13.block.3.conv.conv.weight_v"].shape == (64, 32, 1)
    ours, _ = renamed(folded, RENAMINGS, Path())
    networks = {name: value.shape for name, value in codec.state_dict().items() if not name.startswith("quantizer.")}
    wanted = {name: value.shape for name, value in ours.items() if not name.startswith(("quantizer.", "transform."))}
    assert networks == wanted
    assert (codec.hop_length, codec.bitrate_bps(), codec.num_frames_for(48001)) == (320, 4000, 151)


def test_the_model_in_the_configs_is_the_published_one() -> None:
    values = OmegaConf.to_container(OmegaConf.load(CONFIGS / "model" / "speechtokenizer_16k.yaml"))
    assert from_dict(values, "model") == SPEECHTOKENIZER_16KHZ


# Files


@pytest.mark.parametrize("spelling", encodec.SPELLINGS)
def test_every_file_that_the_projects_write(tmp_path: Path, spelling: str) -> None:
    tensors = _tensors(TINY, spelling)
    expected = load_speechtokenizer(_folder(tmp_path / "folder", TINY, _tensors(TINY)))
    assert expected.config == TINY_CONFIG
    package = {"generator": tensors, "discriminators": {"mpd": {"bias": torch.ones(1)}}, "best_dev_mel_loss": 0.5}
    files: dict[str, object] = {
        "SpeechTokenizer.pt": tensors,
        "Model_best_dev.pt": tensors,
        "ckpt.dev": tensors,
        "ModelTrainer_00001000": package,
    }
    save_file(tensors, tmp_path / "SpeechTokenizer.safetensors")
    found = [load_checkpoint(tmp_path / "SpeechTokenizer.safetensors")]
    for name, content in files.items():
        folder = tmp_path / f"of_{name}"
        folder.mkdir()
        torch.save(content, folder / name)
        (folder / "config.json").write_text(json.dumps(TINY))
        assert detect_kind(folder / name, allow_pickle=True) == detect_kind(folder) == "speechtokenizer"
        found += [load_checkpoint(source, allow_pickle=True) for source in (folder, folder / name)]
    for codec in found:
        assert codec.config == expected.config
        assert not codec.training
        assert not any(parameter.requires_grad for parameter in codec.parameters())
        for name, value in codec.state_dict().items():
            torch.testing.assert_close(value, expected.state_dict()[name], rtol=1e-6, atol=0)  # g * v / |v| rounds


def test_every_tensor_goes_where_it_belongs(tmp_path: Path) -> None:
    tensors = _tensors(TINY, "folded")
    codec = load_speechtokenizer(_folder(tmp_path / "folder", TINY, tensors))
    ours = codec.state_dict()
    for name, theirs in {
        "encoder.layers.0.weight": "encoder.model.0.conv.conv.weight",
        "encoder.layers.1.branch.layers.3.weight": "encoder.model.1.block.3.conv.conv.weight",
        "encoder.layers.4.shortcut.layers.0.bias": "encoder.model.4.shortcut.conv.conv.bias",
        "encoder.layers.7.lstm.weight_ih_l1_reverse": "encoder.model.7.lstm.weight_ih_l1_reverse",
        "encoder.layers.9.weight": "encoder.model.9.conv.conv.weight",
        "decoder.layers.1.lstm.bias_hh_l1": "decoder.model.1.lstm.bias_hh_l1",
        "decoder.layers.3.weight": "decoder.model.3.convtr.convtr.weight",
        "decoder.layers.9.bias": "decoder.model.9.conv.conv.bias",
    }.items():
        assert torch.equal(ours[name], tensors[theirs]), name
    for stage, codebook in enumerate(ours["quantizer.codebooks"]):
        assert torch.equal(codebook, tensors[f"quantizer.vq.layers.{stage}._codebook.embed"])


@pytest.mark.parametrize(
    "changes",
    [
        {"strides": [2, 3]},
        {"strides": [5, 2, 4, 3], "n_filters": 2},  # layers of more than one digit
        {"n_filters": 6},
        {"dimension": 7},
        {"codebook_size": 5},
        {"n_q": 2},
        {"lstm_layers": 1},
        {"residual_kernel_size": 5},
        {"activation": "Snake"},
        {"semantic_dimension": 6},  # as wide as the latents, so there is no transform
    ],
)
def test_shapes_tell_what_a_checkpoint_alone_holds(tmp_path: Path, changes: dict[str, Any]) -> None:
    settings = TINY | changes
    folder = _folder(tmp_path / "folder", settings, _tensors(settings))
    told = load_speechtokenizer(folder / "model.safetensors")
    described = load_speechtokenizer(folder)
    assert told.config == described.config
    given = load_speechtokenizer(folder / "model.safetensors", config=described.config)
    assert given.config == described.config


def test_what_shapes_cannot_tell_is_in_the_settings(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "folder", TINY | {"sample_rate": 8000, "dilation_base": 3}, _tensors(TINY))
    described, told = load_speechtokenizer(folder), load_speechtokenizer(folder / "model.safetensors")
    assert (described.sample_rate_hz, described.config.dilation_base) == (8000, 3)
    assert (told.sample_rate_hz, told.config.dilation_base) == (16000, 2)
    with pytest.raises(ValueError, match="is a model for 8000 Hz, not for 16000 Hz"):
        load_checkpoint(folder, sample_rate_hz=16000)


# Mistakes


def _without(key: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.pop(key)


def _with(key: str, *shape: int) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({key: torch.ones(shape)})


LSTM = "encoder.model.7.lstm.weight_hh_l1_reverse"
CODEBOOK = "quantizer.vq.layers.1._codebook"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without(LSTM), r"missing \['encoder.layers.7.lstm.weight_hh_l1_reverse'\], unknown \[\]"),
        (_without("encoder.model.9.conv.conv.weight_g"), "missing the length of encoder.layers.9.weight"),
        (_without(f"{CODEBOOK}.embed"), r"missing \['quantizer.layers.1.codebook.embed'\]"),
        (_without(f"{CODEBOOK}.cluster_size"), r"missing \['quantizer.layers.1.codebook.cluster_size'\]"),
        (_with("transform.scale", 1), r"unknown \['transform.scale'\]"),
        (_with("generator.bias", 1), r"unknown \['generator.bias'\]"),
        (_with("decoder.model.1.lstm.weight_ih_l0_reverse", 64, 16), r"unknown \['decoder.model.1.lstm.weight_ih_l0_r"),
        (_with("encoder.model.2.alpha", 1, 4, 1), r"unknown \['encoder.model.2.alpha'\]"),
        (_with("encoder.model.9.conv.conv.weight_v", 6, 16, 7), r"is \(6, 16, 7\), the config asks for \(6, 32, 7\)"),
        (_with(f"{CODEBOOK}.embed", 8, 6), r"codebooks are \(8, 6\), the config asks for \(16, 6\)"),
        (lambda tensors: tensors[f"{CODEBOOK}.inited"].zero_(), "quantizer.layers.1.codebook was never trained"),
        (lambda tensors: tensors[LSTM].fill_(torch.nan), "weight_hh_l1_reverse holds NaN or infinity"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    tensors = _tensors(TINY)
    change(tensors)
    folder = _folder(tmp_path / "folder", TINY, tensors)
    with pytest.raises(ValueError, match=message) as caught:
        load_speechtokenizer(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strides": []}, "ratios must be one or more"),
        ({"strides": [2, 3]}, "the config asks for"),
        ({"n_filters": "4"}, r"config\.json\.num_filters: expected int, got '4'"),
        ({"bidirectional": False}, r"unknown \['encoder.model.7.lstm.bias_hh_l0_reverse'"),
        ({"lstm_layers": 0}, "bidirectional_lstm needs causal=False"),
        ({"activation": "GELU"}, r"config\.json: activation='GELU' is not one of \('ELU', 'Snake'\)"),
        ({"activation": "Snake"}, r"missing \['decoder.layers.2.alpha'"),
        ({"n_q": 5}, r"missing \['quantizer.layers.4.codebook.embed'"),
        ({"n_q": 3}, r"unknown \['quantizer.vq.layers.3._codebook.cluster_size'"),
        ({"dimension": None}, r"config\.json\.quantizer\.latent_dim: expected int, got None"),
    ],
)
def test_settings_that_do_not_fit_are_value_errors(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = _folder(tmp_path / "folder", TINY | changes, _tensors(TINY))
    with pytest.raises(ValueError, match=message):
        load_speechtokenizer(folder)


def test_sources_that_are_no_checkpoints_are_value_errors(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "folder", {"upsample_rates": [2]}, _tensors(TINY))
    with pytest.raises(ValueError, match="does not describe a SpeechTokenizer or DM-Codec model"):
        load_speechtokenizer(folder)
    (folder / "config.json").write_text(json.dumps({key: TINY[key] for key in ("n_filters", "n_q", "strides")}))
    with pytest.raises(ValueError, match=r"config\.json: \w+ is missing"):
        load_speechtokenizer(folder)
    with pytest.raises(ValueError, match="config= cannot be given"):
        load_speechtokenizer(folder, config=TINY_CONFIG)
    (folder / "config.json").write_text(json.dumps(TINY))
    save_file({"bias": torch.zeros(1)}, folder / "other.safetensors")
    with pytest.raises(ValueError, match=r"one checkpoint, found \['model.safetensors', 'other.safetensors'\]"):
        load_speechtokenizer(folder)
    with pytest.raises(ValueError, match="no checkpoint of SpeechTokenizer or DM-Codec"):
        load_speechtokenizer(folder / "other.safetensors")
    torch.save(_tensors(TINY), tmp_path / "SpeechTokenizer.pt")
    with pytest.raises(ValueError, match=r"if you trust it, allow_pickle=True \(--allow-pickle\) reads it"):
        load_speechtokenizer(tmp_path / "SpeechTokenizer.pt")
    torch.save({"generator": {"bias": 1}}, tmp_path / "Model.pt")
    with pytest.raises(ValueError, match="not a mapping of names to tensors"):
        load_speechtokenizer(tmp_path / "Model.pt", allow_pickle=True)
    odd = TINY | {"n_filters": 5}
    save_file(_tensors(odd), tmp_path / "odd.safetensors")
    with pytest.raises(ValueError, match=r"odd\.safetensors: num_filters=5 is not a multiple of compress=2"):
        load_speechtokenizer(tmp_path / "odd.safetensors")


# What it can do


def test_it_hears_the_whole_recording_and_cannot_stream(tmp_path: Path) -> None:
    codec = load_speechtokenizer(_folder(tmp_path / "folder", TINY, _tensors(TINY)))
    assert not codec.is_streamable
    for stream in (StreamingEncoder, StreamingDecoder):
        with pytest.raises(ValueError, match="not causal and cannot stream"):
            stream(codec)
    audio = _audio(1, 50 * HOP)
    tokens = codec.encode(audio)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(windows, "FRAMES_PER_WINDOW", 8)  # it gets one window all the same
        encoder, decoder = windows.WindowedEncoder(codec, 1), windows.WindowedDecoder(codec, 1)
        assert all(encoder.push(piece).shape[2] == 0 for piece in audio.split(100, dim=2))
        assert torch.equal(encoder.flush(), tokens.codes)
        assert all(decoder.push(piece).shape[2] == 0 for piece in tokens.codes.split(10, dim=2))
        torch.testing.assert_close(decoder.flush(), codec.decode(tokens), rtol=0, atol=0)


def test_an_imported_model_encodes_and_decodes_files(folder: Path) -> None:
    source = _folder(folder / "source", TINY, _tensors(TINY), "SpeechTokenizer.safetensors")
    told = succeed("import", source, "ours")
    assert "streams    no: it looks ahead, and takes whole recordings" in told
    write_wav("speech.wav", speech_like(1000)[None], 16000)
    succeed("encode", "speech.wav", "speech.codec", "--model", "ours")
    succeed("decode", "speech.codec", "back.wav", "--model", "ours")
    assert_wav("back.wav", 1, 1000, 16000)
    assert "--allow-pickle reads it" in refusal("import", __file__, "other")


# Against the package itself.


def _peer(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The `speechtokenizer` package's model with random weights. Its trainer, and what that needs, is not imported."""
    trainer = types.ModuleType("speechtokenizer.trainer")
    trainer.SpeechTokenizerTrainer = None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "speechtokenizer.trainer", trainer)
    speechtokenizer = pytest.importorskip("speechtokenizer")
    torch.manual_seed(0)
    peer = speechtokenizer.SpeechTokenizer(settings).eval()
    entries = [layer._codebook for layer in peer.quantizer.vq.layers]
    encodec._liven(peer, [entry.embed for entry in entries], _audio(2, 16000))
    for entry in entries:
        entry.inited.fill_(1)
    return peer


def _check_parity(peer: Any, codec: SEANetCodec, num_samples: int, num_rows: int) -> None:
    audio = _audio(num_rows, num_samples)
    expected = peer.encode(audio).transpose(0, 1)
    tokens = codec.encode(audio)
    assert tokens.codes.shape == expected.shape
    assert_same_codes(tokens.codes, expected, peer.encoder(audio), codec.quantizer.codebooks)
    heard = peer.decode(expected.transpose(0, 1))[:, :, :num_samples]
    given = Tokens(expected, torch.full((num_rows,), num_samples), "")
    loudest = float(heard.abs().max())
    torch.testing.assert_close(codec.decode(given), heard, rtol=0, atol=RELATIVE_TOLERANCE * loudest)


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
@pytest.mark.parametrize("settings", [TINY, SNAKE, TINY | {"n_residual_layers": 2}], ids=["elu", "snake", "deep"])
@torch.no_grad()
def test_parity_with_speechtokenizer(tmp_path: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    peer = _peer(settings, monkeypatch)
    torch.save(peer.state_dict(), tmp_path / "SpeechTokenizer.pt")
    (tmp_path / "config.json").write_text(json.dumps(settings))
    codec = load_speechtokenizer(tmp_path, allow_pickle=True)
    assert load_speechtokenizer(tmp_path / "SpeechTokenizer.pt", allow_pickle=True).config == codec.config
    for num_samples in (1, 5, 6, 7, 100, 601, 6001):
        _check_parity(peer, codec, num_samples, num_rows=3)
    audio = _audio(1, 601)
    expected = peer.encode(audio, n_q=2).transpose(0, 1)
    assert torch.equal(codec.encode(audio, num_quantizers=2).codes, expected)


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
@torch.no_grad()
def test_parity_with_speechtokenizer_at_full_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peer = _peer(PUBLISHED, monkeypatch)
    assert {name: tuple(value.shape) for name, value in peer.state_dict().items()} == _shapes(PUBLISHED)
    torch.save(peer.state_dict(), tmp_path / "SpeechTokenizer.pt")
    codec = load_speechtokenizer(tmp_path / "SpeechTokenizer.pt", allow_pickle=True)
    assert codec.config == SPEECHTOKENIZER_16KHZ
    _check_parity(peer, codec, 16001, num_rows=1)
