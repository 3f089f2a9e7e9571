"""Scalar quantization: every dimension on its own, on a fixed grid (FSQ) or on learned values (latent quantization).

Shapes as in `codec.quantizers.digits`; n values of a dim.

Source: Mentzer et al., "Finite scalar quantization: VQ-VAE made simple" (2023), section 3 and appendix A.1, in the form
of https://github.com/lucidrains/vector-quantize-pytorch (finite_scalar_quantization.py and residual_fsq.py), which
Spark-TTS's BiCodec was trained with; Hsu et al., "Disentanglement via latent quantization" (2023), section 3, and as
published, https://github.com/kylehkhsu/latent_quantization.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from codec.config import register
from codec.quantizers.digits import DigitQuantizer, check_row
from codec.quantizers.interface import QuantizerConfig


@dataclass(frozen=True, kw_only=True)
class FSQConfig(QuantizerConfig):
    """`num_stages` rows of codes, each for as many dims as `levels` has numbers, with so many values per dim.

    Published choices: (8, 6, 5), (8, 5, 5, 5), (7, 5, 5, 5, 5), (8, 8, 8, 6, 5) and (8, 8, 8, 5, 5, 5) for about 8, 10,
    12, 14 and 16 bits; BiCodec (4, 4, 4, 4, 4, 4), X-codec2 eight times 4.

    Fewer than 3 levels are refused: the formula puts the only threshold of 2 at -3.8. "lookup_free" has it at 0.
    """

    levels: tuple[int, ...]
    num_stages: int = 1

    def __post_init__(self) -> None:
        if min(self.latent_dim, self.num_stages) < 1:
            raise ValueError("latent_dim and num_stages must be positive")
        if not self.levels or min(self.levels) < 3:
            raise ValueError(f"levels={self.levels}: each must be 3 or more")
        check_row(math.prod(self.levels), "fewer levels, or more stages")


@register("fsq", FSQConfig)
class FSQ(DigitQuantizer):
    """Finite scalar quantization, and residual FSQ where there are several stages.

    A dim x of L levels becomes round(h tanh(x + s) - o) / (L // 2), with h = 1.001 (L - 1) / 2, o = 1/2 where L is even
    and else 0, and s such that 0 stays 0. So an even L has one value more below zero than above: 4 levels are -1, -0.5,
    0 and 0.5. Stage i does this to what is left, times (L - 1)**i, and its values count (L - 1)**-i. The digit of the
    lowest value is 0, and the first dim is the least significant one of the code.

    There are no losses: bounded dims need none. The gradient of each stage passes the rounding straight through, and on
    through tanh; what stages before it took away is a constant. So the derivative of several stages is that of
    tanh(x + s) near each of its steps, added up, as published: around zero about one per stage. Derivatives of the
    first stage alone, or of 1, taught a toy less.

    >>> import torch
    >>> quantizer = FSQ(FSQConfig(latent_dim=8, levels=(5, 4, 3), num_stages=2))
    >>> codes = quantizer.encode(torch.randn(1, 8, 7))
    >>> codes.shape, quantizer.codebook_sizes, quantizer.decode(codes[:, :1]).shape
    (torch.Size([1, 2, 7]), (60, 60), torch.Size([1, 8, 7]))
    """

    def __init__(self, config: FSQConfig) -> None:
        levels = config.levels
        super().__init__(config.latent_dim, len(levels), config.num_stages, levels, first_is_most_significant=False)
        self.config = config

    def _digits(self, inner_BFd: Tensor) -> Tensor:
        half_d = self.radices // 2
        digits, residual_BFd = [], inner_BFd
        for scale_d in self._scales():
            # Rounded before it is cast: a cast alone would drop what falls short of an integer by a rounding error.
            digits_BFd = self._bounded(residual_BFd / scale_d).round().long() + half_d
            digits.append(digits_BFd.clamp_min(0).minimum(self.radices - 1))
            residual_BFd = residual_BFd - (digits[-1] - half_d).to(self._dtype) / half_d * scale_d
        return torch.stack(digits, dim=2)

    def _values(self, digits_BFKm: Tensor) -> Tensor:
        half_d = self.radices // 2
        return (digits_BFKm - half_d).to(self._dtype) / half_d * self._scales()

    def _carrier(self, inner_BFd: Tensor, values_BFKm: Tensor) -> Tensor:
        before_BFKd = values_BFKm.cumsum(2) - values_BFKm
        left_BFKd = (inner_BFd[:, :, None] - before_BFKd) / self._scales()
        return self._bounded(left_BFKd) / (self.radices // 2) * self._scales()

    def _bounded(self, inner_BFd: Tensor) -> Tensor:
        half_range_d = (self.radices - 1).to(self._dtype) * 1.001 / 2
        offset_d = 0.5 * (self.radices % 2 == 0).to(self._dtype)
        return (inner_BFd + (offset_d / half_range_d).atanh()).tanh() * half_range_d - offset_d

    def _scales(self) -> Tensor:
        """By how much the values of each stage count [K, d]."""
        stages_K = torch.arange(len(self.codebook_sizes), device=self.radices.device)
        scales_Kd: Tensor = (self.radices - 1).to(self._dtype) ** -stages_K[:, None]
        return scales_Kd


@dataclass(frozen=True, kw_only=True)
class LatentScalarsConfig(QuantizerConfig):
    """`num_scalars` dims, each of which takes one of `num_values` values of its own.

    `num_groups`: into how many rows of codes the dims are divided, in order. Left out, every dim has a row of its own.
    """

    num_scalars: int
    num_values: int = 10
    num_groups: int | None = None

    def __post_init__(self) -> None:
        if min(self.latent_dim, self.num_scalars, self.num_rows) < 1 or self.num_values < 2:
            raise ValueError("latent_dim, num_scalars and num_groups must be positive, and num_values 2 or more")
        if self.num_scalars % self.num_rows:
            raise ValueError(f"num_scalars={self.num_scalars} is not a multiple of num_groups={self.num_groups}")
        check_row(self.num_values ** (self.num_scalars // self.num_rows), "more groups")

    @property
    def num_rows(self) -> int:
        """How many rows of codes there are."""
        return self.num_scalars if self.num_groups is None else self.num_groups


@register("latent_scalars", LatentScalarsConfig)
class LatentScalars(DigitQuantizer):
    """Latent quantization: every dim goes to the nearest of its own learned values, the lower one of two as near.

    A row of codes per dim keeps what the method is made for, dims that can be read one by one. Rows of several dims
    (the first is the least significant one) make fewer tokens of them.

    Losses, both mean squares over dims and real frames, where an absent row counts as zero (published weights: 0.01 and
    0.01, with a weight decay of 0.1 on the whole model; without the decay dims run away from such weak losses, and
    0.25 and 1 halved the error in a toy):

    - `commitment` draws the dims to their values;
    - `codebook` draws the chosen values to the dims; nothing else teaches them.

    Of the quantized dims the gradient passes straight through. Values begin evenly spread over -0.5..0.5.

    >>> import torch
    >>> quantizer = LatentScalars(LatentScalarsConfig(latent_dim=6, num_scalars=6, num_values=5, num_groups=2))
    >>> codes = quantizer.encode(torch.randn(1, 6, 7))
    >>> codes.shape, quantizer.codebook_sizes, quantizer.decode(codes).shape
    (torch.Size([1, 2, 7]), (125, 125), torch.Size([1, 6, 7]))
    """

    def __init__(self, config: LatentScalarsConfig) -> None:
        radices = (config.num_values,) * (config.num_scalars // config.num_rows)
        super().__init__(
            config.latent_dim, config.num_scalars, config.num_rows, radices, first_is_most_significant=False
        )
        self.config = config
        values_n = torch.linspace(-0.5, 0.5, config.num_values)
        self.scalars = nn.Parameter(values_n.repeat(config.num_scalars, 1))

    def _digits(self, inner_BFd: Tensor) -> Tensor:
        distances_BFdn = (inner_BFd[..., None] - self.scalars.detach()).abs()
        return self._in_rows(distances_BFdn.argmin(-1))

    def _values(self, digits_BFKm: Tensor) -> Tensor:
        dims_d = torch.arange(len(self.scalars), device=digits_BFKm.device)
        return self.scalars[dims_d, digits_BFKm.flatten(2)].view(digits_BFKm.shape)

    def _losses(
        self, inner_BFd: Tensor, values_BFKm: Tensor, present_BFK: Tensor, num_real: Tensor
    ) -> dict[str, Tensor]:
        inner_BFKm, num_errors = self._in_rows(inner_BFd), num_real * inner_BFd.shape[2]
        return {
            "commitment": ((inner_BFKm - values_BFKm.detach()).square() * present_BFK[..., None]).sum() / num_errors,
            "codebook": ((inner_BFKm.detach() - values_BFKm).square() * present_BFK[..., None]).sum() / num_errors,
        }
