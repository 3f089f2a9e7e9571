"""Binary quantization: a bit per dimension, by its sign, for dims as they are (LFQ) or on a sphere (BSQ).

Shapes as in `codec.quantizers.digits`; P codes of a factor.

Entropies are those of soft bits: a dim z is taken to be the bit 1 with probability sigmoid(4 t s z), where s is the
value of the bit 1 and t the inverse temperature. That is the softmax over all codes of 2 t (z . code), as published:
it is a product of bits, so the entropy of a frame is a sum over bits, exactly, however large the codebook.

Source: Yu et al., "Language model beats diffusion: tokenizer is key to visual generation" (2023), section 3.1, in the
form of https://github.com/lucidrains/vector-quantize-pytorch (lookup_free_quantization.py); Zhao et al., "Image and
video tokenization with binary spherical quantization" (2024), section 3, and as published,
https://github.com/zhaoyue-zephyrus/bsq-vit (transcoder/models/quantizer/bsq.py). The order of bits is theirs, and that
of FocalCodec (https://github.com/lucadellalib/focalcodec).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor

from codec.config import register
from codec.quantizers.digits import DigitQuantizer, check_row
from codec.quantizers.interface import QuantizerConfig

_MIN_NORM = 1e-3  # shorter latents are not stretched to length 1: the gradient is at most this much steeper


@dataclass(frozen=True, kw_only=True)
class LookupFreeConfig(QuantizerConfig):
    """`num_bits` bits a frame, in `num_groups` rows of codes with equally many, at most 16 each.

    `entropy_bits`: the entropy of the batch is that of factors of so many bits, the last one of a row may have fewer.
    Their sum is no less than that of a row as a whole, which too few frames cannot tell.
    `inverse_temperature`: how sharply a dim decides its bit in the entropies.
    """

    num_bits: int
    num_groups: int = 1
    entropy_bits: int = 9
    inverse_temperature: float = 100.0

    def __post_init__(self) -> None:
        if min(self.latent_dim, self.num_bits, self.num_groups, self.entropy_bits) < 1 or self.inverse_temperature <= 0:
            raise ValueError("latent_dim, num_bits, num_groups, entropy_bits and inverse_temperature must be positive")
        if self.num_bits % self.num_groups:
            raise ValueError(f"num_bits={self.num_bits} is not a multiple of num_groups={self.num_groups}")
        check_row(2 ** (self.num_bits // self.num_groups), "more groups")


@dataclass(frozen=True, kw_only=True)
class BinarySphericalConfig(LookupFreeConfig):
    """As for "lookup_free", but for what is the default of the inverse temperature."""

    inverse_temperature: float = 1.0


@register("lookup_free", LookupFreeConfig)
class LookupFree(DigitQuantizer):
    """Lookup-free quantization (LFQ): a dim above 0 becomes 1, every other one -1.

    The first dim of a row is the most significant bit of its code. More than 16 bits are divided into rows, in order:
    the bits of all rows in a line are the code that one row would have.

    Losses, over real frames, where an absent row adds nothing (published weights: 0.1, 0.1 and, by version, 0 or 0.25;
    published is 0.1 (sample entropy - batch entropy), which differs by a constant):

    - `sample_entropy`: of the soft bits of a frame, in nats; it draws dims away from 0;
    - `diversity`: by how much the entropy of the batch, in nats, falls short of that of bits which are thrown: 0 where
      all codes are used alike. Batches should be large; those of several processes count as one, so `forward` must run
      in all of them alike;
    - `commitment`: the mean square over dims of what quantization changes. Without it nothing holds the dims' scale: in
      a toy they grew to 16, where no bit is soft and the entropies teach nothing.

    Of the quantized dims the gradient passes straight through. The stat `bit_entropy` [K] is the entropy of single
    bits in the batch, in bits, mean over the bits of a row: unlike the perplexity of a large codebook, a small batch
    can tell it.

    >>> import torch
    >>> quantizer = LookupFree(LookupFreeConfig(latent_dim=8, num_bits=18, num_groups=2))
    >>> codes = quantizer.encode(torch.randn(1, 8, 7))
    >>> codes.shape, quantizer.codebook_sizes, quantizer.decode(codes).shape
    (torch.Size([1, 2, 7]), (512, 512), torch.Size([1, 8, 7]))
    """

    bit_value = 1.0

    def __init__(self, config: LookupFreeConfig) -> None:
        radices = (2,) * (config.num_bits // config.num_groups)
        super().__init__(config.latent_dim, config.num_bits, config.num_groups, radices, first_is_most_significant=True)
        self.config = config

    def _digits(self, inner_BFd: Tensor) -> Tensor:
        return self._in_rows((inner_BFd > 0).long())

    def _values(self, digits_BFKm: Tensor) -> Tensor:
        return (2 * digits_BFKm - 1).to(self._dtype) * self.bit_value

    def _losses(
        self, inner_BFd: Tensor, values_BFKm: Tensor, present_BFK: Tensor, num_real: Tensor
    ) -> dict[str, Tensor]:
        inner_BFKm, present_BFK1 = self._in_rows(inner_BFd), present_BFK[..., None]
        logits_BFKm = 4.0 * self.config.inverse_temperature * self.bit_value * inner_BFKm
        ones_BFKm = logits_BFKm.sigmoid()
        entropies_BFKm = F.softplus(logits_BFKm) - logits_BFKm * ones_BFKm
        errors_BFKm = (inner_BFKm - values_BFKm).square()
        return {
            "sample_entropy": (entropies_BFKm * present_BFK1).sum() / num_real,
            "diversity": self._diversity(ones_BFKm.flatten(0, 1), present_BFK.flatten(0, 1)),
            "commitment": (errors_BFKm * present_BFK1).sum() / num_real * self._commitment_share,
        }

    @property
    def _commitment_share(self) -> float:
        return 1.0 / self.config.num_bits

    def _diversity(self, ones_NKm: Tensor, present_NK: Tensor) -> Tensor:
        """What the soft bits' entropy over the batch lacks, summed over rows."""
        sums = [self._summed(bits_NKg, present_NK) for bits_NKg in ones_NKm.split(self.config.entropy_bits, dim=2)]
        means_KP, counts_K = _means_of_all_processes(torch.cat(sums, dim=1), present_NK.sum(0))
        parts = means_KP.split([part.shape[1] for part in sums], dim=1)
        # Of a probability that is zero the logarithm must not be infinite, nor its gradient.
        entropies_K = torch.stack([-(part * part.clamp_min(1e-8).log()).sum(1) for part in parts]).sum(0)
        return ((ones_NKm.shape[2] * math.log(2) - entropies_K) * (counts_K > 0)).sum()

    def _summed(self, ones_NKg: Tensor, present_NK: Tensor) -> Tensor:
        """The probabilities of the 2^g codes of a factor, summed over frames [K, 2^g]; the first bit counts most.

        A code's is the product of those of its first and its last bits, so the sum is a product of two matrices, and
        nothing is as large as N times 2^g.
        """
        half = ones_NKg.shape[2] // 2
        first_NKP, last_NKP = _joint(ones_NKg[:, :, :half]), _joint(ones_NKg[:, :, half:])
        return torch.einsum("nkp,nkq->kpq", first_NKP * present_NK[..., None], last_NKP).flatten(1)

    def _stats(self, codes_BFK: Tensor) -> dict[str, Tensor]:
        ones_Km, counts_K = self._digits_of(codes_BFK).sum((0, 1)), (codes_BFK >= 0).sum((0, 1))
        share_Km = ones_Km / counts_K.clamp_min(1)[:, None]
        entropy_Km = -(torch.xlogy(share_Km, share_Km) + torch.xlogy(1 - share_Km, 1 - share_Km)) / math.log(2)
        return super()._stats(codes_BFK) | {"bit_entropy": entropy_Km.mean(1)}


@register("binary_spherical", BinarySphericalConfig)
class BinarySpherical(LookupFree):
    """Binary spherical quantization (BSQ): dims are scaled to length 1, and go to the nearest corner of a cube in it.

    With d bits, over all rows, the values are 1 / sqrt(d) and -1 / sqrt(d). Codes, losses and stats are those of
    `LookupFree`, of the scaled dims, but that `commitment` is a sum over dims: the squared distance, below
    2 - 2 / sqrt(d). Published weights: 0.1 / t for both entropies, which are of the factors of 9 bits or, as in the
    run of 18 bits, of single ones (`entropy_bits=1`); 0 for the commitment.

    The gradient passes straight through the choice of the corner, and on through the scaling, so it only turns the
    dims. The published one is 1 / sqrt(d) times as large.

    >>> import torch
    >>> quantizer = BinarySpherical(BinarySphericalConfig(latent_dim=13, num_bits=13))
    >>> codes = quantizer.encode(torch.randn(1, 13, 7))
    >>> codes.shape, quantizer.codebook_sizes, quantizer.decode(codes).norm(dim=1).round(decimals=4).unique()
    (torch.Size([1, 1, 7]), (8192,), tensor([1.]))
    """

    def __init__(self, config: BinarySphericalConfig) -> None:
        super().__init__(config)
        self.bit_value = config.num_bits**-0.5

    def _prepared(self, inner_BFd: Tensor) -> Tensor:
        return F.normalize(inner_BFd, dim=2, eps=_MIN_NORM)

    @property
    def _commitment_share(self) -> float:
        return 1.0


def _joint(ones_NKg: Tensor) -> Tensor:
    """The probabilities [N, K, 2^g] of the numbers that independent bits make; 1 for no bits at all."""
    joint_NKP = torch.ones_like(ones_NKg[:, :, :1]) if ones_NKg.shape[2] else ones_NKg.new_ones(*ones_NKg.shape[:2], 1)
    for ones_NK in ones_NKg.unbind(2):
        both_NK2 = torch.stack([1.0 - ones_NK, ones_NK], dim=2)
        joint_NKP = (joint_NKP[..., None] * both_NK2[:, :, None]).flatten(2)
    return joint_NKP


def _means_of_all_processes(sums_KP: Tensor, counts_K: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over this process's frames -> the mean over the frames of all processes, and how many these are.

    Processes average their gradients, so each one's is as many times that of its own share in the mean.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return sums_KP / counts_K.clamp_min(1)[:, None], counts_K
    totals = torch.cat([sums_KP.detach(), counts_K[:, None]], dim=1)
    torch.distributed.all_reduce(totals)
    means_KP, counts_K = totals[:, :-1] / totals[:, -1:].clamp_min(1), totals[:, -1]
    own_KP = torch.distributed.get_world_size() * sums_KP / counts_K.clamp_min(1)[:, None]
    return means_KP + (own_KP - own_KP.detach()), counts_K
