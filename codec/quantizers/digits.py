"""What quantizers without a stored codebook share: a code is a number, and its digits say where each dimension lies.

Shapes: B batch, D dims of the latents, F frames, N = B * F frames of a batch, K code rows, d dims that are quantized,
m digits of a row.

A row either quantizes all dims, m = d, and each row what those before it left over (stages); or its own m = d / K of
them (groups). Either way a prefix of the rows can be decoded, and a row that is absent adds zero; but with groups only
a model that was trained with prefixes makes anything of them.
"""

from __future__ import annotations

import itertools
import math
import operator
from abc import abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codec.layers.causal import Linear
from codec.quantizers.interface import Quantized, Quantizer

MAX_CODEBOOK_SIZE = 2**16


def check_row(num_codes: int, remedy: str) -> None:
    """ValueError where a row of codes would have more values than 16 bits hold."""
    if num_codes > MAX_CODEBOOK_SIZE:
        raise ValueError(f"a row would have {num_codes} codes, at most {MAX_CODEBOOK_SIZE} are possible: {remedy}")


class DigitQuantizer(Quantizer):
    """Base of the quantizers of single dimensions.

    Where `num_dims` is not `latent_dim`, linear layers with bias lead to the quantized dims and back; else there are
    none. They are row-exact, so without gradients the codes of a frame do not depend on what lies beside it. Without
    autocast, in the precision of the parameters.

    `forward` gives latents with the value of `decode(codes)`; a frame without any code is zero and has no gradient.
    `stats` count the codes of one batch, so `dead_fraction` is high for a codebook that is larger than the batch.
    """

    radices: Tensor
    place_values: Tensor

    def __init__(
        self, latent_dim: int, num_dims: int, num_rows: int, radices: Sequence[int], *, first_is_most_significant: bool
    ) -> None:
        super().__init__()
        size = math.prod(radices)
        self.codebook_sizes = (size,) * num_rows
        self.valid_num_quantizers = tuple(range(1, num_rows + 1))
        self._has_stages = len(radices) == num_dims
        self._has_projections = latent_dim != num_dims
        self.in_proj = Linear(latent_dim, num_dims) if self._has_projections else nn.Identity()
        self.out_proj = Linear(num_dims, latent_dim) if self._has_projections else nn.Identity()
        places = list(itertools.accumulate(radices[:-1], operator.mul, initial=1))
        if first_is_most_significant:
            places = [size // (place * radix) for place, radix in zip(places, radices, strict=True)]
        self.register_buffer("radices", torch.tensor(radices), persistent=False)
        self.register_buffer("place_values", torch.tensor(places), persistent=False)

    # What each quantizer says of itself

    @abstractmethod
    def _digits(self, inner_BFd: Tensor) -> Tensor:
        """The digits [B, F, K, m] of the dims, each in 0..radix-1 even where the dims are no numbers."""

    @abstractmethod
    def _values(self, digits_BFKm: Tensor) -> Tensor:
        """What digits stand for [B, F, K, m]."""

    def _prepared(self, inner_BFd: Tensor) -> Tensor:
        """What is quantized and learned from, where that is not the dims as they are."""
        return inner_BFd

    def _carrier(self, inner_BFd: Tensor, values_BFKm: Tensor) -> Tensor:
        """Through what the gradient of each row's values passes [B, F, K, m]; the dims, if straight through."""
        return self._in_rows(inner_BFd)

    def _losses(
        self, inner_BFd: Tensor, values_BFKm: Tensor, present_BFK: Tensor, num_real: Tensor
    ) -> dict[str, Tensor]:
        """Unweighted losses; the values have a gradient to what `_values` looks up."""
        return {}

    def _stats(self, codes_BFK: Tensor) -> dict[str, Tensor]:
        return usage_of_codes(codes_BFK.flatten(0, 1), self.codebook_sizes[0])

    # The interface

    def encode(self, latents: Tensor, *, num_quantizers: int | None = None) -> Tensor:
        num_rows = self.check_num_quantizers(num_quantizers)
        with torch.autocast(latents.device.type, enabled=False):
            codes_BFK = self._codes(self._digits(self._prepared(self._enter(latents))))
        return codes_BFK[:, :, :num_rows].transpose(1, 2)

    def decode(self, codes: Tensor) -> Tensor:
        self.check_codes(codes)
        num_missing = len(self.codebook_sizes) - codes.shape[1]
        # All rows, so that a prefix is added up as the same codes with absent rows are.
        codes_BFK = F.pad(codes.transpose(1, 2), (0, num_missing), value=-1)
        with torch.autocast(codes.device.type, enabled=False):
            return self._leave(self._values(self._digits_of(codes_BFK)), codes_BFK >= 0)

    def forward(
        self, latents: Tensor, mask: Tensor | None = None, *, num_quantizers: int | Tensor | None = None
    ) -> Quantized:
        present_BFK = self.present(latents, mask, num_quantizers).transpose(1, 2)
        num_frames = latents.shape[0] * latents.shape[2]
        num_real = torch.full((), num_frames, device=latents.device) if mask is None else mask.sum()
        with torch.autocast(latents.device.type, enabled=False):
            # Zeros instead of what is masked: whatever is there, it must not reach a sum or a gradient.
            heard = latents if mask is None else torch.where(mask[:, None], latents, 0.0)
            inner_BFd = self._prepared(self._enter(heard))
            digits_BFKm = self._digits(inner_BFd.detach())
            codes_BFK = self._codes(digits_BFKm).masked_fill(~present_BFK, -1)
            values_BFKm = self._values(digits_BFKm)
            carrier_BFKm = self._carrier(inner_BFd, values_BFKm.detach())
            quantized_BFKm = values_BFKm.detach() + (carrier_BFKm - carrier_BFKm.detach())
            return Quantized(
                latents=self._leave(quantized_BFKm, present_BFK),
                codes=codes_BFK.transpose(1, 2),
                losses=self._losses(inner_BFd, values_BFKm, present_BFK, num_real.clamp_min(1)),
                stats=self._stats(codes_BFK),
                inputs=latents.detach().to(self._dtype),
            )

    def update(self, *quantized: Quantized) -> None:
        """Nothing: what is learned is learned by gradient."""

    # Latents to dims, digits to codes, and back

    @property
    def _dtype(self) -> torch.dtype:
        return next((parameter.dtype for parameter in self.parameters()), torch.float32)

    def _enter(self, latents: Tensor) -> Tensor:
        # Contiguous: elementwise functions round differently on strided memory.
        inner_BFd: Tensor = self.in_proj(latents.to(self._dtype).transpose(1, 2).contiguous())
        return inner_BFd

    def _leave(self, values_BFKm: Tensor, present_BFK: Tensor) -> Tensor:
        latents_BFD: Tensor = self.out_proj(self._joined(values_BFKm, present_BFK))
        if self._has_projections:  # their bias is not a code
            latents_BFD = torch.where(present_BFK.any(2, keepdim=True), latents_BFD, 0.0)
        return latents_BFD.transpose(1, 2)

    def _codes(self, digits_BFKm: Tensor) -> Tensor:
        return (digits_BFKm * self.place_values).sum(-1)

    def _digits_of(self, codes_BFK: Tensor) -> Tensor:
        """The digits [B, F, K, m] of codes; those of an absent code are those of 0."""
        return codes_BFK.clamp_min(0)[..., None] // self.place_values % self.radices

    def _in_rows(self, dims_BFd: Tensor) -> Tensor:
        """What belongs to each row of a quantizer with groups [B, F, K, m]."""
        return dims_BFd.reshape(*dims_BFd.shape[:2], len(self.codebook_sizes), len(self.radices))

    def _joined(self, values_BFKm: Tensor, present_BFK: Tensor) -> Tensor:
        """The dims [B, F, d] that the values of rows make; absent rows add zero."""
        values_BFKm = torch.where(present_BFK[..., None], values_BFKm, 0.0)
        if not self._has_stages:
            return values_BFKm.flatten(2)
        first_BFd, *others_BFd = values_BFKm.unbind(2)
        return sum(others_BFd, first_BFd)  # one after another: in the same order for every shape


def usage_of_codes(codes_NK: Tensor, codebook_size: int) -> dict[str, Tensor]:
    """As `codec.quantizers.interface.usage`, in memory that does not grow with the codebook."""
    num_rows = codes_NK.shape[1]
    numbered_NK = codes_NK + codebook_size * torch.arange(num_rows, device=codes_NK.device)
    found, counts = numbered_NK[codes_NK >= 0].unique(return_counts=True)
    row = found // codebook_size
    zeros_K = torch.zeros(num_rows, device=codes_NK.device)
    share = counts / zeros_K.index_add(0, row, counts.float())[row]
    return {
        "perplexity": zeros_K.index_add(0, row, -share * share.log()).exp(),
        "dead_fraction": 1.0 - torch.bincount(row, minlength=num_rows) / codebook_size,
    }
