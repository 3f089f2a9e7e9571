"""Residual and grouped residual vector quantization, with codebooks learned by moving averages or by gradient.

Shapes: B batch, D dims, F frames, N = B * F rows, S stages, G groups, C entries, K = S * G code rows, d = D / G.
Code row k = stage * G + group. A prefix of whole stages is a lower rate of the same model.

Source: SoundStream (Zeghidour et al. 2021) sections III.C-D for the residual chain, moving averages and quantizer
dropout; HiFi-Codec (Yang et al. 2023) section 2.2 for groups, and as published,
https://github.com/yangdongchao/AcademiCodec, for learning by gradient; VQ-VAE (van den Oord et al. 2017) section 3.2
for the losses and appendix A.1 for the moving averages. `codec.quantizers.transport` names those of balanced assignment
and of the loss "transport". Unlike common implementations of these, here k-means initialisation survives the first
update (sums hold mean * count), a restarted code stays restarted (sums and counts move with it), "dead" is relative to
uniform use (no dependence on batch size), the residual chain is detached, so every stage's commitment reaches the
encoder, and several processes learn what one would learn from all their batches.
`recipes/published_bugs.py` has the other behaviour, to measure what it costs.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn

from codec.config import register
from codec.kernels.kept import Kept
from codec.kernels.residual_search import SearchTables, rvq_decode, rvq_search
from codec.kernels.statistics import sums_by_code
from codec.quantizers.gradients import GRADIENTS, check_gradient
from codec.quantizers.interface import Quantized, Quantizer, QuantizerConfig, usage
from codec.quantizers.transport import LEAST_EPSILON, balanced_codes, transport_loss

LEARNING = ("ema", "gradient")
ASSIGNMENTS = ("nearest", "balanced")
TRANSPORTS = (None, "uniform", "learned")


@dataclass(frozen=True, kw_only=True)
class ResidualVQConfig(QuantizerConfig):
    """`num_stages` stages of `num_groups` codebooks with `codebook_size` entries over `latent_dim` dimensions.

    `learning`: "ema" by moving averages, in `Quantizer.update`; or "gradient", from the loss "codebook", the codebooks
    being parameters of the optimizer. It does not change what a file of weights holds.

    With "ema", `ema_decay` is the moving average's memory per update, and a code used less than `dead_threshold` times
    the uniform share is restarted from a latent of the current batch.

    `assignment`: how `forward` chooses entries, "nearest"; or "balanced", so that all entries of a codebook get about
    equally many of the frames in a batch, which should be far more than entries. `encode` takes the nearest one always.

    `transport`: with learning="gradient", a loss of that name, the cost of transporting a batch to the whole codebook:
    None, or with entries' shares that are "uniform" or "learned".

    `gradient`: how the decoder's gradient passes the choice of entries, "straight_through" or "rotation".

    `sinkhorn_epsilon` (how soft plans are) and `num_sinkhorn_iterations` belong to both: `codec.quantizers.transport`.
    """

    num_stages: int
    num_groups: int = 1
    codebook_size: int = 1024
    learning: str = "ema"
    ema_decay: float = 0.99
    dead_threshold: float = 0.1
    assignment: str = "nearest"
    transport: str | None = None
    gradient: str = "straight_through"
    sinkhorn_epsilon: float = 0.01
    num_sinkhorn_iterations: int = 10

    def __post_init__(self) -> None:
        if min(self.latent_dim, self.num_stages, self.num_groups, self.codebook_size) < 1:
            raise ValueError("latent_dim, num_stages, num_groups and codebook_size must be positive")
        if self.latent_dim % self.num_groups:
            raise ValueError(f"latent_dim={self.latent_dim} is not a multiple of num_groups={self.num_groups}")
        if not 0.0 < self.ema_decay < 1.0 or not 0.0 <= self.dead_threshold < 1.0:
            raise ValueError("ema_decay must lie in (0, 1) and dead_threshold in [0, 1)")
        if self.learning not in LEARNING:
            raise ValueError(f"learning={self.learning!r} is not one of {LEARNING}")
        if self.learning == "gradient" and (self.ema_decay, self.dead_threshold) != (0.99, 0.1):
            raise ValueError("ema_decay and dead_threshold have no meaning with learning='gradient': leave them out")
        check_gradient(self.gradient)
        if self.assignment not in ASSIGNMENTS:
            raise ValueError(f"assignment={self.assignment!r} is not one of {ASSIGNMENTS}")
        if self.transport not in TRANSPORTS:
            raise ValueError(f"transport={self.transport!r} is not one of {TRANSPORTS}")
        if self.transport and self.learning != "gradient":
            raise ValueError(f"transport={self.transport!r} needs learning='gradient': moving averages hear no loss")
        if self.sinkhorn_epsilon < LEAST_EPSILON or self.num_sinkhorn_iterations < 1:
            raise ValueError(f"sinkhorn_epsilon must be at least {LEAST_EPSILON}, and num_sinkhorn_iterations positive")
        if not self.uses_plans and (self.sinkhorn_epsilon, self.num_sinkhorn_iterations) != (0.01, 10):
            raise ValueError("sinkhorn_epsilon and num_sinkhorn_iterations need assignment='balanced' or a transport")

    @property
    def uses_plans(self) -> bool:
        """Whether `forward` plans over the batches of all processes."""
        return self.assignment == "balanced" or self.transport is not None


@register("residual_vq", ResidualVQConfig)
class ResidualVQ(Quantizer):
    """Residual VQ (`num_groups=1`) and grouped residual VQ.

    The state dict holds the codebooks, and with transport="learned" also `share_logits` [K, C]; the moving averages are
    training state (`training_state`), and where they are not restored they start as if every entry had been used alike.

    `forward` gives the loss "commitment", which draws the latents to the entries, and, where these are learned by
    gradient, "codebook", which draws the entries to the latents: its gradient is zero for all entries but the chosen
    ones. Both are the mean over code rows of the mean square of what a stage leaves over.

    With balanced assignment (Zhan et al. 2022, published weight of "commitment" unknown) no entry is left behind, but
    what is chosen in training is not always what `encode` chooses, and the stages after it learn from that.

    With transport, "transport" is the mean over rows of the entropic cost of bringing what a row sees to its entries:
    it draws every entry to latents that are not served well, and latents to entries. "share_divergence", where shares
    are learned, is the mean Kullback-Leibler divergence of them from uniform ones. Published (Vuong et al. 2023) are
    weights of 1e-3, for squared distances that are sums over dims and not means, and 1; here a weight of 1 was better
    than 0.1. There transport is exact and apart for every place in an image; here it is entropic, over all frames of a
    batch, and every stage has its own.

    Either plans over the batches of all processes together, so these must run `forward` alike.

    The stats, per code row:

    - `perplexity` and `dead_fraction` as everywhere;
    - `commitment`: the mean square of what is left after this row, over the frames that have it;
    - `gradient_norm`: the norm of the gradient of the loss "commitment" with respect to the latents, as far as this row
      makes it, by its formula and not by differentiation: `stage_gradient_norms` measures;
    - `norm_ratio`: the root mean square of the chosen entries over that of what they are chosen for. Far below 1 from
      the first row on: the codebook has lost the scale of the latents.

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
        if config.learning == "gradient":
            bound = 1.0 / config.codebook_size
            self.codebooks = nn.Parameter(torch.empty(num_codebooks, config.codebook_size, dim).uniform_(-bound, bound))
        else:
            self.register_buffer("codebooks", torch.randn(num_codebooks, config.codebook_size, dim))
        if config.transport == "learned":
            self.share_logits = nn.Parameter(torch.zeros(num_codebooks, config.codebook_size))
        self._averages_KC_KCd: tuple[Tensor, Tensor] | None = None
        self._num_updates = 0
        self._kept_tables: Kept[SearchTables] = Kept()

    def _tables(self) -> SearchTables:
        make = functools.partial(SearchTables, self.codebooks, num_groups=self.config.num_groups)
        return self._kept_tables.get([self.codebooks], make)

    def encode(self, latents: Tensor, *, num_quantizers: int | None = None) -> Tensor:
        num_rows = self.check_num_quantizers(num_quantizers)
        batch_size, num_dims, num_frames = latents.shape
        rows_ND = latents.transpose(1, 2).reshape(-1, num_dims)
        codes_NK = rvq_search(rows_ND, self._tables(), num_rows=num_rows)
        return codes_NK.view(batch_size, num_frames, num_rows).transpose(1, 2)

    def decode(self, codes: Tensor) -> Tensor:
        self.check_codes(codes)
        batch_size, num_rows, num_frames = codes.shape
        codes_NK = codes.transpose(1, 2).reshape(-1, num_rows)
        latents_ND = rvq_decode(codes_NK, self.codebooks.detach(), num_groups=self.config.num_groups)
        return latents_ND.view(batch_size, num_frames, self.config.latent_dim).transpose(1, 2)

    def forward(
        self, latents: Tensor, mask: Tensor | None = None, *, num_quantizers: int | Tensor | None = None
    ) -> Quantized:
        batch_size, num_dims, num_frames = latents.shape
        groups, num_codebooks = self.config.num_groups, len(self.codebook_sizes)
        rows_ND = latents.float().transpose(1, 2).reshape(-1, num_dims)
        present_BKF = self.present(latents, mask, num_quantizers)
        if isinstance(num_quantizers, Tensor):
            num_rows = int(num_quantizers.max())
        else:
            num_rows = self.check_num_quantizers(num_quantizers)
        if self.config.uses_plans and _is_distributed():  # the other processes wait for this one in each row they have
            longest = torch.tensor(num_rows, device=latents.device)
            torch.distributed.all_reduce(longest, torch.distributed.ReduceOp.MAX)
            num_rows = int(longest)
        present_NK = present_BKF[:, :num_rows].transpose(1, 2).reshape(-1, num_rows)
        if mask is not None:
            rows_ND = torch.where(mask.reshape(-1, 1), rows_ND, 0.0)  # what stands elsewhere must not spread, be it NaN
        if self.config.assignment == "balanced":
            codes_NK = self._balanced_codes(rows_ND, present_NK)
        else:
            codes_NK = rvq_search(rows_ND, self._tables(), num_rows=num_rows).masked_fill(~present_NK, -1)

        # The chain is detached: stage s sees the latents minus constants, so its commitment reaches the encoder.
        residuals_Nd = list(rows_ND.view(-1, groups, num_dims // groups).unbind(1))
        tables_Cd = self.codebooks.unbind(0)
        left_over_N = [_mean_square(part_Nd) for part_Nd in residuals_Nd]  # before the first stage, then after each row
        entries_power_N, codebook_errors_N, transports = [], [], []
        for row in range(num_rows):
            entries_Nd = F.embedding(codes_NK[:, row].clamp_min(0), tables_Cd[row])
            if self.config.learning == "gradient":
                codebook_errors_N.append(_mean_square(entries_Nd - residuals_Nd[row % groups].detach()))
            if self.config.transport:
                transports.append(self._transport(residuals_Nd[row % groups][present_NK[:, row]], tables_Cd[row], row))
            entries_Nd = entries_Nd.detach()
            entries_power_N.append(_mean_square(entries_Nd))
            residuals_Nd[row % groups] = residuals_Nd[row % groups] - entries_Nd
            left_over_N.append(_mean_square(residuals_Nd[row % groups]))
        counts_K = present_NK.sum(0).clamp_min(1)

        def means_K(values_N: list[Tensor]) -> Tensor:
            mean_K = (torch.stack(values_N, dim=1) * present_NK).sum(0) / counts_K
            return F.pad(mean_K, (0, num_codebooks - num_rows))

        commitment_K = means_K(left_over_N[groups:])
        losses = {"commitment": commitment_K.mean()}
        if codebook_errors_N:
            losses["codebook"] = means_K(codebook_errors_N).mean()
        if transports:
            losses["transport"] = torch.stack(transports).sum() / num_codebooks
        if self.config.transport == "learned":
            log_shares_KC = self.share_logits.log_softmax(1)
            divergences_K = (log_shares_KC.exp() * log_shares_KC).sum(1) + math.log(self.config.codebook_size)
            losses["share_divergence"] = divergences_K.mean()
        codes_NK = F.pad(codes_NK, (0, num_codebooks - num_rows), value=-1)
        stats = usage(codes_NK, self.config.codebook_size)
        stats["commitment"] = commitment_K.detach()
        # The derivative of mean(r^2) / K over n rows of d dims is 2 r / (n d K).
        num_values_K = F.pad(counts_K, (0, num_codebooks - num_rows), value=1) * (num_dims // groups)
        stats["gradient_norm"] = 2.0 / num_codebooks * (stats["commitment"] / num_values_K).sqrt()
        power_K = means_K(left_over_N[:-groups]).detach()
        stats["norm_ratio"] = (means_K(entries_power_N) / power_K.clamp_min(1e-20)).sqrt()

        quantized_ND = rvq_decode(codes_NK[:, :num_rows], self.codebooks.detach(), num_groups=groups)
        passed_ND = GRADIENTS[self.config.gradient](rows_ND, quantized_ND)
        return Quantized(
            latents=passed_ND.view(batch_size, num_frames, num_dims).transpose(1, 2),
            codes=codes_NK.view(batch_size, num_frames, num_codebooks).transpose(1, 2),
            losses=losses,
            stats=stats,
            inputs=latents.detach().float(),
        )

    @torch.no_grad()
    def _balanced_codes(self, rows_ND: Tensor, present_NK: Tensor) -> Tensor:
        """Codes [N, K'] of the rows that are present, -1 elsewhere: in each row, all entries about equally often."""
        groups = self.config.num_groups
        residual_NGd = rows_ND.view(-1, groups, rows_ND.shape[1] // groups).clone()
        codes_NK = present_NK.long() - 1
        for row, is_present_N in enumerate(present_NK.unbind(1)):
            codes_n = balanced_codes(
                residual_NGd[is_present_N, row % groups],
                self.codebooks[row],
                epsilon=self.config.sinkhorn_epsilon,
                num_iterations=self.config.num_sinkhorn_iterations,
            )
            codes_NK[is_present_N, row] = codes_n
            residual_NGd[is_present_N, row % groups] -= self.codebooks[row, codes_n]
        return codes_NK

    def _transport(self, inputs_nd: Tensor, entries_Cd: Tensor, row: int) -> Tensor:
        """The cost of transporting what a code row sees to its entries."""
        if self.config.transport == "learned":
            shares_C = self.share_logits[row].softmax(0)
        else:
            shares_C = self.codebooks.new_full((self.config.codebook_size,), 1.0 / self.config.codebook_size)
        return transport_loss(
            inputs_nd,
            entries_Cd,
            shares_C,
            epsilon=self.config.sinkhorn_epsilon,
            num_iterations=self.config.num_sinkhorn_iterations,
        )

    @torch.no_grad()
    def update(self, *quantized: Quantized) -> None:
        """Move the codebooks towards what was assigned to them; restart dead codes. Nothing where they are parameters.

        Several processes move theirs alike, as one process would that had all their frames.

        A quantizer that was not initialised learns from its random entries on; call `initialize` first.
        """
        config, groups = self.config, self.config.num_groups
        if config.learning == "gradient":
            return
        rows_ND = torch.cat([q.inputs.transpose(1, 2).reshape(-1, config.latent_dim) for q in quantized])
        codes_NK = torch.cat([q.codes.transpose(1, 2).reshape(-1, len(self.codebook_sizes)) for q in quantized])
        residual_NGd = rows_ND.view(-1, groups, config.latent_dim // groups).clone()
        generator = torch.Generator(rows_ND.device).manual_seed(self._num_updates)
        self._num_updates += 1
        present_NK = codes_NK >= 0
        first_K, total_K = (places.tolist() for places in self._places(present_NK.sum(0)))
        num_rows = sum(total > 0 for total in total_K)  # a prefix: later stages were left out everywhere
        sums_KCd, drawn_KCd = (torch.zeros_like(self.codebooks[:num_rows]) for _ in range(2))
        counts_KC = torch.zeros_like(sums_KCd[:, :, 0])
        size = (config.codebook_size,)
        for row in range(num_rows):
            codes_n = codes_NK[present_NK[:, row], row]
            inputs_nd = residual_NGd[present_NK[:, row], row % groups]
            counts_KC[row], sums_KCd[row] = sums_by_code(inputs_nd, codes_n, config.codebook_size)
            chosen_C = torch.randint(total_K[row], size, generator=generator, device=rows_ND.device)
            drawn_KCd[row] = _share_of(inputs_nd, chosen_C, first_K[row])
            residual_NGd[present_NK[:, row], row % groups] -= self.codebooks[row, codes_n]
        self._move(*map(self._all_reduce, (counts_KC, sums_KCd, drawn_KCd)))

    def _move(self, counts_KC: Tensor, sums_KCd: Tensor, drawn_KCd: Tensor) -> None:
        """Learn from what fell on each entry of the first rows, and restart dead ones at what was drawn."""
        mean_KC, total_KCd = (average[: len(counts_KC)] for average in self._averages())
        mean_KC.lerp_(counts_KC, 1.0 - self.config.ema_decay)
        total_KCd.lerp_(sums_KCd, 1.0 - self.config.ema_decay)
        self._restart(self._dead(mean_KC), drawn_KCd, mean_KC, total_KCd)
        torch.div(total_KCd, mean_KC.clamp_min(1e-5)[:, :, None], out=self.codebooks[: len(counts_KC)])

    def _dead(self, mean_KC: Tensor) -> Tensor:
        return mean_KC < self.config.dead_threshold * mean_KC.mean(1, keepdim=True)

    def _restart(self, dead_KC: Tensor, drawn_KCd: Tensor, mean_KC: Tensor, total_KCd: Tensor) -> None:
        # Sums and counts move with the entry, or the next update would undo the restart.
        uniform_KC = mean_KC.mean(1, keepdim=True).expand_as(mean_KC)
        total_KCd[dead_KC] = drawn_KCd[dead_KC] * uniform_KC[dead_KC][:, None]
        mean_KC[dead_KC] = uniform_KC[dead_KC]

    @property
    def num_frames_to_initialize(self) -> int:
        return 0 if self.config.learning == "gradient" else 16 * self.config.codebook_size

    @torch.no_grad()
    def initialize(self, latents: Tensor, *, num_iterations: int = 10, seed: int = 0) -> None:
        """Set the codebooks by k-means, stage after stage, over the latents of all processes.

        Nothing where they are learned by gradient, from small random values.
        """
        config, groups = self.config, self.config.num_groups
        if config.learning == "gradient":
            return
        rows_ND = latents.detach().float().transpose(1, 2).reshape(-1, config.latent_dim)
        first, total = map(int, self._places(torch.tensor(len(rows_ND), device=rows_ND.device)))
        if total < config.codebook_size:
            raise ValueError(f"{total} frames are too few to initialise {config.codebook_size} entries")
        residual_NGd = rows_ND.view(-1, groups, config.latent_dim // groups).clone()
        generator = torch.Generator(rows_ND.device).manual_seed(seed)
        mean_KC, total_KCd = self._averages()
        for row in range(len(self.codebook_sizes)):
            points_Nd = residual_NGd[:, row % groups]
            chosen_C = torch.randperm(total, generator=generator, device=rows_ND.device)[: config.codebook_size]
            entries_Cd = self._all_reduce(_share_of(points_Nd, chosen_C, first))
            for _ in range(num_iterations):
                counts_C, sums_Cd = self._assigned(points_Nd, entries_Cd)
                # An entry that loses all points keeps its place.
                entries_Cd = torch.where(counts_C[:, None] > 0, sums_Cd / counts_C.clamp_min(1.0)[:, None], entries_Cd)
            self.codebooks[row] = entries_Cd
            # The average holds counts per update; k-means saw all at once. Any scale works while sums match. An entry
            # without points keeps a trace of weight, and so its place until it is restarted.
            mean_KC[row] = counts_C.clamp_min(0.01)
            total_KCd[row] = entries_Cd * mean_KC[row, :, None]
            residual_NGd[:, row % groups] -= entries_Cd[rvq_search(points_Nd, SearchTables(entries_Cd[None]))[:, 0]]

    def _assigned(self, points_Nd: Tensor, entries_Cd: Tensor) -> tuple[Tensor, Tensor]:
        """How many points of all processes are nearest to each entry [C], and their sums [C, d]."""
        codes_N = rvq_search(points_Nd, SearchTables(entries_Cd[None]))[:, 0]
        counts_C, sums_Cd = sums_by_code(points_Nd, codes_N, len(entries_Cd))
        return self._all_reduce(counts_C), self._all_reduce(sums_Cd)

    def training_state(self) -> dict[str, Tensor]:
        if self.config.learning == "gradient":
            return {}
        mean_KC, total_KCd = self._averages()
        return {"counts": mean_KC, "sums": total_KCd, "num_updates": torch.tensor(self._num_updates)}

    def load_training_state(self, state: dict[str, Tensor]) -> None:
        if self.config.learning == "gradient":
            super().load_training_state(state)
            return
        self._averages_KC_KCd = (state["counts"].to(self.codebooks), state["sums"].to(self.codebooks))
        self._num_updates = int(state["num_updates"])

    def _averages(self) -> tuple[Tensor, Tensor]:
        """Moving averages of how often an entry was used [K, C] and of the sum of what it was used for [K, C, d]."""
        if self._averages_KC_KCd is None:
            self._averages_KC_KCd = (torch.ones_like(self.codebooks[:, :, 0]), self.codebooks.clone())
        mean_KC, total_KCd = (average.to(self.codebooks.device) for average in self._averages_KC_KCd)
        self._averages_KC_KCd = (mean_KC, total_KCd)
        return self._averages_KC_KCd

    def _all_reduce(self, values: Tensor) -> Tensor:
        """Add up, in place, the values of all processes."""
        if _is_distributed():
            torch.distributed.all_reduce(values)
        return values

    def _places(self, num_rows: Tensor) -> tuple[Tensor, Tensor]:
        """Where this process's rows begin among those of all processes, in the order of ranks, and how many all are."""
        if not _is_distributed():
            return torch.zeros_like(num_rows), num_rows
        rank, num_ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        by_rank = num_rows.new_zeros(num_ranks, *num_rows.shape)
        by_rank[rank] = num_rows
        self._all_reduce(by_rank)
        return by_rank[:rank].sum(0), by_rank.sum(0)


def _mean_square(values_Nd: Tensor) -> Tensor:
    return values_Nd.square().mean(-1)


def _share_of(rows_Nd: Tensor, chosen_C: Tensor, first: int) -> Tensor:
    """The chosen rows [C, d] of all processes, as far as they are among these, the first of which is row `first`."""
    chosen_C = chosen_C - first
    mine_C = (chosen_C >= 0) & (chosen_C < len(rows_Nd))
    share_Cd = rows_Nd.new_zeros(len(chosen_C), rows_Nd.shape[1])
    share_Cd[mine_C] = rows_Nd[chosen_C[mine_C]]
    return share_Cd


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
