"""What every quantizer offers, and what it returns in training."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Quantized:
    """The result of `Quantizer.forward`.

    latents: [B, D, F], quantized; the gradient reaches the input by the straight-through estimator.
    codes: int64 [B, K, F]; -1 where a stage was left out or a frame is masked.
    losses: scalars, unweighted: the recipe weighs them.
    stats: detached; `perplexity` [K] and `dead_fraction` [K].
    inputs: [B, D, F], detached; what `update` learns from.
    """

    latents: Tensor
    codes: Tensor
    losses: dict[str, Tensor]
    stats: dict[str, Tensor]
    inputs: Tensor


class Quantizer(nn.Module, ABC):
    """Turns latents [B, D, F] into codes [B, K, F] and back; `forward` is for training and is pure."""

    codebook_sizes: tuple[int, ...]
    valid_num_quantizers: tuple[int, ...]

    @property
    def device(self) -> torch.device:
        """Where the codebooks lie."""
        return next(chain(self.buffers(), self.parameters())).device

    @abstractmethod
    def forward(
        self, latents: Tensor, mask: Tensor | None = None, *, num_quantizers: int | Tensor | None = None
    ) -> Quantized:
        """Quantize for training. `mask` [B, F] is true on real frames; `num_quantizers` may differ per item [B]."""

    @abstractmethod
    def update(self, *quantized: Quantized) -> None:
        """Learn what is not learned by gradient, once per optimizer step, from the forwards since the last one."""

    @abstractmethod
    def encode(self, latents: Tensor, *, num_quantizers: int | None = None) -> Tensor:
        """[B, D, F] -> codes int64 [B, K, F]."""

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor:
        """Codes [B, K', F] of any valid prefix -> latents [B, D, F]; -1 marks an absent stage."""

    @property
    def num_frames_to_initialize(self) -> int:
        """How many frames of latents `initialize` should be given; 0 where learning starts from random values."""
        return 0

    def initialize(self, latents: Tensor, *, seed: int = 0) -> None:
        """Set codebooks from representative latents [B, D, F] before training; ValueError for too few frames.

        Nothing where learning starts from random values.
        """

    def training_state(self) -> dict[str, Tensor]:
        """What training keeps beside the state dict, such as moving averages, for a checkpoint that it resumes from."""
        return {}

    def load_training_state(self, state: dict[str, Tensor]) -> None:
        """Restore what `training_state` returned."""
        if state:
            raise ValueError(f"{type(self).__name__} keeps no training state, got {sorted(state)}")

    def check_num_quantizers(self, num_quantizers: int | None) -> int:
        """The number of code rows that is meant; ValueError where it is no valid prefix."""
        if num_quantizers is None:
            return self.valid_num_quantizers[-1]
        if num_quantizers not in self.valid_num_quantizers:
            raise ValueError(f"num_quantizers={num_quantizers} is not one of {self.valid_num_quantizers}")
        return num_quantizers


def draw_num_quantizers(
    valid_num_quantizers: tuple[int, ...], batch_size: int, *, full_fraction: float, generator: torch.Generator
) -> Tensor:
    """Quantizer dropout: per item a prefix length [B], all stages with probability `full_fraction`, else uniform."""
    valid = torch.tensor(valid_num_quantizers)
    drawn = valid[torch.randint(len(valid), (batch_size,), generator=generator)]
    full = torch.rand(batch_size, generator=generator) < full_fraction
    return torch.where(full, valid[-1], drawn)


def usage(codes_NK: Tensor, codebook_size: int) -> dict[str, Tensor]:
    """The `stats` of a `Quantized` from codes [N, K]; -1 marks an absent stage."""
    perplexity, dead_fraction = [], []
    for codes_N in codes_NK.unbind(1):
        counts_C = torch.bincount(codes_N[codes_N >= 0], minlength=codebook_size).float()
        share_C = counts_C / counts_C.sum().clamp_min(1.0)
        perplexity.append(torch.exp(-(share_C * share_C.clamp_min(1e-12).log()).sum()))
        dead_fraction.append((counts_C == 0).float().mean())
    return {"perplexity": torch.stack(perplexity), "dead_fraction": torch.stack(dead_fraction)}
