"""Codecs that keep the voice apart: a handful of global codes per recording, beside the codes of its frames.

    reference -> speaker encoder -> voice latents [B, E, L] -> voice quantizer -> global codes [B, L] -> voice [B, V]

Whoever decodes may give the global codes of another recording: what is said stays, the voice changes.

Letters: B batch, C channels, T samples, D dims of the latents, F frames, E dims of the voice latents, L global codes,
V dims of the voice vector.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from codec.models.interface import Codec
from codec.quantizers.interface import Quantizer
from codec.tokens import Tokens


@dataclass(frozen=True)
class Voice:
    """What a speaker encoder makes of references.

    x_vector: [B, V], before the bottleneck: in the first steps of training it stands for the voice vector.
    latents: [B, E, L], what the voice quantizer takes.
    """

    x_vector: Tensor
    latents: Tensor


class VoicedCodec(Codec):
    """Base of codecs with global codes. Their decoders take a voice vector beside the latents.

    `num_global_codes`: L. `voice_samples`: of a recording without a reference, the beginning that says the voice.
    `voice_quantizer`: has one row of codes, and the L global codes are its frames. `num_semantic_quantizers`: how many
    rows of codes know (nearly) nothing of the voice; more than these carry the speaker along.
    """

    voice_quantizer: Quantizer
    voice_samples: int
    num_semantic_quantizers: int = 1
    own_losses: tuple[str, ...] = ()  # the names of what `reconstruct_for_training` adds to the losses
    is_disguisable: bool = False  # whether `analyze` can have voices disguised from the encoder of row 0

    @property
    def global_codebook_size(self) -> int:
        """How many values a global code has."""
        return self.voice_quantizer.codebook_sizes[0]

    def levelled(self, reference: Tensor) -> Tensor:
        """Whole references [B, C, T], as loud as `hear_voice` is to hear them; here as they are."""
        return reference

    @property
    def num_global_bits(self) -> int:
        """Bits of a recording's global codes, packed."""
        return self.num_global_codes * (self.global_codebook_size - 1).bit_length()

    @abstractmethod
    def hear_voice(self, reference: Tensor) -> Voice:
        """References [B, C, T], all of full length -> their voices; differentiable."""

    @abstractmethod
    def voice_vector(self, latents: Tensor) -> Tensor:
        """Voice latents [B, E, L], quantized or not -> voice vectors [B, V]; differentiable."""

    @abstractmethod
    def analyze(self, audio: Tensor, disguise: Tensor | None = None) -> Tensor:
        """As `Codec.analyze`. With `disguise` [B], where `is_disguisable`, row 0 hears other voices say the same."""

    @abstractmethod
    def synthesize(self, latents: Tensor, num_samples: int, voice: Tensor | None = None) -> Tensor:
        """Latents [B, D, F] and voice vectors [B, V] -> audio [B, C, num_samples]."""

    @torch.inference_mode()
    def encode(
        self,
        audio: Tensor,
        num_samples: Tensor | None = None,
        *,
        num_quantizers: int | None = None,
        global_codes: Tensor | None = None,
    ) -> Tokens:
        """As `Codec.encode`; the voice is that of `global_codes` [B, L], else of the recordings themselves."""
        # Of the codes themselves the other base class knows, one that streams or one that does not.
        tokens = super().encode(audio, num_samples, num_quantizers=num_quantizers)  # type: ignore[safe-super]
        if global_codes is None:
            global_codes = self.encode_global(audio, tokens.num_samples)
        return replace(tokens, global_codes=self.checked_global_codes(global_codes, len(tokens.codes)))

    def reconstruct(
        self,
        audio: Tensor,
        quantize: Callable[[Tensor], Tensor],
        voice: Tensor | None = None,
        disguise: Tensor | None = None,
    ) -> Tensor:
        """As `Codec.reconstruct`, in a given voice [B, V]; without one, in the voice of the audio, quantized."""
        if voice is None:
            voice = self.voice_of(self.encode_global(audio))
        return self.synthesize(quantize(self.analyze(audio, disguise)), audio.shape[2], voice)

    def reconstruct_for_training(
        self, audio: Tensor, quantize: Callable[[Tensor], Tensor], voice: Tensor, disguise: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """As `reconstruct`, and the losses that a model of this family has of its own, unweighted."""
        return self.reconstruct(audio, quantize, voice, disguise), {}

    @torch.inference_mode()
    def encode_global(self, reference: Tensor, num_samples: Tensor | None = None) -> Tensor:
        """References [B, C, T] -> global codes int64 [B, L]. Each is heard alone, so that none depends on the others.

        Only the first `voice_samples` samples are heard. ValueError as for `encode`.
        """
        reference, num_samples = self._checked_audio(reference, num_samples)
        codes = []
        for row, length in zip(reference, num_samples.tolist(), strict=True):
            heard = self.hear_voice(self.levelled(row[None, :, :length])[:, :, : self.voice_samples])
            codes.append(self.voice_quantizer.encode(heard.latents)[:, 0])
        return torch.cat(codes) if codes else torch.zeros(0, self.num_global_codes, dtype=torch.int64)

    def voice_of(self, global_codes: Tensor) -> Tensor:
        """Global codes [B, L] -> voice vectors [B, V], each by itself, so that none depends on the others."""
        latents = self.voice_quantizer.decode(global_codes[:, None])
        return torch.cat([self.voice_vector(row[None]) for row in latents])

    def checked_global_codes(self, global_codes: Tensor | None, batch_size: int) -> Tensor:
        """These codes on this codec's device; ValueError where they are missing, or none of this codec's."""
        wanted = f"int64 [{batch_size}, {self.num_global_codes}] in 0..{self.global_codebook_size - 1}"
        if global_codes is None:
            raise ValueError(f"this codec needs global codes, {wanted}: they say the voice")
        if global_codes.dtype != torch.int64 or global_codes.shape != (batch_size, self.num_global_codes):
            raise ValueError(f"global_codes must be {wanted}, got {global_codes.dtype} {tuple(global_codes.shape)}")
        if batch_size and not 0 <= int(global_codes.min()) <= int(global_codes.max()) < self.global_codebook_size:
            raise ValueError(f"global_codes must be {wanted}, got {int(global_codes.min())}..{int(global_codes.max())}")
        return global_codes.to(self.quantizer.device)


def voiced(codec: Codec) -> VoicedCodec:
    """The codec itself, where it keeps the voice apart; ValueError where it does not."""
    if not isinstance(codec, VoicedCodec):
        name = codec.name or type(codec).__name__
        raise ValueError(f"{name} does not keep the voice apart: that takes a model with global codes")
    return codec
