"""How robust speech units are: edits from the units of a recording to those of the same recording, distorted."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from codec.evaluation.results import Summary, summarize


@dataclass(frozen=True)
class UnitDistance:
    """Unit edit distances over recordings, of de-duplicated units.

    per_frame: edits over the clean recording's frames, as published. per_unit: over its de-duplicated units, which
    does not get better by itself where units change less often.
    """

    per_frame: Summary
    per_unit: Summary


def edit_distance(first: np.ndarray, second: np.ndarray) -> int:
    """The least number of insertions, deletions and replacements that make one sequence [N] of the other [M].

    Source: Levenshtein (1966); Wagner and Fischer, "The string-to-string correction problem" (1974).

    >>> edit_distance(np.array([1, 2, 3, 4]), np.array([2, 3, 5, 4, 4]))
    3
    """
    places = np.arange(len(second) + 1)
    row = places
    for number, unit in enumerate(first, 1):
        # What a deletion or a replacement costs; insertions then pass on the cheapest of all places before.
        costs = np.concatenate([[number], np.minimum(row[1:] + 1, row[:-1] + (second != unit))])
        row = np.minimum.accumulate(costs - places) + places
    return int(row[-1])


def runs(units: np.ndarray) -> np.ndarray:
    """Units int64 [F] without those that repeat the one before them."""
    return units[np.flatnonzero(np.diff(units, prepend=-1))]


def unit_distance(pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> UnitDistance:
    """Of pairs of units int64 [F] and [F'], clean and distorted, one for each recording.

    Source: Gat et al., "Augmentation invariant discrete representation for generative spoken language modeling" (2022),
    section 3: the Levenshtein distance over the number of frames, averaged over recordings.
    """
    per_frame, per_unit = [], []
    for clean, distorted in pairs:
        if not len(clean):
            raise ValueError("a recording without frames has no unit edit distance")
        kept = runs(clean)
        num_edits = edit_distance(kept, runs(distorted))
        per_frame.append(num_edits / len(clean))
        per_unit.append(num_edits / len(kept))
    return UnitDistance(summarize(per_frame), summarize(per_unit))
