"""Speech units that training makes: units that distortions do not change, and units that tell what comes next.

`train_invariant_units` puts a small network on frozen features and teaches it to say of distorted speech what k-means
says of the clean speech. Followed here, of Gat et al., "Augmentation invariant discrete representation for generative
spoken language modeling" (2022): the features stay frozen, targets are the de-duplicated units of clean speech, the
loss is CTC, since stretched speech has other frames, and rounds repeat it with the units of the round before. Not
followed: there is no blank, since neighbours among de-duplicated units always differ, so every frame has a unit and
durations mean something; the network may hear a few frames; it hears the clean speech as well as all distortions of it;
features of a fixed set of crops are computed once, so that training takes minutes on a processor.

`train_predictive_units` trains a small encoder and a product quantizer so that, from what was said, the quantized
latents of the next frames can be told from those of other frames. Followed, of Baevski et al., "vq-wav2vec" (2020):
the quantizers, a causal context network over quantized latents, 12 prediction steps with a linear map each, 10
negatives from the same recording. Not followed: the encoder hears features (log-mels, or those of a frozen model)
rather than raw audio, networks are small, the choice among positive and negatives is one softmax (InfoNCE, van den Oord
et al. 2018) instead of binary choices, and the temperature of Gumbel noise falls within the run.

Everything that is drawn follows from (seed, crop) and (seed, step).

Letters: N crops, B batch, F frames, D dims, V units, W width.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from codec.batch import progress_bar
from codec.quantizers.interface import QuantizerConfig
from codec.quantizers.product import GumbelVQConfig, KMeansVQConfig
from codec.units import SpeechUnits, UnitSource, deduplicate
from codec.units.assigners import PredictiveEncoder, PredictiveEncoderConfig, UnitHead, UnitHeadConfig
from recipes.augment import Distortion
from recipes.crops import Pool

PREDICTION_STEPS, NUM_NEGATIVES = 12, 10
# Of the quantizers' own losses. Source: vq-wav2vec for k-means, wav2vec 2.0 for the diversity of Gumbel choices.
LOSS_WEIGHTS = {"codebook": 1.0, "commitment": 0.25, "diversity": 0.1}
_IMPOSSIBLE = -1e4  # log probability of a blank
_LARGEST = torch.finfo(torch.float16).max
_GUMBEL_SHARE = 0.7  # of a run, over which the temperature falls


@dataclass(frozen=True, kw_only=True)
class UnitTrainingSettings:
    """A run hears `num_crops` crops of `crop_frames` frames once, and then takes `max_steps` of `batch_size` of them.

    Features are kept in memory in float16: for every crop 2 * crop_frames * feature_dim bytes, and as much again for
    each kind of distortion.
    """

    max_steps: int = 600
    num_crops: int = 600
    crop_frames: int = 200
    batch_size: int = 32
    lr: float = 1e-3
    warmup_steps: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_steps", "num_crops", "crop_frames", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        if self.lr <= 0.0 or self.warmup_steps < 0:
            raise ValueError("lr must be positive and warmup_steps not negative")


@dataclass(frozen=True)
class Heard:
    """Features float16 [F, D] of a crop: `variants[0]` of the clean one, then of its distortions."""

    variants: tuple[Tensor, ...]


def hear(
    pool: Pool, source: UnitSource, settings: UnitTrainingSettings, distortion: Distortion | None = None
) -> list[Heard]:
    """All crops of a run. ValueError where `pool` or `distortion` has another rate than the source."""
    for other in (pool, distortion):
        if other is not None and other.sample_rate_hz != source.sample_rate_hz:
            raise ValueError(f"units of {source.sample_rate_hz} Hz cannot hear {other.sample_rate_hz} Hz")
    heard = []
    with progress_bar() as advance:
        for crop in range(settings.num_crops):
            rng = np.random.default_rng((settings.seed, crop))
            audio, _ = pool.draw(rng, settings.crop_frames * source.stride_samples)
            kinds = distortion.kinds if distortion is not None else ()
            variants = [audio, *(distortion(kind, audio, rng) for kind in kinds if distortion is not None)]
            features = (source.features(torch.from_numpy(np.ascontiguousarray(variant[0]))) for variant in variants)
            heard.append(Heard(tuple(feature.clamp(-_LARGEST, _LARGEST).half() for feature in features)))
            advance(1, settings.num_crops)
    return heard


# Units that distortions do not change


def train_invariant_units(
    pool: Pool,
    units: SpeechUnits,
    distortion: Distortion,
    settings: UnitTrainingSettings,
    *,
    num_rounds: int = 1,
    width: int = 256,
    num_layers: int = 2,
    kernel_size: int = 5,
) -> SpeechUnits:
    """As many units as `units` has, of the same features, that are the same when speech is distorted.

    Every round takes `settings.max_steps`, and learns from the units of the round before; the first from `units`.
    """
    if num_rounds < 1:
        raise ValueError(f"num_rounds must be positive, not {num_rounds}")
    pl.seed_everything(settings.seed, workers=True, verbose=False)
    heard = hear(pool, units.source, settings, distortion)
    config = UnitHeadConfig(
        feature_dim=units.source.feature_dim,
        num_units=units.num_units,
        width=width,
        num_layers=num_layers,
        kernel_size=kernel_size,
    )
    teacher = units
    for number in range(num_rounds):
        targets = [deduplicate(teacher.assigner.assign(crop.variants[0].float()))[0] for crop in heard]
        head = UnitHead(config)
        head.set_statistics(torch.cat([crop.variants[0] for crop in heard]))
        _fit(_Invariance(head, settings), _Crops(heard, settings, number, targets), settings)
        teacher = SpeechUnits(units.source, head)
    return teacher


class _Invariance(pl.LightningModule):
    def __init__(self, head: UnitHead, settings: UnitTrainingSettings) -> None:
        super().__init__()
        self.head, self.settings = head, settings

    def training_step(self, batch: _Batch, batch_index: int) -> Tensor:
        loss = ctc_without_blank(self.head(batch.features, batch.mask), batch.num_frames, batch.targets)
        self.log("loss", loss.detach(), prog_bar=True, batch_size=1)
        return _finite(loss, self.global_step)

    def configure_optimizers(self) -> Any:
        return _optimizer(self.head.parameters(), self.settings)


def ctc_without_blank(scores: Tensor, num_frames: Tensor, targets: Sequence[Tensor]) -> Tensor:
    """The mean over rows of -log P(targets | scores) per target: each frame has a unit, and runs of one count once.

    `scores` float [B, F, V], `num_frames` int64 [B], `targets` de-duplicated units int64 [n] for each row. A row with
    more targets than frames cannot be, and does not count.

    Source: Graves et al., "Connectionist temporal classification" (2006), without its blank.
    """
    log_probs = F.pad(scores.float().log_softmax(-1), (0, 1), value=_IMPOSSIBLE).transpose(0, 1)
    lengths = torch.tensor([len(target) for target in targets])
    losses = F.ctc_loss(
        log_probs,
        torch.cat(list(targets)),
        num_frames,
        lengths,
        blank=scores.shape[2],
        reduction="none",
        zero_infinity=True,
    )
    is_possible = lengths <= num_frames
    return (losses / lengths.clamp_min(1))[is_possible].sum() / is_possible.sum().clamp_min(1)


# Units that tell what comes next


def train_predictive_units(
    pool: Pool,
    source: UnitSource,
    quantizer: QuantizerConfig,
    settings: UnitTrainingSettings,
    *,
    num_layers: int = 2,
    kernel_size: int = 3,
) -> SpeechUnits:
    """Units of any source by a product quantizer, all of whose groups together make one unit."""
    if isinstance(quantizer, GumbelVQConfig):
        falling = (quantizer.temperature_end / quantizer.temperature_start) ** (
            1.0 / max(1.0, _GUMBEL_SHARE * settings.max_steps)
        )
        quantizer = replace(quantizer, temperature_decay=falling)
    elif not isinstance(quantizer, KMeansVQConfig):
        raise ValueError(f"{type(quantizer).__name__} is neither gumbel_vq nor kmeans_vq")
    pl.seed_everything(settings.seed, workers=True, verbose=False)
    heard = hear(pool, source, settings)
    config = PredictiveEncoderConfig(
        feature_dim=source.feature_dim, quantizer=quantizer, num_layers=num_layers, kernel_size=kernel_size
    )
    encoder = PredictiveEncoder(config)
    encoder.set_statistics(torch.cat([crop.variants[0] for crop in heard]))
    _fit(_Prediction(encoder, settings), _Crops(heard, settings, 0), settings)
    return SpeechUnits(source, encoder)


class ContextNetwork(nn.Module):
    """A causal summary of what was said, and what it says of the next `PREDICTION_STEPS` frames. For training only."""

    def __init__(self, width: int, *, num_layers: int = 3, kernel_size: int = 3) -> None:
        super().__init__()
        self.padding = kernel_size - 1
        self.layers = nn.ModuleList(nn.Conv1d(width, width, kernel_size) for _ in range(num_layers))
        self.predict = nn.Linear(width, PREDICTION_STEPS * width)

    def forward(self, latents: Tensor) -> Tensor:
        """Quantized latents [B, W, F] -> predictions [B, F, steps, W]: at frame i of frame i + 1 + step."""
        hidden = latents
        for layer in self.layers:
            hidden = hidden + F.gelu(layer(F.pad(hidden, (self.padding, 0))))
        predicted: Tensor = self.predict(hidden.transpose(1, 2))
        return predicted.view(*predicted.shape[:2], PREDICTION_STEPS, latents.shape[1])


class _Prediction(pl.LightningModule):
    def __init__(self, encoder: PredictiveEncoder, settings: UnitTrainingSettings) -> None:
        super().__init__()
        self.encoder, self.settings = encoder, settings
        self.context = ContextNetwork(encoder.config.quantizer.latent_dim)

    def training_step(self, batch: _Batch, batch_index: int) -> Tensor:
        quantized = self.encoder.quantizer(self.encoder(batch.features, batch.mask), batch.mask)
        rng = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + self.global_step)
        loss = prediction_loss(self.context(quantized.latents), quantized.latents, rng)
        self.log("loss", loss.detach(), prog_bar=True, batch_size=1)
        for name, value in quantized.losses.items():
            loss = loss + LOSS_WEIGHTS[name] * value
        self.encoder.quantizer.update(quantized)
        return _finite(loss, self.global_step)

    def configure_optimizers(self) -> Any:
        return _optimizer(self.parameters(), self.settings)


def prediction_loss(predictions: Tensor, latents: Tensor, rng: torch.Generator) -> Tensor:
    """Cross-entropy of telling a coming frame from `NUM_NEGATIVES` others of its row, mean over steps and frames.

    `predictions` [B, F, steps, W], see `ContextNetwork`; `latents` [B, W, F]. Negatives are drawn evenly, with
    replacement, from the row's frames but the one to be told. ValueError for rows of too few frames.

    Source: van den Oord et al., "Representation learning with contrastive predictive coding" (2018), section 2.3;
    Schneider et al., "wav2vec" (2019), section 2.2, for negatives of the same recording.
    """
    batch_size, num_frames, num_steps, _ = predictions.shape
    if num_frames <= num_steps:
        raise ValueError(f"{num_frames} frames are too few to predict {num_steps} steps")
    frames_BFW = latents.transpose(1, 2)
    # Any other frame, by how far it is after the true one in a ring.
    offsets = torch.randint(1, num_frames, (batch_size, num_frames, NUM_NEGATIVES), generator=rng)
    places = (torch.arange(num_frames)[:, None] + offsets) % num_frames
    candidates = torch.cat([torch.arange(num_frames).expand(batch_size, 1, -1).transpose(1, 2), places], dim=2)
    index = candidates.to(latents.device).flatten(1)[:, :, None].expand(-1, -1, frames_BFW.shape[2])
    choices = frames_BFW.gather(1, index).unflatten(1, (num_frames, NUM_NEGATIVES + 1))  # [B, F, 1 + negatives, W]
    losses = []
    for step in range(num_steps):
        scores = torch.einsum("bfw,bfnw->bfn", predictions[:, : num_frames - 1 - step, step], choices[:, 1 + step :])
        losses.append(-scores.log_softmax(-1)[..., 0].mean())
    return torch.stack(losses).mean()


# The run


class _Batch(NamedTuple):
    """features [B, F, D], mask [B, F], num_frames [B], and targets where there are any."""

    features: Tensor
    mask: Tensor
    num_frames: Tensor
    targets: tuple[Tensor, ...]


class _Crops(torch.utils.data.Dataset[_Batch]):
    """Item i is the batch of step i of a round: crops and variants of them, drawn evenly by (seed, round, i)."""

    def __init__(
        self, heard: Sequence[Heard], settings: UnitTrainingSettings, turn: int, targets: Sequence[Tensor] | None = None
    ) -> None:
        self._heard, self._settings, self._turn, self._targets = heard, settings, turn, targets

    def __len__(self) -> int:
        return self._settings.max_steps

    def __getitem__(self, step: int) -> _Batch:
        rng = np.random.default_rng((self._settings.seed, self._turn, step))
        crops = rng.integers(len(self._heard), size=self._settings.batch_size).tolist()
        drawn = [self._heard[crop].variants for crop in crops]
        features = [variants[int(rng.integers(len(variants)))].float() for variants in drawn]
        num_frames = torch.tensor([len(feature) for feature in features])
        return _Batch(
            nn.utils.rnn.pad_sequence(features, batch_first=True),
            torch.arange(int(num_frames.max())) < num_frames[:, None],
            num_frames,
            tuple(self._targets[crop] for crop in crops) if self._targets is not None else (),
        )


def _finite(loss: Tensor, step: int) -> Tensor:
    if not torch.isfinite(loss):
        raise ValueError(f"the loss is not finite in step {step}")
    return loss


def _optimizer(parameters: Any, settings: UnitTrainingSettings) -> Any:
    optimizer = torch.optim.AdamW(parameters, settings.lr, weight_decay=0.01)

    def factor(step: int) -> float:
        rising = min(1.0, (step + 1) / max(1, settings.warmup_steps))
        return rising * 0.5 * (1.0 + math.cos(math.pi * min(1.0, step / settings.max_steps)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _fit(module: pl.LightningModule, crops: _Crops, settings: UnitTrainingSettings) -> None:
    trainer = pl.Trainer(
        max_steps=settings.max_steps,
        max_epochs=-1,
        accelerator="cpu",
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        callbacks=[_Progress(settings.max_steps)],
    )
    loader: Any = DataLoader(crops, batch_size=None, shuffle=False, num_workers=0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        trainer.fit(module, loader)
    module.eval()


class _Progress(pl.Callback):
    """The bar of all programs here."""

    def __init__(self, num_steps: int) -> None:
        self._num_steps = num_steps
        self._bar = progress_bar()
        self._advance: Callable[[int, int | None], None]

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._advance = self._bar.__enter__()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._advance(1, self._num_steps)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._bar.__exit__(None, None, None)
