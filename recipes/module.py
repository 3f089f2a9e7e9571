"""The LightningModule that trains a codec of the multirate family by reconstruction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor

from codec.models.multirate import MultirateCodec
from codec.quantizers.interface import Quantized, draw_num_quantizers
from codec.quantizers.residual import ResidualVQ
from recipes.losses import SpectralLoss, si_sdr_db
from recipes.optimizers import MuonAdamW, gradient_norms, warmup_cosine

_NOT_YET = 2**40


class CodecTraining(pl.LightningModule):
    """One training run of a codec. `config` is the whole Hydra configuration (see `configs/train.yaml`).

    The quantizer is brought in gradually, because a decoder that never saw clean latents does not learn phase: no item
    is quantized before `quantizer_start_step`; then latents are collected until k-means can set the codebooks; from
    there the share of quantized items grows to all of them over `quantizer_ramp_steps`.

    Every random draw depends on (seed, step) alone, so a resumed run continues as the whole one would have.
    """

    quantizer_since: Tensor

    def __init__(self, codec: MultirateCodec, config: DictConfig) -> None:
        super().__init__()
        if not isinstance(codec.quantizer, ResidualVQ):
            raise ValueError("this recipe trains residual quantizers")
        self.codec = codec
        self.config = config
        self.loss = SpectralLoss(
            sample_rate_hz=codec.sample_rate_hz,
            window_samples=config.loss.window_samples,
            num_mels=config.loss.num_mels,
            mel_floor=config.loss.mel_floor,
        )
        # The step at which the codebooks were set; a pretrained quantizer was set a whole ramp ago.
        since = _NOT_YET if config.init_from is None else -config.loss.quantizer_ramp_steps
        self.register_buffer("quantizer_since", torch.tensor(since))
        self._collected: list[Tensor] = []
        self._to_learn_from: list[Quantized] = []

    @property
    def quantizer(self) -> ResidualVQ:
        """The codec's quantizer; a property, so that checkpoints hold it once."""
        return cast(ResidualVQ, self.codec.quantizer)

    # The step

    def training_step(self, batch: Tensor, batch_index: int) -> Tensor:
        draws = torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.global_step)
        audio = batch[:, 0]
        latents = self._encode(audio)
        losses: dict[str, Tensor] = {}
        share = self._quantized_share(latents)
        if share > 0.0:
            prefixes = draw_num_quantizers(
                self.quantizer.valid_num_quantizers,
                len(audio),
                full_fraction=self.config.loss.full_prefix_fraction,
                generator=draws,
            )
            quantized = self.quantizer(latents, num_quantizers=prefixes)
            self._to_learn_from.append(quantized)
            self._log_usage(quantized)
            losses |= quantized.losses
            is_quantized = torch.rand(len(audio), generator=draws).to(latents.device) < share
            latents = torch.where(is_quantized.view(-1, 1, 1), quantized.latents, latents)
        losses |= self.loss(self._decode(latents, audio.shape[1]), audio)
        total = sum((self.config.loss.weights[name] * value for name, value in losses.items()), latents.new_zeros(()))
        self.log_dict({f"train/{name}": value for name, value in losses.items()} | {"train/total": total})
        self.log("train/quantized_share", share)
        return total

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if self._to_learn_from:
            self.quantizer.update(*self._to_learn_from)
            self._to_learn_from.clear()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.global_step % self.config.trainer.log_every_n_steps == 0:
            norms = gradient_norms(self.codec.named_parameters())
            self.log_dict({f"gradient_norm/{part}": norm for part, norm in norms.items()})

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        config = self.config.optimizer
        betas = (float(config.betas[0]), float(config.betas[1]))
        optimizer = MuonAdamW(self.codec, lr=config.lr, weight_decay=config.weight_decay, betas=betas)
        schedule = warmup_cosine(
            optimizer,
            warmup_steps=config.warmup_steps,
            total_steps=self.config.trainer.max_steps,
            final_fraction=config.final_fraction,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # Validation: the same crops at several rates, and without the quantizer

    def validation_step(self, batch: Tensor, batch_index: int) -> None:
        audio = batch[:, 0]
        latents = self._encode(audio)
        self._log_reconstruction("unquantized", latents, audio)
        if self.quantizer_since == _NOT_YET:
            return
        codes = self.quantizer.encode(latents)
        for num_quantizers in self.config.data.dev_num_quantizers:
            decoded = self.quantizer.decode(codes[:, :num_quantizers])
            self._log_reconstruction(f"{num_quantizers}_quantizers", decoded, audio)

    def _log_reconstruction(self, name: str, latents: Tensor, audio: Tensor) -> None:
        estimate = self._decode(latents, audio.shape[1])
        losses = self.loss(estimate, audio)
        values = {f"val/{loss}/{name}": value for loss, value in losses.items()}
        values[f"val/si_sdr_db/{name}"] = si_sdr_db(estimate, audio).mean()
        self.log_dict(values, batch_size=len(audio), sync_dist=True)

    # Checkpoints carry the moving averages of the codebooks, which a released model does not need

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["quantizer_training"] = self.quantizer.training_state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.quantizer.load_training_state(checkpoint["quantizer_training"])

    # Parts

    def _encode(self, audio: Tensor) -> Tensor:
        """Latents [B, D, F] of [B, T] and of the frames that the decoder's delay reaches ahead."""
        delayed = F.pad(audio, (0, self.codec.decode_delay_samples))
        return self.codec.encode_latents(delayed, self.codec.encoder.init_state(len(audio)))[0]

    def _decode(self, latents: Tensor, num_samples: int) -> Tensor:
        audio = self.codec.decode_latents(latents, self.codec.decoder.init_state(len(latents)))[0]
        return audio[:, self.codec.decode_delay_samples :][:, :num_samples]

    def _quantized_share(self, latents: Tensor) -> float:
        """The share of items to quantize in this step; sets the codebooks when their time has come."""
        config = self.config.loss
        if self.quantizer_since == _NOT_YET:
            if self.global_step < config.quantizer_start_step:
                return 0.0
            self._collected.append(latents.detach())
            frames = sum(part.shape[0] * part.shape[2] for part in self._collected)
            if frames < config.k_means_frames:
                return 0.0
            rows_ND = torch.cat([part.transpose(1, 2).flatten(0, 1) for part in self._collected])
            self.quantizer.initialize(rows_ND.t()[None], seed=self.config.seed)
            self._collected.clear()
            self.quantizer_since.fill_(self.global_step)
        done = self.global_step - int(self.quantizer_since)
        return min(1.0, (done + 1) / max(1, int(config.quantizer_ramp_steps)))

    def _log_usage(self, quantized: Quantized) -> None:
        if self.global_step % self.config.trainer.log_every_n_steps:
            return
        for row, perplexity in enumerate(quantized.stats["perplexity"]):
            self.log(f"perplexity/{row}", perplexity)
            self.log(f"dead_fraction/{row}", quantized.stats["dead_fraction"][row])
        code_norm = self.quantizer.codebooks.norm(dim=-1).mean(-1)
        for row, norm in enumerate(code_norm):
            self.log(f"code_norm/{row}", norm)
