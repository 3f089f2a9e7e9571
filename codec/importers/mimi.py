"""Mimi checkpoints, of the `moshi` package and of `transformers`, as `MimiCodec`s.

Both layouts hold the same tensors, but for the order of dims in queries and keys: `transformers` turns the two halves
of a head, the `moshi` package and we turn neighbours. Codebooks are stored as sums and counts, whose quotients they
are. Every tensor of a checkpoint is used once; that a codebook was initialized is checked, and left behind.

Source: the layouts as published, https://github.com/kyutai-labs/moshi (moshi/moshi/models/loaders.py, modules,
quantization/core_vq.py) and https://github.com/huggingface/transformers (models/mimi).
"""

from __future__ import annotations

import os
import re
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from codec.config import from_dict
from codec.importers.checkpoint import (
    check_tensors,
    checked_tensors,
    read_checkpoint,
    read_json,
    renamed,
    transformers_weights,
    with_config,
)
from codec.models.mimi import MimiCodec, MimiConfig
from codec.quantizers.interface import QuantizerConfig
from codec.quantizers.split import SplitVQConfig

# Of either layout, in this order.
_RENAMINGS = (
    (r"^downsample\.(conv\.conv\.)?conv\.", "encoder.layers.2."),
    (r"^upsample\.(convtr\.convtr\.convtr|conv)\.", "decoder.layers.0."),
    (r"^(encoder|decoder)_transformer\.(transformer\.)?layers\.", r"\1.layers.1.layers."),
    (r"^encoder\.(model|layers)\.(?=\d+\.(block|conv)\.)", "encoder.layers.0.layers."),
    (r"^decoder\.(model|layers)\.(?=\d+\.(block|convtr|conv)\.)", "decoder.layers.2.layers."),
    (r"\.(conv\.conv|convtr\.convtr|conv)\.(weight|bias)$", r".\2"),
    (r"\.block\.(\d+)\.", r".branch.layers.\1."),
    # Transformers
    (r"\.self_attn\.(in_proj_weight|in_projs\.0\.weight)$", ".qkv.weight"),
    (r"\.self_attn\.(out_proj|out_projs\.0|o_proj)\.", ".out."),
    (r"\.(norm1|input_layernorm)\.", ".attention_norm."),
    (r"\.(norm2|post_attention_layernorm)\.", ".feedforward_norm."),
    (r"\.(linear1|mlp\.fc1)\.", ".expand."),
    (r"\.(linear2|mlp\.fc2)\.", ".project."),
    (r"\.(layer_scale_1|self_attn_layer_scale)\.scale$", ".attention_scale"),
    (r"\.(layer_scale_2|mlp_layer_scale)\.scale$", ".feedforward_scale"),
    # The quantizer
    (r"^quantizer\.(rvq_first|semantic_residual_vector_quantizer)\.", "quantizer.semantic."),
    (r"^quantizer\.(rvq_rest|acoustic_residual_vector_quantizer)\.", "quantizer.acoustic."),
    (r"\.vq\.layers\.(\d+)\._codebook\.", r".layers.\1.codebook."),
    (r"\.codebook\.(_initialized|inited)$", ".codebook.initialized"),
    (r"\.codebook\.cluster_size$", ".codebook.cluster_usage"),
    (r"\.codebook\.(embedding_sum|embed_avg)$", ".codebook.embed_sum"),
)
_LEAST_USAGE = 1e-5  # an entry that nothing chose still has a place, its sum divided by this; both projects say so

_NAMES = {
    "sample_rate_hz": "sampling_rate",
    "num_channels": "audio_channels",
    "ratios": "upsampling_ratios",
    "num_filters": "num_filters",
    "kernel_size": "kernel_size",
    "last_kernel_size": "last_kernel_size",
    "residual_kernel_size": "residual_kernel_size",
    "num_residual_blocks": "num_residual_layers",
    "dilation_base": "dilation_growth_rate",
    "compress": "compress",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "feedforward_dim": "intermediate_size",
    "window": "sliding_window",
    "initial_scale": "layer_scale_initial_scale",
}


def load_mimi(
    source: str | os.PathLike[str], *, config: MimiConfig | None = None, allow_pickle: bool = False
) -> MimiCodec:
    """A Mimi checkpoint as a codec, ready for use: float32, in evaluation mode, without gradients.

    `source` is a folder of `transformers` (config.json beside model.safetensors or pytorch_model.bin), or a file of
    tensors in either layout, such as the published `tokenizer-e351c8d8-checkpoint125.safetensors`. A file says nothing
    of its model, which is `config`, by default the published one.

    Only safetensors are read, unless `allow_pickle`: then other files too, by `torch.load(weights_only=True)`.

    ValueError where a tensor is missing, unknown or of another shape than the config asks for; it names them.
    """
    path, config = with_config(Path(source), config, _read_config, transformers_weights)
    config = config or MimiConfig()
    content = read_checkpoint(path, allow_pickle=allow_pickle)
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        content = content["model"]  # what the `moshi` package reads of pickles
    tensors, spellings = renamed(checked_tensors(content, path), _RENAMINGS, path)
    _join_queries_keys_and_values(tensors, config, path)
    _stack_codebooks(tensors, config.quantizer, path)
    for key in [key for key in tensors if re.fullmatch(r"quantizer\.\w+\.(input|output)_proj\.weight", key)]:
        tensors[key] = tensors[key].flatten(1)  # convolutions of one frame
    codec = MimiCodec(config)
    check_tensors(tensors, codec.state_dict(), spellings, path)
    codec.load_state_dict(tensors)
    return codec.eval().requires_grad_(False)


def _join_queries_keys_and_values(tensors: dict[str, Tensor], config: MimiConfig, path: Path) -> None:
    """Replace the three projections of `transformers` by one, with the dims of queries and keys in our order.

    There, a pair that is turned are dims i and i + D / 2 of a head of D; here they are 2 i and 2 i + 1.
    """
    width = config.quantizer.latent_dim
    for queries in [key for key in tensors if key.endswith(".self_attn.q_proj.weight")]:
        prefix = queries.removesuffix("self_attn.q_proj.weight")
        names = [f"{prefix}self_attn.{part}_proj.weight" for part in "qkv"]
        if missing := [name for name in names if name not in tensors]:
            raise ValueError(f"{path} does not fit its config: missing {missing}")
        parts = [tensors.pop(name) for name in names]
        for name, part in zip(names, parts, strict=True):
            if part.shape != (width, width):
                raise ValueError(f"{path}: {name} is {tuple(part.shape)}, the config asks for {(width, width)}")
        for i in (0, 1):
            parts[i] = parts[i].view(config.num_heads, 2, -1, width).transpose(1, 2).reshape(width, width)
        tensors[f"{prefix}qkv.weight"] = torch.cat(parts)


def _stack_codebooks(tensors: dict[str, Tensor], config: QuantizerConfig, path: Path) -> None:
    """Replace sums and counts of each part's stages by one tensor of all its codebooks."""
    if not isinstance(config, SplitVQConfig):
        raise ValueError(f"{path} has a split_vq, and no other quantizer")
    for part, num_stages in (("semantic", 1), ("acoustic", config.num_stages - 1)):
        codebooks = []
        for stage in range(num_stages):
            prefix = f"quantizer.{part}.layers.{stage}.codebook"
            names = [f"{prefix}.{name}" for name in ("initialized", "cluster_usage", "embed_sum")]
            if missing := [name for name in names if name not in tensors]:
                raise ValueError(f"{path} does not fit its config: missing {missing}")
            is_initialized, usage, total = (tensors.pop(name) for name in names)
            if not is_initialized.all():
                raise ValueError(f"{path}: {prefix} was never trained")
            shape = (config.codebook_size, config.codebook_dim)
            for name, value, expected in ((names[1], usage, shape[:1]), (names[2], total, shape)):
                if value.shape != expected:
                    raise ValueError(f"{path}: {name} is {tuple(value.shape)}, the config asks for {expected}")
            codebooks.append(total / usage.clamp(min=_LEAST_USAGE)[:, None])
        tensors[f"quantizer.{part}.vq.codebooks"] = torch.stack(codebooks)


def _read_config(path: Path) -> MimiConfig:
    """The configuration in a config.json of `transformers`. ValueError for what no `MimiConfig` can say."""
    data = read_json(path)
    if data.get("model_type") != "mimi":
        raise ValueError(f"{path} does not describe a Mimi model")
    try:
        values = _converted_config(data)
    except KeyError as error:
        raise ValueError(f"{path}: {error.args[0]} is missing") from error
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ValueError(f"{path}: {error}") from error
    config: MimiConfig = from_dict(values, str(path))
    return config


def _converted_config(data: dict[str, Any]) -> dict[str, Any]:
    """The dict of a `MimiConfig`."""
    width, num_heads = data["hidden_size"], data["num_attention_heads"]
    rope = data.get("rope_parameters") or {"rope_theta": data.get("rope_theta")}
    supported = {
        "use_causal_conv": True,
        "pad_mode": "constant",
        "trim_right_ratio": 1.0,
        "use_conv_shortcut": False,
        "num_semantic_quantizers": 1,
        "vector_quantization_hidden_dimension": data["codebook_dim"],
        "upsample_groups": width,
        "hidden_act": "gelu",
        "norm_eps": 1e-5,
        "attention_bias": False,
        "num_key_value_heads": num_heads,
        "head_dim": width // num_heads,
    }
    for name, only in supported.items():
        if data.get(name) not in (only, None):
            raise ValueError(f"{name}={data[name]!r} is not supported, {only!r} is")
    if rope.get("rope_type", "default") != "default" or data.get("rope_scaling"):
        raise ValueError("of rotary positions, only the default kind is supported")
    values = {ours: data[theirs] for ours, theirs in _NAMES.items()}
    if rope.get("rope_theta") is not None:
        values["rope_base"] = float(rope["rope_theta"])
    # Newer versions do not say the rate of frames, and always halve that of the network before.
    if (frame_rate_hz := data.get("frame_rate") or data.get("_frame_rate")) is not None:
        downsampling = data["sampling_rate"] / prod(data["upsampling_ratios"]) / frame_rate_hz
        if not downsampling.is_integer():
            raise ValueError(f"frame_rate={frame_rate_hz!r} does not divide the rate that upsampling_ratios make")
        values["downsampling"] = int(downsampling)
    quantizer = {
        "type": "split_vq",
        "latent_dim": width,
        "num_stages": data["num_quantizers"],
        "codebook_size": data["codebook_size"],
        "codebook_dim": data["codebook_dim"],
    }
    return {"type": "mimi", **values, "quantizer": quantizer}
