"""The configuration of a run as typed values: everything in `configs/` is checked here, before anything is built.

Sections are frozen dataclasses. An unknown key, a value of another type and an impossible combination are ValueErrors
of one line that begins with the dotted path, such as `adversary.optimizer.lr`. Models, losses and discriminators are
mappings with a "type" (see `codec.config`), which whoever builds them checks in the same way.

`quantizer`, a file of `configs/quantizer/`, puts another quantizer into the model of an experiment: the values of
`model.quantizer`, all of them but `latent_dim`, which stays the model's where it is not given; and beside them
`weights`, which take the place of the weights of the losses of the quantizer that was there. An experiment may ask for
numbers of code rows that the new quantizer cannot have, in `quantization.prefixes` and `validation.num_quantizers`:
those it can have stay, and where none does the setting is null. Settings hold what comes out, and so does the
`config.yaml` of a run.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from codec import pretrained as _pretrained  # noqa: F401  (registers models and quantizers)
from codec.config import build, from_dict, from_values, to_dict
from codec.quantizers.interface import Quantizer, QuantizerConfig
from recipes.losses import GAN_KINDS, REDUCTIONS

PRECISIONS = ("32-true", "bf16-mixed")
DROPOUTS = ("item", "first_items", "batch", "nested", "powers_of_two", "rounded_up")
# What of `trainer` this recipe sets itself, and where the user says it instead.
_NOT_OF_THE_TRAINER = {
    "accumulate_grad_batches": "raise data.batch_size",
    "gradient_clip_val": "set optimizer.clip_norm",
    "gradient_clip_algorithm": "set optimizer.clip_norm",
    "max_epochs": "set trainer.max_steps",
    "min_epochs": "set trainer.max_steps",
    "strategy": "set trainer.devices and trainer.num_nodes",
    "logger": "logs go to output_dir",
    "callbacks": "they are fixed",
    "default_root_dir": "set output_dir",
    "use_distributed_sampler": "data.* says what is drawn",
    "enable_checkpointing": "checkpoints go to output_dir",
    "overfit_batches": "point data.train_dir to few files",
}


@dataclass(frozen=True, kw_only=True)
class ScheduleSettings:
    """The learning rate over steps, as a factor; see `recipes.optimizers.schedule_factor`."""

    warmup_steps: int = 0
    final_fraction: float = 1.0
    decay: float = 1.0
    decay_every_steps: int = 1

    def __post_init__(self) -> None:
        if self.warmup_steps < 0 or self.decay_every_steps < 1:
            raise ValueError("warmup_steps must not be negative and decay_every_steps must be positive")
        if not 0.0 <= self.final_fraction <= 1.0 or not 0.0 < self.decay <= 1.0:
            raise ValueError("final_fraction must lie in 0..1 and decay in (0, 1]")


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """`algorithm` is one of `recipes.optimizers.OPTIMIZERS`; `clip_norm` bounds the norm of all gradients together."""

    algorithm: str
    lr: float
    betas: tuple[float, ...]
    weight_decay: float = 0.0
    clip_norm: float | None = None
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)

    def __post_init__(self) -> None:
        if self.lr <= 0.0 or self.weight_decay < 0.0:
            raise ValueError(f"lr must be positive and weight_decay not negative, got {self.lr}, {self.weight_decay}")
        if len(self.betas) != 2 or not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {self.betas}")
        if self.clip_norm is not None and self.clip_norm <= 0.0:
            raise ValueError(f"clip_norm must be positive or null, got {self.clip_norm}")


@dataclass(frozen=True, kw_only=True)
class QuantizationSettings:
    """How the quantizer is brought in, and its dropout; see `recipes.quantization`.

    The quantizer is left out before `start_step`; the share of quantized items then grows over `ramp_steps`.

    Quantizer dropout: `dropout_share` of the items keep a prefix of the code rows only, one of `prefixes` (null: of all
    valid ones), the others all rows. `dropout` says which items these are, and how prefixes are drawn:

    - "item": each item with that probability, and uniformly (with a share of 1: SoundStream; FlexTok's "uniform");
    - "first_items": that share of the batch, from its beginning, and each uniformly (DAC);
    - "batch": the whole batch with that probability, and one prefix for all of it (with a share of 1: EnCodec with its
      bandwidths as `prefixes`; EnCodec in audiocraft and Mimi with all prefixes);
    - "nested": as "item", but the prefixes take turns from item to item, so each has its part in every batch. The mean
      over a batch estimates the mean of the losses of all prefixes (Matryoshka) at one decoding per item;
    - "powers_of_two": as "item", but of the prefixes only the 1st, 2nd, 4th, 8th... and the last (FlexTok's "pow2");
    - "rounded_up": as "item", and what was drawn is rounded up to one of those (FlexTok's "uniform_pow2").
    """

    start_step: int = 0
    ramp_steps: int = 0
    dropout: str = "item"
    dropout_share: float = 0.0
    prefixes: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if min(self.start_step, self.ramp_steps) < 0:
            raise ValueError("start_step and ramp_steps must not be negative")
        if not 0.0 <= self.dropout_share <= 1.0:
            raise ValueError(f"dropout_share={self.dropout_share} is not in 0..1")
        _check_choice("dropout", self.dropout, DROPOUTS)


@dataclass(frozen=True, kw_only=True)
class BalancerSettings:
    """The gradient balancer; see `recipes.balancer`.

    `total_norm` is what each item's gradient at the output comes to. These are summed over the items of all processes,
    whereas losses that are not heard, such as commitment, are means over them.
    """

    decay: float = 0.999
    total_norm: float = 1.0


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """`terms` are what `recipes.losses.ReconstructionLoss` is built from.

    `weights` name every term and the quantizer's losses; a loss without a weight is a mistake. With a balancer the
    weights of what is heard are shares of the gradient at the decoder's output.
    """

    terms: Any
    weights: dict[str, float]
    balancer: BalancerSettings | None = None


@dataclass(frozen=True, kw_only=True)
class AdversarySettings:
    """Discriminators, what they are trained by, and what the codec learns from them; see `recipes.adversary`.

    `loss`, `reduction` and `relative_features` as `recipes.losses` explains them. `weights` of `adversarial` and
    `feature` among the codec's losses.

    The discriminators begin to learn at `start_step`, in every `every_n_steps`-th step; the codec listens to them
    `head_start_steps` later. `crop_samples`: they hear random crops of that length, the same of both signals; null is
    all. `num_active`: how many of the sub-discriminators take part in a step, in turns; null is all.
    """

    discriminators: tuple[Any, ...]
    optimizer: OptimizerSettings
    weights: dict[str, float]
    loss: str = "hinge"
    reduction: str = "mean"
    relative_features: bool = False
    start_step: int = 0
    head_start_steps: int = 0
    every_n_steps: int = 1
    crop_samples: int | None = None
    num_active: int | None = None

    def __post_init__(self) -> None:
        _check_choice("loss", self.loss, GAN_KINDS)
        _check_choice("reduction", self.reduction, REDUCTIONS)
        if set(self.weights) != {"adversarial", "feature"} or min(self.weights.values()) < 0.0:
            raise ValueError(f"weights must be of adversarial and feature, and not negative, got {self.weights}")
        if not self.discriminators:
            raise ValueError("discriminators is empty; adversary=none trains without")
        if min(self.start_step, self.head_start_steps) < 0 or self.every_n_steps < 1:
            raise ValueError("start_step and head_start_steps must not be negative, every_n_steps must be positive")
        if self.crop_samples is not None and self.crop_samples < 1:
            raise ValueError(f"crop_samples must be positive or null, got {self.crop_samples}")


@dataclass(frozen=True, kw_only=True)
class ObjectiveSettings:
    """What some stages of the quantizer learn from a teacher; see `recipes.distillation`.

    `teacher`, `loss` and `alignment` are mappings with a "type"; `alignment` is for teachers that speak of words.
    `stages` learn each by itself, counted from 0; null: their sum. The loss counts with `weight` from `start_step`, to
    which it rises over `ramp_steps`, until before `stop_step` (null: to the end).
    """

    teacher: Any
    weight: float
    loss: Any = field(default_factory=lambda: {"type": "cosine_over_time"})
    stages: tuple[int, ...] | None = (0,)
    alignment: Any = None
    start_step: int = 0
    ramp_steps: int = 0
    stop_step: int | None = None

    def __post_init__(self) -> None:
        if self.weight < 0.0:
            raise ValueError(f"weight must not be negative, got {self.weight}")
        if self.stages is not None and (not self.stages or len(set(self.stages)) < len(self.stages)):
            raise ValueError(f"stages must be different numbers, or null for their sum, got {list(self.stages)}")
        if min(self.start_step, self.ramp_steps) < 0:
            raise ValueError("start_step and ramp_steps must not be negative")
        if self.stop_step is not None and self.stop_step <= self.start_step:
            raise ValueError(f"stop_step={self.stop_step} is not after start_step={self.start_step}")


@dataclass(frozen=True, kw_only=True)
class VoiceSettings:
    """How a codec with global codes learns voices; see `recipes.voice`.

    Before `warmup_steps` the x-vector stands for the voice vector; then the loss "speaker" draws the one to the other,
    with `speaker_weight`. `disguise`: the lowest and the highest factor by which the spectra that row 0 hears are
    stretched, drawn for every item.
    """

    warmup_steps: int = 0
    speaker_weight: float = 1.0
    disguise: tuple[float, ...] = (1.0, 1.0)

    def __post_init__(self) -> None:
        if self.warmup_steps < 0 or self.speaker_weight < 0.0:
            raise ValueError("warmup_steps and speaker_weight must not be negative")
        if len(self.disguise) != 2 or not 0.0 < self.disguise[0] <= self.disguise[1]:
            raise ValueError(f"disguise must be [lowest, highest], both positive, got {list(self.disguise)}")


@dataclass(frozen=True, kw_only=True)
class AverageSettings:
    """A moving average of the weights, which validation and export use; see `recipes.averaging`."""

    decay: float = 0.99


@dataclass(frozen=True, kw_only=True)
class ValidationSettings:
    """Dev crops are reconstructed from `num_quantizers` code rows each (null: all and half of them).

    `monitor` is a loss, or `si_sdr_db`: the checkpoint that is best by it, with all code rows, is kept.
    `num_examples` of the dev crops can be heard and seen in TensorBoard.
    """

    num_quantizers: tuple[int, ...] | None = None
    monitor: str = "total"
    num_examples: int = 4


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A whole run; see `configs/train.yaml`."""

    output_dir: str
    data: Any
    loss: LossSettings
    optimizer: OptimizerSettings
    trainer: dict[str, Any]
    quantization: QuantizationSettings = field(default_factory=QuantizationSettings)
    validation: ValidationSettings = field(default_factory=ValidationSettings)
    model: Any = None
    adversary: AdversarySettings | None = None
    distillation: dict[str, ObjectiveSettings] | None = None
    voice: VoiceSettings | None = None
    features: str | None = None
    average: AverageSettings | None = None
    weight_norm: bool | None = None
    seed: int = 0
    num_threads: int | None = None
    resume: bool = False
    init_from: str | None = None
    warm_start: str | None = None

    def __post_init__(self) -> None:
        if self.init_from is not None and self.warm_start is not None:
            raise ValueError("init_from takes all weights of a model, warm_start those that fit: only one of them")
        check_trainer(self.trainer)

    @property
    def max_steps(self) -> int:
        """Generator steps of the whole run."""
        return int(self.trainer["max_steps"])

    @property
    def log_every_n_steps(self) -> int:
        """Steps between two rows of the logs."""
        return int(self.trainer.get("log_every_n_steps", 50))


def parse(config: DictConfig) -> Settings:
    """The settings that a composed configuration says; ValueError of one line with the path of what is wrong."""
    try:
        values = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ValueError(one_line(error)) from error
    quantizer = values.pop("quantizer", None) if isinstance(values, dict) else None
    settings: Settings = from_values(Settings, values, "")
    return settings if quantizer is None else _with_quantizer(settings, quantizer)


def loss_names(quantizer: Quantizer, latent_dim: int) -> set[str]:
    """The names of a quantizer's losses: one frame tells them."""
    with torch.no_grad():
        return set(quantizer(torch.zeros(1, latent_dim, 1, device=quantizer.device)).losses)


def check_weights(weights: Mapping[str, float], names: Collection[str], path: str) -> None:
    """ValueError where a weight has no loss or a loss no weight; `path` is where the weights stand."""
    there = ", ".join(sorted(names)) or "none"
    for name in sorted(weights.keys() - set(names)):
        raise ValueError(f"{path}.{name}: there is no such loss (there are {there})")
    for name in sorted(set(names) - weights.keys()):
        raise ValueError(f"{path}.{name} is needed: the loss has no weight (there are {there})")


@dataclass(frozen=True, kw_only=True)
class _Weights:
    weights: dict[str, float]


def _with_quantizer(settings: Settings, values: Any) -> Settings:
    """These settings with the quantizer that `values` describe in their model; see the top of this file."""
    if not isinstance(values, dict):
        raise ValueError(f"quantizer: expected a mapping or null, got {values!r}")
    if settings.model is None:
        raise ValueError("quantizer: model is null, so there is nothing to put it into (init_from keeps its own)")
    before = getattr(from_dict(settings.model, "model"), "quantizer", None)
    if not isinstance(before, QuantizerConfig):
        raise ValueError(f"quantizer: a model of type {settings.model['type']!r} has none")
    values = {"latent_dim": before.latent_dim} | values
    weights = from_values(_Weights, {"weights": values.pop("weights", {})}, "quantizer").weights
    config = from_dict(values, "quantizer")
    if not isinstance(config, QuantizerConfig):
        raise ValueError(f"quantizer.type: {values['type']!r} is no quantizer")
    quantizer: Quantizer = build(config)
    check_weights(weights, loss_names(quantizer, config.latent_dim), "quantizer.weights")
    replaced = loss_names(build(before), before.latent_dim)
    kept = {name: weight for name, weight in settings.loss.weights.items() if name not in replaced}

    def possible(numbers: tuple[int, ...] | None) -> tuple[int, ...] | None:
        return tuple(number for number in numbers or () if number in quantizer.valid_num_quantizers) or None

    return replace(
        settings,
        model=settings.model | {"quantizer": to_dict(config)},
        loss=replace(settings.loss, weights=kept | weights),
        quantization=replace(settings.quantization, prefixes=possible(settings.quantization.prefixes)),
        validation=replace(settings.validation, num_quantizers=possible(settings.validation.num_quantizers)),
    )


def one_line(error: Exception) -> str:
    """What a configuration library says in many lines: the path, and what is wrong with it."""
    path = getattr(error, "full_key", None)
    message = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return f"{path}: {message}" if path and path not in message else message


def check_trainer(trainer: dict[str, Any]) -> None:
    """ValueError for a section `trainer` that sets what a recipe sets itself, or what there is not."""
    known = set(inspect.signature(pl.Trainer.__init__).parameters) - {"self"}
    for key in trainer:
        if key in _NOT_OF_THE_TRAINER:
            raise ValueError(f"trainer.{key} cannot be set here; {_NOT_OF_THE_TRAINER[key]}")
        if key not in known:
            raise ValueError(f"trainer.{key}: there is no such setting of pytorch_lightning.Trainer")
    if not isinstance(trainer.get("max_steps"), int) or trainer["max_steps"] < 1:
        raise ValueError(f"trainer.max_steps must be a positive number of steps, got {trainer.get('max_steps')}")
    if trainer.get("precision", "32-true") not in PRECISIONS:
        raise ValueError(f"trainer.precision={trainer['precision']!r} is not one of {PRECISIONS}")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not one of {choices}")
