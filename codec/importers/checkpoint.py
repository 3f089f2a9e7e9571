"""Checkpoints of others, in parts that all importers share: reading, renaming, folding weight norm, checking.

Only safetensors are read, unless a caller allows pickles, which are then read by `torch.load(weights_only=True)`: they
run no code. Every tensor of a checkpoint is used once, and every tensor of ours comes from one, or it is a ValueError.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor

_Config = TypeVar("_Config")

# Weight norm as a parametrization names its halves by numbers; the third spelling is a plain `weight`.
_WEIGHT_NORM_SPELLINGS = (
    (r"\.parametrizations\.weight\.original0$", ".weight_g"),
    (r"\.parametrizations\.weight\.original1$", ".weight_v"),
)


def read_checkpoint(path: Path, *, allow_pickle: bool) -> Any:
    """What a file holds: a mapping of names to tensors where it is of safetensors, anything where it is a pickle."""
    if not path.is_file():
        raise ValueError(f"{path} is no file")
    is_pickle = path.suffix != ".safetensors"
    if is_pickle and not allow_pickle:
        raise ValueError(
            f"{path} is not a .safetensors file; if you trust it, allow_pickle=True (--allow-pickle) reads it"
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True) if is_pickle else load_file(path)
    except Exception as error:  # both raise types of their own
        raise ValueError(f"{path} cannot be read: {error}") from error


def with_config(
    source: Path, config: _Config | None, read_config: Callable[[Path], _Config], find: Callable[[Path], Path]
) -> tuple[Path, _Config | None]:
    """The file of weights, and its model's configuration: of a folder that of its config.json, else what was given."""
    if not source.is_dir():
        return source, config
    if config is not None:
        raise ValueError(f"{source} has a config.json, so config= cannot be given")
    config = read_config(source / "config.json")
    return find(source), config


def transformers_weights(folder: Path) -> Path:
    """The weights in a folder of `transformers`: safetensors where there are some."""
    weights = folder / "model.safetensors"
    return weights if weights.is_file() else folder / "pytorch_model.bin"


def only_checkpoint(folder: Path) -> Path:
    """The one file that lies beside config.json; ValueError where there is none, or more than one."""
    others = sorted(file for file in folder.iterdir() if file.is_file() and file.name != "config.json")
    if len(others) != 1:
        raise ValueError(f"{folder} must hold a config.json and one checkpoint, found {[file.name for file in others]}")
    return others[0]


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file; ValueError where there is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} is not a mapping")
    return data


def checked_tensors(tensors: Any, path: Path) -> dict[str, Tensor]:
    """The same, if it is a mapping of names to tensors; else ValueError."""
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ValueError(f"{path} is not a mapping of names to tensors")
    return tensors


def renamed(
    tensors: dict[str, Tensor], renamings: Sequence[tuple[str, str]], path: Path
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors by our names, in float32, and how the checkpoint spells each name.

    `renamings` are pairs of a regular expression and its replacement, applied one after another.
    """
    ours: dict[str, Tensor] = {}
    spellings: dict[str, str] = {}
    for key, value in tensors.items():
        name = key
        for pattern, replacement in (*_WEIGHT_NORM_SPELLINGS, *renamings):
            name = re.sub(pattern, replacement, name)
        if name in ours:
            raise ValueError(f"{path}: {key} and {spellings[name]} are the same tensor")
        ours[name], spellings[name] = value.float(), key
    return ours, spellings


def fold_weight_norm(tensors: dict[str, Tensor], path: Path) -> None:
    """Replace directions and lengths by the weights that they make. Lengths belong to the first dimension."""
    for key in [key for key in tensors if key.endswith(("weight_g", "weight_v"))]:
        name = key.removesuffix("_g").removesuffix("_v")
        if name in tensors and f"{name}_v" not in tensors:
            continue  # the other half has been here
        if name in tensors:
            raise ValueError(f"{path}: {name} is there with and without weight norm")
        halves = [tensors.pop(f"{name}_{half}", None) for half in "gv"]
        length, direction = (half.double() if half is not None else None for half in halves)
        if length is None or direction is None:
            raise ValueError(f"{path}: missing the {'length' if length is None else 'direction'} of {name}")
        if length.numel() != direction.shape[0]:
            raise ValueError(f"{path}: {name} has {length.numel()} lengths for {direction.shape[0]} directions")
        norm = direction.flatten(1).norm(dim=1).view(-1, *[1] * (direction.dim() - 1))
        tensors[name] = (length.view_as(norm) * (direction / norm)).float()


def check_tensors(
    tensors: dict[str, Tensor], expected: dict[str, Tensor], spellings: dict[str, str], path: Path
) -> None:
    """ValueError unless the tensors have the names and shapes that a codec's state dict has, and finite values."""
    missing = sorted(expected.keys() - tensors.keys())
    unknown = sorted(spellings.get(key, key) for key in tensors.keys() - expected.keys())
    if missing or unknown:
        raise ValueError(f"{path} does not fit its config: missing {missing}, unknown {unknown}")
    for key, value in tensors.items():
        if value.shape != expected[key].shape:
            raise ValueError(f"{path}: {key} is {tuple(value.shape)}, the config asks for {tuple(expected[key].shape)}")
        if not torch.isfinite(value).all():
            raise ValueError(f"{path}: {key} holds NaN or infinity")
