"""Training runs of a few steps, for tests: recordings, and configurations as the command line composes them."""

from pathlib import Path
from typing import Any

import hydra
import numpy as np
import soundfile
from omegaconf import DictConfig, OmegaConf

from codec.config import to_dict
from codec.testing import speech_like, tiny_config

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
# Lightning speaks of its own plans, of loaders without workers, and of a log interval longer than a tiny run.
LIGHTNING_WARNINGS = (
    "ignore:.*does not have many workers.*",
    "ignore:The number of training batches .* is smaller than the logging interval.*",
)
# Two kinds of discriminators, of a few hundred weights, that can judge 512 samples.
ADVERSARY = {
    "discriminators": [
        {"type": "multi_period", "periods": [2, 3], "channels": [2, 4]},
        {"type": "multi_scale_stft", "n_ffts": [64], "num_filters": 2},
    ],
    "weights": {"adversarial": 1.0, "feature": 2.0},
    "optimizer": {"algorithm": "adamw", "lr": 1e-3, "betas": [0.8, 0.99], "schedule": {"decay": 0.9}},
}


def write_recordings(folder: Path, *, rate_hz: int = 16000, num_channels: int = 1, num_samples: int = 24000) -> Path:
    """Three short recordings; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(3):
        audio = speech_like(num_samples, rate_hz=rate_hz, seed=index)
        soundfile.write(folder / f"{index}.wav", np.stack([audio] * num_channels, axis=1), rate_hz)
    return folder


def compose(*overrides: str) -> DictConfig:
    """What the command line makes of these overrides."""
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return hydra.compose("train", list(overrides))


def tiny_run(recordings: Path, output_dir: Path, *overrides: str, **sections: Any) -> DictConfig:
    """Six steps with the tiny codec, three to an epoch; the quantizer comes in at step 1. `sections` are replaced."""
    config = compose(
        f"output_dir={output_dir}",
        f"data.train_dir={recordings}",
        f"data.dev_dir={recordings}",
        "data.batch_size=4",
        "data.crop_samples=12800",
        "data.steps_per_epoch=3",
        "data.num_workers=0",
        "data.num_dev_items=2",
        "data.dev_crop_samples=6400",
        "trainer.accelerator=cpu",
        "trainer.precision=32-true",
        "trainer.log_every_n_steps=1",
        "trainer.enable_progress_bar=false",
        "trainer.max_steps=6",
        "loss.terms.spectral.window_samples=[256,64]",
        "loss.terms.spectral.num_mels=[16,8]",
        "quantization.start_step=1",
        "quantization.ramp_steps=2",
        "optimizer.schedule.warmup_steps=2",
        "validation.num_quantizers=[1]",
        "validation.num_examples=1",
        *overrides,
    )
    for name, value in ({"model": to_dict(tiny_config())} | sections).items():
        OmegaConf.update(config, name, value, merge=False, force_add=True)
    return config
