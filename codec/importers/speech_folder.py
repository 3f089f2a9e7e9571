"""The folder of a frozen speech model, put beside the weights of a codec that hears by it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from codec.importers.checkpoint import checked_tensors, read_checkpoint

_SETTINGS = "config.json"
_PREPARING = ("preprocessor_config.json", "processor_config.json")  # older and newer releases of `transformers`
_PICKLE = "pytorch_model.bin"


def copy_speech_model(source: Path, target: Path, *, allow_pickle: bool = False) -> None:
    """Make `target` a folder with the speech model of `source`, a folder of `transformers`.

    Files are linked where the disk can, else copied; of others than settings and weights nothing is taken. Where there
    are no safetensors, weights are converted from `pytorch_model.bin`, which `torch.load(weights_only=True)` reads, if
    `allow_pickle`. ValueError where something is missing.
    """
    weights = sorted(source.glob("model*.safetensors*"))  # also the index of weights in several files
    preparing = [source / name for name in _PREPARING if (source / name).is_file()]
    if not (source / _SETTINGS).is_file() or not preparing:
        raise ValueError(f"{source} must hold {_SETTINGS} and {_PREPARING[0]} or {_PREPARING[1]}")
    if not weights and not (source / _PICKLE).is_file():
        raise ValueError(f"{source} holds no model.safetensors and no {_PICKLE}")
    if not weights and not allow_pickle:
        raise ValueError(
            f"{source} holds its weights as a pickle only: if you trust it, allow_pickle=True (--allow-pickle) "
            f"converts it; to do without it, and decode only, import the folder of the codec alone"
        )
    target.mkdir()
    for file in (source / _SETTINGS, *preparing, *weights):
        _link_or_copy(file, target / file.name)
    if not weights:
        path = source / _PICKLE
        tensors = checked_tensors(read_checkpoint(path, allow_pickle=True), path)
        own = {key: value.clone(memory_format=torch.contiguous_format) for key, value in tensors.items()}
        save_file(own, target / "model.safetensors", metadata={"format": "pt"})


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)
