"""Residual and grouped residual vector quantization with codebooks learned by moving averages.

Shapes: B batch, D dims, F frames, N = B * F rows, S stages, G groups, C entries, K = S * G code rows, d = D / G.
Code row k = stage * G + group. A prefix of whole stages is a lower rate of the same model.

Source: SoundStream (Zeghidour et al. 2021) sections III.C-D for the residual chain, moving averages and quantizer
dropout; HiFi-Codec (Yang et al. 2023) section 2.2 for groups; VQ-VAE (van den Oord et al. 2017) appendix A.1 for the
moving averages. Unlike common implementations of these, here k-means initialisation survives the first update (sums
hold mean * count), a restarted code stays restarted (sums and counts move with it), "dead" is relative to uniform use
(no dependence on batch size), and the residual chain is detached, so every stage's commitment reaches the encoder.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed
from torch import Tensor

from codec.config import register
from codec.kernels.residual_search import rvq_decode, rvq_search, score_offsets
from codec.quantizers.interface import Quantized, Quantizer, usage


@dataclass(frozen=True, kw_only=True)
class ResidualVQConfig:
    """`num_stages` stages of `num_groups` codebooks with `codebook_size` entries over `latent_dim` dimensions.

    `ema_decay` is the moving average's memory per update; a code used less than `dead_threshold` times the uniform
    share is restarted from a latent of the current batch.
    """

    latent_dim: int
    num_stages: int
    num_groups: int = 1
    codebook_size: int = 1024
    ema_decay: float = 0.99
    dead_threshold: float = 0.1

    def __post_init__(self) -> None:
        if min(self.latent_dim, self.num_stages, self.num_groups, self.codebook_size) < 1:
            raise ValueError("latent_dim, num_stages, num_groups and codebook_size must be positive")
        if self.latent_dim % self.num_groups:
            raise ValueError(f"latent_dim={self.latent_dim} is not a multiple of num_groups={self.num_groups}")
        if not 0.0 < self.ema_decay < 1.0 or not 0.0 <= self.dead_threshold < 1.0:
            raise ValueError("ema_decay must lie in (0, 1) and dead_threshold in [0, 1)")


@register("residual_vq", ResidualVQConfig)
class ResidualVQ(Quantizer):
    """Residual VQ (`num_groups=1`) and grouped residual VQ.

    The state dict holds the codebooks only; the moving averages are training state (`training_state`), and where they
    are not restored they start as if every entry had been used alike.

    >>> import torch
    >>> quantizer = ResidualVQ(ResidualVQConfig(latent_dim=8, num_stages=2, codebook_size=16))
    >>> codes = quantizer.encode(torch.randn(1, 8, 5))
    >>> codes.shape, quantizer.decode(codes[:, :1]).shape
    (torch.Size([1, 2, 5]), torch.Size([1, 8, 5]))
    """

    codebooks: Tensor

    def __init__(self, config: ResidualVQConfig) -> None:
        super().__init__()
        self.config = config
        num_codebooks = config.num_stages * config.num_groups
        dim = config.latent_dim // config.num_groups
        self.codebook_sizes = (config.codebook_size,) * num_codebooks
        self.valid_num_quantizers = tuple(range(config.num_groups, num_codebooks + 1, config.num_groups))
        self.register_buffer("codebooks", torch.randn(num_codebooks, config.codebook_size, dim))
        self._averages_KC_KCd: tuple[Tensor, Tensor] | None = None
        self._num_updates = 0
        self._offsets: tuple[object, Tensor] | None = None

    def _score_offsets(self) -> Tensor:
        """`score_offsets` of the codebooks as they are now, kept until they are written to or moved."""
        key = (self.codebooks.data_ptr(), None if self.codebooks.is_inference() else self.codebooks._version)
        if self._offsets is None or self._offsets[0] != key:
            self._offsets = (key, score_offsets(self.codebooks))
        return self._offsets[1]

    def encode(self, latents: Tensor, *, num_quantizers: int | None = None) -> Tensor:
        num_rows = self.check_num_quantizers(num_quantizers)
        batch_size, num_dims, num_frames = latents.shape
        rows_ND = latents.transpose(1, 2).reshape(-1, num_dims)
        offsets_KC = self._score_offsets()[:num_rows]
        codes_NK = rvq_search(rows_ND, self.codebooks[:num_rows], offsets_KC, num_groups=self.config.num_groups)
        return codes_NK.view(batch_size, num_frames, num_rows).transpose(1, 2)

    def decode(self, codes: Tensor) -> Tensor:
        self.check_num_quantizers(codes.shape[1])
        if codes.numel() and not (codes.min() >= -1 and codes.max() < self.config.codebook_size):
            raise ValueError(f"codes must lie in -1..{self.config.codebook_size - 1}, got {codes.min()}..{codes.max()}")
        batch_size, num_rows, num_frames = codes.shape
        codes_NK = codes.transpose(1, 2).reshape(-1, num_rows)
        latents_ND = rvq_decode(codes_NK, self.codebooks, num_groups=self.config.num_groups)
        return latents_ND.view(batch_size, num_frames, self.config.latent_dim).transpose(1, 2)

    def forward(
        self, latents: Tensor, mask: Tensor | None = None, *, num_quantizers: int | Tensor | None = None
    ) -> Quantized:
        batch_size, num_dims, num_frames = latents.shape
        groups, num_codebooks = self.config.num_groups, len(self.codebook_sizes)
        rows_ND = latents.float().transpose(1, 2).reshape(-1, num_dims)
        if isinstance(num_quantizers, Tensor):
            if not set(num_quantizers.tolist()) <= set(self.valid_num_quantizers):
                raise ValueError(
                    f"num_quantizers={num_quantizers.tolist()}: each must be one of {self.valid_num_quantizers}"
                )
            per_item = num_quantizers.to(latents.device)
        else:
            per_item = torch.full((batch_size,), self.check_num_quantizers(num_quantizers), device=latents.device)
        present_NK = (
            torch.arange(num_codebooks, device=latents.device) < per_item.repeat_interleave(num_frames)[:, None]
        )
        if mask is not None:
            present_NK = present_NK & mask.reshape(-1, 1)
        codes_NK = rvq_search(rows_ND, self.codebooks, num_groups=groups)
        codes_NK = torch.where(present_NK, codes_NK, -1)

        # The chain is detached: stage s sees the latents minus constants, so its commitment reaches the encoder.
        residuals_Nd = list(rows_ND.view(-1, groups, num_dims // groups).unbind(1))
        commitment = rows_ND.new_zeros(())
        for row in range(num_codebooks):
            entries_Nd = self.codebooks[row, codes_NK[:, row].clamp_min(0)]
            entries_Nd = torch.where(present_NK[:, row, None], entries_Nd, 0.0)
            residuals_Nd[row % groups] = residuals_Nd[row % groups] - entries_Nd
            weight_N = present_NK[:, row].float()
            error = residuals_Nd[row % groups].square().mean(-1)
            commitment = commitment + (error * weight_N).sum() / weight_N.sum().clamp_min(1.0)
        commitment = commitment / num_codebooks

        quantized_ND = rvq_decode(codes_NK, self.codebooks, num_groups=groups)
        rows_ND = rows_ND + (quantized_ND - rows_ND).detach()
        return Quantized(
            latents=rows_ND.view(batch_size, num_frames, num_dims).transpose(1, 2),
            codes=codes_NK.view(batch_size, num_frames, num_codebooks).transpose(1, 2),
            losses={"commitment": commitment},
            stats=usage(codes_NK, self.config.codebook_size),
            inputs=latents.detach().float(),
        )

    @torch.no_grad()
    def update(self, *quantized: Quantized) -> None:
        """Move the codebooks towards what was assigned to them; restart dead codes. All-reduced under DDP.

        A quantizer that was not initialised learns from its random entries on; call `initialize` first.
        """
        config, groups = self.config, self.config.num_groups
        rows_ND = torch.cat([q.inputs.transpose(1, 2).reshape(-1, config.latent_dim) for q in quantized])
        codes_NK = torch.cat([q.codes.transpose(1, 2).reshape(-1, len(self.codebook_sizes)) for q in quantized])
        residual_NGd = rows_ND.view(-1, groups, config.latent_dim // groups).clone()
        generator = torch.Generator(rows_ND.device).manual_seed(self._num_updates)
        self._num_updates += 1
        for row in range(codes_NK.shape[1]):
            present_N = codes_NK[:, row] >= 0
            codes_n = codes_NK[present_N, row]
            inputs_nd = residual_NGd[present_N, row % groups]
            counts_C = torch.bincount(codes_n, minlength=config.codebook_size).to(inputs_nd.dtype)
            sums_Cd = torch.zeros_like(self.codebooks[row]).index_add_(0, codes_n, inputs_nd)
            counts_C, sums_Cd = _all_reduce(counts_C), _all_reduce(sums_Cd)
            candidates_Cd, is_drawn_C = _draw_inputs(inputs_nd, config.codebook_size, generator)
            residual_NGd[present_N, row % groups] -= self.codebooks[row, codes_n]
            if counts_C.sum() > 0:
                self._move(row, counts_C, sums_Cd, candidates_Cd, is_drawn_C)

    def _move(self, row: int, counts_C: Tensor, sums_Cd: Tensor, candidates_Cd: Tensor, is_drawn_C: Tensor) -> None:
        mean_C, total_Cd = (average[row] for average in self._averages())
        mean_C.lerp_(counts_C, 1.0 - self.config.ema_decay)
        total_Cd.lerp_(sums_Cd, 1.0 - self.config.ema_decay)
        uniform = mean_C.mean()
        dead_C = (mean_C < self.config.dead_threshold * uniform) & is_drawn_C
        # Sums and counts move with the entry, or the next update would undo the restart.
        total_Cd.copy_(torch.where(dead_C[:, None], candidates_Cd * uniform, total_Cd))
        mean_C.copy_(torch.where(dead_C, uniform, mean_C))
        self.codebooks[row] = total_Cd / mean_C.clamp_min(1e-5)[:, None]

    @property
    def num_frames_to_initialize(self) -> int:
        return 16 * self.config.codebook_size

    @torch.no_grad()
    def initialize(self, latents: Tensor, *, num_iterations: int = 10, seed: int = 0) -> None:
        """Set the codebooks by k-means, stage after stage."""
        rows_ND = latents.detach().float().transpose(1, 2).reshape(-1, self.config.latent_dim)
        if rows_ND.shape[0] < self.config.codebook_size:
            raise ValueError(f"{rows_ND.shape[0]} frames are too few to initialise {self.config.codebook_size} entries")
        groups = self.config.num_groups
        residual_NGd = rows_ND.view(-1, groups, self.config.latent_dim // groups).clone()
        generator = torch.Generator(rows_ND.device).manual_seed(seed)
        mean_KC, total_KCd = self._averages()
        for row in range(len(self.codebook_sizes)):
            points_Nd = residual_NGd[:, row % groups]
            entries_Cd, counts_C = _k_means(points_Nd, self.config.codebook_size, num_iterations, generator)
            _broadcast(entries_Cd)
            _broadcast(counts_C)
            self.codebooks[row] = entries_Cd
            # The average holds counts per update; k-means saw all at once. Any scale works while sums match. An entry
            # without points keeps a trace of weight, and so its place until it is restarted.
            mean_KC[row] = counts_C.clamp_min(0.01)
            total_KCd[row] = entries_Cd * mean_KC[row, :, None]
            codes_N = rvq_search(points_Nd, entries_Cd[None])[:, 0]
            residual_NGd[:, row % groups] -= entries_Cd[codes_N]

    def training_state(self) -> dict[str, Tensor]:
        mean_KC, total_KCd = self._averages()
        return {"counts": mean_KC, "sums": total_KCd, "num_updates": torch.tensor(self._num_updates)}

    def load_training_state(self, state: dict[str, Tensor]) -> None:
        self._averages_KC_KCd = (state["counts"].to(self.codebooks), state["sums"].to(self.codebooks))
        self._num_updates = int(state["num_updates"])

    def _averages(self) -> tuple[Tensor, Tensor]:
        """Moving averages of how often an entry was used [K, C] and of the sum of what it was used for [K, C, d]."""
        if self._averages_KC_KCd is None:
            self._averages_KC_KCd = (torch.ones_like(self.codebooks[:, :, 0]), self.codebooks.clone())
        mean_KC, total_KCd = (average.to(self.codebooks.device) for average in self._averages_KC_KCd)
        self._averages_KC_KCd = (mean_KC, total_KCd)
        return self._averages_KC_KCd


def _k_means(
    points_Nd: Tensor, num_entries: int, num_iterations: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Entries [C, d] and how many points each has [C]; an entry that loses all points keeps its place."""
    chosen = torch.randperm(points_Nd.shape[0], generator=generator, device=points_Nd.device)[:num_entries]
    entries_Cd = points_Nd[chosen].clone()
    counts_C = points_Nd.new_ones(num_entries)
    for _ in range(num_iterations):
        codes_N = rvq_search(points_Nd, entries_Cd[None])[:, 0]
        counts_C = torch.bincount(codes_N, minlength=num_entries).to(points_Nd.dtype)
        sums_Cd = torch.zeros_like(entries_Cd).index_add_(0, codes_N, points_Nd)
        entries_Cd = torch.where(counts_C[:, None] > 0, sums_Cd / counts_C.clamp_min(1.0)[:, None], entries_Cd)
    return entries_Cd, counts_C


def _draw_inputs(inputs_nd: Tensor, num_entries: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One random input per entry [C, d], the same on every process, and which entries got one [C].

    Each process draws for its share of the entries; one that has no inputs in this batch leaves its share undrawn.
    """
    rank, num_ranks = 0, 1
    if _is_distributed():
        rank, num_ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    drawn_Cd = inputs_nd.new_zeros(num_entries, inputs_nd.shape[1])
    is_drawn_C = torch.zeros(num_entries, device=inputs_nd.device)
    if inputs_nd.shape[0]:
        chosen_C = torch.randint(inputs_nd.shape[0], (num_entries,), generator=generator, device=inputs_nd.device)
        drawn_Cd[rank::num_ranks] = inputs_nd[chosen_C[rank::num_ranks]]
        is_drawn_C[rank::num_ranks] = 1.0
    return _all_reduce(drawn_Cd), _all_reduce(is_drawn_C) > 0


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _all_reduce(values: Tensor) -> Tensor:
    if _is_distributed():
        torch.distributed.all_reduce(values)
    return values


def _broadcast(values: Tensor) -> Tensor:
    if _is_distributed():
        torch.distributed.broadcast(values, src=0)
    return values
