"""Semantic codes, global codes for the voice, and acoustic refinement: the multirate family, for language models.

    audio -> log-mel -> blocks at 50 Hz -> semantic latents -> row 0 of the codes        (what is said)
    audio -> encoder of the multirate family -> acoustic latents -> the rows after it    (how exactly it sounded)
    the first seconds, or a reference -> speaker encoder -> global codes                 (who says it)
    codes -> latents -> decoder of the multirate family, every rate of it told the voice -> audio, where refined
                           '-> pitch, and gains of pulses and noise (codec.layers.source) -> audio, added to it

Row 0 and the global codes are enough to decode: that is what a language model writes. Every further row refines, and
carries more of the speaker. One file serves both.

Codes of row 0 say nothing of phase, and a network without memory cannot go on with a period: what it gives back
whispers. So the decoder also says how a train of pulses and noise are to be shaped, and a layer that keeps the phase
makes them. Frames of row 0 alone are nothing else; where there are more rows the decoder's own waveform is added, and
it learns to need no pulses. Their phase reaches back to the beginning, so a place in a file is only reached by decoding
all that comes before.

All of it but the speaker encoder is causal and made of layers whose rows are exact (`codec.kernels.row_linear`), so a
stream gives the same bits as a file. The speaker encoder hears one recording at a time, as a whole.

The semantic encoder hears formants and no harmonics (`semantic_cepstra`), and while training voices whose spectra are
stretched at random (`disguise`), so that it cannot tell whose they are; the melody of speech is lost to it as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codec.config import build, register
from codec.layers.causal import CausalLayer, ConvNeXtBlock, Downsample, Linear, Sequential, State, Upsample
from codec.layers.pitch import track_pitch
from codec.layers.source import HIGHEST_HZ, LOWEST_HZ, HarmonicNoise
from codec.layers.spectra import LogMel
from codec.models.interface import UNLIMITED
from codec.models.multirate import MultirateConfig, MultirateFamily, decoder_layers, encoder_layers
from codec.models.speaker import SpeakerEncoder
from codec.models.voice import Voice, VoicedCodec
from codec.quantizers.interface import QuantizerConfig
from codec.quantizers.scalar import FSQ, FSQConfig
from codec.quantizers.semantic import SemanticAcousticConfig, SemanticAcousticQuantizer

_FIRST_LOG_GAIN, _MOST_LOG_GAIN = -3.0, 3.0
_LEAST_REFINEMENT = 1e-3  # of latents of unit scale; below it is what rounding leaves of nothing
_MELS_PER_FRAME, _NUM_MELS, _WINDOW_HOPS = 2, 80, 3


@dataclass(frozen=True, kw_only=True)
class SemanticGlobalConfig(MultirateConfig):
    """`MultirateConfig`, and the semantic encoder and the voice beside it.

    `quantizer` is a `SemanticAcousticConfig`. `num_global_codes` codes of `voice_levels` each say the voice; they are
    made of the first `voice_samples` samples where no reference is given. `voice_dim`: V, `speaker_channels`: the width
    of the speaker encoder. `semantic_cepstra`: how much of a spectrum the semantic encoder hears, see `LogMel`. Pulses
    and noise are shaped in `source_bands` bands.
    """

    quantizer: QuantizerConfig
    semantic_channels: int = 192
    semantic_blocks: int = 6
    semantic_cepstra: int = 16
    num_global_codes: int = 32
    voice_levels: tuple[int, ...] = (4, 4, 4, 4, 4, 4)
    voice_dim: int = 192
    voice_samples: int = 48000
    speaker_channels: int = 128
    source_bands: int = 40

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.quantizer, SemanticAcousticConfig):
            raise ValueError("quantizer must be of type 'semantic_acoustic': row 0 has an encoder of its own")
        for name in (
            "semantic_channels",
            "semantic_blocks",
            "num_global_codes",
            "voice_dim",
            "voice_samples",
            "source_bands",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not 1 <= self.semantic_cepstra <= _NUM_MELS:
            raise ValueError(f"semantic_cepstra={self.semantic_cepstra} is not in 1..{_NUM_MELS}")
        if self.speaker_channels < 8:
            raise ValueError(f"speaker_channels must be 8 or more, got {self.speaker_channels}")
        if not self.strides:
            raise ValueError("strides must name at least one: pulses are shaped at the second fastest rate")
        if self.patch_samples * math.prod(self.strides) % _MELS_PER_FRAME:
            raise ValueError(f"a frame must be a multiple of {_MELS_PER_FRAME} samples")


@register("semantic_global", SemanticGlobalConfig)
class SemanticGlobalCodec(VoicedCodec, MultirateFamily):
    """A streamable mono codec with global codes; see `VoicedCodec` and `StreamableCodec`."""

    config: SemanticGlobalConfig
    is_disguisable = True
    own_losses = ("pitch",)
    quantizer: SemanticAcousticQuantizer
    voice_quantizer: FSQ

    def __init__(self, config: SemanticGlobalConfig) -> None:
        super().__init__(config)
        assert isinstance(config.quantizer, SemanticAcousticConfig)
        acoustic_dim = config.quantizer.acoustic.latent_dim
        self.semantic_encoder = _SemanticEncoder(config, self.hop_length, config.quantizer.semantic.latent_dim)
        self.encoder = Sequential(encoder_layers(config, acoustic_dim))
        self.quantizer = build(config.quantizer)
        self.quantizer.check_framewise()
        self.decoder = _VoicedDecoder(decoder_layers(config, acoustic_dim), config)
        self.speaker_encoder = SpeakerEncoder(
            sample_rate_hz=config.sample_rate_hz, channels=config.speaker_channels, x_vector_dim=config.voice_dim
        )
        num_levels = len(config.voice_levels)
        self.to_voice_latents = nn.Linear(config.voice_dim, config.num_global_codes * num_levels)
        nn.init.normal_(self.to_voice_latents.weight, std=config.voice_dim**-0.5)
        self.voice_quantizer = build(FSQConfig(latent_dim=num_levels, num_stages=1, levels=config.voice_levels))
        self.from_voice_latents = Linear(config.num_global_codes * num_levels, config.voice_dim)
        self.num_global_codes = config.num_global_codes
        self.voice_samples = config.voice_samples
        self.decode_frames_before = UNLIMITED
        self.codebook_sizes = self.quantizer.codebook_sizes
        self.valid_num_quantizers = self.quantizer.valid_num_quantizers

    # Steps

    @torch.inference_mode()
    def encode_init(self, batch_size: int) -> State:
        return self._encode_state(batch_size)

    @torch.inference_mode()
    def decode_init(self, batch_size: int, global_codes: Tensor | None = None) -> State:
        return self.decoder.voiced_state(self.voice_of(self.checked_global_codes(global_codes, batch_size)))

    @torch.inference_mode()
    def decode_step(self, codes: Tensor, state: State) -> tuple[Tensor, State]:
        audio, _, state = self.decoder.step(*self._told(self.quantizer.decode(self._checked_codes(codes))), state)
        return audio[:, None], state

    # Networks, shared by training and inference

    def analyze(self, audio: Tensor, disguise: Tensor | None = None) -> Tensor:
        """As `MultirateCodec.analyze`, latents [B, D, F + delay]; `disguise` [B] as `LogMel` has its `stretch`."""
        return self.encode_latents(self._whole_frames(audio), self._encode_state(len(audio)), disguise)[0]

    def synthesize(self, latents: Tensor, num_samples: int, voice: Tensor | None = None) -> Tensor:
        return self._synthesize(latents, num_samples, voice, None)[0]

    def reconstruct_for_training(
        self, audio: Tensor, quantize: Callable[[Tensor], Tensor], voice: Tensor, disguise: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """As `VoicedCodec` says. The pulses have the pitch of the audio where it is voiced, so that they can fit.

        The loss "pitch" is the mean absolute difference of the logarithms of that pitch and of the decoder's own.
        """
        size = self.decoder.source.row_samples
        # A row of pulses is heard `delay_rows` later, and the audio `decode_delay_samples` later still.
        center = self.decoder.source.delay_rows * size - self.decode_delay_samples + size // 2
        num_samples = audio.shape[2]
        padded = F.pad(audio[:, 0], (0, self.decode_delay_samples + -num_samples % self.hop_length))
        with torch.autocast(audio.device.type, enabled=False):
            tracked, is_voiced = track_pitch(
                padded, sample_rate_hz=self.sample_rate_hz, hop_samples=size, first_center=center
            )
        heard, own = self._synthesize(
            quantize(self.analyze(audio, disguise)), num_samples, voice, torch.where(is_voiced, tracked, torch.nan)
        )
        error = torch.where(is_voiced, (own.log() - tracked.log()).abs(), 0.0)
        return heard, {"pitch": error.sum() / is_voiced.sum().clamp_min(1)}

    def _synthesize(
        self, latents: Tensor, num_samples: int, voice: Tensor | None, pitch_hz: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Audio [B, 1, num_samples], and the decoder's own pitch [B, R]; see `_VoicedDecoder.step`."""
        if voice is None:
            raise ValueError("this codec needs a voice to speak with")
        audio, own, _ = self.decoder.step(*self._told(latents), self.decoder.voiced_state(voice), pitch_hz)
        return audio[:, None, self.decode_delay_samples :][:, :, :num_samples], own

    def hear_voice(self, reference: Tensor) -> Voice:
        x_vector = self.speaker_encoder(reference[:, 0]).float()
        x_vector = F.layer_norm(x_vector, x_vector.shape[-1:])
        latents = self.to_voice_latents(x_vector).float()
        return Voice(x_vector, latents.unflatten(1, (len(self.config.voice_levels), self.num_global_codes)))

    def voice_vector(self, latents: Tensor) -> Tensor:
        vector: Tensor = self.from_voice_latents(latents.flatten(1)).float()
        return vector

    def _encode_state(self, batch_size: int) -> State:
        return self.semantic_encoder.init_state(batch_size), self.encoder.init_state(batch_size)

    def encode_latents(self, audio: Tensor, state: State, disguise: Tensor | None = None) -> tuple[Tensor, State]:
        """Audio [B, F * hop] -> latents [B, D, F]; semantic and acoustic ones have unit scale each."""
        semantic_state, acoustic_state = state
        semantic, semantic_state = self.semantic_encoder.step(audio, semantic_state, disguise)
        acoustic, acoustic_state = self.encoder.step(self._patches(audio), acoustic_state)
        parts = [F.layer_norm(rows.float(), rows.shape[-1:]) for rows in (semantic, acoustic)]
        return torch.cat(parts, dim=2).transpose(1, 2), (semantic_state, acoustic_state)

    def _told(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Of latents [B, D, F], what the decoder gets: rows [B, F, A], and which frames are refined, bool [B, F]."""
        refinement = self.quantizer.refinement(latents)
        return latents[:, self.quantizer.dims_of_stage(1)].transpose(1, 2), refinement.abs().amax(1) > _LEAST_REFINEMENT


class _SemanticEncoder(nn.Module):
    """Audio [B, F * hop] -> rows [B, F, S]: log-mel at twice the frame rate, then blocks at the frame rate."""

    def __init__(self, config: SemanticGlobalConfig, hop_length: int, latent_dim: int) -> None:
        super().__init__()
        self.mel_hop_samples = hop_length // _MELS_PER_FRAME
        self.mels = LogMel(
            sample_rate_hz=config.sample_rate_hz,
            hop_samples=self.mel_hop_samples,
            window_hops=_WINDOW_HOPS,
            num_mels=_NUM_MELS,
            num_cepstra=config.semantic_cepstra,
        )
        channels, num_blocks = config.semantic_channels, config.semantic_blocks
        sizes = {"kernel_size": config.kernel_size, "expansion": config.expansion, "num_blocks": num_blocks}
        blocks = [ConvNeXtBlock(channels, **sizes) for _ in range(num_blocks)]
        self.layers = Sequential(
            [Downsample(_NUM_MELS, channels, _MELS_PER_FRAME), *blocks, Linear(channels, latent_dim)]
        )

    def init_state(self, batch_size: int) -> State:
        return self.mels.init_state(batch_size), self.layers.init_state(batch_size)

    def step(self, audio: Tensor, state: State, stretch: Tensor | None) -> tuple[Tensor, State]:
        mel_state, state = state
        hops = audio.unflatten(1, (audio.shape[1] // self.mel_hop_samples, self.mel_hop_samples))
        mels, mel_state = self.mels.step(hops, mel_state, stretch)
        rows, state = self.layers.step(mels, state)
        return rows, (mel_state, state)


class _VoicedDecoder(nn.Module):
    """The decoder of the multirate family, whose rows are scaled and shifted by the voice wherever a rate begins.

    The names of its layers are those of that family, so weights of one may begin the other. Scales and shifts are part
    of the state: they are computed once for a stream. Pulses and noise are shaped by the rows of the second fastest
    rate. Frames that are not refined have nothing else.
    """

    def __init__(self, layers: list[CausalLayer], config: SemanticGlobalConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        # Before the first block of each rate: after the first linear layer, and after each upsampling.
        self._places = [1, *(place + 1 for place, layer in enumerate(layers) if isinstance(layer, Upsample))]
        self.voicing = nn.ModuleList(
            Linear(config.voice_dim, 2 * channels) for channels in reversed(config.decoder_channels)
        )
        for layer in cast("Iterator[Linear]", self.voicing):
            nn.init.zeros_(layer.weight)
        self._last_upsampling = self._places[-1] - 1
        self.delay_frames = config.decode_delay_frames
        self.source = HarmonicNoise(
            sample_rate_hz=config.sample_rate_hz,
            row_samples=config.patch_samples * config.strides[0],
            num_bands=config.source_bands,
        )
        self.source_norm = nn.LayerNorm(config.decoder_channels[1])
        self.shape_source = Linear(config.decoder_channels[1], 1 + 2 * config.source_bands)
        with torch.no_grad():
            self.shape_source.weight.mul_(0.1)
            assert self.shape_source.bias is not None
            self.shape_source.bias.fill_(_FIRST_LOG_GAIN)
            self.shape_source.bias[0] = 0.0

    def voiced_state(self, voice: Tensor) -> State:
        """The state of decoders with these voices [B, V], before any latents."""
        voicing = tuple(layer(voice).float() for layer in cast("Iterator[Linear]", self.voicing))
        before = tuple(layer.init_state(len(voice)) for layer in cast("Iterator[CausalLayer]", self.layers))
        was_refined = torch.zeros(len(voice), self.delay_frames, dtype=torch.bool, device=voice.device)
        return voicing, before, self.source.init_state(len(voice)), was_refined

    def step(
        self, x: Tensor, is_refined: Tensor, state: State, pitch_hz: Tensor | None = None
    ) -> tuple[Tensor, Tensor, State]:
        """Rows [B, F, A], and which are refined [B, F] -> audio [B, F * hop], the pitch of its pulses [B, R], a state.

        A given pitch [B, R], in Hz, takes the place of the decoder's own in the pulses, where it is not NaN.
        """
        voicing, before, source_state, was_refined = state
        # What comes out is the audio of `delay_frames` before.
        refined = torch.cat([cast("Tensor", was_refined), is_refined], dim=1)
        due, was_refined = refined[:, : is_refined.shape[1]], refined[:, is_refined.shape[1] :]
        after = []
        pitch = gains = x
        for place, (layer, old) in enumerate(zip(cast("Iterator[CausalLayer]", self.layers), before, strict=True)):
            if place == self._last_upsampling:
                pitch, gains = self._shape(x)
            if place in self._places:
                scale, shift = cast("Tensor", voicing[self._places.index(place)])[:, None].chunk(2, dim=2)
                x = x * (1.0 + scale) + shift
            x, new = layer.step(x, old)
            after.append(new)
        told = pitch if pitch_hz is None else torch.where(pitch_hz.isnan(), pitch, pitch_hz)
        voiced, source_state = self.source.step(told, gains, source_state)
        waveform = x.float().reshape(*due.shape, -1) if due.shape[1] else x.new_zeros(*due.shape, 1)
        audio = (waveform * due[:, :, None]).flatten(1) + voiced.flatten(1)
        return audio, pitch, (voicing, tuple(after), source_state, was_refined)

    def _shape(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Rows [B, R, C] -> pitch [B, R] and logarithms of gains [B, R, 2 * bands]."""
        said = self.shape_source(self.source_norm(x)).float()
        # Contiguous: elementwise functions round differently on strided memory; `exp2` does even by how much there is.
        share = torch.tanh(said[:, :, 0].contiguous() / 2)
        pitch_hz = math.sqrt(LOWEST_HZ * HIGHEST_HZ) * (share * (math.log(HIGHEST_HZ / LOWEST_HZ) / 2)).exp()
        return pitch_hz, said[:, :, 1:].clamp_max(_MOST_LOG_GAIN)
