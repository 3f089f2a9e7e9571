"""How a codec with global codes learns voices: whom it hears, and what its decoder is told in each step.

The speaker encoder hears the reference of each item, another stretch of the same recording (`data.reference_samples`),
or else the item itself. What it makes of it goes through the voice quantizer to the decoder, and the gradient of
everything that is heard comes back the same way: no speaker has a label.

In the first steps (`warmup_steps`) the x-vector, as it is before the bottleneck, stands for the voice vector. After
them the loss "speaker" is the mean square of the difference between the two, which teaches the voice vector alone.

`disguise` keeps the voice out of row 0: it hears spectra that are stretched by a factor drawn for every item, so that
pitch and formants tell nothing of the speaker, while the decoder has to give the real ones back.

Source: x-vectors first, then both drawn together: Spark-TTS (Wang et al. 2025), BiCodec's training, as copies of its
configuration have it. Disguise: Choi et al., "Neural analysis and synthesis" (2021), section 3.1, in a simpler form.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from codec.models.bicodec import BiCodec
from codec.models.voice import VoicedCodec
from recipes.data import Batch
from recipes.distributed import rank_and_size, share_of
from recipes.settings import VoiceSettings


class VoiceTraining:
    """Reconstructs in training. ValueError for settings that the codec cannot have."""

    def __init__(self, codec: VoicedCodec, settings: VoiceSettings | None) -> None:
        self.codec = codec
        self.settings = settings or VoiceSettings()
        self.is_disguised = self.settings.disguise != (1.0, 1.0)
        if self.is_disguised and not codec.is_disguisable:
            raise ValueError("voice.disguise: this model cannot hide voices from row 0; leave it out")

    @property
    def weights(self) -> dict[str, float]:
        """The weights of the losses that `reconstruct` gives, but the model's own, which are in `loss.weights`."""
        return {"speaker": self.settings.speaker_weight}

    def reconstruct(
        self, batch: Batch, quantize: Callable[[Tensor], Tensor], step: int, draws: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """A batch -> audio [B, C, T] as the codec gives it back in the voices of its references, and losses."""
        voice, losses = self.voices(batch.audio if batch.reference is None else batch.reference, step)
        disguise = self._draw_disguise(len(batch.audio), draws)
        disguise = None if disguise is None else disguise.to(batch.audio.device)
        if isinstance(self.codec, BiCodec):
            audio, own_losses = self.codec.reconstruct_for_training(
                batch.audio, quantize, voice, disguise, surround=batch.surround
            )
        else:
            audio, own_losses = self.codec.reconstruct_for_training(batch.audio, quantize, voice, disguise)
        return audio.float(), losses | own_losses

    def voices(self, references: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """References [B, C, R] -> what the decoder is told of them [B, V], and losses."""
        heard = self.codec.hear_voice(self.codec.levelled(references))
        if step < self.settings.warmup_steps:
            return heard.x_vector, {}
        with torch.autocast(references.device.type, enabled=False):
            voice = self.codec.voice_vector(self.codec.voice_quantizer(heard.latents.float()).latents)
            return voice, {"speaker": F.mse_loss(voice, heard.x_vector.detach().float())}

    def _draw_disguise(self, batch_size: int, draws: torch.Generator) -> Tensor | None:
        if not self.is_disguised:
            return None
        low, high = map(math.log, self.settings.disguise)
        return share_of(torch.rand(batch_size * rank_and_size()[1], generator=draws) * (high - low) + low).exp()
