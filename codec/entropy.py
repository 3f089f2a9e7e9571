"""Entropy coding of codes: range coding from tables of integer counts, the same bits on every machine.

What comes next in speech is not uniform: a code depends on the one before it in time and on the coarser rows of its own
frame. A row of codes has two such parents, and the pair of their codes picks one of at most 32 classes, each with a
table of counts. Contexts begin anew with every call, so blocks can be read alone.

Coded bytes

Codes go one by one, frame by frame, in a frame channel by channel, coarsest row first; parents are of the same channel.
The groups of both parents' codes (of "no code yet" before the first frame) index the row's `classes`, and that class's
counts c[0..n-1] are the code's distribution: code i takes the integers from left[i] up to left[i + 1] of 2^24, where

    left[i] = floor((c[0] + ... + c[i-1]) * scale) + i      scale = (2^24 - n) / (c[0] + ... + c[n-1])

in float64: the sums are exact, and IEEE 754 fixes the division and the products. The range coder holds `lower` and
`range` of 64 bits, at first 0 and 2^64 - 1. For each code, with s = range >> 24: lower += s * left[i] (carrying into
words that are out already), range = s * (left[i + 1] - left[i]); if range < 2^32, the upper 32 bits of `lower` go out,
and both are shifted left by 32. At the end come as few words more as put a decoder into the range. Words are little
endian; zero bytes at the very end are left out, and a decoder reads zeros there.

Source: constriction (Bamler 2022, "Understanding entropy coding with asymmetric numeral systems"), its range coder with
words of 32 bits. `tests/test_range_coder.py` decodes with nothing but the above.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

MAX_CLASSES = 32
MAX_TABLE_BYTES = 2**16


class EntropyError(ValueError):
    """Tables or coded bytes that cannot be used; the message says why in one line."""


@dataclass(frozen=True)
class Parent:
    """A code that says something about another: in row `row`, in the same frame or `lag` = 1 frame before."""

    row: int
    lag: int


@dataclass(frozen=True, eq=False)
class RowModel:
    """How one row of codes is coded.

    parents: the two codes that its class depends on.
    groups: uint8 [codebook size + 1] for each parent; maps its code to a group. The last entry is for "no code yet".
    classes: uint8 [groups of the first, groups of the second].
    counts: uint16 [classes, codebook size], at least 1.
    """

    parents: tuple[Parent, Parent]
    groups: tuple[np.ndarray, np.ndarray]
    classes: np.ndarray
    counts: np.ndarray


class EntropyTables:
    """The tables of one model: `encode` and `decode` blocks of codes. `id` names their contents, 8 hex digits.

    A model for K rows also codes the first K' < K of them.
    """

    def __init__(self, rows: tuple[RowModel, ...]) -> None:
        _check_rows(rows)
        self.rows = rows
        self.codebook_sizes = tuple(row.counts.shape[1] for row in rows)
        digest = hashlib.sha256()
        for name, tensor in sorted(self.to_tensors().items()):
            little = tensor.astype(tensor.dtype.newbyteorder("<"))
            digest.update(f"{name} {little.dtype.str} {little.shape}\n".encode() + little.tobytes())
        self.id = digest.hexdigest()[:8]

    @staticmethod
    def from_tensors(tensors: Mapping[str, np.ndarray]) -> EntropyTables:
        """Undo `to_tensors`. EntropyError where a tensor is missing or does not fit."""
        try:
            parents = tensors["parents"]
            rows = tuple(
                RowModel(
                    (Parent(*map(int, parents[k, 0])), Parent(*map(int, parents[k, 1]))),
                    (tensors[f"row{k}.groups0"], tensors[f"row{k}.groups1"]),
                    tensors[f"row{k}.classes"],
                    tensors[f"row{k}.counts"],
                )
                for k in range(len(parents))
            )
        except (KeyError, IndexError, TypeError) as error:
            raise EntropyError(f"the entropy tables are incomplete: {error}") from error
        return EntropyTables(rows)

    def to_tensors(self) -> dict[str, np.ndarray]:
        """All tables by name, for a file."""
        tensors = {"parents": np.array([[(p.row, p.lag) for p in row.parents] for row in self.rows], np.uint8)}
        for k, row in enumerate(self.rows):
            tensors |= {f"row{k}.groups{i}": row.groups[i] for i in range(2)}
            tensors |= {f"row{k}.classes": row.classes, f"row{k}.counts": row.counts}
        return tensors

    def encode(self, codes: np.ndarray) -> bytes:
        """Codes int64 [C, K, F], each channel coded alone -> bytes."""
        import constriction

        models = self._models
        num_channels, num_rows, num_frames = codes.shape
        encoder = constriction.stream.queue.RangeEncoder()
        channels = []
        for channel in codes:
            padded = np.concatenate([np.array(self.codebook_sizes[:num_rows])[:, None], channel], axis=1)
            channels.append(np.stack([self._classes(k, padded) for k in range(num_rows)]).T.tolist())
        frames = codes.transpose(2, 0, 1).tolist()
        for f in range(num_frames):
            for c in range(num_channels):
                for code, model, index in zip(frames[f][c], models, channels[c][f], strict=False):
                    encoder.encode(code, model[index])
        words: bytes = encoder.get_compressed().astype("<u4").tobytes()
        return words.rstrip(b"\0")

    def decode(self, data: bytes, num_channels: int, num_rows: int, num_frames: int) -> np.ndarray:
        """Undo `encode`: int64 [C, K, F]. EntropyError for bytes that `encode` does not make."""
        import constriction

        if num_rows > len(self.rows):
            raise EntropyError(f"there are tables for {len(self.rows)} rows of codes, not {num_rows}")
        words = np.frombuffer(data + bytes(-len(data) % 4), "<u4").astype(np.uint32)
        decoder = constriction.stream.queue.RangeDecoder(words)
        models, lookup = self._models, self._lookup
        before = [list(self.codebook_sizes[:num_rows]) for _ in range(num_channels)]
        frames = []
        try:
            for _ in range(num_frames):
                for c in range(num_channels):
                    frame: list[int] = []
                    both = (frame, before[c])
                    for model, (row0, lag0, groups0, row1, lag1, groups1, classes) in zip(
                        models[:num_rows], lookup, strict=False
                    ):
                        index = classes[groups0[both[lag0][row0]]][groups1[both[lag1][row1]]]
                        frame.append(decoder.decode(model[index]))
                    before[c] = frame
                frames.append(list(before))
        except Exception as error:  # constriction raises what Rust panics with
            raise EntropyError(f"coded bytes are damaged: {error}") from error
        codes = np.array(frames, np.int64).reshape(num_frames, num_channels, num_rows).transpose(1, 2, 0)
        if self.encode(codes) != data:
            raise EntropyError("coded bytes are not what these codes are coded as")
        return codes

    def bits(self, codes: np.ndarray) -> np.ndarray:
        """What each row of codes [K, F] costs: float64 [K], bits per frame on average."""
        padded = np.concatenate([np.array(self.codebook_sizes[: len(codes)])[:, None], codes], axis=1)
        costs = []
        for k, row in enumerate(self.rows[: len(codes)]):
            logs = np.log2(row.counts / row.counts.sum(1, keepdims=True, dtype=np.float64))
            costs.append(-logs[self._classes(k, padded), codes[k]].sum() / max(1, codes.shape[1]))
        return np.array(costs)

    def _classes(self, k: int, padded: np.ndarray) -> np.ndarray:
        """The class of every code in row k, [F]; `padded` [K, 1 + F] begins with a frame of "no code yet"."""
        row = self.rows[k]
        first, second = (
            groups[padded[p.row, 1 - p.lag : padded.shape[1] - p.lag]]
            for p, groups in zip(row.parents, row.groups, strict=True)
        )
        found: np.ndarray = row.classes[first, second]
        return found

    @functools.cached_property
    def _models(self) -> list[list[Any]]:
        import constriction

        categorical = constriction.stream.model.Categorical
        return [[categorical(c, perfect=False) for c in row.counts.astype(np.float64, "C")] for row in self.rows]

    @functools.cached_property
    def _lookup(self) -> list[tuple[Any, ...]]:
        """The same tables as lists, which are faster for one code at a time."""
        return [
            (
                row.parents[0].row, row.parents[0].lag, row.groups[0].tolist(),
                row.parents[1].row, row.parents[1].lag, row.groups[1].tolist(),
                row.classes.tolist(),
            )
            for row in self.rows
        ]  # fmt: skip


def _check_rows(rows: tuple[RowModel, ...]) -> None:
    if not rows:
        raise EntropyError("there are no entropy tables")
    for k, row in enumerate(rows):
        counts = row.counts
        if counts.dtype != np.uint16 or counts.ndim != 2 or counts.shape[1] < 2 or counts.nbytes > MAX_TABLE_BYTES:
            raise EntropyError(f"row {k}: counts must be uint16 of at most {MAX_TABLE_BYTES} bytes, got {counts.shape}")
        for parent, groups in zip(row.parents, row.groups, strict=True):
            if parent.lag not in (0, 1) or not 0 <= parent.row < k + parent.lag:
                raise EntropyError(f"row {k} cannot depend on row {parent.row} {parent.lag} frames before")
            size = rows[parent.row].counts.shape[-1] + 1
            if groups.shape != (size,) or groups.dtype != np.uint8:
                raise EntropyError(f"row {k}: groups must be uint8 [{size}], got {groups.dtype} {groups.shape}")
        wanted = tuple(int(groups.max()) + 1 for groups in row.groups)
        if row.classes.dtype != np.uint8 or row.classes.shape != wanted:
            raise EntropyError(f"row {k}: classes must be uint8 {wanted}, got {row.classes.dtype} {row.classes.shape}")
        if not int(row.classes.max()) < len(counts) <= MAX_CLASSES or counts.min() < 1:
            raise EntropyError(f"row {k}: there must be counts of at least 1 for each of at most {MAX_CLASSES} classes")
