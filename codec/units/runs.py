"""Runs of one unit: units of equal length in time are many alike in a row, and language models want them once."""

from __future__ import annotations

import torch
from torch import Tensor


def deduplicate(units: Tensor) -> tuple[Tensor, Tensor]:
    """Units int64 [F] -> the unit of every run [N], and how many frames it lasts [N]; `expand` is the inverse.

    ValueError for other shapes, and for -1, which stands for frames that are not there.

    >>> [part.tolist() for part in deduplicate(torch.tensor([5, 5, 5, 2, 5, 5]))]
    [[5, 2, 5], [3, 1, 2]]
    """
    if units.dim() != 1 or units.dtype != torch.int64:
        raise ValueError(f"units must be int64 [F], not {units.dtype} {list(units.shape)}: take one row of a batch")
    if bool((units < 0).any()):
        raise ValueError("units must not be negative: cut the row to its num_frames")
    kept, durations = torch.unique_consecutive(units, return_counts=True)
    return kept, durations


def expand(units: Tensor, durations: Tensor) -> Tensor:
    """The frames int64 [F] of units [N] that last so many frames each [N]: what `deduplicate` was given.

    ValueError where there are not as many of each, or a duration is negative.

    >>> expand(torch.tensor([5, 2, 5]), torch.tensor([3, 1, 2])).tolist()
    [5, 5, 5, 2, 5, 5]
    """
    if units.dim() != 1 or units.shape != durations.shape:
        raise ValueError(f"units {list(units.shape)} and durations {list(durations.shape)} must both be [N]")
    if bool((durations < 0).any()):
        raise ValueError("durations must not be negative")
    return torch.repeat_interleave(units, durations)
