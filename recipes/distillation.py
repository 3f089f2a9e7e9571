"""Distillation: stages of the quantizer learn to say what frozen speech and language models say.

An objective is a teacher, a loss, and the stages that learn from it:

    distillation:
      speech:                                    # any name; its loss is called "distilled_speech"
        teacher: {type: speech_teacher, source: FOLDER, layers: 9}
        loss: {type: cosine_over_time}
        stages: [0]                              # each by itself, through a layer of its own; null: the sum of all
        weight: 120.0
      text:
        teacher: {type: text_teacher, source: FOLDER, words: FILE}
        alignment: {type: forced}                      # of word pieces with frames: recipes/alignments.py
        ...

What a stage adds to the latents, its entry, is passed through a linear layer ("head") to the teacher's dims and
compared there. Its gradient reaches the encoder for every stage alike, by the straight-through estimator on the
latents: as published, stages after the first taught the encoder nothing. Until the quantizer is in use the latents
themselves stand for its stages, so that an encoder hears its teachers early.

Heads learn with the codec, by its optimizer, and are no part of the model that is exported.

Source: as in `recipes.distillation_losses` and `recipes.alignments`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from codec.config import build, from_dict
from codec.quantizers.interface import Quantized, Quantizer
from recipes import speech_teacher as _speech_teacher  # noqa: F401  (registers its configuration)
from recipes import text_teacher as _text_teacher  # noqa: F401  (registers its configuration)
from recipes.alignments import Alignment, AlignmentConfig
from recipes.data import Batch, SpeechData
from recipes.distillation_losses import DistillationLoss, DistillationLossConfig, frame_cosines
from recipes.settings import ObjectiveSettings
from recipes.targets import Pieces, Targets, TeacherConfig


@runtime_checkable
class FrameTeacher(Protocol):
    """A teacher that says something of every frame."""

    feature_dim: int
    num_mixed_layers: int | None

    def check(self, data: SpeechData) -> None:
        """ValueError, before the first step, for whatever cannot be."""

    def targets(self, batch: Batch, *, sample_rate_hz: int, num_frames: int, frame_rate_hz: float) -> Targets:
        """For the crops of a batch [B, C, T]: what its frames should know."""


@runtime_checkable
class PieceTeacher(Protocol):
    """A teacher that says something of every word piece; an alignment brings it to frames."""

    feature_dim: int
    num_mixed_layers: int | None

    def check(self, data: SpeechData) -> None:
        """ValueError, before the first step, for whatever cannot be."""

    def pieces(self, batch: Batch, *, seconds: float) -> Pieces:
        """For the crops of a batch, each of so many seconds: what is said in them."""


@dataclass(frozen=True)
class Distilled:
    """What came of a step: losses to be weighted, and values to be logged."""

    losses: dict[str, Tensor]
    logged: dict[str, Tensor]


class Objective(nn.Module):
    """One teacher and what learns from it. The teacher is frozen and stays out of state dicts."""

    def __init__(self, name: str, settings: ObjectiveSettings, quantizer: Quantizer, latent_dim: int) -> None:
        super().__init__()
        path = f"distillation.{name}"
        self.settings = settings
        self.loss: DistillationLoss = _built(settings.loss, DistillationLossConfig, f"{path}.loss")
        # Not a submodule: its weights are neither trained nor saved.
        self._teacher = (_built(settings.teacher, TeacherConfig, f"{path}.teacher"),)
        is_text = isinstance(self.teacher, PieceTeacher)
        if is_text and settings.alignment is None:
            raise ValueError(f"{path}.alignment is needed: its teacher speaks of words, not of frames")
        if settings.alignment is not None and not is_text:
            raise ValueError(f"{path}.alignment: its teacher speaks of frames already")
        num_stages = len(quantizer.valid_num_quantizers)
        self.stages = settings.stages
        if self.stages is not None and not set(self.stages) <= set(range(num_stages)):
            raise ValueError(f"{path}.stages={list(self.stages)}: this quantizer has stages 0 to {num_stages - 1}")
        feature_dim = self.teacher.feature_dim
        self.alignment: Alignment | None = None
        if settings.alignment is not None:
            dims = (latent_dim, feature_dim)
            self.alignment = _built(settings.alignment, AlignmentConfig, f"{path}.alignment", *dims)
        self.heads = nn.ModuleList(
            nn.Linear(len(range(latent_dim)[_dims_of(quantizer, stage)]), feature_dim)
            for stage in self.stages or (None,)
        )
        mixed = self.teacher.num_mixed_layers
        self.layer_logits = nn.Parameter(torch.zeros(mixed)) if mixed else None

    @property
    def teacher(self) -> Any:
        """What is learned from."""
        return self._teacher[0]

    def factor_in(self, step: int) -> float:
        """What the weight is multiplied by in a step: 0 before `start_step`, then a rise over `ramp_steps`."""
        since = step - self.settings.start_step
        if since < 0 or (self.settings.stop_step is not None and step >= self.settings.stop_step):
            return 0.0
        return min(1.0, (since + 1) / max(1, self.settings.ramp_steps))

    def forward(
        self, batch: Batch, students: Students, *, sample_rate_hz: int, frame_rate_hz: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, unweighted; `cosine`, the mean over frames, or NaN; `share`, of frames that have a target."""
        frames = students.latents
        targets = self._targets(batch, frames, sample_rate_hz=sample_rate_hz, frame_rate_hz=frame_rate_hz)
        values, mask = targets.values, targets.mask
        if self.layer_logits is not None:
            # What has no target must not reach the gradient of the weights, be it NaN.
            values = torch.where(mask[:, :, None, None], values, 0.0)
            values = torch.einsum("bfld,l->bfd", values, self.layer_logits.softmax(0))
        losses, cosines = [], []
        for head, stage in zip(self.heads, self.stages or (None,), strict=True):
            latents, is_there = students.stage(stage)
            said = head(latents)
            present = mask & is_there
            losses.append(self.loss(said, values, present))
            cosine = frame_cosines(said.detach(), values.detach(), present)
            cosines.append(cosine.sum() / present.sum())
        logged = {"cosine": torch.stack(cosines).nanmean(), "share": mask.float().mean()}
        return torch.stack(losses).mean(), logged

    def _targets(self, batch: Batch, frames: Tensor, *, sample_rate_hz: int, frame_rate_hz: float) -> Targets:
        if self.alignment is None:
            found = self.teacher.targets(
                batch, sample_rate_hz=sample_rate_hz, num_frames=frames.shape[1], frame_rate_hz=frame_rate_hz
            )
            return Targets(found.values.to(frames.device), found.mask.to(frames.device))
        pieces: Pieces = self.teacher.pieces(batch, seconds=batch.audio.shape[2] / sample_rate_hz)
        moved = Pieces(*(part.to(frames.device) for part in (pieces.values, pieces.kinds, pieces.spans)))
        aligned: Targets = self.alignment(moved, frames, frame_rate_hz)
        return aligned


class Students:
    """What stages of the quantizer say of a batch, frame by frame [B, F, E], with a gradient that reaches the encoder.

    `latents` [B, E, F] as they came from the encoder; `quantized` is None while the quantizer is not in use.
    """

    def __init__(self, quantizer: Quantizer, latents: Tensor, quantized: Quantized | None) -> None:
        self._quantizer, self._quantized = quantizer, quantized
        self.latents = latents.float().transpose(1, 2)

    def stage(self, number: int | None) -> tuple[Tensor, Tensor]:
        """Frames [B, F, E] of one stage, or with None of the sum of all that are there, and which are there [B, F]."""
        dims = _dims_of(self._quantizer, number)
        if self._quantized is None:
            return self.latents[:, :, dims], torch.ones_like(self.latents[:, :, 0], dtype=torch.bool)
        codes = self._quantized.codes
        if number is None:
            return self._quantized.latents.transpose(1, 2), codes[:, 0] >= 0
        said = self._quantizer.through_stage(self.latents.transpose(1, 2), codes, number).transpose(1, 2)
        last_row = self._quantizer.valid_num_quantizers[number] - 1
        return said[:, :, dims], codes[:, last_row] >= 0


def _dims_of(quantizer: Quantizer, stage: int | None) -> slice:
    return slice(None) if stage is None else quantizer.dims_of_stage(stage)


class Distillation(nn.Module):
    """All objectives of a run, by name. The names of their losses are `distilled_<name>`."""

    def __init__(
        self, settings: dict[str, ObjectiveSettings], quantizer: Quantizer, latent_dim: int, *, frame_rate_hz: float
    ) -> None:
        super().__init__()
        for name in settings:
            if not name or "." in name or hasattr(nn.ModuleDict(), name):
                raise ValueError(f"distillation.{name}: {name!r} cannot be the name of an objective")
        self.objectives = nn.ModuleDict(
            {name: Objective(name, objective, quantizer, latent_dim) for name, objective in settings.items()}
        )
        self.frame_rate_hz = frame_rate_hz

    def check(self, data: SpeechData) -> None:
        """ValueError for whatever a teacher finds wrong with the data, before the first step."""
        for name, objective in self._named():
            try:
                objective.teacher.check(data)
            except ValueError as error:
                raise ValueError(f"distillation.{name}: {error}") from error

    def weights_in(self, step: int) -> dict[str, float]:
        """The weights of the losses of a step."""
        return {
            f"distilled_{name}": objective.settings.weight * objective.factor_in(step)
            for name, objective in self._named()
        }

    def forward(self, batch: Batch, students: Students, *, step: int, sample_rate_hz: int) -> Distilled:
        """The losses of a step; those that weigh nothing in it are left out, and their teachers not asked."""
        losses: dict[str, Tensor] = {}
        logged: dict[str, Tensor] = {}
        with torch.autocast(batch.audio.device.type, enabled=False):
            for name, objective in self._named():
                if not objective.settings.weight * objective.factor_in(step):
                    continue
                loss, values = objective(
                    batch, students, sample_rate_hz=sample_rate_hz, frame_rate_hz=self.frame_rate_hz
                )
                losses[f"distilled_{name}"] = loss
                logged |= {f"distillation/{name}_{key}": value for key, value in values.items()}
        return Distilled(losses, logged)

    def _named(self) -> list[tuple[str, Objective]]:
        return [(name, module) for name, module in self.objectives.items() if isinstance(module, Objective)]


def _built(values: Any, config_class: type, path: str, *context: Any) -> Any:
    config = from_dict(values, path)
    if not isinstance(config, config_class):
        raise ValueError(f"{path}.type: {values['type']!r} does not fit here")
    try:
        return build(config, *context)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
