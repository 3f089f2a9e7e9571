"""Product quantization: dims are cut into groups, and each group picks an entry of its own, all at the same time.

Shapes: B batch, D dims, F frames, N = B * F rows, G = K groups, C entries, d = D / G.

No row of codes refines another, so no prefix of them is a model of a lower rate: all rows are needed.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from dataclasses import dataclass

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn

from codec.config import register
from codec.kernels.kept import Kept
from codec.kernels.residual_search import SearchTables, rvq_decode, rvq_search
from codec.kernels.row_linear import row_linear
from codec.quantizers.gradients import GRADIENTS, check_gradient
from codec.quantizers.interface import Quantized, Quantizer, QuantizerConfig, usage

NORMS = ("frame", "utterance")


def _check_sizes(latent_dim: int, num_groups: int, codebook_size: int) -> None:
    if min(latent_dim, num_groups, codebook_size) < 1:
        raise ValueError("latent_dim, num_groups and codebook_size must be positive")
    if latent_dim % num_groups:
        raise ValueError(f"latent_dim={latent_dim} is not a multiple of num_groups={num_groups}")


class _ProductVQ(Quantizer):
    """What the three have in common: `codebooks` [G, C, d], or [1, C, d] where all groups share one, and their use."""

    def __init__(self, codebooks: Tensor, num_groups: int) -> None:
        super().__init__()
        self.codebooks = nn.Parameter(codebooks)
        self.num_groups = num_groups
        self.codebook_sizes = (codebooks.shape[1],) * num_groups
        self.valid_num_quantizers = (num_groups,)

    def tables(self) -> Tensor:
        """The entries of each group as they are decoded, [G, C, d]; differentiable."""
        return self.codebooks.expand(self.num_groups, -1, -1)

    @abstractmethod
    def _choose(self, rows_ND: Tensor, num_frames: int) -> Tensor:
        """Codes [N, G] of whole items without padding."""

    @torch.no_grad()
    def encode(self, latents: Tensor, *, num_quantizers: int | None = None) -> Tensor:
        self.check_num_quantizers(num_quantizers)
        batch_size, _, num_frames = latents.shape
        with torch.autocast(latents.device.type, enabled=False):
            rows_ND = latents.to(self.codebooks.dtype).transpose(1, 2).flatten(0, 1).contiguous()
            codes_NG = self._choose(rows_ND, num_frames)
        return codes_NG.view(batch_size, num_frames, self.num_groups).transpose(1, 2)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        self.check_codes(codes)
        batch_size, _, num_frames = codes.shape
        codes_NG = codes.transpose(1, 2).flatten(0, 1)
        latents_ND = rvq_decode(codes_NG, self.tables(), num_groups=self.num_groups)
        return latents_ND.view(batch_size, num_frames, latents_ND.shape[1]).transpose(1, 2)

    def forward(
        self, latents: Tensor, mask: Tensor | None = None, *, num_quantizers: int | Tensor | None = None
    ) -> Quantized:
        """Quantize for training; `num_quantizers` is the number of groups, or left out."""
        with torch.autocast(latents.device.type, enabled=False):
            batch_size, _, num_frames = latents.shape
            inputs = latents.to(self.codebooks.dtype)
            is_real_BF = self.present(latents, mask, num_quantizers)[:, 0]
            # What stands in frames that are not real must not spread, be it NaN.
            inputs = torch.where(is_real_BF[:, None], inputs, 0.0)
            rows_ND = inputs.transpose(1, 2).flatten(0, 1).contiguous()
            quantized_NGd, codes_NG, losses, stats = self._quantize(rows_ND, is_real_BF)
            quantized_NGd = torch.where(is_real_BF.reshape(-1, 1, 1), quantized_NGd, 0.0)
            return Quantized(
                latents=quantized_NGd.view(batch_size, num_frames, inputs.shape[1]).transpose(1, 2),
                codes=codes_NG.view(batch_size, num_frames, self.num_groups).transpose(1, 2),
                losses=losses,
                stats=stats,
                inputs=inputs.detach(),
            )

    @abstractmethod
    def _quantize(
        self, rows_ND: Tensor, is_real_BF: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """Quantized rows [N, G, d], codes [N, G] with -1 where a frame is not real, losses and stats."""

    def _entries(self, codes_NG: Tensor, tables_GCd: Tensor) -> Tensor:
        """The entries [N, G, d] of codes; the first one for a code of -1."""
        parts = [F.embedding(codes_NG[:, g].clamp_min(0), tables_GCd[g]) for g in range(self.num_groups)]
        return torch.stack(parts, dim=1)

    def update(self, *quantized: Quantized) -> None:
        """Nothing: everything is learned by gradient."""


class _NearestVQ(_ProductVQ):
    """Product quantizers that pick the nearest entry, and learn by the losses of VQ-VAE."""

    def __init__(self, codebooks: Tensor, num_groups: int, gradient: str, *, by: str = "distance") -> None:
        super().__init__(codebooks, num_groups)
        self._pass_gradient = GRADIENTS[gradient]
        self._by = by
        self._kept_tables: Kept[SearchTables] = Kept()

    @abstractmethod
    def _points(self, rows_ND: Tensor, is_real_BF: Tensor) -> Tensor:
        """What entries are chosen for, [N, G, d]."""

    def _search(self, points_NGd: Tensor) -> Tensor:
        """Codes [N, G] of points."""
        make = functools.partial(SearchTables, super().tables(), num_groups=self.num_groups, by=self._by)
        return rvq_search(points_NGd.flatten(1), self._kept_tables.get([self.codebooks], make))

    def _choose(self, rows_ND: Tensor, num_frames: int) -> Tensor:
        is_real_BF = rows_ND.new_ones(len(rows_ND) // max(1, num_frames), num_frames, dtype=torch.bool)
        return self._search(self._points(rows_ND, is_real_BF))

    def _quantize(
        self, rows_ND: Tensor, is_real_BF: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor], dict[str, Tensor]]:
        is_real_N = is_real_BF.flatten()
        points_NGd, tables_GCd = self._points(rows_ND, is_real_BF), self.tables()
        codes_NG = self._search(points_NGd).masked_fill(~is_real_N[:, None], -1)
        entries_NGd = self._entries(codes_NG, tables_GCd)

        def error(one_NGd: Tensor, other_NGd: Tensor) -> Tensor:
            return ((one_NGd - other_NGd).square().mean((1, 2)) * is_real_N).sum() / is_real_N.sum().clamp_min(1)

        losses = {
            "commitment": error(points_NGd, entries_NGd.detach()),
            "codebook": error(points_NGd.detach(), entries_NGd),
        }
        return self._pass_gradient(points_NGd, entries_NGd), codes_NG, losses, usage(codes_NG, tables_GCd.shape[1])


@dataclass(frozen=True, kw_only=True)
class KMeansVQConfig(QuantizerConfig):
    """`num_groups` groups of `latent_dim / num_groups` dims; one codebook of `codebook_size` entries, or one for each.

    `norm`: over what projected latents are normalised: "frame", or "utterance" as published. `gradient`: how the
    decoder's gradient passes the choice of entries, "straight_through" or "rotation".
    """

    num_groups: int = 2
    codebook_size: int = 320
    shared_codebook: bool = True
    norm: str = "frame"
    gradient: str = "straight_through"

    def __post_init__(self) -> None:
        _check_sizes(self.latent_dim, self.num_groups, self.codebook_size)
        check_gradient(self.gradient)
        if self.norm not in NORMS:
            raise ValueError(f"norm={self.norm!r} is not one of {', '.join(NORMS)}")


@register("kmeans_vq", KMeansVQConfig)
class KMeansVQ(_NearestVQ):
    """The k-means quantizer of vq-wav2vec: each group is projected, normalised, and replaced by its nearest entry.

    The losses are mean squares over real frames and all dims: `codebook` (published weight 1) draws the entries to the
    points they are chosen for, `commitment` (0.25) the points to the entries. The gradient of the quantized latents
    passes to the normalised points, and from there through norm and projection.

    As published, a group is normalised over its dims and all frames of an utterance (group norm): the codes of a frame
    then depend on the whole signal, and a stream, or a part of a file, gives others than the file. The norm "frame"
    looks at one frame at a time.

    Source: Baevski et al., "vq-wav2vec" (2020), section 3.2; https://github.com/facebookresearch/fairseq,
    fairseq/modules/kmeans_vector_quantizer.py.

    >>> import torch
    >>> quantizer = KMeansVQ(KMeansVQConfig(latent_dim=8, codebook_size=16))
    >>> codes = quantizer.encode(torch.randn(1, 8, 5))
    >>> codes.shape, quantizer.decode(codes).shape
    (torch.Size([1, 2, 5]), torch.Size([1, 8, 5]))
    """

    def __init__(self, config: KMeansVQConfig) -> None:
        groups, dim = config.num_groups, config.latent_dim // config.num_groups
        codebooks = 0.01 * torch.randn(1 if config.shared_codebook else groups, config.codebook_size, dim)
        super().__init__(codebooks, groups, config.gradient)
        self.config = config
        bound = dim**-0.5  # as torch initialises its own convolutions
        self.projection = nn.Parameter(torch.empty(groups, dim, dim).uniform_(-bound, bound))
        self.norm_weight = nn.Parameter(torch.ones(groups, dim))
        self.norm_bias = nn.Parameter(torch.zeros(groups, dim))

    @property
    def is_framewise(self) -> bool:
        return self.config.norm == "frame"

    def _points(self, rows_ND: Tensor, is_real_BF: Tensor) -> Tensor:
        groups, dim = self.num_groups, self.codebooks.shape[2]
        parts = rows_ND.view(-1, groups, dim).unbind(1)
        projected = [row_linear(part.contiguous(), self.projection[g]) for g, part in enumerate(parts)]
        points_NGd = torch.stack(projected, dim=1)
        if self.config.norm == "frame":
            points_NGd = F.layer_norm(points_NGd, (dim,))
        else:
            points_BFGd = points_NGd.view(*is_real_BF.shape, groups, dim)
            weight_BFGd = is_real_BF[:, :, None, None].to(points_NGd.dtype)
            num_values = dim * weight_BFGd.sum((1, 3), keepdim=True).clamp_min(1.0)
            centred = points_BFGd - (points_BFGd * weight_BFGd).sum((1, 3), keepdim=True) / num_values
            variance = (centred.square() * weight_BFGd).sum((1, 3), keepdim=True) / num_values
            points_NGd = (centred * (variance + 1e-5).rsqrt()).flatten(0, 1)
        return points_NGd * self.norm_weight + self.norm_bias


@dataclass(frozen=True, kw_only=True)
class MultiCodebookVQConfig(QuantizerConfig):
    """`num_groups` groups of `latent_dim / num_groups` dims, each with a codebook of `codebook_size` entries.

    `gradient`: how the decoder's gradient passes the choice of entries, "straight_through" or "rotation".
    """

    latent_dim: int = 64
    num_groups: int = 8
    codebook_size: int = 4096
    gradient: str = "straight_through"

    def __post_init__(self) -> None:
        _check_sizes(self.latent_dim, self.num_groups, self.codebook_size)
        check_gradient(self.gradient)


@register("multi_codebook_vq", MultiCodebookVQConfig)
class MultiCodebookVQ(_NearestVQ):
    """The multi-codebook quantizer of UniTok: each chunk of the latents becomes an entry of the most similar direction.

    Chunks and entries have no length: both are normalised to 1, and what comes out is unit vectors side by side. The
    losses are mean squares over real frames and all dims: `codebook` (published weight 1) turns the entries to the
    chunks, `commitment` (0.25) the chunks to the entries. The gradient of the quantized latents passes to the unit
    vectors of the chunks, and from there through the normalisation, so it never changes a chunk's length.

    Source: Ma et al., "UniTok: a unified tokenizer for visual generation and understanding" (2025), section 3.2;
    https://github.com/FoundationVision/UniTok, models/quant.py.

    >>> import torch
    >>> quantizer = MultiCodebookVQ(MultiCodebookVQConfig(latent_dim=8, num_groups=2, codebook_size=16))
    >>> codes = quantizer.encode(torch.randn(1, 8, 5))
    >>> codes.shape, quantizer.decode(codes).shape
    (torch.Size([1, 2, 5]), torch.Size([1, 8, 5]))
    """

    def __init__(self, config: MultiCodebookVQConfig) -> None:
        dim = config.latent_dim // config.num_groups
        bound = dim**-0.5 / 36  # as published; only its relation to the learning rate matters
        codebooks = torch.empty(config.num_groups, config.codebook_size, dim).uniform_(-bound, bound)
        super().__init__(codebooks, config.num_groups, config.gradient, by="direction")
        self.config = config

    def tables(self) -> Tensor:
        return F.normalize(self.codebooks, dim=-1)

    def _points(self, rows_ND: Tensor, is_real_BF: Tensor) -> Tensor:
        return F.normalize(rows_ND.view(-1, self.num_groups, self.codebooks.shape[2]), dim=-1)


@dataclass(frozen=True, kw_only=True)
class GumbelVQConfig(QuantizerConfig):
    """`num_groups` groups of `latent_dim / num_groups` dims; one codebook of `codebook_size` entries, or one for each.

    `hidden_factor`: how many times wider than the latents the hidden layer before the scores is; 0 is none, as in
    wav2vec 2.0. The temperature falls from `temperature_start` by the factor `temperature_decay` per update, down to
    `temperature_end`.
    """

    num_groups: int = 2
    codebook_size: int = 320
    shared_codebook: bool = True
    hidden_factor: int = 2
    temperature_start: float = 2.0
    temperature_end: float = 0.5
    temperature_decay: float = 0.999995

    def __post_init__(self) -> None:
        _check_sizes(self.latent_dim, self.num_groups, self.codebook_size)
        if self.hidden_factor < 0:
            raise ValueError(f"hidden_factor must not be negative, got {self.hidden_factor}")
        if not 0.0 < self.temperature_end <= self.temperature_start or not 0.0 < self.temperature_decay <= 1.0:
            raise ValueError("temperatures must be positive and not rise, and temperature_decay lie in (0, 1]")


@register("gumbel_vq", GumbelVQConfig)
class GumbelVQ(_ProductVQ):
    """The Gumbel quantizer of vq-wav2vec: a small network scores the entries of each group, and training draws one.

    `forward` draws an entry with the probability that its score gives it, by adding Gumbel noise; the gradient is that
    of the softmax of the noisy scores at the current `temperature`, and the chosen entries learn, too. `encode` takes
    the entry of the highest score, without noise, so it may differ from the codes of `forward`; the stats `perplexity`
    and `dead_fraction` are of what `encode` gives. Further stats: `prob_perplexity`, of the mean probabilities without
    noise, and `temperature`.

    The loss `diversity` is the share of entries that the mean probabilities of a process's real frames leave unused,
    (G C - sum of their perplexities) / (G C). vq-wav2vec trains without it (weight 0); wav2vec 2.0 gives it 0.1.

    `forward` is pure: noise comes from a generator of its own, seeded by the number of updates so far and, where
    several processes train, by the process. So two forwards of one step draw the same noise for inputs of one shape,
    the next step draws other noise, and a resumed run draws what it would have drawn. The number of updates is training
    state: where it is not restored, the temperature begins anew.

    Source: Baevski et al., "vq-wav2vec" (2020), section 3.1; https://github.com/facebookresearch/fairseq,
    fairseq/modules/gumbel_vector_quantizer.py; the loss from "wav2vec 2.0" (2020), equation 4, as published there.

    >>> import torch
    >>> quantizer = GumbelVQ(GumbelVQConfig(latent_dim=8, codebook_size=16))
    >>> codes = quantizer.encode(torch.randn(1, 8, 5))
    >>> codes.shape, quantizer.decode(codes).shape
    (torch.Size([1, 2, 5]), torch.Size([1, 8, 5]))
    """

    def __init__(self, config: GumbelVQConfig) -> None:
        groups, dim = config.num_groups, config.latent_dim
        codebooks = torch.rand(1 if config.shared_codebook else groups, config.codebook_size, dim // groups)
        super().__init__(codebooks, groups)
        self.config = config
        self.hidden = nn.Linear(dim, config.hidden_factor * dim) if config.hidden_factor else None
        self.scores = nn.Linear(max(1, config.hidden_factor) * dim, groups * config.codebook_size)
        if self.hidden is None:
            nn.init.normal_(self.scores.weight)
            nn.init.zeros_(self.scores.bias)
        self._num_updates = 0

    @property
    def temperature(self) -> float:
        """The temperature of the softmax after the updates so far."""
        config = self.config
        return max(config.temperature_end, config.temperature_start * config.temperature_decay**self._num_updates)

    def _logits(self, rows_ND: Tensor) -> Tensor:
        """The scores of all entries, [N, G, C]."""
        if self.hidden is not None:
            rows_ND = F.gelu(row_linear(rows_ND, self.hidden.weight, self.hidden.bias))
        return row_linear(rows_ND, self.scores.weight, self.scores.bias).view(
            len(rows_ND), self.num_groups, self.config.codebook_size
        )

    def _choose(self, rows_ND: Tensor, num_frames: int) -> Tensor:
        return self._logits(rows_ND).max(-1).indices

    def _quantize(
        self, rows_ND: Tensor, is_real_BF: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor], dict[str, Tensor]]:
        is_real_N, tables_GCd = is_real_BF.flatten(), self.tables()
        logits_NGC = self._logits(rows_ND)
        generator = torch.Generator(rows_ND.device).manual_seed(self._seed())
        noise_NGC = -torch.empty_like(logits_NGC).exponential_(generator=generator).log()
        soft_NGC = ((logits_NGC + noise_NGC) / self.temperature).softmax(-1)
        codes_NG = soft_NGC.detach().max(-1).indices.masked_fill(~is_real_N[:, None], -1)
        # The value is the chosen entry; the scores get the gradient of the soft mixture, the entry its own.
        mixed_NGd = torch.einsum("ngc,gcd->ngd", soft_NGC - soft_NGC.detach(), tables_GCd.detach())
        quantized_NGd = self._entries(codes_NG, tables_GCd) + mixed_NGd

        probs_NGC = logits_NGC.softmax(-1) * is_real_N[:, None, None]
        mean_GC = probs_NGC.sum(0) / is_real_N.sum().clamp_min(1)
        perplexity_G = torch.exp(-(mean_GC * mean_GC.clamp_min(1e-7).log()).sum(-1))
        size = tables_GCd.shape[1]
        best_NG = logits_NGC.detach().max(-1).indices.masked_fill(~is_real_N[:, None], -1)
        stats = usage(best_NG, size)
        stats["prob_perplexity"] = perplexity_G.detach()
        stats["temperature"] = torch.full_like(stats["prob_perplexity"], self.temperature)
        return quantized_NGd, codes_NG, {"diversity": 1.0 - perplexity_G.mean() / size}, stats

    def _seed(self) -> int:
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return self._num_updates
        return self._num_updates * torch.distributed.get_world_size() + torch.distributed.get_rank()

    def update(self, *quantized: Quantized) -> None:
        """Count the step: the temperature falls, and noise changes."""
        self._num_updates += 1

    def training_state(self) -> dict[str, Tensor]:
        return {"num_updates": torch.tensor(self._num_updates)}

    def load_training_state(self, state: dict[str, Tensor]) -> None:
        self._num_updates = int(state["num_updates"])
