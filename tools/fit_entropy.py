"""Measure a model's codes and write its entropy tables: `python -m tools.fit_entropy MODEL_FOLDER TRAIN --check DEV`.

TRAIN and DEV are folders with recordings. The tables go into the model's `tokens.safetensors`; files
written from then on are entropy-coded. Prints, for each row of codes, what it depends on and what a code costs on DEV:
packed, from one table, and with its context.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from codec.audio import find_audio, read_audio, resample
from codec.entropy import MAX_CLASSES, MAX_TABLE_BYTES, EntropyTables, Parent, RowModel
from codec.pretrained import load
from codec.token_format import FILE_NAME

_load_once = functools.cache(load)
_MAX_GROUPS = 32
_SMOOTHING = 30.0  # weight of the prior, in observations
_ITERATIONS = 20


def codes_of(model: str, folder: Path, *, num_workers: int) -> list[np.ndarray]:
    """The codes [K, F] of the first channel of every recording under a folder."""
    with ProcessPoolExecutor(num_workers) as pool:
        return list(pool.map(functools.partial(_encode, model=model), find_audio(folder), chunksize=16))


def _encode(file: Path, *, model: str) -> np.ndarray:
    torch.set_num_threads(1)
    codec = _load_once(model)
    audio, rate_hz = read_audio(file)
    audio = resample(audio[:1], rate_hz, codec.sample_rate_hz)
    codes: np.ndarray = codec.encode(torch.from_numpy(audio.copy())[None]).codes[0].numpy()
    return codes


def fit(recordings: list[np.ndarray], codebook_sizes: tuple[int, ...]) -> EntropyTables:
    """Tables from codes [K, F]. For each row the two parents are taken that together say most about it."""
    sizes = np.array(codebook_sizes)
    # A frame of "no code yet" before each recording; it is never a code itself.
    frames = np.concatenate([np.concatenate([sizes[:, None], codes], axis=1) for codes in recordings], axis=1)
    real = np.flatnonzero(frames[0] < sizes[0])
    return EntropyTables(tuple(_fit_row(k, frames, real, codebook_sizes) for k in range(len(sizes))))


def _fit_row(k: int, frames: np.ndarray, real: np.ndarray, sizes: tuple[int, ...]) -> RowModel:
    size = sizes[k]
    max_classes = min(MAX_CLASSES, MAX_TABLE_BYTES // (2 * size))
    if max_classes < 1:
        raise ValueError(f"a codebook of {size} is too large for a table")
    codes = frames[k, real]
    candidates = sorted({Parent(k, 1), Parent(0, 1)} | {Parent(j, 0) for j in {0, 1, 2, k - 2, k - 1} if 0 <= j < k},
                        key=lambda p: (p.lag, p.row))  # fmt: skip
    groups, values = {}, {}
    for parent in candidates:
        values[parent] = frames[parent.row, real - parent.lag]
        joint = _joint(values[parent], codes, sizes[parent.row] + 1, size)
        groups[parent] = _cluster(joint, _MAX_GROUPS)
    best: tuple[float, RowModel] | None = None
    for pair in itertools.combinations_with_replacement(candidates, 2):
        if pair[0] == pair[1] and len(candidates) > 1:
            continue
        shape = tuple(int(groups[p].max()) + 1 for p in pair)
        both = groups[pair[0]][values[pair[0]]].astype(np.int64) * shape[1] + groups[pair[1]][values[pair[1]]]
        joint = _joint(both, codes, shape[0] * shape[1], size)
        classes = _cluster(joint, max_classes)
        counts = _counts(joint, classes)
        logs = np.log2(counts / counts.sum(1, keepdims=True, dtype=np.float64))
        cost = -float((joint * logs[classes]).sum() / joint.sum())
        if best is None or cost < best[0]:
            best = cost, RowModel(pair, (groups[pair[0]], groups[pair[1]]), classes.reshape(shape), counts)
    assert best is not None
    return best[1]


def _joint(contexts: np.ndarray, codes: np.ndarray, num_contexts: int, size: int) -> np.ndarray:
    """How often each code follows each context: float64 [num_contexts, size]."""
    flat = np.bincount(contexts * size + codes, minlength=num_contexts * size)
    return flat.reshape(num_contexts, size).astype(np.float64)


def _cluster(joint: np.ndarray, num_clusters: int) -> np.ndarray:
    """Contexts with like distributions -> cluster numbers uint8 [contexts], without gaps.

    Source: k-means with the Kullback-Leibler divergence (the information bottleneck of Tishby et al. 1999 with hard
    assignments): each step lowers the bits per code.
    """
    rng = np.random.default_rng(0)
    mass = joint.sum(1)
    prior = (joint.sum(0) + 1) / (joint.sum() + joint.shape[1])
    roots = np.sqrt((joint + 2 * prior) / (mass[:, None] + 2))
    centres = [int(mass.argmax())]
    distance = np.square(roots - roots[centres[0]]).sum(1)
    while len(centres) < min(num_clusters, len(joint)) and (distance * mass).sum() > 0:
        centres.append(int(rng.choice(len(mass), p=distance * mass / (distance * mass).sum())))
        distance = np.minimum(distance, np.square(roots - roots[centres[-1]]).sum(1))
    clusters = np.stack([np.square(roots - roots[c]).sum(1) for c in centres]).argmin(0)
    for _ in range(_ITERATIONS):
        totals = np.zeros((len(centres), joint.shape[1]))
        np.add.at(totals, clusters, joint)
        totals += _SMOOTHING * prior
        moved = (joint @ np.log(totals / totals.sum(1, keepdims=True)).T).argmax(1)
        if (moved == clusters).all():
            break
        clusters = moved
    numbers: np.ndarray = np.unique(clusters, return_inverse=True)[1].astype(np.uint8)
    return numbers


def _counts(joint: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """Smoothed counts uint16 [clusters, size], as fine as 16 bits allow."""
    totals = np.zeros((int(clusters.max()) + 1, joint.shape[1]))
    np.add.at(totals, clusters, joint)
    prior = (joint.sum(0) + 1) / (joint.sum() + joint.shape[1])
    shares = (totals + _SMOOTHING * prior) / (totals.sum(1, keepdims=True) + _SMOOTHING)
    scale = np.minimum(65535 / shares.max(1, keepdims=True), 2.0**20)
    counts: np.ndarray = np.clip(np.round(shares * scale), 1, 65535).astype(np.uint16)
    return counts


def report(tables: EntropyTables, train: list[np.ndarray], check: list[np.ndarray]) -> str:
    """Bits per code on recordings that the tables were not fitted to."""
    num_frames = sum(codes.shape[1] for codes in check)
    contextual = sum(tables.bits(codes) * codes.shape[1] for codes in check) / num_frames
    lines = [" row  packed  one table  with context  depends on"]
    total = np.zeros(3)
    for k, row in enumerate(tables.rows):
        size = tables.codebook_sizes[k]
        seen = np.bincount(np.concatenate([codes[k] for codes in train]), minlength=size) + 1.0
        static = -np.log2(seen / seen.sum())[np.concatenate([codes[k] for codes in check])].mean()
        total += ((size - 1).bit_length(), static, contextual[k])
        names = " and ".join(f"row {p.row}" + (" a frame before" if p.lag else "") for p in row.parents)
        lines.append(f"{k:4}  {(size - 1).bit_length():6}  {static:9.3f}  {contextual[k]:12.3f}  {names}")
        lines.append(f" 0-{k}  {total[0]:6.0f}  {total[1]:9.3f}  {total[2]:12.3f}  {1 - total[2] / total[0]:.1%} saved")
    return "\n".join(lines)


def main() -> None:
    """Parse arguments and fit; a mistake in them is one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a folder with a model")
    parser.add_argument("train", type=Path)
    parser.add_argument("--check", type=Path, required=True, help="recordings to measure on, unseen in fitting")
    parser.add_argument("--num-workers", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    try:
        token_format = load(args.model).token_format
        assert token_format is not None  # loaded models have one
        train, check = (
            codes_of(str(args.model), folder, num_workers=args.num_workers) for folder in (args.train, args.check)
        )
        tables = fit(train, token_format.codebook_sizes)
        replace(token_format, tables=tables).save(args.model)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(report(tables, train, check))
    print(f"{args.model / FILE_NAME}: tables {tables.id}")


if __name__ == "__main__":
    main()
