"""HiFi-Codec checkpoints of AcademiCodec as `HiFiCodec`s.

A checkpoint is a pickle of three state dicts: `{"generator": ..., "encoder": ..., "quantizer": ...}`. Written as
safetensors it is one mapping whose names begin with these three. Weight norm is accepted in its three spellings and
folded; the encoder's last convolution has none. Every tensor is used once.

Source: the layout as published, https://github.com/yangdongchao/AcademiCodec (academicodec/models/hificodec, and
egs/HiFi-Codec-*/config_*.json for the settings).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
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
from codec.models.hificodec import (
    HIFICODEC_16K_320D,
    HIFICODEC_24K_240D,
    HIFICODEC_24K_320D,
    HiFiCodec,
    HiFiCodecConfig,
)
from codec.quantizers.interface import QuantizerConfig
from codec.quantizers.residual import ResidualVQConfig

PARTS = ("generator", "encoder", "quantizer")
_PUBLISHED = (HIFICODEC_16K_320D, HIFICODEC_24K_320D, HIFICODEC_24K_240D)
# The module lists of the two stages; the published code has no third.
_STAGES = ("quantizer_modules", "quantizer_modules2")
# What the published code does not take from its settings.
_ENCODER_CHANNELS, _LATENT_DIM = 32, 512


def load_hificodec(
    source: str | os.PathLike[str],
    *,
    config: HiFiCodecConfig | None = None,
    sample_rate_hz: int | None = None,
    allow_pickle: bool = False,
) -> HiFiCodec:
    """A HiFi-Codec checkpoint as a codec, ready for use: float32, in evaluation mode, without gradients.

    `source` is a checkpoint, or a folder with its settings as config.json and the checkpoint as its only other file.
    A checkpoint alone says nothing of its model: that is `config` (see `read_config`), by default the published model
    with these kernels. Those for 16 and 24 kHz at 320 samples per frame look alike: `sample_rate_hz` tells them apart.

    Only safetensors are read, unless `allow_pickle`: then other files too, by `torch.load(weights_only=True)`.

    ValueError where a tensor is missing, unknown or of another shape than the config asks for; it names them.
    """
    path, config = with_config(Path(source), config, read_config, only_checkpoint)
    if config is not None and sample_rate_hz not in (None, config.sample_rate_hz):
        raise ValueError(f"{path} is a model for {config.sample_rate_hz} Hz, not for {sample_rate_hz} Hz")
    tensors = checked_tensors(_flattened(read_checkpoint(path, allow_pickle=allow_pickle), path), path)
    ours, spellings = renamed(tensors, (), path)
    if config is None:
        config = _published_config(ours, sample_rate_hz, path)
    ours, spellings = renamed(tensors, list(_renamings(config)), path)
    fold_weight_norm(ours, path)
    _stack_codebooks(ours, config.quantizer, path)
    codec = HiFiCodec(config)
    check_tensors(ours, codec.state_dict(), spellings, path)
    codec.load_state_dict(ours)
    return codec.eval().requires_grad_(False)


def read_config(path: str | os.PathLike[str]) -> HiFiCodecConfig:
    """The configuration in a config_*.json of AcademiCodec. ValueError for what no `HiFiCodecConfig` can say.

    Of its settings, those that describe the network count; those of training are left behind.
    """
    path = Path(path)
    data = read_json(path)
    if "upsample_rates" not in data:
        raise ValueError(f"{path} does not describe a HiFi-Codec model")
    try:
        values = _converted_config(data)
    except KeyError as error:
        raise ValueError(f"{path}: {error.args[0]} is missing") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    config: HiFiCodecConfig = from_dict(values, str(path))
    return config


def _converted_config(data: dict[str, Any]) -> dict[str, Any]:
    """The dict of a `HiFiCodecConfig`."""
    if str(data["resblock"]) != "1":
        raise ValueError(f"resblock={data['resblock']!r} is not supported, '1' is")
    dilations = data["resblock_dilation_sizes"]
    if any(other != dilations[0] for other in dilations) or len(dilations) != len(data["resblock_kernel_sizes"]):
        raise ValueError("resblock_dilation_sizes must be one list, the same for each of resblock_kernel_sizes")
    return {
        "type": "hificodec",
        "sample_rate_hz": data["sampling_rate"],
        "ratios": data["upsample_rates"],
        "kernel_sizes": data["upsample_kernel_sizes"],
        "encoder_channels": _ENCODER_CHANNELS,
        "decoder_channels": data["upsample_initial_channel"],
        "residual_kernel_sizes": data["resblock_kernel_sizes"],
        "residual_dilations": dilations[0],
        "quantizer": {
            "type": "residual_vq",
            "latent_dim": _LATENT_DIM,
            "num_stages": len(_STAGES),
            "num_groups": data["n_code_groups"],
            "codebook_size": data["n_codes"],
            "learning": "gradient",
        },
    }


def _flattened(checkpoint: Any, path: Path) -> Any:
    """Three state dicts as one, each name beginning with that of its dict; anything else as it is."""
    if not isinstance(checkpoint, dict) or not all(isinstance(value, dict) for value in checkpoint.values()):
        return checkpoint
    if set(checkpoint) != set(PARTS):
        raise ValueError(f"{path} holds {sorted(map(str, checkpoint))}, and not {', '.join(PARTS)}")
    return {f"{part}.{key}": value for part in PARTS for key, value in checkpoint[part].items()}


def _published_config(tensors: dict[str, Tensor], sample_rate_hz: int | None, path: Path) -> HiFiCodecConfig:
    """The published configuration whose kernels these are."""
    kernel_sizes: dict[int, int] = {}
    for key, value in tensors.items():
        if (found := re.match(r"generator\.ups\.(\d+)\.weight(_v)?$", key)) and value.dim() == 3:
            kernel_sizes[int(found[1])] = value.shape[2]
    kernels = tuple(kernel_sizes[index] for index in sorted(kernel_sizes))
    fitting = [config for config in _PUBLISHED if config.kernel_sizes == kernels]
    if not fitting:
        raise ValueError(f"{path} has kernels {kernels}, as no published HiFi-Codec has; its config must be given")
    rates = [config.sample_rate_hz for config in fitting]
    if sample_rate_hz is None and len(fitting) > 1:
        raise ValueError(f"{path} may be a model for {rates[0]} or {rates[1]} Hz; sample_rate_hz must say which")
    if sample_rate_hz not in (None, *rates):
        raise ValueError(f"{path} is a model for {' or '.join(map(str, rates))} Hz, not for {sample_rate_hz} Hz")
    return next(config for config in fitting if sample_rate_hz in (None, config.sample_rate_hz))


def _renamings(config: HiFiCodecConfig) -> Iterator[tuple[str, str]]:
    """Patterns of their names and our names for them: see the lists of layers in `codec.models.hificodec`."""
    num_ratios, num_blocks = len(config.ratios), len(config.residual_kernel_sizes)
    either = r"^(encoder|generator)\."
    yield either + r"conv_pre\.", r"\1.layers.0."
    yield either + r"conv_post\.", rf"\1.layers.{3 * num_ratios + 2}."
    for ratio in range(num_ratios):
        yield either + rf"ups\.{ratio}\.", rf"\1.layers.{3 * ratio + 2}."
        for block in range(num_blocks):
            index, blocks = ratio * num_blocks + block, rf"layers.{3 * ratio + 3}"
            yield rf"^encoder\.normalize\.{index}\.", rf"encoder.{blocks}.norms.{block}."
            for which, layer in ((1, 1), (2, 3)):
                unit = rf"{blocks}.blocks.{block}.layers.\2.branch.layers.{layer}."
                yield either + rf"resblocks\.{index}\.convs{which}\.(\d+)\.", rf"\1.{unit}"


def _stack_codebooks(tensors: dict[str, Tensor], config: QuantizerConfig, path: Path) -> None:
    """Replace the codebooks, stage by stage and group by group, by one tensor of all."""
    if not isinstance(config, ResidualVQConfig) or config.num_stages != len(_STAGES):
        raise ValueError(f"HiFi-Codec has a residual_vq of {len(_STAGES)} stages, and nothing else")
    names = [f"quantizer.{stage}.{group}.embedding.weight" for stage in _STAGES for group in range(config.num_groups)]
    if missing := [name for name in names if name not in tensors]:
        raise ValueError(f"{path} does not fit its config: missing {missing}")
    codebooks = [tensors.pop(name) for name in names]
    wanted = (config.codebook_size, config.latent_dim // config.num_groups)
    if shapes := {tuple(codebook.shape) for codebook in codebooks} - {wanted}:
        raise ValueError(f"{path}: codebooks are {shapes.pop()}, the config asks for {wanted}")
    tensors["quantizer.codebooks"] = torch.stack(codebooks)
