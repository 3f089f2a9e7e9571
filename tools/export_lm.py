"""Turn a run of `recipes.train_lm` into a language model: `python -m tools.export_lm RUN OUT`.

OUT receives `config.json`, with the codec and the pattern of its tokens, and `model.safetensors`; `tools.evaluate_lm`
and `tools.continue_speech` take it, and `recipes.token_lm.load_lm`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from codec.config import from_values
from recipes.settings import one_line
from recipes.token_lm import TokenLM, TokenLMConfig, save_lm


def export_lm(run: Path, out: Path, *, checkpoint: str = "best.ckpt") -> TokenLM:
    """Write the model of a run's checkpoint, and return it. ValueError where the run has none."""
    file = run / "checkpoints" / checkpoint
    if not file.is_file():
        raise ValueError(f"{file} does not exist")
    # Weights-only: a checkpoint from elsewhere can run no code here.
    state = torch.load(file, map_location="cpu", weights_only=True)
    if "lm" not in state:
        raise ValueError(f"{file} is not of a language model")
    lm = TokenLM(from_values(TokenLMConfig, state["lm"], str(file)))
    weights = {key.removeprefix("lm."): v for key, v in state["state_dict"].items() if key.startswith("lm.")}
    try:
        lm.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{file} does not fit its configuration: {one_line(error)}") from error
    save_lm(lm, out)
    return lm


def main() -> None:
    """Parse arguments and export; a mistake in them is one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--checkpoint", default="best.ckpt", help="a file in RUN/checkpoints (default: best.ckpt)")
    args = parser.parse_args()
    try:
        lm = export_lm(args.run, args.out, checkpoint=args.checkpoint)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    vocabulary = lm.config.vocabulary
    num_weights = sum(parameter.numel() for parameter in lm.parameters())
    print(f"{args.out}: {num_weights} weights, {vocabulary.pattern}, {vocabulary.num_quantizers} rows of codes")


if __name__ == "__main__":
    main()
