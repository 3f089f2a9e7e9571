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

    def check_num_quantizers(self, num_quantizers: int | None) -> int:
        """The number of code rows that is meant; ValueError where it is no valid prefix."""
        if num_quantizers is None:
            return self.valid_num_quantizers[-1]
        if num_quantizers not in self.valid_num_quantizers:
            raise ValueError(f"num_quantizers={num_quantizers} is not one of {self.valid_num_quantizers}")
        return num_quantizers
