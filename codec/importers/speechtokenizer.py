"""Checkpoints of SpeechTokenizer and DM-Codec, which are one network, as `SEANetCodec`s.

A checkpoint is a state dict (`SpeechTokenizer.pt`, `Model_best_dev.pt`; also as safetensors), or what a trainer keeps,
whose "generator" it is (`ModelTrainer_00001000` and the like). Its tensors are named and laid out as EnCodec's. Weight
norm is accepted in its three spellings and folded. Every tensor is used once, but those of use to a trainer only, which
are left behind by name: `transform`, which made features for a teacher, and counts and sums behind the codebooks.

As published, the networks look ahead, and their encoder hears the whole recording: they cannot stream, and a recording
of a minute takes some 2.5 GB of memory.

Source: the layouts as published, https://github.com/ZhangXInFD/SpeechTokenizer (speechtokenizer/model.py and modules,
config/spt_base_cfg.json) and https://github.com/mubtasimahasan/DM-Codec (codec/model.py, trainer.py, config.json).
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from codec.config import from_dict
from codec.importers.checkpoint import (
    check_tensors,
    checked_tensors,
    fold_weight_norm,
    only_checkpoint,
    read_checkpoint,
    read_json,
    renamed,
    with_config,
)
from codec.importers.encodec import RENAMINGS, stack_codebooks
from codec.models.seanet import SEANetCodec, SEANetConfig
from codec.quantizers.residual import ResidualVQConfig

# Source: spt_base_cfg.json of SpeechTokenizer and config.json of DM-Codec, which say the same of the network.
SPEECHTOKENIZER_16KHZ = SEANetConfig(
    sample_rate_hz=16000,
    num_filters=64,
    bidirectional_lstm=True,
    causal=False,
    pad_mode="reflect",
    quantizer=ResidualVQConfig(latent_dim=1024, num_stages=8, codebook_size=1024),
)

_ACTIVATIONS = {"ELU": "elu", "Snake": "snake"}
_TRAINING_ONLY = ("transform.weight", "transform.bias")


def load_speechtokenizer(
    source: str | os.PathLike[str], *, config: SEANetConfig | None = None, allow_pickle: bool = False
) -> SEANetCodec:
    """A checkpoint of SpeechTokenizer or DM-Codec as a codec: float32, in evaluation mode, without gradients.

    `source` is a checkpoint, or a folder with its settings as config.json and the checkpoint as its only other file. Of
    a checkpoint alone, the shapes of its tensors tell all but the rate, 16 kHz, and how dilations grow, by 2, as
    published; or `config` says it.

    Only safetensors are read, unless `allow_pickle`: then other files too, by `torch.load(weights_only=True)`.

    ValueError where a tensor is missing, unknown or of another shape than the config asks for; it names them.
    """
    path, config = with_config(Path(source), config, _read_config, only_checkpoint)
    content = read_checkpoint(path, allow_pickle=allow_pickle)
    if isinstance(content, dict) and isinstance(content.get("generator"), dict):
        content = content["generator"]
    tensors = checked_tensors(content, path)
    tensors = {key: value for key, value in tensors.items() if key not in _TRAINING_ONLY}
    tensors, spellings = renamed(tensors, RENAMINGS, path)
    fold_weight_norm(tensors, path)
    if config is None:
        config = _config_of(tensors, path)
    stack_codebooks(tensors, config.quantizer, path)
    for key in [key for key in tensors if key.endswith(".alpha")]:
        tensors[key] = tensors[key].flatten()  # published as [1, C, 1]
    codec = SEANetCodec(config)
    check_tensors(tensors, codec.state_dict(), spellings, path)
    codec.load_state_dict(tensors)
    return codec.eval().requires_grad_(False)


def _read_config(path: Path) -> SEANetConfig:
    """The configuration in a config.json of either project. ValueError for what no `SEANetConfig` can say.

    Of its settings, those that describe the network count; those of training are left behind.
    """
    data = read_json(path)
    if not {"n_filters", "n_q", "strides"} <= data.keys():
        raise ValueError(f"{path} does not describe a SpeechTokenizer or DM-Codec model")
    try:
        values = _converted_config(data)
    except KeyError as error:
        raise ValueError(f"{path}: {error.args[0]} is missing") from error
    if values["activation"] is None:
        raise ValueError(f"{path}: activation={data['activation']!r} is not one of {tuple(_ACTIVATIONS)}")
    config: SEANetConfig = from_dict(values, str(path))
    return config


def _converted_config(data: dict[str, Any]) -> dict[str, Any]:
    """The dict of a `SEANetConfig`."""
    return {
        "type": "seanet",
        "sample_rate_hz": data["sample_rate"],
        "ratios": data["strides"],
        "num_filters": data["n_filters"],
        "residual_kernel_size": data["residual_kernel_size"],
        "num_residual_blocks": data["n_residual_layers"],
        "dilation_base": data["dilation_base"],
        "activation": _ACTIVATIONS.get(str(data["activation"])),
        "num_lstm_layers": data["lstm_layers"],
        "bidirectional_lstm": data["bidirectional"],
        "causal": False,
        "pad_mode": "reflect",
        "quantizer": {
            "type": "residual_vq",
            "latent_dim": data["dimension"],
            "num_stages": data["n_q"],
            "codebook_size": data["codebook_size"],
        },
    }


def _config_of(tensors: dict[str, Tensor], path: Path) -> SEANetConfig:
    """The configuration that shapes tell; what they do not, as published. Names are ours, weight norm is folded."""

    def matching(pattern: str) -> list[Tensor]:
        """The weights of that name, in the order of their numbers."""
        found = {int(match[1]): value for key, value in tensors.items() if (match := re.fullmatch(pattern, key))}
        return [found[number] for number in sorted(found) if found[number].dim() > 1]

    codebooks = matching(r"quantizer\.layers\.(\d+)\.codebook\.embed")
    convolutions = matching(r"encoder\.layers\.(\d+)\.weight")
    # The first and the last are convolutions, between them are the transposed ones, as long as two strides.
    kernel_sizes = [weight.shape[-1] for weight in matching(r"decoder\.layers\.(\d+)\.weight")[1:-1]]
    shortcuts = matching(r"decoder\.layers\.(\d+)\.shortcut\.layers\.0\.weight")
    inner = matching(r"decoder\.layers\.(\d+)\.branch\.layers\.1\.weight")
    if not codebooks or not convolutions or not kernel_sizes or not inner:
        raise ValueError(f"{path} is no checkpoint of SpeechTokenizer or DM-Codec, as far as its tensors tell")
    codebook_size, latent_dim = codebooks[0].shape[:2]
    try:
        return replace(
            SPEECHTOKENIZER_16KHZ,
            ratios=tuple(size // 2 for size in kernel_sizes),
            num_filters=len(convolutions[0]),
            residual_kernel_size=inner[0].shape[-1],
            num_residual_blocks=len(shortcuts) // len(kernel_sizes),
            activation="snake" if any(key.endswith(".alpha") for key in tensors) else "elu",
            num_lstm_layers=len(matching(r"decoder\.layers\.1\.lstm\.weight_ih_l(\d+)")),
            bidirectional_lstm=any(key.endswith("_reverse") for key in tensors),
            quantizer=ResidualVQConfig(latent_dim=latent_dim, num_stages=len(codebooks), codebook_size=codebook_size),
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
