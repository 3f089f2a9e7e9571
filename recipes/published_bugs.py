"""A residual quantizer with the training bugs of published systems, to measure what these cost. Nothing else uses it.

An experiment asks for it by `model.quantizer.type: residual_vq_as_published`; what it learned is a state dict that an
ordinary `residual_vq` of the same shape loads.

Source: the behaviour of `core_vq.py` in https://github.com/facebookresearch/encodec, which SpeechTokenizer, DM-Codec,
WavTokenizer and AcademiCodec took over, and of `vqvae.py` in https://github.com/yangdongchao/AcademiCodec.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from codec.config import register
from codec.quantizers.interface import Quantized
from codec.quantizers.residual import ResidualVQ, ResidualVQConfig

BUGS = (
    # k-means leaves sums that hold means, beside counts: the first update divides one by the other.
    "k_means_without_counts",
    # A restart writes the table, which the same update then makes anew of the old sums and counts.
    "restart_overwritten",
    # Dead is what was used fewer than two times per update, however many frames an update has.
    "absolute_dead_threshold",
    # A stage works on the input minus straight-through outputs: the gradients cancel, and only stage 1 commits.
    "chained_residual",
    # Every process learns from its own frames.
    "local_statistics",
    # The codebooks learn in every forward in training mode, not once per optimizer step.
    "update_in_forward",
)
_BUGS_WITH_GRADIENT = ("chained_residual",)
_DEAD_COUNT = 2.0


@dataclass(frozen=True, kw_only=True)
class ResidualVQAsPublishedConfig(ResidualVQConfig):
    """`bugs`: which of `BUGS` there are; with learning="gradient" (HiFi-Codec) only "chained_residual" is possible."""

    bugs: tuple[str, ...] = BUGS

    def __post_init__(self) -> None:
        super().__post_init__()
        possible = _BUGS_WITH_GRADIENT if self.learning == "gradient" else BUGS
        for bug in self.bugs:
            if bug not in possible:
                raise ValueError(f"bugs: {bug!r} is not one of {possible} (learning={self.learning!r})")


@register("residual_vq_as_published", ResidualVQAsPublishedConfig)
class BuggyResidualVQ(ResidualVQ):
    """`ResidualVQ` with known bugs switched on. It exists only to measure what they cost.

    >>> quantizer = BuggyResidualVQ(ResidualVQAsPublishedConfig(latent_dim=8, num_stages=2, codebook_size=16))
    >>> quantizer.config.bugs[0]
    'k_means_without_counts'
    """

    config: ResidualVQAsPublishedConfig

    def __init__(self, config: ResidualVQAsPublishedConfig) -> None:
        super().__init__(config)

    def forward(
        self, latents: Tensor, mask: Tensor | None = None, *, num_quantizers: int | Tensor | None = None
    ) -> Quantized:
        quantized = super().forward(latents, mask, num_quantizers=num_quantizers)
        if "chained_residual" in self.config.bugs:
            quantized = self._chained(latents, quantized)
        if "update_in_forward" in self.config.bugs and self.training:
            super().update(quantized)
        return quantized

    def update(self, *quantized: Quantized) -> None:
        if "update_in_forward" not in self.config.bugs:
            super().update(*quantized)

    @torch.no_grad()
    def initialize(self, latents: Tensor, *, num_iterations: int = 10, seed: int = 0) -> None:
        super().initialize(latents, num_iterations=num_iterations, seed=seed)
        if "k_means_without_counts" in self.config.bugs:
            _, total_KCd = self._averages()
            total_KCd.copy_(self.codebooks)

    def _chained(self, latents: Tensor, quantized: Quantized) -> Quantized:
        """The commitment as it is when every stage passes its gradient straight through into the next residual."""
        groups = self.config.num_groups
        residuals_BdF = list(latents.float().chunk(groups, dim=1))
        commitment = latents.new_zeros(())
        for row, codes_BF in enumerate(quantized.codes.unbind(1)):
            x_BdF = residuals_BdF[row % groups]
            is_present_B1F = codes_BF[:, None] >= 0
            entries_BdF = self.codebooks[row].detach()[codes_BF.clamp_min(0)].transpose(1, 2) * is_present_B1F
            errors_B1F = (x_BdF - entries_BdF).square().mean(1, keepdim=True) * is_present_B1F
            commitment = commitment + errors_B1F.sum() / is_present_B1F.sum().clamp_min(1)
            straight_through_BdF = x_BdF + (entries_BdF - x_BdF).detach()
            residuals_BdF[row % groups] = x_BdF - straight_through_BdF
        commitment = commitment / len(self.codebook_sizes)
        # What the formula says of later stages is not so here.
        stage_K = torch.arange(len(self.codebook_sizes), device=latents.device) // groups
        norm_K = quantized.stats["gradient_norm"] * (stage_K == 0)
        return replace(
            quantized,
            losses=quantized.losses | {"commitment": commitment},
            stats=quantized.stats | {"gradient_norm": norm_K},
        )

    def _dead(self, mean_KC: Tensor) -> Tensor:
        if "absolute_dead_threshold" in self.config.bugs:
            return mean_KC < _DEAD_COUNT
        return super()._dead(mean_KC)

    def _restart(self, dead_KC: Tensor, drawn_KCd: Tensor, mean_KC: Tensor, total_KCd: Tensor) -> None:
        if "restart_overwritten" in self.config.bugs:
            self.codebooks[: len(dead_KC)][dead_KC] = drawn_KCd[dead_KC]
        else:
            super()._restart(dead_KC, drawn_KCd, mean_KC, total_KCd)

    def _all_reduce(self, values: Tensor) -> Tensor:
        return values if "local_statistics" in self.config.bugs else super()._all_reduce(values)
