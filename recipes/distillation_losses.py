"""How far what a codec's frames say is from what a teacher says of them.

Shapes: B batch, F frames, D dims of the teacher. Every loss takes an estimate [B, F, D] with a gradient, targets of
that shape and a mask [B, F], and gives a scalar, unweighted. What the mask leaves out has no part in it, be it NaN;
where it leaves nothing, the loss is 0 and so is its gradient.

Two axes are in use. Over time: a dim is one curve over the frames of an item, and compared by its shape; an item counts
as a whole, and a dim that is nearly constant hardly matters. Per frame: every frame says one vector.

Source: Zhang et al., "SpeechTokenizer" (2024), section 3.2, and DM-Codec (Ahasan et al. 2024), section 3.2, both as
published, https://github.com/ZhangXInFD/SpeechTokenizer and https://github.com/mubtasimahasan/DM-Codec: the "D axis"
loss is -log(sigmoid(cosine)) with the cosine taken along time, the "T axis" loss is L1 plus the same of frames.
Contrastive: van den Oord et al., "Representation learning with contrastive predictive coding" (2018), equation 4.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codec.config import register


@dataclass(frozen=True, kw_only=True)
class DistillationLossConfig:
    """Base of the configurations of these losses."""


class DistillationLoss(nn.Module):
    """See the top of this file."""

    def forward(self, estimate: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class CosineOverTimeConfig(DistillationLossConfig):
    """No settings: as published."""


@register("cosine_over_time", CosineOverTimeConfig)
class CosineOverTime(DistillationLoss):
    """Mean over items and dims of -log(sigmoid(cosine of both curves over time)): the papers' D axis.

    It lies between 0.3133, where all curves have the same direction, and 1.3133; no codec brings it to 0.
    """

    def __init__(self, config: CosineOverTimeConfig) -> None:
        super().__init__()

    def forward(self, estimate: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
        estimate, targets = _masked(estimate, mask), _masked(targets, mask)
        per_item = -F.logsigmoid(F.cosine_similarity(estimate, targets, dim=1)).mean(1)
        return _mean(per_item, mask.any(1))


@dataclass(frozen=True, kw_only=True)
class CosinePerFrameConfig(DistillationLossConfig):
    """No settings."""


@register("cosine_per_frame", CosinePerFrameConfig)
class CosinePerFrame(DistillationLoss):
    """Mean over frames of 1 - cosine: 0 to 2."""

    def __init__(self, config: CosinePerFrameConfig) -> None:
        super().__init__()

    def forward(self, estimate: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
        return _mean(1.0 - frame_cosines(estimate, targets, mask), mask)


@dataclass(frozen=True, kw_only=True)
class L1AndCosineConfig(DistillationLossConfig):
    """`cosine_weight`: of -log(sigmoid(cosine)) beside the L1."""

    cosine_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.cosine_weight < 0.0:
            raise ValueError(f"cosine_weight must not be negative, got {self.cosine_weight}")


@register("l1_and_cosine", L1AndCosineConfig)
class L1AndCosine(DistillationLoss):
    """Mean absolute error, and the mean over frames of -log(sigmoid(cosine)): the papers' T axis."""

    def __init__(self, config: L1AndCosineConfig) -> None:
        super().__init__()
        self.cosine_weight = config.cosine_weight

    def forward(self, estimate: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
        error = (_masked(estimate, mask) - _masked(targets, mask)).abs().mean(2)
        angle = -F.logsigmoid(frame_cosines(estimate, targets, mask))
        return _mean(error + self.cosine_weight * angle, mask)


@dataclass(frozen=True, kw_only=True)
class ContrastiveConfig(DistillationLossConfig):
    """`temperature` divides cosines; at most `max_frames` frames of a batch take part, evenly spaced over all."""

    temperature: float = 0.1
    max_frames: int = 1024

    def __post_init__(self) -> None:
        if self.temperature <= 0.0 or self.max_frames < 2:
            raise ValueError("temperature must be positive and max_frames at least 2")


@register("contrastive", ContrastiveConfig)
class Contrastive(DistillationLoss):
    """InfoNCE: a frame's estimate shall be closer to its own target than to the targets of other frames of the batch.

    Frames that share a target, as those of one word piece do, are no negatives of one another.
    """

    def __init__(self, config: ContrastiveConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, estimate: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
        ours_ND, wanted_ND = estimate[mask], targets[mask]
        if len(ours_ND) > self.config.max_frames:
            chosen = torch.linspace(0, len(ours_ND) - 1, self.config.max_frames, device=ours_ND.device).round().long()
            ours_ND, wanted_ND = ours_ND[chosen], wanted_ND[chosen]
        if len(ours_ND) < 2:
            # Not a constant: whatever learns has a gradient of zeros, as it has in other processes.
            return 0.0 * (_masked(estimate, mask).sum() + _masked(targets, mask).sum())
        wanted_ND = F.normalize(wanted_ND, dim=1)
        logits_NN = F.normalize(ours_ND, dim=1) @ wanted_ND.t() / self.config.temperature
        is_own = torch.eye(len(ours_ND), dtype=torch.bool, device=ours_ND.device)
        is_same = wanted_ND @ wanted_ND.t() > 1.0 - 1e-5
        logits_NN = logits_NN.masked_fill(is_same & ~is_own, -torch.inf)
        return F.cross_entropy(logits_NN, torch.arange(len(ours_ND), device=ours_ND.device))


def frame_cosines(estimate: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """Cosines [B, F] of the vectors of frames; 0 where the mask leaves a frame out."""
    return F.cosine_similarity(_masked(estimate, mask), _masked(targets, mask), dim=2)


def _masked(values: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask[:, :, None], values, 0.0)


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp_min(1)
