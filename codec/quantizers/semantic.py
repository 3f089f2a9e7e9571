"""A semantic code for every frame, and acoustic codes for what it does not tell.

Shapes: B batch, D = S + A dims of the latents, S semantic and A acoustic ones, F frames, K code rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from codec.config import build, register
from codec.layers.causal import Linear
from codec.quantizers.interface import Quantized, Quantizer, QuantizerConfig


@dataclass(frozen=True, kw_only=True)
class SemanticAcousticConfig(QuantizerConfig):
    """`semantic` has one code row; `acoustic` any number. `latent_dim` is the sum of theirs."""

    semantic: QuantizerConfig
    acoustic: QuantizerConfig

    def __post_init__(self) -> None:
        wanted = self.semantic.latent_dim + self.acoustic.latent_dim
        if self.latent_dim != wanted:
            raise ValueError(f"latent_dim={self.latent_dim} must be {wanted}, semantic and acoustic dims together")


@register("semantic_acoustic", SemanticAcousticConfig)
class SemanticAcousticQuantizer(Quantizer):
    """Row 0 quantizes the semantic dims; the rows after it what is left of the acoustic ones.

    From the entry of row 0, s, a linear layer P predicts the acoustic latents, and the acoustic quantizer gets z - P s.
    So rows refine each other, as in a residual quantizer, but what chooses row 0 is an encoder of its own, which need
    not know anything but what is said. Decoded latents are [s | P s + acoustic entries].

    Gradients pass straight through: of frames with row 0 alone to the semantic latents and P, of frames with more to
    the acoustic latents, for there the later rows make up for whatever row 0 is.

    Losses: those of both quantizers, the semantic one's with "semantic_" before their names, and "prediction", the mean
    square of z - P s, which teaches P alone. The stats are those that both quantizers have. `inputs` are [B, D, F], the
    semantic latents and z - P s.

    >>> from codec.quantizers.residual import ResidualVQConfig
    >>> semantic = ResidualVQConfig(latent_dim=4, num_stages=1, codebook_size=32)
    >>> acoustic = ResidualVQConfig(latent_dim=6, num_stages=2, codebook_size=16)
    >>> config = SemanticAcousticConfig(latent_dim=10, semantic=semantic, acoustic=acoustic)
    >>> quantizer = SemanticAcousticQuantizer(config)
    >>> codes = quantizer.encode(torch.randn(1, 10, 5))
    >>> codes.shape, quantizer.codebook_sizes, quantizer.decode(codes[:, :1]).shape
    (torch.Size([1, 3, 5]), (32, 16, 16), torch.Size([1, 10, 5]))
    """

    def __init__(self, config: SemanticAcousticConfig) -> None:
        super().__init__()
        self.config = config
        self.semantic: Quantizer = build(config.semantic)
        self.acoustic: Quantizer = build(config.acoustic)
        if len(self.semantic.codebook_sizes) != 1:
            raise ValueError(f"the semantic quantizer has {len(self.semantic.codebook_sizes)} rows of codes, not 1")
        self.prediction = Linear(config.semantic.latent_dim, config.acoustic.latent_dim, bias=False)
        self.codebook_sizes = self.semantic.codebook_sizes + self.acoustic.codebook_sizes
        self.valid_num_quantizers = (1, *(1 + number for number in self.acoustic.valid_num_quantizers))

    @property
    def is_framewise(self) -> bool:
        return self.semantic.is_framewise and self.acoustic.is_framewise

    def dims_of_stage(self, stage: int) -> slice:
        num_semantic = self.config.semantic.latent_dim
        return slice(0, num_semantic) if stage == 0 else slice(num_semantic, self.config.latent_dim)

    def refinement(self, latents: Tensor) -> Tensor:
        """What decoded latents [B, D, F] have beyond row 0: [B, A, F], z - P s of the entries that they hold."""
        semantic, acoustic = self._split(latents)
        refined: Tensor = acoustic - self._predicted(semantic)
        return refined

    @torch.no_grad()
    def encode(self, latents: Tensor, *, num_quantizers: int | None = None) -> Tensor:
        num_rows = self.check_num_quantizers(num_quantizers)
        semantic, acoustic = self._split(latents)
        codes = self.semantic.encode(semantic)
        if num_rows == 1:
            return codes
        left = acoustic - self._predicted(self.semantic.decode(codes))
        return torch.cat([codes, self.acoustic.encode(left, num_quantizers=num_rows - 1)], dim=1)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        self.check_codes(codes)
        entries = self.semantic.decode(codes[:, :1])
        acoustic = self._predicted(entries)
        if codes.shape[1] > 1:
            acoustic = acoustic + self.acoustic.decode(codes[:, 1:])
        return torch.cat([entries, acoustic], dim=1)

    def forward(
        self, latents: Tensor, mask: Tensor | None = None, *, num_quantizers: int | Tensor | None = None
    ) -> Quantized:
        present_BKF = self.present(latents, mask, num_quantizers)
        semantic_latents, acoustic_latents = self._split(latents)
        with torch.autocast(latents.device.type, enabled=False):
            semantic = self.semantic(semantic_latents, present_BKF[:, 0])
            predicted = self._predicted(semantic.latents)
            has_more_BF = present_BKF[:, 1]
            left = acoustic_latents - predicted.detach()
            num_rows_B = present_BKF[:, 1:].any(2).sum(1).clamp_min(self.acoustic.valid_num_quantizers[0])
            acoustic = self.acoustic(left, has_more_BF, num_quantizers=num_rows_B)
            refined = torch.where(has_more_BF[:, None], predicted.detach() + acoustic.latents, predicted)
            only_P = acoustic_latents.detach() - self._predicted(semantic.latents.detach())
            error = torch.where(present_BKF[:, :1], only_P, 0.0).square()
            num_real = (present_BKF[:, 0].sum() * error.shape[1]).clamp_min(1)
        losses = {f"semantic_{name}": loss for name, loss in semantic.losses.items()}
        return Quantized(
            latents=torch.cat([semantic.latents, refined], dim=1),
            codes=torch.cat([semantic.codes, acoustic.codes], dim=1),
            losses=losses | acoustic.losses | {"prediction": error.sum() / num_real},
            stats={
                name: torch.cat([semantic.stats[name], acoustic.stats[name]])
                for name in semantic.stats
                if name in acoustic.stats
            },
            inputs=torch.cat([semantic.inputs, acoustic.inputs], dim=1),
        )

    def update(self, *quantized: Quantized) -> None:
        parts = [self._split(q.inputs) for q in quantized]
        self.semantic.update(
            *(replace(q, inputs=s, codes=q.codes[:, :1]) for q, (s, _) in zip(quantized, parts, strict=True))
        )
        self.acoustic.update(
            *(replace(q, inputs=a, codes=q.codes[:, 1:]) for q, (_, a) in zip(quantized, parts, strict=True))
        )

    @property
    def num_frames_to_initialize(self) -> int:
        return max(self.semantic.num_frames_to_initialize, self.acoustic.num_frames_to_initialize)

    @torch.no_grad()
    def initialize(self, latents: Tensor, *, seed: int = 0) -> None:
        semantic, acoustic = self._split(latents)
        self.semantic.initialize(semantic, seed=seed)
        entries = self.semantic.decode(self.semantic.encode(semantic))
        # The best P for these frames; what is left is what the acoustic part will have to tell.
        rows, wanted = (part.transpose(1, 2).flatten(0, 1).double() for part in (entries, acoustic))
        ridge = 1e-3 * torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device) * rows.square().mean()
        solved = torch.linalg.solve(rows.T @ rows / len(rows) + ridge, rows.T @ wanted / len(rows))
        self.prediction.weight.copy_(solved.T)
        self.acoustic.initialize(acoustic - self._predicted(entries), seed=seed)

    def training_state(self) -> dict[str, Tensor]:
        parts = {"semantic": self.semantic, "acoustic": self.acoustic}
        return {f"{name}.{key}": value for name, part in parts.items() for key, value in part.training_state().items()}

    def load_training_state(self, state: dict[str, Tensor]) -> None:
        for name, part in (("semantic", self.semantic), ("acoustic", self.acoustic)):
            part.load_training_state(
                {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
            )

    def _split(self, latents: Tensor) -> Any:
        return latents.split([self.config.semantic.latent_dim, self.config.acoustic.latent_dim], dim=1)

    def _predicted(self, entries: Tensor) -> Tensor:
        with torch.autocast(entries.device.type, enabled=False):
            predicted: Tensor = self.prediction(entries.transpose(1, 2)).transpose(1, 2)
        return predicted
