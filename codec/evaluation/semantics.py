"""What codes and latents know of labels, such as the phones at every frame: purity, mutual information, a linear probe.

Letters: F frames, D dims, K rows of codes. Labels and codes are int64 [F] from 0 up; a label of -1 says that there is
none, and the frame does not count. `files` int64 [F] tells which recording a frame is of; recordings, not frames, are
independent, and intervals are made of them.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from codec.evaluation.results import Summary, summarize

_MAX_GROUPS = 100  # of recordings, that one after the other is left out
_Z = 1.959964  # of a normal distribution's 95 %
PROBE_FOLDS = 5
PROBE_FRAMES = 20_000  # that a probe learns from, at the most
_PROBE_STEPS = 200


@dataclass(frozen=True)
class Counts:
    """How often codes met labels. `pairs` [N, 2] are those that occurred, `counts` [N] how often."""

    pairs: np.ndarray
    counts: np.ndarray

    @staticmethod
    def of(codes: np.ndarray, labels: np.ndarray) -> Counts:
        """Of the frames with a label. `codes` is [F], or [K, F] where several rows make one unit together.

        ValueError where shapes differ or no frame has a label.
        """
        units = joined(codes)
        if units.shape != labels.shape:
            raise ValueError(f"{units.shape[-1]} frames of codes do not fit {labels.shape[-1]} of labels")
        has_label = labels >= 0
        if not has_label.any():
            raise ValueError("no frame has a label")
        width = int(labels.max()) + 1
        keys, counts = np.unique(units[has_label] * width + labels[has_label], return_counts=True)
        return Counts(np.stack([keys // width, keys % width], axis=1), counts)

    def purity(self) -> float:
        """Phone purity: how often a frame has the label that is the most frequent one of its code.

        It grows with the size of the codebook, and is 1 where every frame has a code of its own: compare codebooks of
        one size, on as many frames, or look at `cluster_purity`, too.

        Source: Hsu et al., "HuBERT" (2021), section IV-C.
        """
        return self._largest(0)

    def cluster_purity(self) -> float:
        """How often a frame has the code that is the most frequent one of its label; falls as codebooks grow.

        Source: as for `purity`.
        """
        return self._largest(1)

    def pnmi(self) -> float:
        """Mutual information of codes and labels over the entropy of the labels; NaN where there is but one label.

        0 where codes say nothing of labels, 1 where they tell them. As an estimate from counts it is too high, the more
        so the larger the codebook and the fewer the frames: compare it with `pnmi_by_chance`.

        Source: Hsu et al., "HuBERT" (2021), section IV-C.
        """
        shares = self.counts / self.counts.sum()
        codes, labels = self._margins()
        information = float((shares * np.log(shares / (codes * labels))).sum())
        entropy = -float((shares * np.log(labels)).sum())
        return max(information, 0.0) / entropy if entropy > 0 else math.nan

    def _largest(self, axis: int) -> float:
        """The share of frames in the largest cell of every line."""
        _, lines = np.unique(self.pairs[:, axis], return_inverse=True)
        largest = np.zeros(lines.max() + 1, self.counts.dtype)
        np.maximum.at(largest, lines, self.counts)
        return float(largest.sum() / self.counts.sum())

    def _margins(self) -> list[np.ndarray]:
        """Of every pair, the shares that its code and its label have."""
        margins = []
        for axis in (0, 1):
            _, lines = np.unique(self.pairs[:, axis], return_inverse=True)
            margins.append((np.bincount(lines, self.counts) / self.counts.sum())[lines])
        return margins


def purity(codes: np.ndarray, labels: np.ndarray) -> float:
    """See `Counts.purity`.

    >>> purity(np.array([0, 0, 0, 1]), np.array([2, 2, 3, 3]))
    0.75
    """
    return Counts.of(codes, labels).purity()


def cluster_purity(codes: np.ndarray, labels: np.ndarray) -> float:
    """See `Counts.cluster_purity`."""
    return Counts.of(codes, labels).cluster_purity()


def pnmi(codes: np.ndarray, labels: np.ndarray) -> float:
    """See `Counts.pnmi`."""
    return Counts.of(codes, labels).pnmi()


def pnmi_by_chance(codes: np.ndarray, labels: np.ndarray) -> float:
    """What `pnmi` is for codes that say nothing: its mean where labels come a quarter, half, three quarters too late.

    Frames are taken for a ring. Codes and labels keep how often and in which runs they occur, and with them the bias.
    """
    return float(np.mean([pnmi(codes, np.roll(labels, len(labels) * quarter // 4)) for quarter in (1, 2, 3)]))


def unseen_purity(codes: np.ndarray, labels: np.ndarray, files: np.ndarray, *, seed: int = 0) -> Summary:
    """How often a frame has the label that is the most frequent one of its code in other recordings.

    Purity without what makes it grow by itself: large codebooks that know single frames by heart gain nothing. In up to
    five folds of recordings; a code that the others do not have is taken for the most frequent label. The interval is a
    bootstrap over recordings. ValueError where there are fewer than two recordings with labels.
    """
    has_label = labels >= 0
    units, targets, recordings = joined(codes)[has_label], labels[has_label], files[has_label]
    if len(np.unique(recordings)) < 2:
        raise ValueError("labels of two recordings are needed")
    _, units = np.unique(units, return_inverse=True)
    shape = (int(units.max()) + 1, int(targets.max()) + 1)
    fold = _folds(recordings, np.random.default_rng(seed))
    is_right = np.zeros(len(targets))
    for number in range(int(fold.max()) + 1):
        known, unseen = fold != number, fold == number
        joint = np.bincount(units[known] * shape[1] + targets[known], minlength=shape[0] * shape[1]).reshape(shape)
        guess = np.where(joint.any(1), joint.argmax(1), joint.sum(0).argmax())
        is_right[unseen] = guess[units[unseen]] == targets[unseen]
    return _share_of_frames(is_right, recordings)


def joined(codes: np.ndarray) -> np.ndarray:
    """Rows of codes [K, F] as one unit a frame, int64 [F], numbered from 0; a single row [F] as it is."""
    if codes.ndim == 1:
        return codes
    units = np.zeros(codes.shape[1], np.int64)
    for row in codes:
        _, units = np.unique(units * (int(row.max(initial=0)) + 1) + row, return_inverse=True)
    return units


def over_files(measure: Callable[[Counts], float], codes: np.ndarray, labels: np.ndarray, files: np.ndarray) -> Summary:
    """A value of all frames, and its 95 % interval by the jackknife over recordings (or 100 groups of them).

    The bootstrap would not do: to draw recordings twice makes codes look more telling than they are. The median is
    that of the values with one group left out. The interval is NaN where there is one recording.

    Source: Efron and Tibshirani, "An introduction to the bootstrap" (1993), chapter 11.
    """
    units = joined(codes)
    has_label = labels >= 0
    names = np.unique(files[has_label])
    if not len(names):
        return Summary(math.nan, math.nan, math.nan, math.nan, 0)
    value = measure(Counts.of(units, labels))
    num_groups = min(len(names), _MAX_GROUPS)
    if num_groups == 1:
        return Summary(value, math.nan, math.nan, value, 1)
    group = np.searchsorted(names, files[has_label]) * num_groups // len(names)
    width = int(labels.max()) + 1
    keys, pairs = np.unique(units[has_label] * width + labels[has_label], return_inverse=True)
    joint = np.stack([keys // width, keys % width], axis=1)
    counts = np.bincount(pairs, minlength=len(keys))
    values = []
    for left_out in range(num_groups):
        rest = counts - np.bincount(pairs[group == left_out], minlength=len(keys))
        values.append(measure(Counts(joint[rest > 0], rest[rest > 0])))
    parts = np.array(values)
    error = math.sqrt((num_groups - 1) * float(np.var(parts)))
    return Summary(value, value - _Z * error, value + _Z * error, float(np.median(parts)), len(names))


def probe(
    latents: np.ndarray,
    labels: np.ndarray,
    files: np.ndarray,
    *,
    groups: np.ndarray | None = None,
    max_frames: int = PROBE_FRAMES,
    seed: int = 0,
) -> Summary:
    """How often a linear classifier tells the label from latents float [F, D], on recordings it has not learned from.

    Multinomial logistic regression on standardised dims, cross-validated in up to five folds: `groups` int64 [F], by
    default `files`, are never divided. With speakers for groups it is tested on other voices, which takes many: from
    one speaker it learns a voice. It learns from at most `max_frames` frames, drawn by `seed`, and is tested on all.
    The interval is a bootstrap over recordings.

    ValueError where there are fewer than two groups or labels. Needs scikit-learn.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    has_label = labels >= 0
    features, targets, recordings = latents[has_label], labels[has_label], files[has_label]
    parts = recordings if groups is None else groups[has_label]
    names = np.unique(parts)
    if len(names) < 2 or len(np.unique(targets)) < 2:
        raise ValueError(f"a probe needs two groups of frames and two labels, got {len(names)} groups")
    rng = np.random.default_rng(seed)
    fold = _folds(parts, rng)
    is_right = np.zeros(len(targets))
    for number in range(int(fold.max()) + 1):
        known, unseen = np.flatnonzero(fold != number), np.flatnonzero(fold == number)
        known = np.sort(rng.permutation(known)[:max_frames])
        if len(np.unique(targets[known])) < 2:
            continue  # it could but guess, and is wrong
        mean, spread = (function(features[known], axis=0, dtype=np.float64) for function in (np.mean, np.std))
        spread = np.where(spread > 1e-9 * max(float(spread.max()), 1e-30), spread, 1.0)
        classifier = LogisticRegression(max_iter=_PROBE_STEPS, tol=1e-3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # near enough after so many steps
            classifier.fit((features[known] - mean) / spread, targets[known])
        is_right[unseen] = classifier.predict((features[unseen] - mean) / spread) == targets[unseen]
    return _share_of_frames(is_right, recordings)


def most_frequent(labels: np.ndarray) -> float:
    """The share of the most frequent label among frames that have one: what a probe without latents would reach."""
    given = labels[labels >= 0]
    return float(np.bincount(given).max() / len(given)) if len(given) else math.nan


def _folds(groups: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The fold of every frame, int64 [F]; each group is in one, and sizes in groups differ by at most one."""
    names = np.unique(groups)
    folds: np.ndarray = rng.permutation(len(names)) % min(PROBE_FOLDS, len(names))
    return folds[np.searchsorted(names, groups)]


def _share_of_frames(is_right: np.ndarray, files: np.ndarray) -> Summary:
    _, numbers = np.unique(files, return_inverse=True)
    num_frames = np.bincount(numbers)
    return summarize((np.bincount(numbers, is_right) / num_frames).tolist(), num_frames.tolist())
