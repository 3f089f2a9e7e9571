"""What every quantizer offers, and what it returns in training."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class QuantizerConfig:
    """What all quantizers' configurations have: latents of `latent_dim` dims. A model takes any of them."""

    latent_dim: int


@dataclass(frozen=True)
class Quantized:
    """The result of `Quantizer.forward`.

    latents: [B, D, F], quantized; the gradient reaches the input by the straight-through estimator.
    codes: int64 [B, K, F]; -1 where a stage was left out or a frame is masked.
    losses: scalars, unweighted: the recipe weighs them.
    stats: detached, each [K]; `perplexity` and `dead_fraction`, and what else a quantizer can tell.
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

    def dims_of_stage(self, stage: int) -> slice:
        """Which dims of the latents a stage is about; here all of them."""
        return slice(None)

    def through_stage(self, latents: Tensor, codes: Tensor, stage: int) -> Tensor:
        """What one stage adds for `codes` [B, K, F] of these latents [B, D, F]: [B, D, F].

        The gradient goes straight to the latents, where the stage has no projections of its own to pass.
        """
        rows = (0, *self.valid_num_quantizers)[stage : stage + 2]
        with torch.no_grad():
            entries = self.decode(codes[:, : rows[1]])
            if rows[0]:
                entries = entries - self.decode(codes[:, : rows[0]])
        return latents + (entries - latents).detach()

    @property
    def is_framewise(self) -> bool:
        """Whether the codes of a frame depend on its own latents alone; if not, no stream gives those of the file."""
        return True

    def check_framewise(self) -> None:
        """ValueError where `is_framewise` is false, for a model that streams."""
        if not self.is_framewise:
            raise ValueError(
                f"a model that streams needs a quantizer whose codes depend on one frame alone, and those of this "
                f"{type(self).__name__} depend on others, too"
            )

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

    def check_codes(self, codes: Tensor) -> None:
        """ValueError where codes [B, K', F] are no valid prefix, or one is neither -1 nor an entry of its codebook."""
        self.check_num_quantizers(codes.shape[1])
        if codes.is_cuda and torch.cuda.is_current_stream_capturing():
            return  # a CUDA graph cannot look at values; who replays it must have
        sizes_K = torch.tensor(self.codebook_sizes[: codes.shape[1]], device=codes.device)
        if codes.numel() and not ((codes >= -1) & (codes < sizes_K[:, None])).all():
            raise ValueError(f"codes must lie in -1..{int(sizes_K.max()) - 1}, got {codes.min()}..{codes.max()}")

    def present(self, latents: Tensor, mask: Tensor | None, num_quantizers: int | Tensor | None) -> Tensor:
        """Which code rows quantize which frames of latents [B, D, F], by what `forward` is given: bool [B, K, F]."""
        num_rows = len(self.codebook_sizes)
        if isinstance(num_quantizers, Tensor):
            given = num_quantizers.tolist()
            if not set(given) <= set(self.valid_num_quantizers):
                raise ValueError(f"num_quantizers={given}: each must be one of {self.valid_num_quantizers}")
            per_item = num_quantizers.to(latents.device)
        else:
            per_item = torch.full((len(latents),), self.check_num_quantizers(num_quantizers), device=latents.device)
        present_BK = torch.arange(num_rows, device=latents.device) < per_item[:, None]
        present_BKF = present_BK[:, :, None].expand(-1, -1, latents.shape[2])
        return present_BKF if mask is None else present_BKF & mask[:, None]


def stage_gradient_norms(quantizer: Quantizer, latents: Tensor) -> Tensor:
    """By how much each stage's commitment pulls at the encoder: one norm [S] for each of `valid_num_quantizers`.

    Measured: the norm of the difference between the gradients, with respect to the latents [B, D, F], of the losses
    "commitment" of one prefix and of the next longer one. A zero means that a stage does not teach the encoder, as with
    a residual chain that is not detached. One forward and backward per prefix: for tests, and now and then in a run.
    ValueError for a quantizer without that loss.
    """
    norms, before = [], torch.zeros_like(latents)
    with torch.enable_grad():
        leaf = latents.detach().requires_grad_()
        for num_quantizers in quantizer.valid_num_quantizers:
            losses = quantizer(leaf, num_quantizers=num_quantizers).losses
            if "commitment" not in losses:
                raise ValueError(f"{type(quantizer).__name__} has no commitment loss")
            (gradient,) = torch.autograd.grad(losses["commitment"], leaf)
            norms.append((gradient - before).norm())
            before = gradient
    return torch.stack(norms)


def usage(codes_NK: Tensor, codebook_size: int) -> dict[str, Tensor]:
    """The `stats` of a `Quantized` from codes [N, K]; -1 marks an absent stage."""
    num_rows = codes_NK.shape[1]
    numbered_NK = codes_NK + codebook_size * torch.arange(num_rows, device=codes_NK.device)
    counts_KC = torch.bincount(numbered_NK[codes_NK >= 0], minlength=num_rows * codebook_size)
    counts_KC = counts_KC.view(num_rows, codebook_size).float()
    share_KC = counts_KC / counts_KC.sum(1, keepdim=True).clamp_min(1.0)
    return {
        "perplexity": torch.exp(-(share_KC * share_KC.clamp_min(1e-12).log()).sum(1)),
        "dead_fraction": (counts_KC == 0).float().mean(1),
    }
