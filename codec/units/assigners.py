"""What makes units of features: the nearest centroid, a network's best score, or the codes of a product quantizer.

Letters: B batch, F frames, D dims of the features, V units, W width of a network, G groups.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codec import config as codec_config
from codec.config import register
from codec.kernels.kept import Kept
from codec.kernels.residual_search import SearchTables, rvq_search
from codec.quantizers.interface import Quantizer, QuantizerConfig


@dataclass(frozen=True, kw_only=True)
class AssignerConfig:
    """What all assigners' configurations have.

    feature_dim: dims of the features. is_standardized: whether each is brought to mean 0 and variance 1 first.
    """

    feature_dim: int
    is_standardized: bool = True


class Assigner(nn.Module, ABC):
    """Gives every frame a unit in 0..`num_units` - 1."""

    config: AssignerConfig
    mean: Tensor  # [D], of the features it was trained on, as is `scale`; only where they are standardised
    scale: Tensor
    num_units: int

    def __init__(self, config: AssignerConfig, num_units: int) -> None:
        super().__init__()
        self.config = config
        self.num_units = num_units
        if config.is_standardized:
            self.register_buffer("mean", torch.zeros(config.feature_dim))
            self.register_buffer("scale", torch.ones(config.feature_dim))

    @torch.no_grad()
    def set_statistics(self, features: Tensor) -> None:
        """Take mean and scale from features [N, D], where they are standardised; dims that do not vary keep theirs."""
        if self.config.is_standardized:
            variance, mean = torch.var_mean(features.double(), 0, correction=0)
            spread = variance.sqrt()
            self.mean.copy_(mean)
            self.scale.copy_(torch.where(spread > 1e-9 * spread.max().clamp_min(1e-30), spread, 1.0))

    def standardized(self, features: Tensor) -> Tensor:
        """Features [..., D] as they are compared."""
        return (features - self.mean) / self.scale if self.config.is_standardized else features

    @abstractmethod
    def assign(self, features: Tensor) -> Tensor:
        """Units int64 [F] of the features [F, D] of one recording; no gradient."""


@dataclass(frozen=True, kw_only=True)
class CentroidsConfig(AssignerConfig):
    """A centroid for every unit."""

    num_units: int

    def __post_init__(self) -> None:
        if min(self.feature_dim, self.num_units) < 1:
            raise ValueError("feature_dim and num_units must be positive")


@register("centroids", CentroidsConfig)
class Centroids(Assigner):
    """The nearest centroid by Euclidean distance, the first one of several as near. Exact, see `rvq_search`."""

    centroids: Tensor  # [V, D], of standardised features

    def __init__(self, config: CentroidsConfig) -> None:
        super().__init__(config, config.num_units)
        self.register_buffer("centroids", torch.zeros(config.num_units, config.feature_dim))
        self._kept_tables: Kept[SearchTables] = Kept()

    @torch.no_grad()
    def assign(self, features: Tensor) -> Tensor:
        tables = self._kept_tables.get([self.centroids], lambda: SearchTables(self.centroids[None]))
        return rvq_search(self.standardized(features), tables)[:, 0]


@dataclass(frozen=True, kw_only=True)
class UnitHeadConfig(AssignerConfig):
    """`num_layers` hidden layers of `width` channels, each over `kernel_size` frames, odd; then a score for each unit.

    With `kernel_size` 1 a unit depends on one frame alone, as published; more frames tell more of what is lasting.
    """

    num_units: int
    width: int = 256
    num_layers: int = 2
    kernel_size: int = 5

    def __post_init__(self) -> None:
        if min(self.feature_dim, self.num_units, self.width, self.num_layers) < 1:
            raise ValueError("feature_dim, num_units, width and num_layers must be positive")
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and positive, not {self.kernel_size}")


@register("unit_head", UnitHeadConfig)
class UnitHead(Assigner):
    """The unit that a small network gives the best score; it can be trained so that augmentations do not change it.

    Source: Gat et al., "Augmentation invariant discrete representation for generative spoken language modeling" (2022),
    section 4, where the network has three layers and sees one frame.
    """

    def __init__(self, config: UnitHeadConfig) -> None:
        super().__init__(config, config.num_units)
        self.layers = _convolutions(config.feature_dim, config.width, config.num_layers, config.kernel_size)
        self.scores = nn.Linear(config.width, config.num_units)

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """Scores [B, F, V] of features [B, F, D]; differentiable. `mask` [B, F] is true on real frames."""
        scores: Tensor = self.scores(_convolved(self.standardized(features), self.layers, mask))
        return scores

    @torch.no_grad()
    def assign(self, features: Tensor) -> Tensor:
        scores: Tensor = self(features[None])[0]
        return scores.max(-1).indices


@dataclass(frozen=True, kw_only=True)
class PredictiveEncoderConfig(AssignerConfig):
    """`num_layers` layers of `quantizer.latent_dim` channels over `kernel_size` frames, odd, and a quantizer.

    A product quantizer of G groups of C entries gives C ** G units: unit = c_0 * C ** (G - 1) + ... + c_(G - 1).
    """

    quantizer: QuantizerConfig
    num_layers: int = 2
    kernel_size: int = 3

    def __post_init__(self) -> None:
        if min(self.feature_dim, self.num_layers) < 1:
            raise ValueError("feature_dim and num_layers must be positive")
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and positive, not {self.kernel_size}")


@register("predictive_encoder", PredictiveEncoderConfig)
class PredictiveEncoder(Assigner):
    """The codes of a quantizer over convolutions, trained to be told from what was said before.

    Source: Baevski et al., "vq-wav2vec: self-supervised learning of discrete speech representations" (2020), whose
    encoder hears raw audio.
    """

    config: PredictiveEncoderConfig
    quantizer: Quantizer

    def __init__(self, config: PredictiveEncoderConfig) -> None:
        quantizer: Quantizer = codec_config.build(config.quantizer)
        super().__init__(config, math.prod(quantizer.codebook_sizes))
        width = config.quantizer.latent_dim
        self.layers = _convolutions(config.feature_dim, width, config.num_layers, config.kernel_size)
        self.quantizer = quantizer

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """Latents [B, W, F] of features [B, F, D], as the quantizer takes them; differentiable."""
        latents = _convolved(self.standardized(features), self.layers, mask)
        return F.layer_norm(latents, latents.shape[-1:]).transpose(1, 2)

    @torch.no_grad()
    def assign(self, features: Tensor) -> Tensor:
        return self.joined(self.quantizer.encode(self(features[None])))[0]

    def joined(self, codes: Tensor) -> Tensor:
        """Codes [B, G, F] as one unit a frame, [B, F]."""
        units = torch.zeros_like(codes[:, 0])
        for group, size in enumerate(self.quantizer.codebook_sizes):
            units = units * size + codes[:, group]
        return units

    def split(self, units: Tensor) -> Tensor:
        """The codes [B, G, F] that units [B, F] were joined of."""
        groups = []
        for size in reversed(self.quantizer.codebook_sizes):
            groups.append(units % size)
            units = units // size
        return torch.stack(groups[::-1], dim=1)


def _convolutions(in_channels: int, width: int, num_layers: int, kernel_size: int) -> nn.ModuleList:
    channels = [in_channels, *[width] * num_layers]
    return nn.ModuleList(
        nn.Conv1d(before, after, kernel_size, padding=kernel_size // 2) for before, after in pairwise(channels)
    )


def _convolved(features: Tensor, layers: nn.ModuleList, mask: Tensor | None) -> Tensor:
    """Features [B, F, D] through convolutions, [B, F, W]. Past a row's end stands what stands past a recording's: 0."""
    hidden = features.transpose(1, 2)
    keep = None if mask is None else mask[:, None].to(hidden.dtype)
    for layer in layers:
        hidden = F.gelu(layer(hidden if keep is None else hidden * keep))
    return hidden.transpose(1, 2)
