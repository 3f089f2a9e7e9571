"""Whether latents tell phones apart: ABX discrimination.

X is a phone of the same kind as A, and B one of another kind; an error is where X is nearer to B.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

MAX_TOKENS = 10  # of one label in one place
MAX_OTHER_SPEAKERS = 5  # that a speaker is compared with
_PAIRS_AT_ONCE = 20_000
_LONGEST = 50  # frames of a phone that count


@dataclass(frozen=True)
class Token:
    """One phone as it was said: its latents float [F, D], who said it, and between which others."""

    label: str
    latents: np.ndarray
    speaker: str = ""
    context: tuple[str, str] = ("", "")


def abx(tokens: Sequence[Token], *, across: bool = False, by_context: bool = True, seed: int = 0) -> float:
    """The error of ABX discrimination, 0 to 1; chance is 0.5. NaN where there are no three phones to compare.

    A and B are of one speaker and, with `by_context`, stand between the same neighbours; so does X, which is of the
    same speaker, or with `across` of another one. The distance of two phones is the mean angle between their frames
    along the best way through both (dynamic time warping), over pi; equal distances are half an error.

    Errors are averaged over triples, then over contexts and speakers, then over ordered pairs of labels. At most
    `MAX_TOKENS` of a label, drawn by `seed`, stand for all in one place, and `MAX_OTHER_SPEAKERS` for all others.

    Source: Schatz et al., "Evaluating speech features with the minimal-pair ABX task" (2013), with the averages of the
    ZeroSpeech challenges; without context: Hallap et al., "Evaluating context-invariance in unsupervised speech
    representations" (2023). They take all tokens, and weigh the ways through both phones likewise.
    """
    rng = np.random.default_rng(seed)
    places: dict[tuple[tuple[str, str], str], dict[str, list[Token]]] = defaultdict(lambda: defaultdict(list))
    for token in tokens:
        if len(token.latents):
            places[token.context if by_context else ("", ""), token.speaker][token.label].append(token)
    chosen = {place: {label: _some(found, rng) for label, found in sorted(by_label.items())}
              for place, by_label in sorted(places.items())}  # fmt: skip
    errors: dict[tuple[str, str], list[float]] = defaultdict(list)
    for first, second in _pairs_of_places(chosen, rng, across=across):
        for pair, error in _errors(first, second).items():
            errors[pair].append(error)
    return float(np.mean([np.mean(found) for found in errors.values()])) if errors else math.nan


_Place = dict[str, list[Token]]


def _some(tokens: list[Token], rng: np.random.Generator) -> list[Token]:
    if len(tokens) <= MAX_TOKENS:
        return tokens
    return [tokens[i] for i in np.sort(rng.permutation(len(tokens))[:MAX_TOKENS])]


def _pairs_of_places(
    places: dict[tuple[tuple[str, str], str], _Place], rng: np.random.Generator, *, across: bool
) -> Iterator[tuple[_Place, _Place]]:
    """Where A and B are from, and where X is from."""
    speakers: dict[tuple[str, str], list[str]] = defaultdict(list)
    for context, speaker in places:
        speakers[context].append(speaker)
    for (context, speaker), place in places.items():
        if len(place) < 2:
            continue
        if not across:
            yield place, place
            continue
        others = [other for other in speakers[context] if other != speaker]
        for i in np.sort(rng.permutation(len(others))[:MAX_OTHER_SPEAKERS]):
            yield place, places[context, others[i]]


def _errors(place: _Place, other: _Place) -> dict[tuple[str, str], float]:
    """Of every pair of labels that A and B, from `place`, may have, with X from `other`."""
    is_same = place is other
    # X needs another of its kind beside it where both are of one place.
    kinds = [label for label in place if label in other and len(other[label]) > is_same]
    if not kinds:
        return {}
    labels = list(place)
    given = [token.latents for label in labels for token in place[label]]
    asked = [token.latents for label in kinds for token in other[label]]
    distances = _distances(given, asked)
    rows = np.repeat(np.arange(len(labels)), [len(place[label]) for label in labels])
    columns = np.repeat([labels.index(label) for label in kinds], [len(other[label]) for label in kinds])
    if is_same:
        own = np.flatnonzero(np.isin(rows, columns))
        distances[own, np.arange(len(own))] = np.nan  # X is not A
    found = {}
    for first in sorted(set(columns.tolist())):
        to_a = distances[rows == first][:, columns == first]
        for second in range(len(labels)):
            if second == first:
                continue
            to_b = distances[rows == second][:, columns == first]
            gaps = to_a[:, None] - to_b[None]
            wrong = np.where(np.abs(gaps) <= 1e-9, 0.5, gaps > 0)
            found[labels[first], labels[second]] = float(wrong[~np.isnan(gaps)].mean())
    return found


def _distances(first: Sequence[np.ndarray], second: Sequence[np.ndarray]) -> np.ndarray:
    """Of all pairs: float64 [len(first), len(second)], in groups of like length."""
    pairs = np.stack(np.meshgrid(np.arange(len(first)), np.arange(len(second)), indexing="ij"), axis=-1).reshape(-1, 2)
    units = [[_unit(latents[:_LONGEST]) for latents in side] for side in (first, second)]
    longest = [max(len(latents) for latents in side) for side in units]
    padded = []
    for side, length in zip(units, longest, strict=True):
        block = np.zeros((len(side), length, side[0].shape[1]))
        for i, latents in enumerate(side):
            block[i, : len(latents)] = latents
        padded.append(block)
    sizes = [np.array([len(latents) for latents in side]) for side in units]
    order = np.argsort(np.maximum(sizes[0][pairs[:, 0]], sizes[1][pairs[:, 1]]), kind="stable")
    found = np.zeros(len(pairs))
    for at in range(0, len(pairs), _PAIRS_AT_ONCE):
        some = order[at : at + _PAIRS_AT_ONCE]
        i, j = pairs[some].T
        lengths = sizes[0][i], sizes[1][j]
        a, b = padded[0][i, : lengths[0].max()], padded[1][j, : lengths[1].max()]
        angles = np.arccos(np.clip(np.einsum("nfd,ngd->nfg", a, b), -1.0, 1.0)) / np.pi
        found[some] = _along_best_ways(angles, *lengths)
    return found.reshape(len(first), len(second))


def _unit(latents: np.ndarray) -> np.ndarray:
    """Frames of length 1; a frame of zeros stays, at right angles to all."""
    rows = latents.astype(np.float64)
    units: np.ndarray = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return units


def _along_best_ways(costs: np.ndarray, num_rows: np.ndarray, num_columns: np.ndarray) -> np.ndarray:
    """The mean cost on the cheapest way from the first to the last cell of each [N, F, G]: float64 [N].

    Steps go one frame on in one of both phones, or in both.
    """
    num_pairs, height, width = costs.shape
    sums = np.full((num_pairs, height + 1, width + 1), np.inf)
    steps = np.zeros((num_pairs, height + 1, width + 1))
    sums[:, 0, 0] = 0.0
    at = np.arange(num_pairs)
    for i in range(1, height + 1):
        for j in range(1, width + 1):
            before = np.stack([sums[:, i - 1, j - 1], sums[:, i - 1, j], sums[:, i, j - 1]])
            counts = np.stack([steps[:, i - 1, j - 1], steps[:, i - 1, j], steps[:, i, j - 1]])
            best = before.argmin(axis=0)
            sums[:, i, j] = before[best, at] + costs[:, i - 1, j - 1]
            steps[:, i, j] = counts[best, at] + 1
    result: np.ndarray = sums[at, num_rows, num_columns] / steps[at, num_rows, num_columns]
    return result
