"""Turn a training run into a model that `codec.load` loads: `python -m tools.export RUN OUT --name NAME@VERSION`.

RUN is the `output_dir` of `recipes.train`. OUT receives `config.json` and `model.safetensors`, and, for a codec that
hears by a speech model, a folder `features` with that one. Where the run kept moving averages of the weights, these are
what is exported; weight norm is folded.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from codec.importers.speech_folder import copy_speech_model
from codec.layers.conv import add_weight_norm, fold_weight_norm
from codec.pretrained import save
from codec.token_format import FEATURE_FOLDER
from recipes.module import wants_weight_norm
from recipes.settings import one_line, parse
from recipes.train import build_codec


def export(run: Path, out: Path, *, name: str, checkpoint: str = "last.ckpt", dtype: str = "float16") -> str:
    """Write the model of a run's checkpoint; return its codec id. ValueError where the run has none."""
    file = run / "checkpoints" / checkpoint
    if not file.is_file():
        raise ValueError(f"{file} does not exist")
    config = OmegaConf.load(run / "config.yaml")
    assert isinstance(config, DictConfig)
    settings = replace(parse(config), init_from=None, warm_start=None)  # the model is written out there
    codec = build_codec(settings)
    if wants_weight_norm(codec, settings):
        add_weight_norm(codec)
    # Weights-only: a checkpoint from elsewhere can run no code here.
    state = torch.load(file, map_location="cpu", weights_only=True)
    weights = {key.removeprefix("codec."): v for key, v in state["state_dict"].items() if key.startswith("codec.")}
    try:
        codec.load_state_dict(state["average"]["values"] if "average" in state else weights)
    except RuntimeError as error:
        raise ValueError(f"{file} does not fit {run / 'config.yaml'}: {one_line(error)}") from error
    fold_weight_norm(codec)
    codec_id = save(codec, out, name=name, dtype=dtype)
    if settings.features is not None:
        shutil.rmtree(out / FEATURE_FOLDER, ignore_errors=True)
        copy_speech_model(Path(settings.features), out / FEATURE_FOLDER)
    return codec_id


def main() -> None:
    """Parse arguments and export; a mistake in them is one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--name", required=True, help="what files will call the model, such as speech_16k@1")
    parser.add_argument("--checkpoint", default="last.ckpt", help="a file in RUN/checkpoints (default: last.ckpt)")
    parser.add_argument("--dtype", default="float16", choices=["float16", "float32"], help="storage (default: float16)")
    args = parser.parse_args()
    try:
        codec_id = export(args.run, args.out, name=args.name, checkpoint=args.checkpoint, dtype=args.dtype)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(f"{args.out}: {args.name}, id {codec_id}")


if __name__ == "__main__":
    main()
