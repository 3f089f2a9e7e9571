"""DAC checkpoints, of the `descript-audio-codec` package and of `transformers`, as `DACCodec`s.

The package's own files are pickles of {"state_dict", "metadata": {"kwargs"}}, whose `kwargs` say what model they hold;
its bare state dict is read as well. Weight norm is accepted in its three spellings and folded: `weight_g` and
`weight_v`, `parametrizations.weight.original0` and `original1`, and a plain `weight`. Every tensor of a checkpoint is
used once.

Source: the layouts as published, https://github.com/descriptinc/descript-audio-codec (dac/model/dac.py,
dac/nn/quantize.py; files as `audiotools.ml.BaseModel` writes them) and https://github.com/huggingface/transformers
(models/dac).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

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
)
from codec.models.dac import DAC_16KHZ, DAC_24KHZ, DAC_44KHZ, DAC_44KHZ_16KBPS, DACCodec, DACConfig

# The published models differ in their number of codebooks, so bare tensors of one tell which it is.
_PUBLISHED = {12: DAC_16KHZ, 32: DAC_24KHZ, 9: DAC_44KHZ, 18: DAC_44KHZ_16KBPS}

# In this order.
_RENAMINGS = (
    (r"^encoder\.block\.", "encoder.layers."),
    (r"^decoder\.model\.", "decoder.layers."),
    (r"\.block\.(\d+)\.block\.(\d+)\.", r".layers.\1.branch.layers.\2."),
    (r"\.block\.(\d+)\.", r".layers.\1."),
    (r"^quantizer\.quantizers\.", "quantizer.stages."),
    (r"\.codebook\.weight$", ".codebook"),
)

_QUANTIZER_FIELDS = ("latent_dim", "num_stages", "codebook_size", "codebook_dim")
_PACKAGE_NAMES = {
    "sample_rate_hz": "sample_rate",
    "encoder_dim": "encoder_dim",
    "encoder_rates": "encoder_rates",
    "decoder_dim": "decoder_dim",
    "decoder_rates": "decoder_rates",
    "latent_dim": "latent_dim",
    "num_stages": "n_codebooks",
    "codebook_size": "codebook_size",
    "codebook_dim": "codebook_dim",
}
_TRANSFORMERS_NAMES = _PACKAGE_NAMES | {
    "sample_rate_hz": "sampling_rate",
    "encoder_dim": "encoder_hidden_size",
    "encoder_rates": "downsampling_ratios",
    "decoder_dim": "decoder_hidden_size",
    "decoder_rates": "upsampling_ratios",
    "latent_dim": "hidden_size",
}


def load_dac(
    source: str | os.PathLike[str], *, config: DACConfig | None = None, allow_pickle: bool = False
) -> DACCodec:
    """A DAC checkpoint as a codec, ready for use: float32, in evaluation mode, without gradients.

    `source` is a folder of `transformers` (config.json beside model.safetensors or pytorch_model.bin), a file that the
    `descript-audio-codec` package wrote (its `weights.pth`, not its `package.pth`, which is code), or a file of tensors
    in either layout. Bare tensors say nothing of their model, which is `config`; by default the published one with as
    many codebooks. What says it itself takes no `config`.

    Only safetensors are read, unless `allow_pickle`: then other files too, by `torch.load(weights_only=True)`.

    ValueError where a tensor is missing, unknown or of another shape than the config asks for; it names them.
    """
    path = Path(source)
    described: DACConfig | None = None
    if path.is_dir():
        described = _of_transformers(path / "config.json")
        path = transformers_weights(path)
    content = read_checkpoint(path, allow_pickle=allow_pickle)
    if isinstance(content, dict) and "state_dict" in content:
        described = _of_package(content.get("metadata"), path)
        content = content["state_dict"]
    if described is not None and config is not None:
        raise ValueError(f"{source} says what model it holds, so config= cannot be given")
    tensors = checked_tensors(content, path)
    config = config or described or _guessed(tensors, path)
    renamings = _transformers_renamings(config) if "encoder.conv1.bias" in tensors else _RENAMINGS
    tensors, spellings = renamed(tensors, renamings, path)
    fold_weight_norm(tensors, path)
    for key in [key for key in tensors if key.endswith(".alpha")]:
        tensors[key] = tensors[key].flatten()  # published as [1, C, 1]
    codec = DACCodec(config)
    check_tensors(tensors, codec.state_dict(), spellings, path)
    codec.load_state_dict(tensors)
    return codec.eval().requires_grad_(False)


def _transformers_renamings(config: DACConfig) -> list[tuple[str, str]]:
    """From the names of `transformers`, which count blocks from 0 and residual units from 1, to ours."""
    found: list[tuple[str, str]] = []
    unit_parts = {"snake1": 0, "conv1": 1, "snake2": 2, "conv2": 3}
    for side, num_blocks, first_unit, block_parts in (
        ("encoder", len(config.encoder_rates), 0, {"snake1": 3, "conv1": 4}),
        ("decoder", len(config.decoder_rates), 2, {"snake1": 0, "conv_t1": 1}),
    ):
        side_parts = {"conv1": 0, "snake1": num_blocks + 1, "conv2": num_blocks + 2}
        found += [(rf"^{side}\.{part}\.", f"{side}.layers.{index}.") for part, index in side_parts.items()]
        for block in range(num_blocks):
            theirs, ours = rf"^{side}\.block\.{block}\.", f"{side}.layers.{block + 1}.layers."
            found += [(rf"{theirs}{part}\.", f"{ours}{index}.") for part, index in block_parts.items()]
            for unit in range(3):
                units = f"{ours}{first_unit + unit}.branch.layers."
                found += [
                    (rf"{theirs}res_unit{unit + 1}\.{part}\.", f"{units}{index}.") for part, index in unit_parts.items()
                ]
    return [*found, *_RENAMINGS[-2:]]


def _guessed(tensors: dict[str, Tensor], path: Path) -> DACConfig:
    """The published configuration with as many codebooks as there are."""
    num_stages = sum(key.endswith("codebook.weight") for key in tensors)
    if num_stages not in _PUBLISHED:
        raise ValueError(f"{path} has {num_stages} codebooks, as no published DAC has; say what it is with config=")
    return _PUBLISHED[num_stages]


def _of_package(metadata: Any, path: Path) -> DACConfig:
    """The configuration in the metadata of a file of the `descript-audio-codec` package."""
    kwargs = metadata.get("kwargs") if isinstance(metadata, dict) else None
    if not isinstance(kwargs, dict):
        raise ValueError(f"{path} has a state_dict, but no metadata with kwargs")
    return _config(kwargs, _PACKAGE_NAMES, f"{path}: kwargs")


def _of_transformers(path: Path) -> DACConfig:
    """The configuration in a config.json of `transformers`."""
    data = read_json(path)
    if data.get("model_type") != "dac":
        raise ValueError(f"{path} does not describe a DAC model")
    return _config(data, _TRANSFORMERS_NAMES, str(path))


def _config(data: dict[str, Any], names: dict[str, str], where: str) -> DACConfig:
    """The configuration in values that either project names in its own way. ValueError for what cannot be."""
    values = {ours: data[theirs] for ours, theirs in names.items() if theirs in data}
    if missing := [names[ours] for ours in names.keys() - values.keys() - {"latent_dim"}]:
        raise ValueError(f"{where}: {', '.join(sorted(missing))} missing")
    dims = values["codebook_dim"]
    if isinstance(dims, list | tuple):  # one per stage
        if len(set(map(str, dims))) != 1:
            raise ValueError(f"{where}: codebook_dim={dims!r} is not the same in all stages, which is not supported")
        values["codebook_dim"] = dims[0]
    if values.get("latent_dim") is None:
        try:
            values["latent_dim"] = values["encoder_dim"] * 2 ** len(values["encoder_rates"])
        except TypeError as error:
            raise ValueError(f"{where}: {error}") from error
    quantizer = {"type": "factorized_vq"} | {name: values.pop(name) for name in _QUANTIZER_FIELDS}
    config: DACConfig = from_dict({"type": "dac", "quantizer": quantizer} | values, where)
    return config
