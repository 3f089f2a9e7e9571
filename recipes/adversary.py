"""Discriminators in a run: when they learn, when they are heard, what they hear, and the losses on both sides."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from recipes.discriminators import Discriminators, alternate, random_crops
from recipes.losses import adversarial_loss, discriminator_loss, feature_matching_loss
from recipes.settings import AdversarySettings


class Heard(NamedTuple):
    """What discriminators hear in one step: recordings and decoded audio [B, C, T'], and which of them listen."""

    real: Tensor
    fake: Tensor
    active: tuple[int, ...] | None


class Adversary(nn.Module):
    """Discriminators and their part of `AdversarySettings`; the losses are weighted, and named as the logs name them.

    The generator's losses leave no gradients in discriminators, and these are spared the cost of them.
    """

    def __init__(self, settings: AdversarySettings) -> None:
        super().__init__()
        self.settings = settings
        self.discriminators = Discriminators(settings.discriminators)
        num_members = len(self.discriminators.members)
        if settings.num_active is not None and not 1 <= settings.num_active <= num_members:
            raise ValueError(f"adversary.num_active={settings.num_active} is not in 1..{num_members}")

    @property
    def min_samples(self) -> int:
        """The shortest crops that the discriminators can judge."""
        return self.discriminators.min_samples

    def learns_in(self, step: int) -> bool:
        """Whether the discriminators take a step of their own."""
        since = step - self.settings.start_step
        return since >= 0 and since % self.settings.every_n_steps == 0

    def is_heard_in(self, step: int) -> bool:
        """Whether the codec learns from them."""
        return step >= self.settings.start_step + self.settings.head_start_steps

    def listen(self, audio: Tensor, estimate: Tensor, step: int, draws: torch.Generator) -> Heard:
        """Both signals [B, C, T] as this step has them heard."""
        signals = [audio, estimate]
        if self.settings.crop_samples is not None:
            signals = random_crops(signals, self.settings.crop_samples, generator=draws)
        active = None
        if self.settings.num_active is not None:
            # Turns are counted in steps of learning, or some discriminators would be heard and never learn.
            turn = max(0, step - self.settings.start_step) // self.settings.every_n_steps
            active = alternate(len(self.discriminators.members), self.settings.num_active, turn)
        return Heard(signals[0], signals[1], active)

    def own_loss(self, heard: Heard) -> Tensor:
        """What the discriminators minimise."""
        self.discriminators.requires_grad_(True)
        real = self.discriminators(heard.real, heard.active)
        fake = self.discriminators(heard.fake.detach(), heard.active)
        return discriminator_loss(real, fake, self.settings.loss, reduction=self.settings.reduction)

    def losses_for_codec(self, heard: Heard) -> dict[str, Tensor]:
        """What the codec minimises, unweighted: `adversarial` and `feature`."""
        settings = self.settings
        self.discriminators.requires_grad_(False)
        with torch.no_grad():
            real = self.discriminators(heard.real, heard.active)
        fake = self.discriminators(heard.fake, heard.active)
        return {
            "adversarial": adversarial_loss(fake, settings.loss, reduction=settings.reduction),
            "feature": feature_matching_loss(
                real, fake, relative=settings.relative_features, reduction=settings.reduction
            ),
        }
