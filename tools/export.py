"""Turn a training run into a model that `codec.load` loads: `python -m tools.export RUN OUT --name NAME@VERSION`.

RUN is the `output_dir` of `recipes.train`. OUT receives `config.json` and `model.safetensors`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from omegaconf import OmegaConf

from codec.pretrained import save
from recipes.train import build_codec


def export(run: Path, out: Path, *, name: str, checkpoint: str = "last.ckpt", dtype: str = "float16") -> str:
    """Write the model of a run's checkpoint; return its codec id. ValueError where the run has none."""
    file = run / "checkpoints" / checkpoint
    if not file.is_file():
        raise ValueError(f"{file} does not exist")
    codec = build_codec(OmegaConf.load(run / "config.yaml"))  # type: ignore[arg-type]
    # Weights-only: a checkpoint from elsewhere can run no code here.
    state = torch.load(file, map_location="cpu", weights_only=True)["state_dict"]
    codec.load_state_dict(
        {key.removeprefix("codec."): value for key, value in state.items() if key.startswith("codec.")}
    )
    return save(codec, out, name=name, dtype=dtype)


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
