"""EnCodec checkpoints, of the `encodec` package and of `transformers`, as `SEANetCodec`s.

Both layouts name the same tensors; our own names follow from theirs by the renamings below. Weight norm is accepted in
its three spellings and folded: `weight_g` and `weight_v`, `parametrizations.weight.original0` and `original1`, and a
plain `weight`. Every tensor of a checkpoint is used once. The counts and sums behind the codebooks are of use to their
trainer only and are left behind.

Source: the layouts as published, https://github.com/facebookresearch/encodec (model.py, modules, quantization) and
https://github.com/huggingface/transformers (models/encodec).
"""

from __future__ import annotations

import os
from math import ceil, prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from codec.config import from_dict
from codec.importers.checkpoint import (
    check_tensors,
    checked_tensors,
    fold_weight_norm,
    read_checkpoint,
    read_json,
    renamed,
    transformers_weights,
    with_config,
)
from codec.models.seanet import SEANetCodec, SEANetConfig
from codec.quantizers.interface import QuantizerConfig
from codec.quantizers.residual import ResidualVQConfig

ENCODEC_24KHZ = SEANetConfig(
    sample_rate_hz=24000,
    pad_mode="reflect",
    quantizer=ResidualVQConfig(latent_dim=128, num_stages=32, codebook_size=1024),
)
ENCODEC_48KHZ = SEANetConfig(
    sample_rate_hz=48000,
    num_channels=2,
    causal=False,
    pad_mode="reflect",
    norm="group",
    segment_samples=48000,
    segment_stride_samples=47520,
    normalize_loudness=True,
    quantizer=ResidualVQConfig(latent_dim=128, num_stages=16, codebook_size=1024),
)

# Of either layout, in this order; of SpeechTokenizer's, too.
RENAMINGS = (
    (r"^(encoder|decoder)\.model\.", r"\1.layers."),
    (r"\.(conv\.conv|convtr\.convtr|conv)\.(weight|bias|weight_g|weight_v)$", r".\2"),
    (r"\.(conv|convtr)\.norm\.", ".norm."),
    (r"\.block\.(\d+)\.", r".branch.layers.\1."),
    (r"\.shortcut\.", ".shortcut.layers.0."),
    (r"^quantizer\.vq\.layers\.(\d+)\._codebook\.", r"quantizer.layers.\1.codebook."),
)
_CODEBOOK_PARTS = ("embed", "inited", "cluster_size", "embed_avg")
_NORMS = {"weight_norm": "weight", "time_group_norm": "group"}


def load_encodec(
    source: str | os.PathLike[str], *, config: SEANetConfig | None = None, allow_pickle: bool = False
) -> SEANetCodec:
    """An EnCodec checkpoint as a codec, ready for use: float32, in evaluation mode, without gradients.

    `source` is a folder of `transformers` (config.json beside model.safetensors or pytorch_model.bin), or a file of
    tensors in either layout. A file says nothing of its model, which is `config`; by default the published 48 kHz model
    where the tensors have group norms, else the published 24 kHz one.

    Only safetensors are read, unless `allow_pickle`: then other files too, by `torch.load(weights_only=True)`.

    ValueError where a tensor is missing, unknown or of another shape than the config asks for; it names them.
    """
    path, config = with_config(Path(source), config, _read_config, transformers_weights)
    tensors = checked_tensors(read_checkpoint(path, allow_pickle=allow_pickle), path)
    tensors, spellings = renamed(tensors, RENAMINGS, path)
    if config is None:
        config = ENCODEC_48KHZ if any(".norm." in key for key in tensors) else ENCODEC_24KHZ
    fold_weight_norm(tensors, path)
    stack_codebooks(tensors, config.quantizer, path)
    codec = SEANetCodec(config)
    check_tensors(tensors, codec.state_dict(), spellings, path)
    codec.load_state_dict(tensors)
    return codec.eval().requires_grad_(False)


def stack_codebooks(tensors: dict[str, Tensor], config: QuantizerConfig, path: Path) -> None:
    """Replace the stages' codebooks, and what the trainer keeps beside them, by one tensor of all."""
    if not isinstance(config, ResidualVQConfig) or config.num_groups > 1:
        raise ValueError(f"{path} has a residual_vq whose codebooks are not grouped, and nothing else")
    codebooks, missing = [], []
    for stage in range(config.num_stages):
        prefix = f"quantizer.layers.{stage}.codebook"
        parts = {part: tensors.pop(f"{prefix}.{part}", None) for part in _CODEBOOK_PARTS}
        missing += [f"{prefix}.{part}" for part, value in parts.items() if value is None]
        if parts["inited"] is not None and not parts["inited"].all():
            raise ValueError(f"{path}: {prefix} was never trained")
        if parts["embed"] is not None:
            codebooks.append(parts["embed"])
    if missing:
        raise ValueError(f"{path} does not fit its config: missing {missing}")
    if shapes := {tuple(codebook.shape) for codebook in codebooks} - {(config.codebook_size, config.latent_dim)}:
        raise ValueError(
            f"{path}: codebooks are {shapes.pop()}, the config asks for {(config.codebook_size, config.latent_dim)}"
        )
    tensors["quantizer.codebooks"] = torch.stack(codebooks)


def _read_config(path: Path) -> SEANetConfig:
    """The configuration in a config.json of `transformers`. ValueError for what no `SEANetConfig` can say."""
    data = read_json(path)
    if data.get("model_type") != "encodec":
        raise ValueError(f"{path} does not describe an EnCodec model")
    try:
        values = _converted_config(data)
    except KeyError as error:
        raise ValueError(f"{path}: {error.args[0]} is missing") from error
    except (TypeError, ValueError, ArithmeticError, IndexError) as error:
        raise ValueError(f"{path}: {error}") from error
    config: SEANetConfig = from_dict(values, str(path))
    return config


def _converted_config(data: dict[str, Any]) -> dict[str, Any]:
    """The dict of a `SEANetConfig`."""
    rate, ratios, codebook_size = data["sampling_rate"], data["upsampling_ratios"], data["codebook_size"]
    supported = {"pad_mode": "reflect", "trim_right_ratio": 1.0, "codebook_dim": data["hidden_size"]}
    for name, only in supported.items():
        if data.get(name) not in (only, None):
            raise ValueError(f"{name}={data[name]!r} is not supported, {only!r} is")
    if data["norm_type"] not in _NORMS:
        raise ValueError(f"norm_type={data['norm_type']!r} is not one of {tuple(_NORMS)}")
    segment = stride = None
    if data["chunk_length_s"] is not None:
        segment = int(data["chunk_length_s"] * rate)
        stride = max(1, int((1.0 - data["overlap"]) * segment))
    bits_per_second = ceil(rate / prod(ratios)) * (codebook_size - 1).bit_length()
    return {
        "type": "seanet",
        "sample_rate_hz": rate,
        "num_channels": data["audio_channels"],
        "ratios": ratios,
        "num_filters": data["num_filters"],
        "kernel_size": data["kernel_size"],
        "last_kernel_size": data["last_kernel_size"],
        "residual_kernel_size": data["residual_kernel_size"],
        "num_residual_blocks": data["num_residual_layers"],
        "dilation_base": data["dilation_growth_rate"],
        "compress": data["compress"],
        "conv_shortcut": data.get("use_conv_shortcut", True),
        "num_lstm_layers": data["num_lstm_layers"],
        "causal": data["use_causal_conv"],
        "pad_mode": "reflect",
        "norm": _NORMS[data["norm_type"]],
        "segment_samples": segment,
        "segment_stride_samples": stride,
        "normalize_loudness": data["normalize"],
        "quantizer": {
            "type": "residual_vq",
            "latent_dim": data["hidden_size"],
            "num_stages": int(1000 * data["target_bandwidths"][-1] // bits_per_second),
            "codebook_size": codebook_size,
        },
    }
