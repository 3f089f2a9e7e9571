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
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codec.config import register
from codec.kernels.kept import Kept
from codec.kernels.residual_search import SearchTables, rvq_search
from codec.kernels.row_linear import row_linear
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
        self._parameter_dicts: list[dict[str, Any]] = [module._parameters for module in self.modules()]
        self._kept_small: Kept[_Small] = Kept()

    @property
    def codebooks(self) -> Tensor:
        """A copy of the codebooks [K, C, d]."""
        return torch.stack([stage.codebook.detach() for stage in self._stages()])

    @torch.no_grad()
    def encode(self, latents: Tensor, *, num_quantizers: int | None = None) -> Tensor:
        num_rows = self.check_num_quantizers(num_quantizers)
        batch_size, _, num_frames = latents.shape
        with torch.autocast(latents.device.type, enabled=False):
            small = self._small()
            rows_ND = latents.to(self._dtype).transpose(1, 2).flatten(0, 1).contiguous()
            codes_NK = rvq_search(row_linear(rows_ND, small.projection, small.bias), small.tables, num_rows=num_rows)
        return codes_NK.view(batch_size, num_frames, num_rows).transpose(1, 2)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        self.check_codes(codes)
        batch_size, num_rows, num_frames = codes.shape
        with torch.autocast(codes.device.type, enabled=False):
            small = self._small()
            codes_NK = codes.transpose(1, 2).flatten(0, 1)
            # An entry of each stage, and 1 for its bias; all 0 where the stage is absent.
            codes_NK = F.pad(codes_NK, (0, self.config.num_stages - num_rows), value=-1)
            numbered_NK = (codes_NK + small.first_entry_K).clamp_min_(0)
            rows_NKd = torch.where((codes_NK >= 0)[:, :, None], F.embedding(numbered_NK, small.entries), 0.0)
            latents_ND = row_linear(rows_NKd.flatten(1), small.back)
        return latents_ND.view(batch_size, num_frames, self.config.latent_dim).transpose(1, 2)

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
        present_BKF = self.present(latents, mask, num_quantizers)
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

    def _small(self) -> _Small:
        # Asking the modules for their parameters takes as long as a search. Their dictionaries stay; with weight norm,
        # which moves weights elsewhere, some are missing there.
        sources = [parameter for parameters in self._parameter_dicts for parameter in parameters.values()]
        if len(sources) != 5 * self.config.num_stages:
            sources = list(self.parameters())
        return self._kept_small.get(sources, lambda: _Small(list(self._stages())))

    def _stages(self, num_stages: int | None = None) -> Iterator[_Stage]:
        return cast("Iterator[_Stage]", iter(self.stages[:num_stages]))

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype


class _Small:
    """All stages as a search in small spaces, and the way back from there; no gradient.

    Projections are linear: what stage s sees of the latents z, less what the stages t before it decoded, is
    I_s(z) - sum of I_s(O_t(e_t)), without the biases of I_s in the sum. So one product projects z for all stages, and
    what an entry takes away from what each later stage sees is a table. Whichever way it is computed, the small vectors
    are the same up to rounding.

    Source: none known; it follows from the projections being linear.
    """

    @torch.no_grad()
    def __init__(self, stages: list[_Stage]) -> None:
        in_weights = [stage.in_proj.weight[:, :, 0] for stage in stages]
        self.projection = torch.cat(in_weights)
        self.bias = torch.cat([stage.in_proj.bias for stage in stages])
        codebooks_KCd = torch.stack([stage.codebook for stage in stages])
        takes = []
        for row, stage in enumerate(stages):
            later_Ld = self.projection[(row + 1) * codebooks_KCd.shape[2] :].double()
            through = later_Ld @ stage.out_proj.weight[:, :, 0].double()
            table = stage.codebook.double() @ through.T + later_Ld @ stage.out_proj.bias.double()
            takes.append(((row + 1) * codebooks_KCd.shape[2], table.to(self.projection.dtype)))
        self.tables = SearchTables(codebooks_KCd, chains=range(len(stages)), by="direction", takes=takes)
        ones_KC1 = torch.ones_like(codebooks_KCd[:, :, :1])
        # All of them [K * C, d + 1], each with the 1 that its stage's bias is multiplied by.
        self.entries = torch.cat([codebooks_KCd, ones_KC1], dim=2).flatten(0, 1)
        self.first_entry_K = codebooks_KCd.shape[1] * torch.arange(len(stages), device=codebooks_KCd.device)
        back = [torch.cat([stage.out_proj.weight[:, :, 0], stage.out_proj.bias[:, None]], 1) for stage in stages]
        self.back = torch.cat(back, dim=1)


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
        codes_N1 = rvq_search(rows_Nd, SearchTables(self.codebook[None], by="direction"))
        return codes_N1.view(projected.shape[0], projected.shape[2])

    def entries(self, codes: Tensor) -> Tensor:
        """Codes [B, F] -> entries [B, d, F]."""
        return F.embedding(codes, self.codebook).transpose(1, 2)


def _error(projected: Tensor, entries: Tensor, present_BF: Tensor) -> Tensor:
    """The sum over present frames of the squared error, mean over dims."""
    return ((projected - entries).square().mean(1) * present_BF).sum()
