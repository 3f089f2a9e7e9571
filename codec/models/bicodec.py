"""BiCodec, the codec of Spark-TTS: a row of semantic codes, and a few global codes for the voice.

    audio -> frozen speech model -> ConvNeXt encoder -> latents [B, D, F] -> quantizer -> codes: what is said
    reference -> mels -> ECAPA-TDNN -> perceiver -> voice latents [B, E, L] -> quantizer -> global codes: who says it
    global codes -> voice vector [B, V]
    latents -> ConvNeXt prenet, its norms told the voice -> hidden [B, V, F], plus the voice -> wave generator -> audio

Not causal, and the speech model hears the whole recording: minutes of it, not hours. Rows of different lengths are
processed apart, so that nothing of one row, nor padding, is heard in another.

The speech model (XLSR-53 as published, 317 M parameters) is no part of the weights: it is looked for when it is first
needed, in `feature_folder`, or given by `attach_features`. To decode, and to hear a voice, nobody needs it.

Loudness is not kept, as published: with `volume_normalize` a recording is brought to one volume before it is heard, so
that is the volume of what is decoded.

Quirks that the published weights depend on are kept, and named where they are: the tripling (`_TRIPLED`), mels without
logarithm, the order of convolution, ReLU and norm (`codec.models.bicodec_speaker`), features of audio without padding
(`feature_padding`). Not kept are its mistakes: global codes that a cast without rounding makes too small, losses that
are NaN in evaluation, batches in which padding changes results.

Source: Wang et al., "Spark-TTS: an efficient LLM-based text-to-speech model with single-stream decoupled speech tokens"
(2025), section 3, and as published, https://github.com/SparkAudio/Spark-TTS, sparktts/models/bicodec.py,
sparktts/models/audio_tokenizer.py and sparktts/modules.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codec.config import build, register
from codec.features import SpeechModel, load_speech_model
from codec.layers.conv import Chain, Conv, ConvTranspose, SignalLayer, Snake
from codec.layers.convnext import ConvNeXtStack
from codec.models.bicodec_speaker import ECAPA, MelMagnitudes, Resampler
from codec.models.dac import residual_units
from codec.models.interface import WholeCodec, rows_by_length
from codec.models.voice import Voice, VoicedCodec
from codec.quantizers.factorized import FactorizedVQConfig
from codec.quantizers.interface import Quantizer, QuantizerConfig
from codec.quantizers.scalar import FSQConfig
from codec.token_format import FEATURE_FOLDER
from codec.tokens import Tokens

FEATURE_PADDINGS = ("none", "end")

# A published block for changing the rate adds three branches up; at a ratio of 1, each of them is its input.
_TRIPLED = 3.0
_BLOCKS_PER_STAGE = 2

_QUANTIZER = FactorizedVQConfig(latent_dim=1024, num_stages=1, codebook_size=8192, codebook_dim=8)
_VOICE_QUANTIZER = FSQConfig(latent_dim=128, levels=(4, 4, 4, 4, 4, 4))


@dataclass(frozen=True, kw_only=True)
class BiCodecConfig:
    """The published model is the default; `hop_length = prod(decoder_rates)`.

    `feature_dim`, `feature_layers`: of the speech model, whose layers are averaged. Its frames must be as long as the
    codec's. `feature_padding`: with "none" it hears the audio as it is, as published, and gives a frame or two too few;
    then the last latents stand for these, too. With "end" zeros behind the audio make up for them.

    Encoder, prenet and postnet are `hidden_dim` wide inside, `expanded_dim` in their blocks; beside their main stack of
    blocks each has `num_stages` further ones of two blocks. The voice vector has `voice_dim` dims, as has what the
    prenet makes.

    Mels for the speaker encoder: `num_mels` bands from `mel_min_hz` on. A reference is its first `voice_samples`
    samples, repeated where it is shorter. `num_global_codes` is how many latents the perceiver has. Its attention has
    `num_heads` heads of `head_dim` dims, `bottleneck_dim` is that of ECAPA-TDNN's gates and pooling.

    The wave generator has `decoder_dim` channels at the frame rate and half as many after each of `decoder_rates`.
    """

    sample_rate_hz: int = 16000
    quantizer: QuantizerConfig = _QUANTIZER
    voice_quantizer: QuantizerConfig = _VOICE_QUANTIZER
    num_global_codes: int = 32
    voice_dim: int = 1024
    voice_samples: int = 96000
    volume_normalize: bool = True
    feature_dim: int = 1024
    feature_layers: tuple[int, ...] = (11, 14, 16)
    feature_padding: str = "none"
    hidden_dim: int = 384
    expanded_dim: int = 2048
    num_stages: int = 2
    encoder_blocks: int = 12
    prenet_blocks: int = 12
    postnet_blocks: int = 6
    num_mels: int = 128
    mel_fft_samples: int = 1024
    mel_window_samples: int = 640
    mel_hop_samples: int = 320
    mel_min_hz: float = 10.0
    speaker_channels: int = 512
    bottleneck_dim: int = 128
    perceiver_layers: int = 2
    num_heads: int = 8
    head_dim: int = 64
    decoder_dim: int = 1536
    decoder_rates: tuple[int, ...] = (8, 5, 4, 2)
    decoder_kernel_sizes: tuple[int, ...] = (16, 11, 8, 4)

    def __post_init__(self) -> None:
        positive = (
            *("sample_rate_hz", "num_global_codes", "voice_dim", "feature_dim", "hidden_dim", "expanded_dim"),
            *("encoder_blocks", "prenet_blocks", "postnet_blocks", "num_mels", "mel_window_samples", "mel_hop_samples"),
            *("bottleneck_dim", "perceiver_layers", "num_heads", "head_dim", "decoder_dim"),
        )
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.num_stages < 0 or not self.feature_layers or min(self.feature_layers) < 0:
            raise ValueError("num_stages must not be negative, and feature_layers one or more numbers from 0 on")
        if self.feature_padding not in FEATURE_PADDINGS:
            raise ValueError(f"feature_padding={self.feature_padding!r} is not one of {FEATURE_PADDINGS}")
        if self.speaker_channels < 8 or self.speaker_channels % 8:
            raise ValueError(f"speaker_channels={self.speaker_channels} is not a multiple of 8")
        if self.mel_window_samples > self.mel_fft_samples:
            raise ValueError(f"mel_window_samples={self.mel_window_samples} is more than {self.mel_fft_samples}")
        if not 0 <= self.mel_min_hz < self.sample_rate_hz / 2:
            raise ValueError(f"mel_min_hz={self.mel_min_hz} is not below half of {self.sample_rate_hz} Hz")
        if self.voice_samples <= self.mel_fft_samples // 2:
            raise ValueError(f"voice_samples={self.voice_samples} is not above half of {self.mel_fft_samples}")
        if not self.decoder_rates or min(self.decoder_rates) < 1:
            raise ValueError(f"decoder_rates must be one or more positive numbers, got {self.decoder_rates}")
        if len(self.decoder_kernel_sizes) != len(self.decoder_rates) or any(
            size < rate or (size - rate) % 2
            for size, rate in zip(self.decoder_kernel_sizes, self.decoder_rates, strict=True)
        ):
            raise ValueError(
                f"decoder_kernel_sizes={self.decoder_kernel_sizes}: each must be one of decoder_rates="
                f"{self.decoder_rates}, plus an even number"
            )
        if self.decoder_dim % 2 ** len(self.decoder_rates):
            raise ValueError(
                f"decoder_dim={self.decoder_dim} cannot be halved {len(self.decoder_rates)} times, once per rate"
            )

    @property
    def hop_length(self) -> int:
        """Samples per frame."""
        return prod(self.decoder_rates)


@register("bicodec", BiCodecConfig)
class BiCodec(VoicedCodec, WholeCodec):
    """A BiCodec; see `AudioCodec`, `Codec` and `VoicedCodec` for the meaning of its methods and attributes.

    >>> import torch
    >>> config = BiCodecConfig(
    ...     quantizer=FactorizedVQConfig(latent_dim=8, num_stages=1, codebook_size=16, codebook_dim=4),
    ...     voice_quantizer=FSQConfig(latent_dim=4, levels=(4, 4)), num_global_codes=3, voice_dim=8, voice_samples=400,
    ...     feature_dim=4, hidden_dim=8, expanded_dim=8, encoder_blocks=1, prenet_blocks=1, postnet_blocks=1,
    ...     num_mels=4, mel_fft_samples=64, mel_window_samples=64, mel_hop_samples=16, speaker_channels=8,
    ...     bottleneck_dim=4, head_dim=4, decoder_dim=8, decoder_rates=(4, 2), decoder_kernel_sizes=(8, 4),
    ... )
    >>> codec = BiCodec(config).eval()
    >>> voices = codec.encode_global(torch.randn(2, 1, 1000))  # needs no speech model
    >>> tokens = Tokens(torch.zeros(2, 1, 13, dtype=torch.int64), torch.tensor([100, 90]), "", global_codes=voices)
    >>> voices.shape, codec.decode(tokens).shape
    (torch.Size([2, 3]), torch.Size([2, 1, 100]))
    """

    num_channels = 1
    hears_by_features = True
    own_losses = ("features",)

    def __init__(self, config: BiCodecConfig) -> None:
        super().__init__()
        self.config: BiCodecConfig = config
        self.sample_rate_hz = config.sample_rate_hz
        self.hop_length = config.hop_length
        self.num_global_codes = config.num_global_codes
        self.voice_samples = config.voice_samples
        self.encoder = _Encoder(config)
        self.quantizer: Quantizer = build(config.quantizer)
        self.speaker_encoder = _SpeakerEncoder(config)
        self.voice_quantizer: Quantizer = build(config.voice_quantizer)
        if len(self.voice_quantizer.codebook_sizes) != 1:
            raise ValueError("voice_quantizer must have one row of codes: its frames are the global codes")
        self.from_voice_latents = nn.Linear(
            config.voice_quantizer.latent_dim * config.num_global_codes, config.voice_dim
        )
        self.prenet = _Decoder(config, config.quantizer.latent_dim, config.voice_dim, config.prenet_blocks, voiced=True)
        self.postnet = _Decoder(config, config.voice_dim, config.feature_dim, config.postnet_blocks, voiced=False)
        self.decoder = Chain(_wave_generator_layers(config))
        self.codebook_sizes = self.quantizer.codebook_sizes
        self.valid_num_quantizers = self.quantizer.valid_num_quantizers
        first, last = self.decoder.reach(0, self.hop_length - 1)
        self.decode_frames_before, self.decode_frames_after = self.prenet.reach - first, self.prenet.reach + last
        # Outside the modules: it is neither saved nor trained.
        self._speech_models: tuple[SpeechModel, ...] = ()

    # The speech model

    def attach_features(self, model: SpeechModel) -> None:
        """Hear speech by this model from now on. ValueError where it is not of the kind that the config asks for."""
        config = self.config
        wanted = (config.sample_rate_hz, config.hop_length, config.feature_dim)
        if (model.sample_rate_hz, model.stride_samples, model.feature_dim) != wanted:
            raise ValueError(
                f"{model.name} has {model.feature_dim} dims every {model.stride_samples} samples at "
                f"{model.sample_rate_hz} Hz, this codec needs {wanted[2]} every {wanted[1]} at {wanted[0]} Hz"
            )
        model.layer_numbers(config.feature_layers)
        self._speech_models = (model,)

    def features(self, audio: Tensor) -> Tensor:
        """What the speech model makes of whole recordings [B, 1, T]: [B, F, feature_dim], without gradient.

        With `feature_padding` "none" F is a frame or two less than T needs, but one at the least. ValueError where
        there is no speech model.
        """
        if not self._speech_models:
            self._find_features()
        (model,) = self._speech_models
        audio = self.levelled(audio)[:, 0]
        if self.config.feature_padding == "none":
            audio = F.pad(audio, (0, max(0, model.entrance.field_samples - audio.shape[1])))
        padding = self.config.feature_padding
        heard = model.to(audio.device)(audio, layers=self.config.feature_layers, padding=padding)
        return cast("Tensor", heard.values)

    def _find_features(self) -> None:
        folder = self.feature_folder
        if folder is None or not folder.is_dir():
            raise ValueError(
                f"{self.name or 'this codec'} hears speech through a speech model, which is missing: put its folder "
                f"(config.json, preprocessor_config.json, model.safetensors) at {folder or FEATURE_FOLDER}"
            )
        with torch.inference_mode(False):
            self.attach_features(load_speech_model(str(folder)))

    # Whole recordings

    @torch.inference_mode()
    def decode(self, tokens: Tokens) -> Tensor:
        longest = self._checked_tokens(tokens)
        voices = self.voice_of(self.checked_global_codes(tokens.global_codes, len(tokens.codes)))
        audio = voices.new_zeros(len(tokens.codes), 1, longest)
        for length, rows in rows_by_length(tokens.num_samples):
            latents = self.quantizer.decode(tokens.codes[rows, :, : self.num_frames_for(length)])
            audio[rows, :, :length] = self.synthesize(latents, length, voices[rows])
        return audio

    # Networks, shared by training and inference

    def analyze(self, audio: Tensor, disguise: Tensor | None = None) -> Tensor:
        """Whole recordings [B, 1, T] -> latents [B, D, ceil(T / hop)]; differentiable but for the speech model."""
        _refuse(disguise)
        return _completed(self.latents_of(self.features(audio)), self.num_frames_for(audio.shape[2]))

    def latents_of(self, features: Tensor) -> Tensor:
        """Features [B, F, feature_dim] -> latents [B, D, F]; differentiable."""
        return cast("Tensor", self.encoder(features)).transpose(1, 2)

    def synthesize(self, latents: Tensor, num_samples: int, voice: Tensor | None = None) -> Tensor:
        """Latents [B, D, F] and voices [B, V] -> audio [B, 1, num_samples]. ValueError without voices."""
        if voice is None:
            raise ValueError("this codec needs a voice to speak with")
        return self._vocode(self.hidden(latents, voice), num_samples, voice)

    def reconstruct_for_training(
        self,
        audio: Tensor,
        quantize: Callable[[Tensor], Tensor],
        voice: Tensor,
        disguise: Tensor | None = None,
        *,
        surround: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """As `VoicedCodec` says; the loss "features" is the mean square of what the postnet misses of the features.

        With `surround` [B, 1, c + T + c], the audio with c samples before and after it, the speech model hears that,
        as in a recording. ValueError where c is no multiple of the hop.
        """
        _refuse(disguise)
        num_samples, heard = audio.shape[2], audio if surround is None else surround
        num_context = (heard.shape[2] - num_samples) // 2
        if num_context % self.hop_length:
            raise ValueError(f"{num_context} samples of context are not whole frames of {self.hop_length}")
        num_frames = self.num_frames_for(num_samples)
        features = self.features(heard)[:, num_context // self.hop_length :][:, :num_frames]
        hidden = self.hidden(quantize(_completed(self.latents_of(features), num_frames)), voice)
        predicted = self.predict_features(hidden)[:, : features.shape[1]].float()
        return self._vocode(hidden, num_samples, voice), {"features": F.mse_loss(predicted, features)}

    def hidden(self, latents: Tensor, voice: Tensor) -> Tensor:
        """Latents [B, D, F] and voices [B, V] -> what the prenet makes of them [B, F, V]; differentiable."""
        return cast("Tensor", self.prenet(latents.transpose(1, 2), voice))

    def predict_features(self, hidden: Tensor) -> Tensor:
        """What the prenet made -> features [B, F, feature_dim], as near as the postnet comes. For training only."""
        return cast("Tensor", self.postnet(hidden))

    def _vocode(self, hidden: Tensor, num_samples: int, voice: Tensor) -> Tensor:
        """What the prenet made [B, F, V] -> audio [B, 1, num_samples]."""
        audio: Tensor = torch.tanh(self.decoder((hidden + voice[:, None]).transpose(1, 2)))
        return audio[:, :, :num_samples]

    def hear_voice(self, reference: Tensor) -> Voice:
        """As `VoicedCodec.hear_voice`, of the first `voice_samples` samples; shorter references are repeated."""
        num_given = max(1, reference.shape[2])
        audio = F.pad(reference, (0, num_given - reference.shape[2]))[:, 0]
        audio = audio.repeat(1, -(-self.voice_samples // num_given))[:, : self.voice_samples]
        x_vector, latents = self.speaker_encoder(audio)
        return Voice(x_vector.to(self._dtype), latents.to(self._dtype))

    def voice_vector(self, latents: Tensor) -> Tensor:
        return cast("Tensor", self.from_voice_latents(latents.flatten(1)))

    def levelled(self, reference: Tensor) -> Tensor:
        """Whole recordings [B, 1, T], at one volume where the config says `volume_normalize`."""
        if not self.config.volume_normalize or not reference.numel():
            return reference
        return torch.stack([at_normal_volume(row) for row in reference])


def _completed(latents: Tensor, num_frames: int) -> Tensor:
    """Latents [B, D, F] for all frames: the last ones stand for what the speech model gave no features of."""
    num_missing = num_frames - latents.shape[2]
    return torch.cat([latents, latents[:, :, -1:].expand(-1, -1, num_missing)], dim=2) if num_missing else latents


def _refuse(disguise: Tensor | None) -> None:
    if disguise is not None:
        raise ValueError("this codec cannot disguise voices: its speech model hears audio as it is")


def at_normal_volume(audio: Tensor) -> Tensor:
    """A recording of any shape, made louder or softer: its loud samples become 0.2 on average, none above 1.

    Loud are those between the 90 % and 99 % quantiles of what is above 0.01. Where there is hardly anything, only its
    peak becomes 0.1. No factor is above 10 or below 0.1 (to a peak of 0.1: not above 100).

    Source: `audio_volume_normalize` in sparktts/utils/audio.py of https://github.com/SparkAudio/Spark-TTS.
    """
    magnitudes = audio.detach().abs().flatten().sort().values
    if magnitudes[-1] < 0.1:
        audio = audio * (0.1 / magnitudes[-1].clamp_min(1e-3))
    heard = magnitudes[magnitudes > 0.01].double()
    if len(heard) <= 10:
        return audio
    volume = heard[int(0.9 * len(heard)) : int(0.99 * len(heard))].mean()
    audio = audio * (0.2 / volume).clamp(0.1, 10.0).to(audio.dtype)
    return audio / audio.detach().abs().max().clamp_min(1.0)


class _Encoder(nn.Module):
    """Features [B, F, feature_dim] -> latents [B, F, D]."""

    def __init__(self, config: BiCodecConfig) -> None:
        super().__init__()
        self.stack = ConvNeXtStack(config.feature_dim, config.hidden_dim, config.expanded_dim, config.encoder_blocks)
        self.stages = _stages(config)
        self.leave = nn.Linear(config.hidden_dim, config.quantizer.latent_dim)

    def forward(self, features: Tensor) -> Tensor:
        return cast("Tensor", self.leave(_through(self.stages, self.stack(features))))


class _Decoder(nn.Module):
    """[B, F, in_dim] -> [B, F, out_dim]; where `voiced`, the norms of its main stack are told voices [B, V].

    An output depends on `reach` frames before and after its own.
    """

    def __init__(self, config: BiCodecConfig, in_dim: int, out_dim: int, num_blocks: int, *, voiced: bool) -> None:
        super().__init__()
        self.enter = nn.Linear(in_dim, config.hidden_dim)
        self.stages = _stages(config)
        self.stack = ConvNeXtStack(
            config.hidden_dim,
            config.hidden_dim,
            config.expanded_dim,
            num_blocks,
            condition_dim=config.voice_dim if voiced else None,
        )
        self.leave = nn.Linear(config.hidden_dim, out_dim)
        self.reach = self.stack.reach + sum(cast("ConvNeXtStack", stage).reach for stage in self.stages)

    def forward(self, x: Tensor, voice: Tensor | None = None) -> Tensor:
        return cast("Tensor", self.leave(self.stack(_through(self.stages, self.enter(x)), voice)))


def _stages(config: BiCodecConfig) -> nn.ModuleList:
    width = config.hidden_dim
    return nn.ModuleList(
        ConvNeXtStack(width, width, config.expanded_dim, _BLOCKS_PER_STAGE) for _ in range(config.num_stages)
    )


def _through(stages: nn.ModuleList, x: Tensor) -> Tensor:
    for stage in stages:
        x = stage(_TRIPLED * x)
    return x


class _SpeakerEncoder(nn.Module):
    """References [B, T] -> x-vectors [B, V] and voice latents [B, E, L]."""

    def __init__(self, config: BiCodecConfig) -> None:
        super().__init__()
        self.mels = MelMagnitudes(
            sample_rate_hz=config.sample_rate_hz,
            fft_samples=config.mel_fft_samples,
            window_samples=config.mel_window_samples,
            hop_samples=config.mel_hop_samples,
            num_mels=config.num_mels,
            min_hz=config.mel_min_hz,
            max_hz=config.sample_rate_hz / 2,
        )
        self.ecapa = ECAPA(config.num_mels, config.speaker_channels, config.bottleneck_dim, config.voice_dim)
        self.resampler = Resampler(
            3 * config.speaker_channels,
            config.voice_quantizer.latent_dim,
            config.num_global_codes,
            num_layers=config.perceiver_layers,
            num_heads=config.num_heads,
            head_dim=config.head_dim,
        )

    def forward(self, audio: Tensor) -> tuple[Tensor, Tensor]:
        x_vector, frames = self.ecapa(self.mels(audio))
        return x_vector, self.resampler(frames).transpose(1, 2)


def _wave_generator_layers(config: BiCodecConfig) -> list[SignalLayer]:
    """From [B, V, F] to audio, before its tanh: the decoder of DAC, with kernels of its own."""
    width = config.decoder_dim
    layers: list[SignalLayer] = [Conv(config.voice_dim, width, 7, causal=False)]
    for rate, kernel_size in zip(config.decoder_rates, config.decoder_kernel_sizes, strict=True):
        upsampling = ConvTranspose(width, width // 2, kernel_size, stride=rate, causal=False)
        layers.append(Chain([Snake(width), upsampling, *residual_units(width // 2)]))
        width //= 2
    return [*layers, Snake(width), Conv(width, 1, 7, causal=False)]
