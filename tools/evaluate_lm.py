"""How well a language model of tokens foresees codes, beside counts of single codes and of pairs.

    python -m tools.evaluate_lm LM CODEC TRAIN DEV

LM is a folder that tools.export_lm wrote, CODEC the model that made the `.codec` files in the folders TRAIN and DEV.
Perplexities are of the codes of all frames of DEV, in all rows and row by row. The language model hears windows as long
as its context, and nothing of what was before them; of delayed rows, row k misses the last k frames of a window.

The counts are of TRAIN: "unigram", how often a code is in its row; "bigram", how often it follows the one before it,
which for row 0 is row 0 of the frame before, else the row above. Between the two it interpolates (Dirichlet), by the
factor that is best on DEV itself, which favours it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from codec.token_format import TokenFormat
from recipes.token_data import CodeCorpus, all_windows, ids_of
from recipes.token_lm import TokenLM, load_lm
from recipes.train_lm import summed_losses

_FACTORS = tuple(2.0**power for power in range(1, 15))


def lm_losses(lm: TokenLM, corpus: CodeCorpus, *, batch_size: int = 8) -> np.ndarray:
    """Mean losses in nats per code, float64 [K], of a corpus."""
    vocabulary = lm.config.vocabulary
    windows = all_windows(corpus, vocabulary, lm.config.network.context_steps)
    sums = torch.zeros(2, 1 + vocabulary.num_quantizers, dtype=torch.float64)
    with torch.inference_mode():
        for first in range(0, len(windows), batch_size):
            sums += summed_losses(lm, ids_of(corpus, vocabulary, windows[first : first + batch_size]))
    means: np.ndarray = (sums[0] / sums[1])[1:].numpy()
    return means


class Counts:
    """How often codes of a row occur, [C], and follow the code before, [C before, C]; see the top of this file."""

    def __init__(self, corpus: CodeCorpus, row: int, num_before: int, codebook_size: int) -> None:
        self.single = np.zeros(codebook_size)
        self.pairs = np.zeros((num_before, codebook_size), np.float32)
        for before, codes in _followers(corpus, row):
            self.single += np.bincount(codes, minlength=codebook_size)
            np.add.at(self.pairs, (before[before >= 0], codes[before >= 0]), 1.0)
        # Each code was seen once more than it was, so that none is impossible.
        self.shares = (self.single + 1.0) / (self.single.sum() + codebook_size)

    def losses(self, corpus: CodeCorpus, row: int) -> tuple[float, float]:
        """Mean losses in nats per code of another corpus: of single codes, and of pairs with the best factor."""
        parts = list(_followers(corpus, row))
        before, codes = (np.concatenate([part[i] for part in parts]) for i in range(2))
        shares = self.shares[codes]
        num_seen = np.where(before >= 0, self.pairs.sum(axis=1)[before], 0.0)
        num_pairs = np.where(before >= 0, self.pairs[before, codes], 0.0)
        pairs = [-np.log((num_pairs + f * shares) / (num_seen + f)).mean() for f in _FACTORS]
        return float(-np.log(shares).mean()), float(min(pairs))


def _followers(corpus: CodeCorpus, row: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The codes of a row, recording by recording, each with the one before it, or -1 where there is none."""
    for number, recording in enumerate(corpus.recordings):
        codes = corpus.read(number, 0, recording.num_frames).codes[0].numpy()
        before = np.concatenate([[-1], codes[0, :-1]]) if row == 0 else codes[row - 1]
        yield before, codes[row]


def evaluate(lm: TokenLM, train: CodeCorpus, dev: CodeCorpus) -> dict[str, list[float]]:
    """Perplexities per code by name of the model: of all rows together, then of each."""
    sizes = lm.config.vocabulary.codebook_sizes
    losses: dict[str, list[float]] = {"unigram": [], "bigram": []}
    for row, size in enumerate(sizes):
        counts = Counts(train, row, sizes[max(0, row - 1)], size)
        single, pairs = counts.losses(dev, row)
        losses["unigram"].append(single)
        losses["bigram"].append(pairs)
    losses["language model"] = lm_losses(lm, dev).tolist()
    return {name: np.exp(np.array([np.mean(means), *means])).tolist() for name, means in losses.items()}


def main() -> None:
    """Parse arguments and measure; a mistake in them is one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lm", type=Path, metavar="LM")
    parser.add_argument("codec", metavar="CODEC")
    parser.add_argument("train", type=Path, metavar="TRAIN")
    parser.add_argument("dev", type=Path, metavar="DEV")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--num-threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.num_threads)
    try:
        lm, token_format = load_lm(args.lm), TokenFormat.load(args.codec)
        vocabulary = lm.config.vocabulary
        if token_format.codec_id != vocabulary.codec_id:
            raise ValueError(f"the language model reads tokens of {vocabulary.codec_id}, not of {token_format.model}")
        train, dev = (CodeCorpus(folder, token_format, vocabulary.num_quantizers) for folder in (args.train, args.dev))
        found = evaluate(lm, train, dev)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    if args.json:
        print(json.dumps(found))
        return
    rows = "".join(f"{f'row {row}':>10}" for row in range(vocabulary.num_quantizers))
    print(f"{'perplexity per code':20}{'all rows':>10}{rows}")
    for name, values in found.items():
        print(f"{name:20}" + "".join(f"{value:10.1f}" for value in values))


if __name__ == "__main__":
    main()
