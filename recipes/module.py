"""The LightningModule that trains a codec: reconstruction, quantizer and, if there are any, adversary and teachers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from codec.layers.conv import add_weight_norm
from codec.models.interface import Codec
from codec.models.voice import VoicedCodec
from codec.quantizers.interface import Quantized
from recipes.adversary import Adversary, Heard
from recipes.averaging import WeightAverage
from recipes.balancer import Balancer
from recipes.data import Batch
from recipes.distillation import Distillation, Students
from recipes.distributed import any_process, average_gradients, rank_and_size
from recipes.losses import ReconstructionLoss, si_sdr_db
from recipes.optimizers import build_optimizer, gradient_norms, schedule_factor
from recipes.quantization import QuantizerTraining
from recipes.settings import OptimizerSettings, Settings, check_weights, loss_names
from recipes.voice import VoiceTraining

_MOST_NAMED_ITEMS = 8


class NonFiniteError(ArithmeticError):
    """A loss or a gradient is NaN or infinite; no step was taken with it."""


class CodecTraining(pl.LightningModule):
    """One training run of a codec, any `codec.models.interface.Codec`. `settings` are the whole configuration.

    A step is one of the generator, which is the codec: `global_step`, `trainer.max_steps`, logs and checkpoints count
    these, with or without an adversary. In a step the discriminators learn first, then the codec hears what they make
    of it. Gradients are averaged over processes by hand, so use `recipes.distributed.AllReduceStrategy` with several.

    Every random draw depends on (seed, step) alone, so a resumed run continues as the whole one would have.

    A non-finite loss or gradient raises `NonFiniteError`, which names the step and the items, before it is used.
    """

    def __init__(self, codec: Codec, settings: Settings) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.settings = settings
        self.codec = codec
        if wants_weight_norm(codec, settings):
            add_weight_norm(codec)
            if not any("parametrizations" in name for name in codec.state_dict()):
                raise ValueError("weight_norm=true, but this model has no convolutions that could have it")
        self.reconstruction = ReconstructionLoss(settings.loss.terms, sample_rate_hz=codec.sample_rate_hz)
        self.adversary = Adversary(settings.adversary) if settings.adversary else None
        self.quantization = QuantizerTraining(
            codec.quantizer, settings.quantization, seed=settings.seed, is_trained=settings.init_from is not None
        )
        self.average = WeightAverage(decay=settings.average.decay) if settings.average else None
        self.distillation: Distillation | None = None
        if settings.distillation:
            self.distillation = Distillation(
                settings.distillation,
                codec.quantizer,
                codec.config.quantizer.latent_dim,
                frame_rate_hz=codec.sample_rate_hz / codec.hop_length,
            )
        self.voice = VoiceTraining(codec, settings.voice) if isinstance(codec, VoicedCodec) else None
        if settings.voice is not None and self.voice is None:
            raise ValueError("voice: this model has no global codes")
        self._check_weights()
        self.balancer = self._new_balancer()
        self._is_logging = False

    # The step

    def on_train_start(self) -> None:
        if self.balancer is not None and self.settings.loss.balancer is not None:
            # Gradients will be averaged over processes; the sum over all items is what one process would have.
            self.balancer.total_norm = self.settings.loss.balancer.total_norm * rank_and_size()[1]

    def training_step(self, batch: Batch, batch_index: int) -> None:
        step, audio = self.global_step, batch.audio
        # As Lightning counts: a value that is logged in another step would be written late.
        self._is_logging = (step + 1) % self.settings.log_every_n_steps == 0
        draws = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + step)
        quantized: Quantized | None = None
        students: Students | None = None

        def quantize(latents: Tensor) -> Tensor:
            nonlocal quantized, students
            passed, quantized = self.quantization(latents, step, draws)
            students = Students(self.codec.quantizer, latents, quantized)
            return passed

        voice_losses: dict[str, Tensor] = {}
        if self.voice is None:
            estimate = self.codec.reconstruct(audio, quantize).float()
        else:
            estimate, voice_losses = self.voice.reconstruct(batch, quantize, step, draws)
        heard_losses = self.reconstruction(estimate, audio)
        inner_losses = voice_losses if quantized is None else voice_losses | quantized.losses
        logged: dict[str, Any] = {}
        if self.distillation is not None and students is not None:
            distilled = self.distillation(batch, students, step=step, sample_rate_hz=self.codec.sample_rate_hz)
            inner_losses |= distilled.losses
            logged |= distilled.logged
        with self._naming(batch, estimate):
            self._check_finite(heard_losses | inner_losses)
            if self.adversary is not None and step >= self.adversary.settings.start_step:
                heard = self.adversary.listen(audio, estimate, step, draws)
                if self.adversary.learns_in(step):
                    logged |= self._train_discriminators(self.adversary, heard)
                if self.adversary.is_heard_in(step):
                    adversarial = self.adversary.losses_for_codec(heard)
                    self._check_finite(adversarial)
                    heard_losses |= adversarial
            logged |= self._train_codec(heard_losses, inner_losses, estimate)
        if self._is_logging:
            self._log(heard_losses | inner_losses | logged, quantized)

    def _train_discriminators(self, adversary: Adversary, heard: Heard) -> dict[str, Any]:
        loss = adversary.own_loss(heard)
        self._check_finite({"discriminators": loss})
        loss.backward()
        since = self.global_step - adversary.settings.start_step
        norms = self._step(1, adversary.settings.optimizer, since, adversary.settings.start_step)
        return {"discriminators": loss} | norms

    def _train_codec(
        self, heard_losses: Mapping[str, Tensor], inner_losses: Mapping[str, Tensor], estimate: Tensor
    ) -> dict[str, Any]:
        """One step of the codec from what is heard of it and from what is not, the quantizer's losses."""
        inner = sum((self._weights[name] * loss for name, loss in inner_losses.items()), estimate.new_zeros(()))
        logged: dict[str, Any] = {}
        if self.balancer is None:
            total = sum((self._weights[name] * loss for name, loss in heard_losses.items()), inner)
            total.backward()
            logged["total"] = total
        else:
            balanced = {name: loss for name, loss in heard_losses.items() if self._weights[name]}
            unbalanced = inner if inner.requires_grad else None
            norms = self.balancer.backward(balanced, estimate, unbalanced=unbalanced)
            logged |= {f"output_gradient_norm/{name}": norm for name, norm in norms.items()}
        step = self.global_step
        logged |= self._step(0, self.settings.optimizer, step, 0)
        self.quantization.update()
        if self.average is not None:
            if self.quantization.since == step:
                # The codebooks were set in this step: what was averaged before belongs to none of theirs.
                self.average = WeightAverage(decay=self.average.decay)
            self.average.update(self.codec)
        return logged

    def _step(self, index: int, settings: OptimizerSettings, step: int, start_step: int) -> dict[str, Any]:
        """One step of an optimizer with the gradients that there are; returns their norms before clipping."""
        name = ("codec", "discriminators")[index]
        optimizer = self.optimizers()[index]
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        average_gradients(parameters)
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if not torch.isfinite(norm):
            raise NonFiniteError(f"a gradient of the {name}")
        norms: dict[str, Any] = {f"gradient_norm/{name}": norm}
        if index == 0 and self._is_logging:
            parts = gradient_norms(self.codec.named_parameters())
            norms |= {f"gradient_norm/{part}": norm for part, norm in parts.items()}
        if settings.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, settings.clip_norm, norm)
        factor = schedule_factor(settings.schedule, step, total_steps=self.settings.max_steps - start_step)
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * factor
        # Lightning counts the steps of its own wrappers; the codec's are the ones to count.
        (optimizer if index == 0 else optimizer.optimizer).step()
        optimizer.zero_grad(set_to_none=True)
        return norms

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        learning: torch.nn.Module = self.codec
        if self.distillation is not None:
            learning = torch.nn.ModuleList([self.codec, self.distillation])
        optimizers = [build_optimizer(self.settings.optimizer, learning, "optimizer")]
        if self.adversary is not None:
            own = self.adversary.settings.optimizer
            optimizers.append(build_optimizer(own, self.adversary, "adversary.optimizer"))
        return optimizers

    def optimizers(self, use_pl_optimizer: bool = True) -> list[Any]:
        """Always a list: the codec's, and the discriminators' if there are any."""
        found = super().optimizers(use_pl_optimizer=use_pl_optimizer)
        return found if isinstance(found, list) else [found]

    # Validation: the same crops at several rates, with averaged weights where there are any

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        audio = batch.audio
        for name, estimate in self.reconstructions(audio).items():
            losses = self.reconstruction(estimate, audio)
            values = {f"val/{loss}/{name}": value for loss, value in losses.items()}
            values[f"val/total/{name}"] = sum(self._weights[loss] * value for loss, value in losses.items())
            values[f"val/si_sdr_db/{name}"] = si_sdr_db(estimate.flatten(0, 1), audio.flatten(0, 1)).mean()
            self.log_dict(values, batch_size=len(audio), sync_dist=rank_and_size()[1] > 1)

    @torch.no_grad()
    def reconstructions(self, audio: Tensor) -> dict[str, Tensor]:
        """Audio [B, C, T] as it is heard without the quantizer and, once it is in use, at the rates of validation.

        Names are `unquantized` and, for each number of code rows, `8_quantizers`.
        """
        quantizer = self.codec.quantizer

        def quantize(latents: Tensor) -> Tensor:
            with torch.autocast(latents.device.type, enabled=False):
                return quantizer.decode(quantizer.encode(latents.float(), num_quantizers=num_quantizers))

        with self._averaged():
            heard = {"unquantized": self.codec.reconstruct(audio, lambda latents: latents).float()}
            for num_quantizers in self.dev_num_quantizers if self.quantization.since is not None else ():
                heard[f"{num_quantizers}_quantizers"] = self.codec.reconstruct(audio, quantize).float()
        return heard

    @property
    def dev_num_quantizers(self) -> tuple[int, ...]:
        """The numbers of code rows that validation listens to; the last one is all of them."""
        valid = self.codec.valid_num_quantizers
        wanted = self.settings.validation.num_quantizers or (valid[(len(valid) - 1) // 2],)
        return (*sorted(set(wanted) - {valid[-1]}), valid[-1])

    @property
    def monitored(self) -> str:
        """The name of the value by which the best checkpoint is chosen."""
        return f"val/{self.settings.validation.monitor}/{self.dev_num_quantizers[-1]}_quantizers"

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        if self.average is None or not self.average.num_updates:
            yield
            return
        with self.average.swapped_into(self.codec):
            yield

    # Checkpoints hold what training keeps beside weights, which a released model does not need

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["quantization"] = self.quantization.state_dict()
        if self.average is not None:
            checkpoint["average"] = self.average.state_dict()
        if self.balancer is not None:
            checkpoint["balancer"] = self.balancer.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.quantization.load_state_dict(checkpoint["quantization"])
        if self.average is not None:
            self.average.load_state_dict(checkpoint["average"])
        if self.balancer is not None:
            self.balancer.load_state_dict(checkpoint["balancer"])

    # Parts

    @property
    def _weights(self) -> dict[str, float]:
        adversarial = self.adversary.settings.weights if self.adversary is not None else {}
        distilled = self.distillation.weights_in(self.global_step) if self.distillation is not None else {}
        voiced = self.voice.weights if self.voice is not None else {}
        return self.settings.loss.weights | adversarial | distilled | voiced

    def _check_weights(self) -> None:
        """Every loss has a weight and every weight a loss, and validation asks for what there is."""
        inner = loss_names(self.codec.quantizer, self.codec.config.quantizer.latent_dim)
        own = self.codec.own_losses if isinstance(self.codec, VoicedCodec) else ()
        check_weights(self.settings.loss.weights, {*self.reconstruction.names, *inner, *own}, "loss.weights")
        known = (*self.reconstruction.names, "total", "si_sdr_db")
        if self.settings.validation.monitor not in known:
            raise ValueError(f"validation.monitor={self.settings.validation.monitor!r} is not one of {known}")
        unknown = set(self.dev_num_quantizers) - set(self.codec.valid_num_quantizers)
        if unknown:
            raise ValueError(
                f"validation.num_quantizers: {sorted(unknown)} are not of {self.codec.valid_num_quantizers}, the "
                "numbers of code rows that this model can have"
            )

    def _new_balancer(self) -> Balancer | None:
        settings = self.settings.loss.balancer
        if settings is None:
            return None
        heard = {*self.reconstruction.names, "adversarial", "feature"}
        weights = {name: weight for name, weight in self._weights.items() if name in heard and weight}
        return Balancer(weights, decay=settings.decay, total_norm=settings.total_norm)

    def _check_finite(self, losses: Mapping[str, Tensor]) -> None:
        values = torch.stack([loss.detach().float() for loss in losses.values()])
        is_bad = ~torch.isfinite(values)
        if any_process(bool(is_bad.any()), values.device):
            bad = [name for name, flag in zip(losses, is_bad.tolist(), strict=True) if flag]
            raise NonFiniteError(f"the loss {', '.join(bad)}" if bad else "a loss on another process")

    @contextmanager
    def _naming(self, batch: Batch, estimate: Tensor) -> Iterator[None]:
        """Tell the step and the items in which something was not finite: those at fault where they can be told."""
        try:
            yield
        except NonFiniteError as error:
            is_bad = ~torch.isfinite(batch.audio + estimate.detach()).flatten(1).all(1)
            bad = is_bad.nonzero()[:, 0].tolist() or range(len(batch.places))
            named = [str(batch.places[number]) for number in bad[:_MOST_NAMED_ITEMS]]
            rest = f" and {len(bad) - len(named)} more" if len(bad) > len(named) else ""
            raise NonFiniteError(
                f"{error} is not finite in step {self.global_step}, from {', '.join(named)}{rest}"
            ) from error

    def _log(self, values: Mapping[str, Any], quantized: Quantized | None) -> None:
        named = {name if "/" in name else f"train/{name}": value for name, value in values.items()}
        for optimizer, name in zip(self.optimizers(), ("codec", "discriminators"), strict=False):
            named[f"learning_rate/{name}"] = optimizer.param_groups[0]["lr"]
        if quantized is not None:
            for stat, per_row in quantized.stats.items():
                named |= {f"{stat}/{row}": value for row, value in enumerate(per_row)}
        self.log_dict(named, sync_dist=rank_and_size()[1] > 1)


def wants_weight_norm(codec: Codec, settings: Settings) -> bool:
    """Whether convolutions are trained as direction and length: as the settings say, or else the model's own."""
    if settings.weight_norm is not None:
        return settings.weight_norm
    return getattr(codec.config, "norm", None) == "weight"
