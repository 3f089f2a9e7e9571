"""Small codecs and signals for tests and examples, of this project and of its users."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import torch

from codec.config import build
from codec.models.multirate import MultirateCodec, MultirateConfig
from codec.models.semantic_global import SemanticGlobalCodec, SemanticGlobalConfig
from codec.quantizers.residual import ResidualVQConfig
from codec.quantizers.semantic import SemanticAcousticConfig


def tiny_config(**changes: Any) -> MultirateConfig:
    """A multirate configuration of a few thousand weights: 16 kHz, hop 64, 3 stages of 32 entries."""
    values: dict[str, Any] = {
        "sample_rate_hz": 16000,
        "patch_samples": 4,
        "strides": (2, 8),
        "encoder_channels": (8, 12, 16),
        "encoder_blocks": (1, 1, 1),
        "decoder_channels": (8, 12, 16),
        "decoder_blocks": (1, 1, 1),
        "quantizer": ResidualVQConfig(latent_dim=12, num_stages=3, codebook_size=32),
        "window_patches": 2,
        "kernel_size": 3,
        "expansion": 2,
    }
    return MultirateConfig(**values | changes)


def tiny_codec(*, seed: int = 0, **changes: Any) -> MultirateCodec:
    """An untrained codec with random weights that `seed` fixes; ready for use like a loaded one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        codec: MultirateCodec = build(tiny_config(**changes))
    codec.codec_id = f"{seed:016x}"
    return codec.eval().requires_grad_(False)


def tiny_voiced_config(**changes: Any) -> SemanticGlobalConfig:
    """As `tiny_config`, with 4 global codes of 64 values, heard in the first 4000 samples, and a semantic row of 48."""
    values = {f.name: getattr(tiny_config(), f.name) for f in fields(MultirateConfig)} | {
        "quantizer": SemanticAcousticConfig(
            latent_dim=20,
            semantic=ResidualVQConfig(latent_dim=8, num_stages=1, codebook_size=48),
            acoustic=ResidualVQConfig(latent_dim=12, num_stages=3, codebook_size=32),
        ),
        "semantic_channels": 16,
        "semantic_blocks": 2,
        "num_global_codes": 4,
        "voice_levels": (4, 4, 4),
        "voice_dim": 16,
        "voice_samples": 4000,
        "speaker_channels": 16,
    }
    return SemanticGlobalConfig(**values | changes)


def tiny_voiced_codec(*, seed: int = 0, **changes: Any) -> SemanticGlobalCodec:
    """As `tiny_codec`, of a family with global codes; the voice is heard in every sample."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        codec: SemanticGlobalCodec = build(tiny_voiced_config(**changes))
        for weight in codec.decoder.voicing.parameters():
            torch.nn.init.normal_(weight, std=0.2)  # zeros, before training
    codec.codec_id = f"{seed:016x}"
    return codec.eval().requires_grad_(False)


def speech_like(num_samples: int, *, rate_hz: int = 16000, seed: int = 0) -> np.ndarray:
    """Float32 [num_samples]: a buzz of gliding pitch under gliding resonances with pauses and hiss; peak about 0.5."""
    rng = np.random.default_rng(seed)
    time = np.arange(num_samples) / rate_hz
    pitch_hz = 120 + 30 * np.sin(2 * np.pi * 0.7 * time + rng.uniform(0, 6)) + 10 * np.sin(2 * np.pi * 2.3 * time)
    phase = 2 * np.pi * np.cumsum(pitch_hz) / rate_hz
    formants_hz = [
        500 + 250 * np.sin(2 * np.pi * 1.9 * time),
        1500 + 500 * np.sin(2 * np.pi * 1.3 * time + 1),
        2600 + 0 * time,
    ]
    audio = np.zeros(num_samples)
    for harmonic in range(1, 25):
        gain = sum(np.exp(-0.5 * ((harmonic * pitch_hz - f) / 180) ** 2) for f in formants_hz)
        audio += gain * np.sin(harmonic * phase) / harmonic**0.5
    syllables = np.clip(np.sin(2 * np.pi * 2.1 * time) + 0.4, 0, 1)
    audio = audio * syllables + 0.03 * rng.standard_normal(num_samples) * (1 - syllables)
    scaled: np.ndarray = 0.5 * audio / np.abs(audio).max(initial=1e-9)
    return scaled.astype(np.float32)
