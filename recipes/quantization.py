"""How a quantizer takes part in training: it is brought in gradually, loses stages at random, and learns once a step.

A decoder that never saw clean latents does not learn phase, so no item is quantized before `start_step`. Then latents
are collected until there are enough to set the codebooks, where the quantizer wants that; from there the share of
quantized items grows to all of them over `ramp_steps`.

Quantizer dropout, so that prefixes of the codes are models of lower rates; `QuantizationSettings.dropout` tells the
published schemes apart. What is dropped adds nothing to the latents, and has no loss.

Source: "item": Zeghidour et al., "SoundStream" (2021), section III-C. "first_items": DAC, dac/nn/quantize.py of
https://github.com/descriptinc/descript-audio-codec. "batch": Défossez et al., "High fidelity neural audio compression"
(2022), section 3.2; with all prefixes, audiocraft and Mimi. "nested": Kusupati et al., "Matryoshka representation
learning" (2022), section 3, which sums the losses of fixed prefixes. There each prefix has a cheap classifier of its
own; here it would have a decoding, and be heard by the discriminators, so every item takes one prefix, in turns: for
the cost of one prefix, an estimate without bias, and with less variance than independent draws have. "powers_of_two"
and "rounded_up": Bachmann et al., "FlexTok" (2025), https://github.com/apple/ml-flextok, where a learned token stands
for what is dropped.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from codec.quantizers.interface import Quantized, Quantizer
from recipes.distributed import rank_and_size, share_of
from recipes.settings import QuantizationSettings


class QuantizerTraining:
    """Quantizes in training. Draws depend on the generator that is given alone, and so on the step.

    `since`: the step in which the quantizer came in, None before that. One that is trained already is in from the
    first step on, with all items.
    """

    def __init__(self, quantizer: Quantizer, settings: QuantizationSettings, *, seed: int, is_trained: bool) -> None:
        self.quantizer = quantizer
        self.settings = settings
        self.seed = seed
        self.since: int | None = -settings.ramp_steps if is_trained else None
        self.prefixes = torch.tensor(sorted(settings.prefixes or quantizer.valid_num_quantizers))
        unknown = set(self.prefixes.tolist()) - set(quantizer.valid_num_quantizers)
        if unknown:
            raise ValueError(
                f"quantization.prefixes: {sorted(unknown)} are not of {quantizer.valid_num_quantizers}, the numbers of "
                "code rows that this model can have"
            )
        self._collected: list[Tensor] = []
        self._to_learn_from: list[Quantized] = []

    def __call__(self, latents: Tensor, step: int, draws: torch.Generator) -> tuple[Tensor, Quantized | None]:
        """Latents [B, D, F] -> what the decoder gets in this step, and what the quantizer made of all of them."""
        with torch.autocast(latents.device.type, enabled=False):
            latents = latents.float()
            if self.since is None and step >= self.settings.start_step:
                self._collect(latents.detach(), step)
            share = self.share_in(step)
            if share == 0.0:
                return latents, None
            quantized = self.quantizer(latents, num_quantizers=self.draw_prefixes(len(latents), draws))
            self._to_learn_from.append(quantized)
            is_quantized = share_of(torch.rand(len(latents) * rank_and_size()[1], generator=draws)) < share
            mixed = torch.where(is_quantized.to(latents.device).view(-1, 1, 1), quantized.latents, latents)
            return mixed, quantized

    def share_in(self, step: int) -> float:
        """The share of items to quantize in a step."""
        if self.since is None:
            return 0.0
        return min(1.0, (step - self.since + 1) / max(1, self.settings.ramp_steps))

    def draw_prefixes(self, batch_size: int, draws: torch.Generator) -> Tensor:
        """How many code rows each item [B] keeps: quantizer dropout."""
        num_items = batch_size * rank_and_size()[1]
        place, is_dropped = _draw(self.settings, len(self.prefixes), num_items, draws)
        return share_of(torch.where(is_dropped, self.prefixes[place], self.quantizer.valid_num_quantizers[-1]))

    def update(self) -> None:
        """Let the quantizer learn from the batches since the last call: once per step of the optimizer."""
        if self._to_learn_from:
            with torch.autocast(self._to_learn_from[0].inputs.device.type, enabled=False):
                self.quantizer.update(*self._to_learn_from)
            self._to_learn_from.clear()

    def _collect(self, latents: Tensor, step: int) -> None:
        """Set the codebooks in this step, if there are latents enough for it by now."""
        self._collected.append(latents)
        num_frames = sum(part.shape[0] * part.shape[2] for part in self._collected)
        if num_frames < self.quantizer.num_frames_to_initialize:
            return
        rows_ND = torch.cat([part.transpose(1, 2).flatten(0, 1) for part in self._collected])
        self.quantizer.initialize(rows_ND.t()[None], seed=self.seed)
        self._collected.clear()
        self.since = step

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs beside the quantizer's weights."""
        return {"since": self.since, "collected": self._collected, "quantizer": self.quantizer.training_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.since = state["since"]
        self._collected = list(state["collected"])
        self.quantizer.load_training_state(state["quantizer"])


def _draw(
    settings: QuantizationSettings, num_prefixes: int, num_items: int, draws: torch.Generator
) -> tuple[Tensor, Tensor]:
    """For each item, a place 0..num_prefixes-1 in the list of prefixes, and whether it takes part at all."""
    powers = torch.tensor([min(2**i, num_prefixes) - 1 for i in range((num_prefixes - 1).bit_length() + 1)])
    num_choices = len(powers) if settings.dropout == "powers_of_two" else num_prefixes
    place = torch.randint(num_choices, (num_items,), generator=draws)
    tossed = torch.rand(num_items, generator=draws)
    is_dropped = tossed < settings.dropout_share
    match settings.dropout:
        case "first_items":
            is_dropped = torch.arange(num_items) < int(num_items * settings.dropout_share)
        case "batch":
            place, is_dropped = place[:1].expand(num_items), is_dropped[:1].expand(num_items)
        case "nested":
            place = (place[0] + torch.arange(num_items)) % num_prefixes
        case "powers_of_two":
            place = powers[place]
        case "rounded_up":
            place = powers[torch.searchsorted(powers, place)]
    return place, is_dropped
