"""Vector quantization whose entries are a frozen random codebook behind one learned linear map (SimVQ).

Shapes: B batch, D dims, F frames, N = B * F rows, S = K stages, C entries.

What moves one entry moves the map, and so all entries: none is left behind, however large the codebook.

Source: Zhu et al., "Addressing representation collapse in vector quantized models with one linear layer" (SimVQ, 2024),
section 3; as published, https://github.com/youngsheen/SimVQ, taming/modules/vqvae/quantize.py: the map has a bias, the
codebook a standard deviation of D ** -0.5. There, looking up codes leaves the map out; here it never is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codec.config import register
from codec.kernels.kept import Kept
from codec.kernels.residual_search import SearchTables, rvq_decode, rvq_search
from codec.quantizers.gradients import GRADIENTS, check_gradient
from codec.quantizers.interface import Quantized, Quantizer, QuantizerConfig, usage


@dataclass(frozen=True, kw_only=True)
class SimVQConfig(QuantizerConfig):
    """`num_stages` stages with `codebook_size` entries and one map each, over latents of `latent_dim` dims.

    `gradient`: how the decoder's gradient passes the quantizer, "straight_through" or "rotation".
    """

    num_stages: int = 1
    codebook_size: int = 1024
    gradient: str = "straight_through"

    def __post_init__(self) -> None:
        if min(self.latent_dim, self.num_stages, self.codebook_size) < 1:
            raise ValueError("latent_dim, num_stages and codebook_size must be positive")
        check_gradient(self.gradient)


@register("simvq", SimVQConfig)
class SimVQ(Quantizer):
    """SimVQ, and residual SimVQ where there are several stages.

    Only the maps are learned, by gradient; `update` has nothing to do. Both losses are means over code rows of the mean
    square of what a stage leaves over, at the frames that have it:

    - `commitment` (published weight 0.25) draws the latents to the entries;
    - `codebook` (1.0) moves the maps, and with them all entries, towards the latents.

    The published audio model multiplies both by 1000, the image model by 1. The chain is detached: a stage sees the
    latents minus constants, so every stage's commitment reaches the encoder. The gradient of the quantized latents
    passes once, from the sum of the entries to the latents, and not to the maps.

    `encode` and `decode` work with `tables`, the mapped codebooks, which are kept while no parameter wants a gradient:
    what is decoded costs no product then. A `ResidualVQ` with these tables as codebooks does the same.

    >>> import torch
    >>> quantizer = SimVQ(SimVQConfig(latent_dim=8, num_stages=2, codebook_size=16))
    >>> codes = quantizer.encode(torch.randn(1, 8, 5))
    >>> codes.shape, quantizer.decode(codes[:, :1]).shape
    (torch.Size([1, 2, 5]), torch.Size([1, 8, 5]))
    """

    codebooks: Tensor

    def __init__(self, config: SimVQConfig) -> None:
        super().__init__()
        self.config = config
        self.codebook_sizes = (config.codebook_size,) * config.num_stages
        self.valid_num_quantizers = tuple(range(1, config.num_stages + 1))
        dim, bound = config.latent_dim, config.latent_dim**-0.5  # bound: as torch initialises linear layers
        self.register_buffer("codebooks", torch.randn(config.num_stages, config.codebook_size, dim) * dim**-0.5)
        self.weight = nn.Parameter(torch.empty(config.num_stages, dim, dim).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(config.num_stages, dim).uniform_(-bound, bound))
        self._kept_tables: Kept[SearchTables] = Kept()

    @torch.no_grad()
    def tables(self) -> Tensor:
        """The entries as they are searched and decoded, [K, C, D]: the codebooks behind their maps; no gradient."""
        return torch.baddbmm(self.bias[:, None], self.codebooks, self.weight.mT)

    @torch.no_grad()
    def encode(self, latents: Tensor, *, num_quantizers: int | None = None) -> Tensor:
        num_rows = self.check_num_quantizers(num_quantizers)
        batch_size, num_dims, num_frames = latents.shape
        with torch.autocast(latents.device.type, enabled=False):
            rows_ND = latents.to(self.weight).transpose(1, 2).reshape(-1, num_dims)
            codes_NK = rvq_search(rows_ND, self._search_tables(), num_rows=num_rows)
        return codes_NK.view(batch_size, num_frames, num_rows).transpose(1, 2)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        self.check_codes(codes)
        batch_size, num_rows, num_frames = codes.shape
        with torch.autocast(codes.device.type, enabled=False):
            latents_ND = rvq_decode(codes.transpose(1, 2).reshape(-1, num_rows), self._search_tables().entries_KCd)
        return latents_ND.view(batch_size, num_frames, self.config.latent_dim).transpose(1, 2)

    def forward(
        self, latents: Tensor, mask: Tensor | None = None, *, num_quantizers: int | Tensor | None = None
    ) -> Quantized:
        with torch.autocast(latents.device.type, enabled=False):
            return self._quantize(latents.to(self.weight.dtype), mask, num_quantizers)

    def _quantize(self, latents: Tensor, mask: Tensor | None, num_quantizers: int | Tensor | None) -> Quantized:
        batch_size, num_dims, num_frames = latents.shape
        num_stages = self.config.num_stages
        present_NK = self.present(latents, mask, num_quantizers).transpose(1, 2).reshape(-1, num_stages)
        # Every frame that is real has the first stage. What stands in the others must not spread, be it NaN.
        is_real_N1 = present_NK[:, :1]
        rows_ND = torch.where(is_real_N1, latents.transpose(1, 2).reshape(-1, num_dims), 0.0)
        tables = self._search_tables()
        tables_KCD = tables.entries_KCd
        codes_NK = rvq_search(rows_ND, tables).masked_fill(~present_NK, -1)

        residual_ND = rows_ND
        commitments_N, errors_N = [], []
        for stage in range(num_stages):
            chosen_N = codes_NK[:, stage].clamp_min(0)
            # To the map alone: through the few entries that were chosen, not through the whole table.
            mapped_ND = F.linear(F.embedding(chosen_N, self.codebooks[stage]), self.weight[stage], self.bias[stage])
            errors_N.append((mapped_ND - residual_ND.detach()).square().mean(-1))
            residual_ND = residual_ND - F.embedding(chosen_N, tables_KCD[stage])
            commitments_N.append(residual_ND.square().mean(-1))

        def mean(values_N: list[Tensor]) -> Tensor:
            sums_K = (torch.stack(values_N, dim=1) * present_NK).sum(0)
            return (sums_K / present_NK.sum(0).clamp_min(1)).mean()

        quantized_ND = GRADIENTS[self.config.gradient](rows_ND, rvq_decode(codes_NK, tables_KCD))
        quantized_ND = torch.where(is_real_N1, quantized_ND, 0.0)
        return Quantized(
            latents=quantized_ND.view(batch_size, num_frames, num_dims).transpose(1, 2),
            codes=codes_NK.view(batch_size, num_frames, num_stages).transpose(1, 2),
            losses={"commitment": mean(commitments_N), "codebook": mean(errors_N)},
            stats=usage(codes_NK, self.config.codebook_size),
            inputs=latents.detach(),
        )

    def update(self, *quantized: Quantized) -> None:
        """Nothing: the maps are learned by gradient."""

    def _search_tables(self) -> SearchTables:
        return self._kept_tables.get([self.codebooks, self.weight, self.bias], lambda: SearchTables(self.tables()))
