"""BiCodec: the layout of its release, written down here by hand, and what its tensors compute, done plainly."""

import builtins
import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from commands import refusal, succeed
from safetensors.torch import load_file, save_file
from speech_models import save_model
from torch import Tensor

import codec
from codec.importers.bicodec import _RENAMINGS, load_bicodec
from codec.importers.checkpoint import fold_weight_norm, renamed
from codec.importers.detect import detect_kind, load_checkpoint
from codec.importers.speech_folder import copy_speech_model
from codec.models.bicodec import BiCodec, BiCodecConfig
from codec.testing import speech_like
from codec.tokens import Tokens

pytest_plugins = ["commands"]

# Source: SPECS of the release, config.yaml; keys that say nothing of the network are among them.
PUBLISHED: dict[str, Any] = {
    "mel_params": {
        "sample_rate": 16000,
        "n_fft": 1024,
        "win_length": 640,
        "hop_length": 320,
        "mel_fmin": 10,
        "mel_fmax": None,
        "num_mels": 128,
    },
    "encoder": {
        "input_channels": 1024,
        "vocos_dim": 384,
        "vocos_intermediate_dim": 2048,
        "vocos_num_layers": 12,
        "out_channels": 1024,
        "sample_ratios": [1, 1],
    },
    "quantizer": {
        "input_dim": 1024,
        "codebook_size": 8192,
        "codebook_dim": 8,
        "commitment": 0.25,
        "codebook_loss_weight": 2.0,
        "use_l2_normlize": True,
        "threshold_ema_dead_code": 0.2,
    },
    "speaker_encoder": {
        "input_dim": 128,
        "out_dim": 1024,
        "latent_dim": 128,
        "token_num": 32,
        "fsq_levels": [4, 4, 4, 4, 4, 4],
        "fsq_num_quantizers": 1,
    },
    "prenet": {
        "input_channels": 1024,
        "vocos_dim": 384,
        "vocos_intermediate_dim": 2048,
        "vocos_num_layers": 12,
        "out_channels": 1024,
        "condition_dim": 1024,
        "sample_ratios": [1, 1],
        "use_tanh_at_final": False,
    },
    "postnet": {
        "input_channels": 1024,
        "vocos_dim": 384,
        "vocos_intermediate_dim": 2048,
        "vocos_num_layers": 6,
        "out_channels": 1024,
        "use_tanh_at_final": False,
    },
    "decoder": {"input_channel": 1024, "channels": 1536, "rates": [8, 5, 4, 2], "kernel_sizes": [16, 11, 8, 4]},
}
FRONT = {"sample_rate": 16000, "ref_segment_duration": 6, "latent_hop_length": 320, "volume_normalize": True}
# What no setting says: channels of ECAPA-TDNN, its bottlenecks, the perceiver's attention.
PUBLISHED_CODE = {"channels": 512, "bottleneck": 128, "attention": 512}

FEATURE_DIM, DIM, VOICE_DIM, HOP = 16, 14, 18, 8
_SIZES = {"vocos_dim": 12, "vocos_intermediate_dim": 20}
TINY: dict[str, Any] = {
    "mel_params": PUBLISHED["mel_params"] | {"n_fft": 256, "win_length": 160, "hop_length": 80, "num_mels": 10},
    "encoder": PUBLISHED["encoder"]
    | _SIZES
    | {"input_channels": FEATURE_DIM, "vocos_num_layers": 3, "out_channels": DIM},
    "quantizer": PUBLISHED["quantizer"] | {"input_dim": DIM, "codebook_size": 32, "codebook_dim": 4},
    "speaker_encoder": PUBLISHED["speaker_encoder"]
    | {"input_dim": 10, "out_dim": VOICE_DIM, "latent_dim": 8, "token_num": 5, "fsq_levels": [4, 5, 4]},
    "prenet": PUBLISHED["prenet"]
    | _SIZES
    | {"input_channels": DIM, "vocos_num_layers": 2, "out_channels": VOICE_DIM, "condition_dim": VOICE_DIM},
    "postnet": PUBLISHED["postnet"]
    | _SIZES
    | {"input_channels": VOICE_DIM, "vocos_num_layers": 1, "out_channels": FEATURE_DIM},
    "decoder": {"input_channel": VOICE_DIM, "channels": 8, "rates": [4, 2], "kernel_sizes": [8, 4]},
}
TINY_FRONT = FRONT | {"ref_segment_duration": 0.25, "latent_hop_length": HOP}
TINY_CODE = {"channels": 16, "bottleneck": 6, "attention": 128}
REFERENCE_SAMPLES = 4000
# Some thirty layers deep, where sums are taken in another order.
RELATIVE_TOLERANCE = 1e-5


def _shapes(settings: dict[str, Any], code: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """The names and shapes of the published state dict."""
    found: dict[str, tuple[int, ...]] = {}

    def affine(name: str, *shape: int) -> None:
        found[f"{name}.weight"], found[f"{name}.bias"] = shape, (shape[0],)

    def weight_normed(name: str, *shape: int, num_outputs: int = 0) -> None:
        found[f"{name}.weight_v"], found[f"{name}.weight_g"] = shape, (shape[0], *[1] * (len(shape) - 1))
        found[f"{name}.bias"] = (num_outputs or shape[0],)

    def norm(name: str, channels: int, condition: int | None) -> None:
        if condition is None:
            affine(name, channels)
        else:
            affine(f"{name}.scale", channels, condition)
            affine(f"{name}.shift", channels, condition)

    def backbone(name: str, inputs: int, sizes: dict[str, Any], layers: int, condition: int | None = None) -> None:
        dim, inner = sizes["vocos_dim"], sizes["vocos_intermediate_dim"]
        affine(f"{name}.embed", dim, inputs, 7)
        norm(f"{name}.norm", dim, condition)
        for i in range(layers):
            block = f"{name}.convnext.{i}"
            found[f"{block}.gamma"] = (dim,)
            affine(f"{block}.dwconv", dim, 1, 7)
            norm(f"{block}.norm", dim, condition)
            affine(f"{block}.pwconv1", inner, dim)
            affine(f"{block}.pwconv2", dim, inner)
        affine(f"{name}.final_layer_norm", dim)

    def batch_norm(name: str, channels: int) -> None:
        affine(name, channels)
        found[f"{name}.running_mean"] = found[f"{name}.running_var"] = (channels,)
        found[f"{name}.num_batches_tracked"] = ()

    encoder = settings["encoder"]
    backbone("encoder.encoder", encoder["input_channels"], encoder, encoder["vocos_num_layers"])
    for i in range(2):
        backbone(f"encoder.downsample.{i}.1", encoder["vocos_dim"], encoder, 2)
    affine("encoder.project", encoder["out_channels"], encoder["vocos_dim"])

    quantizer = settings["quantizer"]
    weight_normed("quantizer.in_project", quantizer["codebook_dim"], quantizer["input_dim"], 1)
    weight_normed("quantizer.out_project", quantizer["input_dim"], quantizer["codebook_dim"], 1)
    found["quantizer.codebook.weight"] = (quantizer["codebook_size"], quantizer["codebook_dim"])
    found["quantizer.cluster_size"] = (quantizer["codebook_size"],)

    for net in ("prenet", "postnet"):
        sizes = settings[net]
        affine(f"{net}.linear_pre", sizes["vocos_dim"], sizes["input_channels"])
        for i in range(2):
            backbone(f"{net}.downsample.{i}.1", sizes["vocos_dim"], sizes, 2)
        backbone(
            f"{net}.vocos_backbone",
            sizes["vocos_dim"],
            sizes,
            sizes["vocos_num_layers"],
            sizes.get("condition_dim"),
        )
        affine(f"{net}.linear", sizes["out_channels"], sizes["vocos_dim"])

    decoder = settings["decoder"]
    width = decoder["channels"]
    weight_normed("decoder.model.0", width, decoder["input_channel"], 7)
    for i, kernel in enumerate(decoder["kernel_sizes"], start=1):
        found[f"decoder.model.{i}.block.0.alpha"] = (1, width, 1)
        weight_normed(f"decoder.model.{i}.block.1", width, width // 2, kernel, num_outputs=width // 2)
        width //= 2
        for unit in (2, 3, 4):
            name = f"decoder.model.{i}.block.{unit}.block"
            found[f"{name}.0.alpha"] = found[f"{name}.2.alpha"] = (1, width, 1)
            weight_normed(f"{name}.1", width, width, 7)
            weight_normed(f"{name}.3", width, width, 1)
    last = len(decoder["rates"]) + 1
    found[f"decoder.model.{last}.alpha"] = (1, width, 1)
    weight_normed(f"decoder.model.{last + 1}", 1, width, 7)

    speaker, home = settings["speaker_encoder"], "speaker_encoder.speaker_encoder"
    channels, bottleneck = code["channels"], code["bottleneck"]
    affine(f"{home}.layer1.conv", channels, speaker["input_dim"], 5)
    batch_norm(f"{home}.layer1.bn", channels)
    for layer in (2, 3, 4):
        name = f"{home}.layer{layer}.se_res2block"
        for i in (0, 2):
            affine(f"{name}.{i}.conv", channels, channels, 1)
            batch_norm(f"{name}.{i}.bn", channels)
        for i in range(7):
            affine(f"{name}.1.convs.{i}", channels // 8, channels // 8, 3)
            batch_norm(f"{name}.1.bns.{i}", channels // 8)
        affine(f"{name}.3.linear1", bottleneck, channels)
        affine(f"{name}.3.linear2", channels, bottleneck)
    affine(f"{home}.conv", 3 * channels, 3 * channels, 1)
    affine(f"{home}.pool.linear1", bottleneck, 9 * channels, 1)
    affine(f"{home}.pool.linear2", 3 * channels, bottleneck, 1)
    batch_norm(f"{home}.bn", 6 * channels)
    affine(f"{home}.linear", speaker["out_dim"], 6 * channels)
    home, dim = "speaker_encoder.perceiver_sampler", speaker["latent_dim"]
    found[f"{home}.latents"] = (speaker["token_num"], dim)
    affine(f"{home}.proj_context", dim, 3 * channels)
    inner = int(dim * 4 * 2 / 3)
    for i in range(2):
        found[f"{home}.layers.{i}.0.to_q.weight"] = (code["attention"], dim)
        found[f"{home}.layers.{i}.0.to_kv.weight"] = (2 * code["attention"], dim)
        found[f"{home}.layers.{i}.0.to_out.weight"] = (dim, code["attention"])
        affine(f"{home}.layers.{i}.1.0", 2 * inner, dim)
        affine(f"{home}.layers.{i}.1.2", dim, inner)
    found[f"{home}.norm.gamma"] = (dim,)
    affine("speaker_encoder.quantizer.project_in", len(speaker["fsq_levels"]), dim)
    affine("speaker_encoder.quantizer.project_out", dim, len(speaker["fsq_levels"]))
    affine("speaker_encoder.project", speaker["out_dim"], dim * speaker["token_num"])
    return found


def _tensors() -> dict[str, Tensor]:
    """A tiny checkpoint of random weights, whose codebook holds what there is to code, so that codes vary."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in _shapes(TINY, TINY_CODE).items():
        value = torch.randn(shape, generator=generator)
        if name.endswith((".alpha", "weight_g", "running_var", "gamma", "norm.weight")):
            value = 0.5 + value.abs()
        elif value.dim() > 1:
            value = value * math.prod(shape[1:]) ** -0.5
        else:
            value = value * 0.1
        if name.startswith("decoder.") and name.endswith("weight_g"):
            value = value * 0.4  # else all that is decoded is clipped
        tensors[name] = torch.tensor(3) if name.endswith("num_batches_tracked") else value
    projected = _Reference(tensors).projected(torch.randn(1, 400, FEATURE_DIM, generator=generator))[0].T
    tensors["quantizer.codebook.weight"] = projected[torch.randperm(400, generator=generator)[:32]].contiguous()
    return tensors


class _Reference:
    """What the published tensors compute, step by step, from their own names."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def weight(self, name: str) -> Tensor:
        if f"{name}.weight" in self.tensors:
            return self.tensors[f"{name}.weight"]
        direction, length = self.tensors[f"{name}.weight_v"], self.tensors[f"{name}.weight_g"]
        weight: Tensor = length * direction / direction.flatten(1).norm(dim=1).view(length.shape)
        return weight

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.weight(name).T + self.tensors[f"{name}.bias"]

    def conv(self, name: str, x: Tensor, *, dilation: int = 1, groups: int = 1) -> Tensor:
        weight = self.weight(name)
        padding = (weight.shape[2] - 1) * dilation // 2
        return F.conv1d(x, weight, self.tensors[f"{name}.bias"], padding=padding, dilation=dilation, groups=groups)

    def norm(self, name: str, x: Tensor, condition: Tensor | None = None) -> Tensor:
        x = (x - x.mean(2, keepdim=True)) / (x.var(2, correction=0, keepdim=True) + 1e-6).sqrt()
        if condition is None:
            return x * self.tensors[f"{name}.weight"] + self.tensors[f"{name}.bias"]
        return x * self.linear(f"{name}.scale", condition)[:, None] + self.linear(f"{name}.shift", condition)[:, None]

    def backbone(self, name: str, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """[B, T, C] -> [B, T, C']."""
        x = self.norm(f"{name}.norm", self.conv(f"{name}.embed", x.mT).mT, condition)
        layer = 0
        while f"{name}.convnext.{layer}.gamma" in self.tensors:
            block = f"{name}.convnext.{layer}"
            y = self.norm(f"{block}.norm", self.conv(f"{block}.dwconv", x.mT, groups=x.shape[2]).mT, condition)
            y = self.linear(f"{block}.pwconv2", F.gelu(self.linear(f"{block}.pwconv1", y)))
            x = x + self.tensors[f"{block}.gamma"] * y
            layer += 1
        return self.norm(f"{name}.final_layer_norm", x)

    def sampled(self, name: str, x: Tensor) -> Tensor:
        """Two blocks that change the rate by 1: the input, thrice."""
        for i in range(2):
            x = self.backbone(f"{name}.downsample.{i}.1", x + x + x)
        return x

    def projected(self, features: Tensor) -> Tensor:
        x = self.sampled("encoder", self.backbone("encoder.encoder", features))
        return self.conv("quantizer.in_project", self.linear("encoder.project", x).mT)

    def codes(self, features: Tensor) -> Tensor:
        """[B, F, feature_dim] -> [B, F]."""
        x = F.normalize(self.projected(features).mT, dim=2)
        return (x @ F.normalize(self.tensors["quantizer.codebook.weight"], dim=1).T).argmax(2)

    def batch_norm(self, name: str, x: Tensor) -> Tensor:
        shape = (1, -1, *[1] * (x.dim() - 2))
        mean, variance, weight, bias = (
            self.tensors[f"{name}.{part}"].view(shape) for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (variance + 1e-5).sqrt() * weight + bias

    def x_vector_and_frames(self, mels: Tensor) -> tuple[Tensor, Tensor]:
        home = "speaker_encoder.speaker_encoder"
        x = self.batch_norm(f"{home}.layer1.bn", self.conv(f"{home}.layer1.conv", mels).relu())
        outputs = []
        for layer in (2, 3, 4):
            name = f"{home}.layer{layer}.se_res2block"
            y = self.batch_norm(f"{name}.0.bn", self.conv(f"{name}.0.conv", x).relu())
            parts = y.split(y.shape[1] // 8, dim=1)
            done: list[Tensor] = []
            for i in range(7):
                heard = parts[i] if i == 0 else done[-1] + parts[i]
                heard = self.conv(f"{name}.1.convs.{i}", heard, dilation=layer).relu()
                done.append(self.batch_norm(f"{name}.1.bns.{i}", heard))
            y = torch.cat([*done, parts[7]], dim=1)
            y = self.batch_norm(f"{name}.2.bn", self.conv(f"{name}.2.conv", y).relu())
            gate = self.linear(f"{name}.3.linear2", self.linear(f"{name}.3.linear1", y.mean(2)).relu()).sigmoid()
            x = x + y * gate[:, :, None]
            outputs.append(x)
        frames = self.conv(f"{home}.conv", torch.cat(outputs, dim=1)).relu()
        mean = frames.mean(2, keepdim=True).expand_as(frames)
        deviation = (frames.var(2, keepdim=True) + 1e-7).sqrt().expand_as(frames)
        hidden = self.conv(f"{home}.pool.linear1", torch.cat([frames, mean, deviation], dim=1)).tanh()
        share = self.conv(f"{home}.pool.linear2", hidden).softmax(2)
        mean = (share * frames).sum(2)
        deviation = ((share * frames**2).sum(2) - mean**2).clamp(min=1e-7).sqrt()
        pooled = self.batch_norm(f"{home}.bn", torch.cat([mean, deviation], dim=1))
        return self.linear(f"{home}.linear", pooled), frames

    def voice_latents(self, frames: Tensor) -> Tensor:
        """[B, C, T] -> [B, L, E]."""
        home = "speaker_encoder.perceiver_sampler"
        context = self.linear(f"{home}.proj_context", frames.mT)
        latents = self.tensors[f"{home}.latents"].expand(len(frames), -1, -1)
        for layer in range(2):
            attention, feed = f"{home}.layers.{layer}.0", f"{home}.layers.{layer}.1"
            heard = torch.cat([latents, context], dim=1)
            queries = latents @ self.tensors[f"{attention}.to_q.weight"].T
            keys, values = (heard @ self.tensors[f"{attention}.to_kv.weight"].T).chunk(2, dim=2)
            found = []
            for at in range(0, queries.shape[2], 64):
                head = slice(at, at + 64)
                share = (queries[:, :, head] @ keys[:, :, head].mT / 8.0).softmax(2)
                found.append(share @ values[:, :, head])
            latents = latents + torch.cat(found, dim=2) @ self.tensors[f"{attention}.to_out.weight"].T
            value, gate = self.linear(f"{feed}.0", latents).chunk(2, dim=2)
            latents = latents + self.linear(f"{feed}.2", value * F.gelu(gate))
        scale = latents.square().mean(2, keepdim=True).sqrt()
        return latents / scale * self.tensors[f"{home}.norm.gamma"]

    def global_codes(self, mels: Tensor) -> Tensor:
        """Mels [B, bands, T] -> [B, L]: each dim becomes one of 4 (or 5) numbers, the first counts least."""
        _, frames = self.x_vector_and_frames(mels)
        inner = self.linear("speaker_encoder.quantizer.project_in", self.voice_latents(frames))
        code, place = torch.zeros(inner.shape[:2], dtype=torch.int64), 1
        for dim, levels in enumerate(TINY["speaker_encoder"]["fsq_levels"]):
            half, offset = (levels - 1) * 1.001 / 2, 0.5 if levels % 2 == 0 else 0.0
            bounded = (inner[..., dim] + math.atanh(offset / half)).tanh() * half - offset
            code = code + place * (bounded.round().long() + levels // 2)
            place *= levels
        return code

    def voice(self, global_codes: Tensor) -> Tensor:
        values = []
        for levels in TINY["speaker_encoder"]["fsq_levels"]:
            values.append((global_codes % levels - levels // 2) / (levels // 2))
            global_codes = global_codes // levels
        latents = self.linear("speaker_encoder.quantizer.project_out", torch.stack(values, dim=2).float())
        return self.linear("speaker_encoder.project", latents.mT.flatten(1))

    def net(self, name: str, x: Tensor, voice: Tensor | None = None) -> Tensor:
        """[B, C, T] -> [B, C', T]."""
        x = self.sampled(name, self.linear(f"{name}.linear_pre", x.mT))
        return self.linear(f"{name}.linear", self.backbone(f"{name}.vocos_backbone", x, voice)).mT

    def snake(self, name: str, x: Tensor) -> Tensor:
        alpha = self.tensors[f"{name}.alpha"]
        return x + (alpha * x).sin() ** 2 / alpha

    def audio(self, codes: Tensor, global_codes: Tensor) -> Tensor:
        latents = self.conv("quantizer.out_project", self.tensors["quantizer.codebook.weight"][codes].mT)
        voice = self.voice(global_codes)
        x = self.conv("decoder.model.0", self.net("prenet", latents, voice) + voice[:, :, None])
        rates, kernel_sizes = TINY["decoder"]["rates"], TINY["decoder"]["kernel_sizes"]
        for i, (rate, kernel) in enumerate(zip(rates, kernel_sizes, strict=True), start=1):
            name = f"decoder.model.{i}.block"
            x, bias = self.snake(f"{name}.0", x), self.tensors[f"{name}.1.bias"]
            x = F.conv_transpose1d(x, self.weight(f"{name}.1"), bias, stride=rate, padding=(kernel - rate) // 2)
            for unit, dilation in ((2, 1), (3, 3), (4, 9)):
                part = f"{name}.{unit}.block"
                y = self.conv(f"{part}.1", self.snake(f"{part}.0", x), dilation=dilation)
                x = x + self.conv(f"{part}.3", self.snake(f"{part}.2", y))
        last = len(rates) + 1
        return self.conv(f"decoder.model.{last + 1}", self.snake(f"decoder.model.{last}", x)).tanh()


def _volume_normalized(audio: np.ndarray) -> np.ndarray:
    """The published front end, in float64."""
    magnitudes = np.sort(np.abs(audio))
    if magnitudes[-1] < 0.1:
        audio = audio * (0.1 / max(magnitudes[-1], 1e-3))
    magnitudes = magnitudes[magnitudes > 0.01]
    if (count := len(magnitudes)) <= 10:
        return audio
    audio = audio * np.clip(0.2 / magnitudes[int(0.9 * count) : int(0.99 * count)].mean(), 0.1, 10)
    normalized: np.ndarray = audio / max(1.0, np.abs(audio).max())
    return normalized


def _mels(audio: np.ndarray) -> Tensor:
    """As published, by torchaudio: [1, bands, T] of a reference [T]."""
    import torchaudio

    sizes = TINY["mel_params"]
    transform = torchaudio.transforms.MelSpectrogram(
        sizes["sample_rate"],
        sizes["n_fft"],
        sizes["win_length"],
        sizes["hop_length"],
        sizes["mel_fmin"],
        n_mels=sizes["num_mels"],
        power=1,
        norm="slaney",
        mel_scale="slaney",
    )
    mels: Tensor = transform(torch.from_numpy(audio).float()[None])
    return mels


def _published_features(folder: Path, audio: np.ndarray) -> Tensor:
    """As published, by `transformers`: the mean of three hidden states of one recording [T]."""
    import transformers

    inputs = transformers.Wav2Vec2FeatureExtractor.from_pretrained(folder)(
        audio, sampling_rate=16000, return_tensors="pt"
    )
    network = transformers.AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        states = network(inputs.input_values.float(), output_hidden_states=True).hidden_states
    features: Tensor = (states[11] + states[14] + states[16]) / 3
    return features


@pytest.fixture(scope="module")
def speech_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("speech") / "wav2vec2-large-xlsr-53"
    return save_model(folder, "xlsr", head="Model", num_hidden_layers=17)


@pytest.fixture
def release(tmp_path: Path, speech_model: Path) -> Path:
    """A folder as published, but tiny."""
    home = tmp_path / "Spark-TTS" / "BiCodec"
    home.mkdir(parents=True)
    (home / "config.yaml").write_text(yaml.safe_dump({"audio_tokenizer": TINY}))
    (home.parent / "config.yaml").write_text(yaml.safe_dump(TINY_FRONT))
    save_file(_tensors(), home / "model.safetensors")
    (home.parent / "wav2vec2-large-xlsr-53").symlink_to(speech_model)
    return home.parent


def _audio(num_samples: int = 6000) -> Tensor:
    return torch.from_numpy(speech_like(num_samples)) * 0.3


def _voices(batch_size: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(80, (batch_size, 5), generator=generator)


@pytest.mark.parametrize("num_samples", [6000, 1203, 24])
def test_tokens_are_those_of_the_published_pipeline(release: Path, num_samples: int) -> None:
    """A frame or two at the end are ours: there the last one is repeated."""
    audio = _audio(12000)[3000 : 3000 + num_samples]
    heard = _volume_normalized(audio.double().numpy())
    reference = _Reference(_tensors())
    codes = reference.codes(_published_features(release / "wav2vec2-large-xlsr-53", heard))
    repeated = np.tile(heard, -(-REFERENCE_SAMPLES // num_samples))[:REFERENCE_SAMPLES]
    tokens = load_bicodec(release).encode(audio[None, None])
    assert tokens.codes.shape == (1, 1, -(-num_samples // HOP))
    assert codes.shape[1] == (num_samples - 20) // HOP + 1
    assert torch.equal(tokens.codes[:, 0, : codes.shape[1]], codes)
    assert (tokens.codes[:, 0, codes.shape[1] :] == codes[:, -1:]).all()
    assert tokens.global_codes is not None
    assert torch.equal(tokens.global_codes, reference.global_codes(_mels(repeated)))
    if num_samples > 1000:
        assert codes.unique().numel() > 10
        assert tokens.global_codes.unique().numel() > 3


def test_latents_of_features_and_codes_are_those_of_the_published_layers(release: Path) -> None:
    ours, reference = load_bicodec(release / "BiCodec"), _Reference(_tensors())
    features = torch.randn(2, 90, FEATURE_DIM, generator=torch.Generator().manual_seed(2))
    latents = ours.latents_of(features)
    in_proj = ours.quantizer.stages[0].in_proj  # type: ignore[union-attr, index]
    torch.testing.assert_close(in_proj(latents), reference.projected(features), rtol=1e-4, atol=1e-4)
    assert torch.equal(ours.quantizer.encode(latents)[:, 0], reference.codes(features))


def test_voices_are_those_of_the_published_layers(release: Path) -> None:
    ours, reference = load_bicodec(release), _Reference(_tensors())
    audio = torch.stack([_audio()[:4000], _audio()[1500:5500]])
    mels = torch.cat([_mels(row.numpy()) for row in audio])
    x_vector, frames = reference.x_vector_and_frames(mels)
    heard = ours.hear_voice(audio[:, None])
    torch.testing.assert_close(heard.x_vector, x_vector, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(heard.latents.mT, reference.voice_latents(frames), rtol=1e-3, atol=1e-4)
    voices = _voices(3)
    torch.testing.assert_close(ours.voice_of(voices), reference.voice(voices), rtol=1e-4, atol=1e-5)


def test_audio_is_that_of_the_published_layers(release: Path) -> None:
    ours, reference = load_bicodec(release), _Reference(_tensors())
    codes = torch.randint(32, (2, 1, 150), generator=torch.Generator().manual_seed(3))
    tokens = Tokens(codes, torch.tensor([1200, 1195]), "", global_codes=_voices(2))
    expected = reference.audio(codes[:, 0], _voices(2))
    heard = ours.decode(tokens)
    assert (heard[0] - expected[0]).abs().max() <= RELATIVE_TOLERANCE * expected.abs().max()
    shorter = reference.audio(codes[1:, 0, :150], _voices(2)[1:])[0, :, :1195]
    assert (heard[1, :, :1195] - shorter).abs().max() <= RELATIVE_TOLERANCE * expected.abs().max()
    assert expected.std() > 0.05
    assert expected.abs().median() < 0.8  # else it is clipped


def test_features_are_predicted_as_by_the_published_postnet(release: Path) -> None:
    ours, reference = load_bicodec(release), _Reference(_tensors())
    latents = torch.randn(2, DIM, 40, generator=torch.Generator().manual_seed(4))
    voice = torch.randn(2, VOICE_DIM, generator=torch.Generator().manual_seed(5))
    predicted = ours.predict_features(ours.hidden(latents, voice))
    expected = reference.net("postnet", reference.net("prenet", latents, voice)).mT
    torch.testing.assert_close(predicted, expected, rtol=1e-4, atol=1e-4)


def test_the_published_model_has_the_names_shapes_and_size_of_ours() -> None:
    path = Path("model.safetensors")
    shapes = _shapes(PUBLISHED, PUBLISHED_CODE)
    buffers = ("cluster_size", "running_mean", "running_var", "num_batches_tracked")
    size = sum(math.prod(shape) for name, shape in shapes.items() if not name.endswith(buffers))
    assert round(size / 1e6, 2) == 156.33
    kept = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    kept = {name: value for name, value in kept.items() if not name.endswith(("cluster_size", "num_batches_tracked"))}
    tensors, _ = renamed(kept, _RENAMINGS, path)
    fold_weight_norm(tensors, path)
    with torch.device("meta"):
        expected = BiCodec(BiCodecConfig()).state_dict()
    found = {name: value.numel() if name.endswith("alpha") else value.shape for name, value in tensors.items()}
    wanted = {name: value.numel() if name.endswith("alpha") else value.shape for name, value in expected.items()}
    assert found == wanted


def test_the_published_settings_are_the_default_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from codec.config import from_dict
    from codec.importers import bicodec as importer

    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"audio_tokenizer": PUBLISHED} | FRONT))
    values = importer._settings(tmp_path / "config.yaml", tmp_path / "config.yaml")
    assert from_dict(values) == BiCodecConfig()


def test_settings_and_shapes_say_the_configuration(release: Path) -> None:
    config = load_bicodec(release).config
    assert (config.speaker_channels, config.bottleneck_dim, config.num_heads, config.head_dim) == (16, 6, 2, 64)
    assert (config.voice_samples, config.num_global_codes, config.hop_length) == (REFERENCE_SAMPLES, 5, HOP)
    assert (config.encoder_blocks, config.prenet_blocks, config.postnet_blocks) == (3, 2, 1)
    (release / "config.yaml").write_text(yaml.safe_dump(TINY_FRONT | {"volume_normalize": False}))
    assert not load_bicodec(release).config.volume_normalize
    assert load_bicodec(release / "BiCodec").config.voice_samples == 96000  # nothing else said so


@pytest.mark.parametrize("spelling", ["parametrized", "folded", "without what is left behind"])
def test_other_spellings_are_the_same_model(release: Path, spelling: str) -> None:
    before = load_bicodec(release).state_dict()
    path = release / "BiCodec" / "model.safetensors"
    tensors = load_file(path)
    for name in [name for name in tensors if name.endswith("weight_g")]:
        base = name.removesuffix("_g")
        if spelling == "parametrized":
            tensors[base.replace("weight", "parametrizations.weight.original0")] = tensors.pop(f"{base}_g")
            tensors[base.replace("weight", "parametrizations.weight.original1")] = tensors.pop(f"{base}_v")
        elif spelling == "folded":
            weight = _Reference(tensors).weight(base.removesuffix(".weight"))
            del tensors[f"{base}_g"], tensors[f"{base}_v"]
            tensors[base] = weight
    if spelling == "without what is left behind":
        del tensors["quantizer.cluster_size"]
        tensors = {name: value for name, value in tensors.items() if not name.endswith("num_batches_tracked")}
    else:
        tensors["mel_transformer.spectrogram.window"] = torch.zeros(160)
        tensors["mel_transformer.mel_scale.fb"] = torch.zeros(129, 10)
    save_file(tensors, path)
    after = load_bicodec(release).state_dict()
    assert before.keys() == after.keys()
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda tensors: tensors.pop("prenet.vocos_backbone.convnext.0.norm.scale.bias"), "missing.*prenet.stack"),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), r"unknown \['extra'\]"),
        (lambda tensors: tensors.update({"encoder.project.bias": torch.zeros(3)}), "encoder.leave.bias is"),
        (lambda tensors: tensors.update({"encoder.project.bias": torch.full((DIM,), math.nan)}), "NaN"),
        (lambda tensors: tensors.pop("speaker_encoder.speaker_encoder.layer1.conv.bias"), "does not hold a BiCodec"),
        (lambda tensors: tensors.pop("decoder.model.0.weight_g"), "missing the length"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    release: Path, change: Callable[[dict[str, Tensor]], object], complaint: str
) -> None:
    path = release / "BiCodec" / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(ValueError, match=complaint):
        load_bicodec(release)


@pytest.mark.parametrize(
    ("where", "value", "complaint"),
    [
        (("encoder", "sample_ratios"), [2, 1], "sample_ratios"),
        (("postnet", "sample_ratios"), [1], "sample_ratios"),
        (("mel_params", "mel_fmax"), 8000, "mel_fmax"),
        (("speaker_encoder", "fsq_num_quantizers"), 2, "more than one FSQ"),
        (("decoder", "kernel_sizes"), [9, 4], "decoder_kernel_sizes"),
        (("decoder", "rates"), "fast", "decoder_rates: expected a list"),
        (("decoder",), {}, "channels is missing"),
        (("encoder",), None, "it has no encoder"),
        (("mel_params", "hop_length"), "far", "mel_hop_samples: expected int"),
        ((), [], "no audio_tokenizer"),
    ],
)
def test_settings_that_no_model_of_ours_has_are_refused(
    release: Path, where: tuple[str, ...], value: Any, complaint: str
) -> None:
    settings: dict[str, Any] = {"audio_tokenizer": copy.deepcopy(TINY)}
    at = settings
    for name in ("audio_tokenizer", *where)[:-1]:
        at = at[name]
    at[("audio_tokenizer", *where)[-1]] = value
    (release / "BiCodec" / "config.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(ValueError, match=complaint) as error:
        load_bicodec(release)
    assert "config.yaml" in str(error.value)
    assert "\n" not in str(error.value)


def test_yaml_that_cannot_be_read_is_one_line(release: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = release / "BiCodec" / "config.yaml"
    for text in ("a: [1\nb: 2", "!!python/object/apply:os.system ['true']", "- 1"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"config\.yaml") as error:
            load_bicodec(release)
        assert "\n" not in str(error.value)
    imported = builtins.__import__

    def without_yaml(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "yaml":
            raise ImportError
        return imported(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without_yaml)
    with pytest.raises(ValueError, match="needs the package PyYAML"):
        load_bicodec(release)


def test_kinds_are_told_by_folders_and_names(release: Path, tmp_path: Path) -> None:
    assert detect_kind(release) == detect_kind(release / "BiCodec") == "bicodec"
    assert detect_kind(release / "BiCodec" / "model.safetensors") == "bicodec"
    config = load_bicodec(release).config
    ours = load_bicodec(release / "BiCodec" / "model.safetensors", config=config)
    assert ours.config == config
    assert isinstance(load_checkpoint(release), BiCodec)
    with pytest.raises(ValueError, match="config= cannot be given"):
        load_bicodec(release, config=config)
    with pytest.raises(ValueError, match=r"does not fit its config.*missing"):
        load_bicodec(release / "BiCodec" / "model.safetensors")  # nothing says that it is not the published size
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"config\.json"):
        detect_kind(tmp_path / "empty")


def test_the_command_brings_the_speech_model_along(release: Path, tmp_path: Path) -> None:
    told = succeed("import", str(release), str(tmp_path / "ours"))
    assert f"encodes    with {tmp_path / 'ours' / 'features'}" in told
    model = codec.load(tmp_path / "ours")
    assert {file.name for file in (tmp_path / "ours" / "features").iterdir()} == {
        "config.json",
        "preprocessor_config.json",
        "model.safetensors",
    }
    audio = _audio()[None, None]
    tokens, expected = model.encode(audio), load_bicodec(release).encode(audio)
    assert torch.equal(tokens.codes, expected.codes)
    assert model.decode(tokens).shape == audio.shape
    succeed("import", str(release), str(tmp_path / "ours"), "--force")
    told = succeed("import", str(release / "BiCodec"), str(tmp_path / "ours"), "--force")
    assert "once its speech model lies in" in told
    assert not (tmp_path / "ours" / "features").exists()
    with pytest.raises(ValueError, match=r"speech model, which is missing: put its folder .* at .*features"):
        codec.load(tmp_path / "ours").encode(audio)


def test_a_speech_model_in_a_pickle_needs_permission(release: Path, tmp_path: Path, speech_model: Path) -> None:
    folder = release / "wav2vec2-large-xlsr-53"
    folder.unlink()
    folder.mkdir()
    for name in ("config.json", "preprocessor_config.json"):
        (folder / name).write_bytes((speech_model / name).read_bytes())
    assert "holds no model.safetensors and no pytorch_model.bin" in refusal("import", str(release), str(tmp_path / "a"))
    tensors = load_file(speech_model / "model.safetensors")
    torch.save(tensors, folder / "pytorch_model.bin")
    told = refusal("import", str(release), str(tmp_path / "a"))
    assert "pickle" in told
    assert "--allow-pickle" in told
    assert not (tmp_path / "a").exists()
    succeed("import", str(release), str(tmp_path / "a"), "--allow-pickle")
    converted = load_file(tmp_path / "a" / "features" / "model.safetensors")
    assert converted.keys() == tensors.keys()
    assert all(torch.equal(converted[name], tensors[name]) for name in tensors)
    assert codec.load(tmp_path / "a").encode(_audio()[None, None]).codes.shape == (1, 1, 750)


def test_a_speech_model_without_settings_is_not_copied(tmp_path: Path, speech_model: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.json").write_text(json.dumps({}))
    with pytest.raises(ValueError, match=r"must hold config\.json and preprocessor_config\.json"):
        copy_speech_model(tmp_path / "a", tmp_path / "b")
    assert not (tmp_path / "b").exists()
    newer = tmp_path / "newer"
    newer.mkdir()
    for name in ("config.json", "model.safetensors"):
        (newer / name).symlink_to(speech_model / name)
    (newer / "processor_config.json").write_text("{}")
    copy_speech_model(newer, tmp_path / "d")
    assert len(list((tmp_path / "d").iterdir())) == 3
    copy_speech_model(speech_model, tmp_path / "c")
    source = speech_model / "model.safetensors"
    assert (tmp_path / "c" / "model.safetensors").read_bytes() == source.read_bytes()
