"""Residual vector quantization in small spaces with codebooks learned by gradient, as in DAC.

Shapes: B batch, D dims of the latents, F frames, d dims of a codebook, N = B * F rows, C entries, S = K stages.

Each stage projects what is left of the latents to a few dims, finds the entry of the most similar direction there, and
projects that entry back.

Source: Kumar et al., "High-fidelity audio compression with improved RVQGAN" (DAC, 2023), section 3.2, after Yu et al.,
"Vector-quantized image modeling with improved VQGAN" (2021), section 3.2; as published,
https://github.com/descriptinc/descript-audio-codec, dac/nn/quantize.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codec.config import register
from codec.kernels.residual_search import rvq_search
from codec.layers.conv import Conv
from codec.quantizers.interface import Quantized, Quantizer, QuantizerConfig, usage


@dataclass(frozen=True, kw_only=True)
class FactorizedVQConfig(QuantizerConfig):
    """`num_stages` stages with `codebook_size` entries of `codebook_dim` dims, over latents of `latent_dim` dims."""

    num_stages: int
    codebook_size: int = 1024
    codebook_dim: int = 8

    def __post_init__(self) -> None:
        for name in ("latent_dim", "num_stages", "codebook_size", "codebook_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")


@register("factorized_vq", FactorizedVQConfig)
class FactorizedVQ(Quantizer):
    """Residual VQ whose every stage searches by cosine in a small space of its own.

    The search compares directions, but an entry is used with its length. Everything is learned by gradient: `update`
    has nothing to do, and the recipe weighs two losses (DAC: 0.25 and 1). Both are squared errors in the small spaces,
    mean over dims and over the frames that are real, summed over stages; an absent stage adds nothing:

    - `commitment` moves the latents and the projections into the small spaces towards the entries;
    - `codebook` moves the entries towards the projected latents.

    Where this differs from the published code: there a stage's residual carries gradients of the stages before it, so
    they take away from what its losses tell the encoder. Here the residual is the latents minus constants, so every
    stage's commitment, and its share of the decoder's gradient, reach the encoder in full. Values are the same.

    The decoder's gradient passes straight through the choice of entries, but on through the projections: unlike
    `ResidualVQ`'s, it is not the identity for the latents. See the comment in the code.

    Weights are plain; `codec.layers.conv.add_weight_norm` reaches the projections, which the published runs train so.

    >>> import torch
    >>> quantizer = FactorizedVQ(FactorizedVQConfig(latent_dim=8, num_stages=2, codebook_size=16, codebook_dim=4))
    >>> codes = quantizer.encode(torch.randn(1, 8, 5))
    >>> codes.shape, quantizer.decode(codes[:, :1]).shape
    (torch.Size([1, 2, 5]), torch.Size([1, 8, 5]))
    """

    def __init__(self, config: FactorizedVQConfig) -> None:
        super().__init__()
        self.config = config
        self.codebook_sizes = (config.codebook_size,) * config.num_stages
        self.valid_num_quantizers = tuple(range(1, config.num_stages + 1))
        self.stages = nn.ModuleList(_Stage(config) for _ in range(config.num_stages))

    @property
    def codebooks(self) -> Tensor:
        """A copy of the codebooks [K, C, d]."""
        return torch.stack([stage.codebook.detach() for stage in self._stages()])

    def encode(self, latents: Tensor, *, num_quantizers: int | None = None) -> Tensor:
        num_rows = self.check_num_quantizers(num_quantizers)
        with torch.autocast(latents.device.type, enabled=False):
            residual = latents.to(self._dtype)
            codes = []
            for stage in self._stages(num_rows):
                codes.append(stage.nearest(stage.in_proj(residual)))
                residual = residual - stage.out_proj(stage.entries(codes[-1]))
        return torch.stack(codes, dim=1)

    def decode(self, codes: Tensor) -> Tensor:
        batch_size, num_rows, num_frames = codes.shape
        self.check_num_quantizers(num_rows)
        if codes.numel() and not (codes.min() >= -1 and codes.max() < self.config.codebook_size):
            raise ValueError(f"codes must lie in -1..{self.config.codebook_size - 1}, got {codes.min()}..{codes.max()}")
        with torch.autocast(codes.device.type, enabled=False):
            quantized = torch.zeros(
                batch_size, self.config.latent_dim, num_frames, dtype=self._dtype, device=codes.device
            )
            for row, stage in enumerate(self._stages(num_rows)):
                decoded = stage.out_proj(stage.entries(codes[:, row].clamp_min(0)))
                quantized = quantized + torch.where(codes[:, row, None] >= 0, decoded, 0.0)
        return quantized

    def forward(
        self, latents: Tensor, mask: Tensor | None = None, *, num_quantizers: int | Tensor | None = None
    ) -> Quantized:
        with torch.autocast(latents.device.type, enabled=False):
            return self._quantize(latents.to(self._dtype), mask, num_quantizers)

    def _quantize(self, latents: Tensor, mask: Tensor | None, num_quantizers: int | Tensor | None) -> Quantized:
        # With z the latents, r the residual of a stage, I and O its projections, e its entry, g the gradient of the
        # quantized latents q, and sg[] a constant:
        #
        #     r = z - sg[O(e) of the stages before],   so dr/dz = 1
        #     commitment = |I(r) - sg[e]|^2    teaches I, and z through I: of every stage, with nothing in between
        #     codebook   = |sg[I(r)] - e|^2    teaches e alone
        #     q = sum of O(sg[e] + I(r) - sg[I(r)]),   whose value is the sum of O(e)
        #
        # From q, O gets g e^T, as if the codes were given; I gets (O^T g) r^T, as published, without which the two
        # losses would have it map everything to one point; and z gets the sum of I^T O^T g over the stages present.
        #
        # Why z does not simply get g: q depends on z only through the few dims that the stages see. Told to move in
        # the others, z drifts without end. In a toy (64 dims, 4 stages of 64 entries over 4, 3,000 steps) the latents'
        # scale went to 76 and 113 with two seeds, where 1.2 is usual, and the final error was 1.4 times as large.
        present_BKF = self._present(latents, mask, num_quantizers)
        num_real = latents.shape[0] * latents.shape[2] if mask is None else mask.sum().clamp_min(1)
        commitment = codebook = latents.new_zeros(())
        residual = latents
        quantized = torch.zeros_like(latents)
        codes = []
        for row, stage in enumerate(self._stages()):
            present_BF = present_BKF[:, row]
            projected = stage.in_proj(residual)
            codes.append(stage.nearest(projected).masked_fill(~present_BF, -1))
            entries = stage.entries(codes[-1].clamp_min(0))
            commitment = commitment + _error(projected, entries.detach(), present_BF) / num_real
            codebook = codebook + _error(projected.detach(), entries, present_BF) / num_real
            decoded = stage.out_proj(entries.detach() + (projected - projected.detach()))
            quantized = quantized + torch.where(present_BF[:, None], decoded, 0.0)
            residual = residual - decoded.detach()
        codes_BKF = torch.stack(codes, dim=1)
        return Quantized(
            latents=quantized,
            codes=codes_BKF,
            losses={"commitment": commitment, "codebook": codebook},
            stats=usage(codes_BKF.transpose(1, 2).flatten(0, 1), self.config.codebook_size),
            inputs=latents.detach(),
        )

    def update(self, *quantized: Quantized) -> None:
        """Nothing: the codebooks are learned by gradient."""

    def _present(self, latents: Tensor, mask: Tensor | None, num_quantizers: int | Tensor | None) -> Tensor:
        """Which stages quantize which frames [B, K, F]."""
        if isinstance(num_quantizers, Tensor):
            if not set(num_quantizers.tolist()) <= set(self.valid_num_quantizers):
                raise ValueError(
                    f"num_quantizers={num_quantizers.tolist()}: each must be one of {self.valid_num_quantizers}"
                )
            per_item = num_quantizers.to(latents.device)
        else:
            per_item = torch.full((len(latents),), self.check_num_quantizers(num_quantizers), device=latents.device)
        present_BK = torch.arange(self.config.num_stages, device=latents.device) < per_item[:, None]
        present_BKF = present_BK[:, :, None].expand(-1, -1, latents.shape[2])
        return present_BKF if mask is None else present_BKF & mask[:, None]

    def _stages(self, num_stages: int | None = None) -> Iterator[_Stage]:
        return cast("Iterator[_Stage]", iter(self.stages[:num_stages]))

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype


class _Stage(nn.Module):
    """One codebook, and the ways to it and back."""

    def __init__(self, config: FactorizedVQConfig) -> None:
        super().__init__()
        self.in_proj = Conv(config.latent_dim, config.codebook_dim, 1, causal=False)
        self.out_proj = Conv(config.codebook_dim, config.latent_dim, 1, causal=False)
        self.codebook = nn.Parameter(torch.randn(config.codebook_size, config.codebook_dim))

    def nearest(self, projected: Tensor) -> Tensor:
        """Codes [B, F] of the entries with the most similar direction; of equal ones the lowest, no gradient.

        The projected latents [B, d, F] keep their length, which changes all similarities alike.
        """
        rows_Nd = projected.detach().transpose(1, 2).flatten(0, 1)
        directions_Cd = F.normalize(self.codebook.detach(), dim=1)
        # Without offsets the residual search, which the distance asks for, is the search for the greatest product.
        offsets_KC = directions_Cd.new_zeros(1, len(directions_Cd))
        return rvq_search(rows_Nd, directions_Cd[None], offsets_KC).view(projected.shape[0], projected.shape[2])

    def entries(self, codes: Tensor) -> Tensor:
        """Codes [B, F] -> entries [B, d, F]."""
        return F.embedding(codes, self.codebook).transpose(1, 2)


def _error(projected: Tensor, entries: Tensor, present_BF: Tensor) -> Tensor:
    """The sum over present frames of the squared error, mean over dims."""
    return ((projected - entries).square().mean(1) * present_BF).sum()
