"""k-means, the same on every machine for the same points: exact searches, sums in a fixed order, one seed.

Letters: N points of D dims, V clusters.
"""

from __future__ import annotations

import torch
from torch import Tensor

from codec.kernels.residual_search import SearchTables, rvq_search
from codec.kernels.statistics import sums_by_code

_POINTS_PER_CLUSTER = 64  # that the first centroids are drawn from: the rest only costs time


def nearest(points_ND: Tensor, centroids_VD: Tensor) -> Tensor:
    """The nearest centroid of every point, int64 [N]: exact, whatever points come with it (see `rvq_search`)."""
    return rvq_search(points_ND, SearchTables(centroids_VD[None]))[:, 0]


@torch.no_grad()
def kmeans(points: Tensor, num_clusters: int, *, seed: int = 0, num_iterations: int = 50) -> Tensor:
    """Centroids float32 [V, D] of points [N, D], by Lloyd's iterations from centroids drawn as k-means++ draws them.

    It ends early when no point changes its cluster. A cluster that loses all points begins anew at the point that is
    furthest from its centroid. ValueError for fewer distinct points than clusters, or points that are not finite.

    Source: Lloyd, "Least squares quantization in PCM" (1982); Arthur and Vassilvitskii, "k-means++: the advantages of
    careful seeding" (2007).

    >>> points = torch.tensor([[0.0], [1.0], [10.0], [11.0]])
    >>> kmeans(points, 2).sort(0).values.tolist()
    [[0.5], [10.5]]
    """
    if points.dim() != 2 or not torch.isfinite(points).all():
        raise ValueError(f"points must be finite, and [N, D], not {list(points.shape)}")
    if num_clusters < 1 or num_iterations < 1:
        raise ValueError("num_clusters and num_iterations must be positive")
    points_ND = points.float().contiguous()
    centroids_VD = _first_centroids(points_ND, num_clusters, torch.Generator().manual_seed(seed))
    before_N = None
    for _ in range(num_iterations):
        chosen_N = nearest(points_ND, centroids_VD)
        if before_N is not None and torch.equal(chosen_N, before_N):
            break
        before_N = chosen_N
        counts_V, sums_VD = sums_by_code(points_ND, chosen_N, num_clusters)
        distances_N = (points_ND - centroids_VD[chosen_N]).square().sum(1)
        centroids_VD = sums_VD / counts_V.clamp_min(1.0)[:, None]
        is_empty_V = counts_V == 0
        if is_empty_V.any():
            furthest = distances_N.sort(descending=True, stable=True).indices[: int(is_empty_V.sum())]
            centroids_VD[is_empty_V] = points_ND[furthest]
    return centroids_VD


def _first_centroids(points_ND: Tensor, num_clusters: int, generator: torch.Generator) -> Tensor:
    """Points, each drawn with a probability that grows with its squared distance from those drawn before."""
    num_points = len(points_ND)
    if num_points > _POINTS_PER_CLUSTER * num_clusters:
        drawn = torch.randperm(num_points, generator=generator)[: _POINTS_PER_CLUSTER * num_clusters]
        chosen = _far_apart(points_ND[drawn.to(points_ND.device)], num_clusters, generator)
        if len(chosen) == num_clusters:
            return chosen
    chosen = _far_apart(points_ND, num_clusters, generator)
    if len(chosen) < num_clusters:
        raise ValueError(f"there are only {len(chosen)} distinct points for {num_clusters} clusters")
    return chosen


def _far_apart(points_ND: Tensor, num_clusters: int, generator: torch.Generator) -> Tensor:
    """So many points, or as many as differ."""
    chosen: list[int] = []
    distances_N = torch.ones(len(points_ND), dtype=torch.float64)
    while len(chosen) < num_clusters and bool(distances_N.any()):
        cumulative_N = distances_N.cumsum(0)
        mark = torch.rand((), generator=generator, dtype=torch.float64) * cumulative_N[-1]
        # The first point whose share ends after the mark; points that were chosen have none.
        chosen.append(min(int(torch.searchsorted(cumulative_N, mark, right=True)), int(distances_N.nonzero()[-1])))
        to_last_N = (points_ND - points_ND[chosen[-1]]).square().sum(1).double().cpu()
        distances_N = to_last_N if len(chosen) == 1 else torch.minimum(distances_N, to_last_N)
    return points_ND[torch.tensor(chosen, dtype=torch.int64, device=points_ND.device)].clone()
