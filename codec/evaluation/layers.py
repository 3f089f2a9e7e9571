"""What each layer of a speech model knows of labels, so that one can be chosen for a teacher.

Letters: F frames, D dims, P labels, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from codec.evaluation.semantics import pnmi

NUM_CLUSTERS = 100
_KEPT_VARIANCE = 0.99


@dataclass(frozen=True)
class LayerKnowledge:
    """Of one layer. Both values are 0 where it knows nothing of the labels, and 1 where it knows them all."""

    layer: int  # 0: before the first transformer layer
    pwcca: float
    pnmi: float  # of k-means clusters of its frames


def pwcca(features: np.ndarray, others: np.ndarray) -> float:
    """Projection-weighted canonical correlation of features float [F, D] with others [F, P], 0 to 1.

    The mean of the canonical correlations, each weighted by how much of the features its direction accounts for.
    Directions of either side that hold less than 1 % of its variance, all together, are left out: they are noise. It is
    measured on the frames that it is fitted to, and so too high by about the root of D / F.

    ValueError where there are no more frames than dims, or one side never changes.

    Source: Morcos et al., "Insights on representational similarity in neural networks with canonical correlation"
    (2018); for layers of speech models Pasad et al., "Layer-wise analysis of a self-supervised speech representation
    model" (2021).
    """
    if len(features) != len(others) or len(features) <= max(features.shape[1], others.shape[1]):
        raise ValueError(f"{len(features)} and {len(others)} frames are too few for {features.shape[1]} dims")
    first = features.astype(np.float64) - features.mean(0, dtype=np.float64)
    basis, second = _basis(first), _basis(others.astype(np.float64) - others.mean(0, dtype=np.float64))
    turn, correlations, _ = np.linalg.svd(basis.T @ second, full_matrices=False)
    weights = np.abs((basis @ turn).T @ first).sum(1)
    return float(np.clip(np.average(np.clip(correlations, 0.0, 1.0), weights=weights), 0.0, 1.0))


def pwcca_with_labels(features: np.ndarray, labels: np.ndarray) -> float:
    """`pwcca` of features [F, D] with labels int64 [F], one dim for each label; frames labelled -1 do not count."""
    has_label = labels >= 0
    present, numbers = np.unique(labels[has_label], return_inverse=True)
    return pwcca(features[has_label], np.eye(len(present))[numbers])


def cluster_pnmi(features: np.ndarray, labels: np.ndarray, *, num_clusters: int = NUM_CLUSTERS, seed: int = 0) -> float:
    """Mutual information of k-means clusters of features [F, D] with labels [F], over the entropy of the labels.

    Dims are standardised. Needs scikit-learn. ValueError where there are fewer labelled frames than clusters.
    """
    from sklearn.cluster import MiniBatchKMeans

    has_label = labels >= 0
    given = features[has_label].astype(np.float32)
    if len(given) < num_clusters:
        raise ValueError(f"{len(given)} labelled frames are too few for {num_clusters} clusters")
    spread = given.std(0)
    scaled = (given - given.mean(0)) / np.where(spread > 0, spread, 1.0)
    means = MiniBatchKMeans(num_clusters, random_state=seed, n_init=3, batch_size=4096)
    return pnmi(means.fit_predict(scaled), labels[has_label])


def analyze_layers(
    hidden: np.ndarray, labels: np.ndarray, *, num_clusters: int = NUM_CLUSTERS, seed: int = 0
) -> list[LayerKnowledge]:
    """Of every layer of hidden states float [L, F, D], with labels int64 [F], -1 where there is none."""
    return [
        LayerKnowledge(
            layer,
            pwcca_with_labels(features, labels),
            cluster_pnmi(features, labels, num_clusters=num_clusters, seed=seed),
        )
        for layer, features in enumerate(hidden)
    ]


def _basis(centred: np.ndarray) -> np.ndarray:
    """An orthonormal basis [F, R] of the directions in which columns vary."""
    energy, directions = np.linalg.eigh(centred.T @ centred)
    energy, directions = np.maximum(energy[::-1], 0.0), directions[:, ::-1]
    if not energy.sum() > 0:
        raise ValueError("all frames are alike")
    kept = int(np.searchsorted(np.cumsum(energy) / energy.sum(), _KEPT_VARIANCE)) + 1
    basis: np.ndarray = centred @ directions[:, :kept] / np.sqrt(energy[:kept])
    return basis
