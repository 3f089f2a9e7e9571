"""A semantic codebook beside an acoustic residual quantizer, over the same latents (the split quantizer of Mimi).

Shapes: B batch, D dims of the latents, d dims of the codebooks, F frames, N = B * F rows, C entries, K code rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from codec.config import register
from codec.kernels.kept import Kept
from codec.kernels.residual_search import SearchTables, rvq_decode, rvq_search
from codec.kernels.row_linear import row_linear
from codec.quantizers.gradients import GRADIENTS, check_gradient
from codec.quantizers.interface import Quantized, Quantizer, QuantizerConfig
from codec.quantizers.residual import ResidualVQ, ResidualVQConfig

_STATS = ("perplexity", "dead_fraction", "commitment", "norm_ratio")


@dataclass(frozen=True, kw_only=True)
class SplitVQConfig(QuantizerConfig):
    """`num_stages` code rows, the first of them semantic, of `codebook_size` entries in `codebook_dim` dims each.

    `ema_decay` and `dead_threshold` as for `ResidualVQConfig`. `gradient`: how the decoder's gradient passes the choice
    of entries, "straight_through" or "rotation".
    """

    num_stages: int = 32
    codebook_size: int = 2048
    codebook_dim: int = 256
    ema_decay: float = 0.99
    dead_threshold: float = 0.1
    gradient: str = "straight_through"

    def __post_init__(self) -> None:
        if min(self.latent_dim, self.codebook_size, self.codebook_dim) < 1 or self.num_stages < 2:
            raise ValueError("latent_dim, codebook_size and codebook_dim must be positive, and num_stages at least 2")
        check_gradient(self.gradient)
        self.part(1)

    def part(self, num_stages: int) -> ResidualVQConfig:
        """The configuration of a part with that many stages."""
        return ResidualVQConfig(
            latent_dim=self.codebook_dim,
            num_stages=num_stages,
            codebook_size=self.codebook_size,
            ema_decay=self.ema_decay,
            dead_threshold=self.dead_threshold,
        )


@register("split_vq", SplitVQConfig)
class SplitVQ(Quantizer):
    """Row 0 is a semantic codebook; the rows after it are stages of a residual quantizer that does not see row 0.

    Both parts get the same latents, each through a projection of its own without bias, and what they give is projected
    back and added. So what the semantic codebook is taught does not bend the acoustic part, and it stands alone: the
    shortest prefix is row 0, and each longer one adds an acoustic stage.

    Codebooks learn by moving averages, as `ResidualVQ` tells; the projections by gradient. The loss "commitment" is the
    mean over all code rows, in the projected spaces. The gradient of the quantized latents passes the choice of entries
    in both parts, but on through the projections; the published model trains so. The stats are those of `ResidualVQ`
    without `gradient_norm`. `inputs` [B, 2 d, F] are the projected latents of both parts.

    State dict, for each part of `semantic` and `acoustic`: `input_proj.weight` [d, D], `output_proj.weight` [D, d] and
    `vq.codebooks` [stages, C, d].

    Source: Défossez et al., "Moshi: a speech-text foundation model for real-time dialogue" (2024), section 3.3.3;
    https://github.com/kyutai-labs/moshi, moshi/moshi/quantization/vq.py.

    >>> import torch
    >>> quantizer = SplitVQ(SplitVQConfig(latent_dim=8, num_stages=3, codebook_size=16, codebook_dim=4))
    >>> codes = quantizer.encode(torch.randn(1, 8, 5))
    >>> codes.shape, quantizer.decode(codes[:, :1]).shape
    (torch.Size([1, 3, 5]), torch.Size([1, 8, 5]))
    """

    def __init__(self, config: SplitVQConfig) -> None:
        super().__init__()
        self.config = config
        self.codebook_sizes = (config.codebook_size,) * config.num_stages
        self.valid_num_quantizers = tuple(range(1, config.num_stages + 1))
        self.semantic = _Part(config, num_stages=1)
        self.acoustic = _Part(config, num_stages=config.num_stages - 1)
        self._kept_both: Kept[_Both] = Kept()

    @torch.no_grad()
    def encode(self, latents: Tensor, *, num_quantizers: int | None = None) -> Tensor:
        num_rows = self.check_num_quantizers(num_quantizers)
        batch_size, _, num_frames = latents.shape
        with torch.autocast(latents.device.type, enabled=False):
            both = self._both()
            rows_ND = latents.to(both.input_weight).mT.flatten(0, 1).contiguous()
            codes_NK = rvq_search(row_linear(rows_ND, both.input_weight), both.tables, num_rows=num_rows)
        return codes_NK.view(batch_size, num_frames, num_rows).mT

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        self.check_codes(codes)
        batch_size, num_rows, num_frames = codes.shape
        with torch.autocast(codes.device.type, enabled=False):
            both = self._both()
            codes_NK, entries_KCd = codes.mT.flatten(0, 1), both.tables.entries_KCd
            parts = [rvq_decode(codes_NK[:, :1], entries_KCd[:1])]
            if num_rows == 1:
                parts.append(torch.zeros_like(parts[0]))
            else:
                parts.append(rvq_decode(codes_NK[:, 1:], entries_KCd[1:]))
            latents_ND = row_linear(torch.cat(parts, dim=1), both.output_weight)
        return latents_ND.view(batch_size, num_frames, self.config.latent_dim).mT

    def _both(self) -> _Both:
        parts = (self.semantic, self.acoustic)
        tensors = [(part.input_proj.weight, part.output_proj.weight, part.vq.codebooks) for part in parts]
        return self._kept_both.get([*tensors[0], *tensors[1]], lambda: _Both(*map(list, zip(*tensors, strict=True))))

    def forward(
        self, latents: Tensor, mask: Tensor | None = None, *, num_quantizers: int | Tensor | None = None
    ) -> Quantized:
        present_BKF = self.present(latents, mask, num_quantizers)
        with torch.autocast(latents.device.type, enabled=False):
            # What stands in frames that are not real must not spread, be it NaN.
            latents = torch.where(present_BKF[:, :1], latents, 0.0)
            semantic_latents, semantic = self.semantic(latents, present_BKF[:, :1])
            acoustic_latents, acoustic = self.acoustic(latents, present_BKF[:, 1:])
        num_rows = self.config.num_stages
        total = semantic.losses["commitment"] + (num_rows - 1) * acoustic.losses["commitment"]
        return Quantized(
            latents=semantic_latents + acoustic_latents,
            codes=torch.cat([semantic.codes, acoustic.codes], dim=1),
            losses={"commitment": total / num_rows},
            stats={name: torch.cat([semantic.stats[name], acoustic.stats[name]]) for name in _STATS},
            inputs=torch.cat([semantic.inputs, acoustic.inputs], dim=1),
        )

    def through_stage(self, latents: Tensor, codes: Tensor, stage: int) -> Tensor:
        """As every quantizer's; the gradient passes the projections, so a teacher of row 0 shapes its whole part."""
        if stage == 0:
            part, rows, of_part = self.semantic, codes[:, :1], 0
        else:
            part, rows, of_part = self.acoustic, codes[:, 1:], stage - 1
        return part.project_back(part.vq.through_stage(part.project(latents), rows, of_part))

    def update(self, *quantized: Quantized) -> None:
        """Let the codebooks of both parts learn, as `ResidualVQ` does."""
        dim = self.config.codebook_dim
        self.semantic.vq.update(*(replace(q, codes=q.codes[:, :1], inputs=q.inputs[:, :dim]) for q in quantized))
        self.acoustic.vq.update(*(replace(q, codes=q.codes[:, 1:], inputs=q.inputs[:, dim:]) for q in quantized))

    @property
    def num_frames_to_initialize(self) -> int:
        return self.semantic.vq.num_frames_to_initialize

    @torch.no_grad()
    def initialize(self, latents: Tensor, *, seed: int = 0) -> None:
        """Set the codebooks of both parts by k-means over the projected latents of all processes."""
        for part in (self.semantic, self.acoustic):
            part.vq.initialize(part.project(latents), seed=seed)

    def training_state(self) -> dict[str, Tensor]:
        parts = {"semantic": self.semantic, "acoustic": self.acoustic}
        return {
            f"{name}.{key}": value for name, part in parts.items() for key, value in part.vq.training_state().items()
        }

    def load_training_state(self, state: dict[str, Tensor]) -> None:
        for name, part in {"semantic": self.semantic, "acoustic": self.acoustic}.items():
            own = {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
            part.vq.load_training_state(own)


class _Both:
    """Both parts at once: one product there, one search over two chains, one product back; no gradient."""

    @torch.no_grad()
    def __init__(self, input_weights: list[Tensor], output_weights: list[Tensor], codebooks: list[Tensor]) -> None:
        self.input_weight = torch.cat(input_weights)
        self.output_weight = torch.cat(output_weights, dim=1)
        chains = [0] + [1] * len(codebooks[1])
        self.tables = SearchTables(torch.cat(codebooks), chains=chains)


class _Part(nn.Module):
    """A residual quantizer, and the ways to it and back."""

    def __init__(self, config: SplitVQConfig, *, num_stages: int) -> None:
        super().__init__()
        self.input_proj = nn.Linear(config.latent_dim, config.codebook_dim, bias=False)
        self.output_proj = nn.Linear(config.codebook_dim, config.latent_dim, bias=False)
        self.vq = ResidualVQ(config.part(num_stages))
        self._pass_gradient = GRADIENTS[config.gradient]

    def forward(self, latents: Tensor, present_BKF: Tensor) -> tuple[Tensor, Quantized]:
        """The quantized latents [B, D, F], zero where no row is present, and what the residual quantizer said."""
        projected = self.project(latents)
        is_present_BF = present_BKF[:, 0]
        # Each item has its own number of rows; one that has none is masked, and then the number does not matter.
        per_item = present_BKF.any(2).sum(1).clamp_min(1)
        quantized = self.vq(projected, is_present_BF, num_quantizers=per_item)
        passed = self._pass_gradient(projected.mT, self.vq.decode(quantized.codes).mT)
        return self.project_back(torch.where(is_present_BF[:, :, None], passed, 0.0).mT), quantized

    def project(self, latents: Tensor) -> Tensor:
        """Latents [B, D, F] -> [B, d, F]."""
        return _rows_through(self.input_proj.weight, latents)

    def project_back(self, projected: Tensor) -> Tensor:
        """[B, d, F] -> [B, D, F]."""
        return _rows_through(self.output_proj.weight, projected)


def _rows_through(weight: Tensor, latents: Tensor) -> Tensor:
    return row_linear(latents.to(weight.dtype).mT.contiguous(), weight).mT
