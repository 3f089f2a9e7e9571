"""Train a codec: `python -m recipes.train experiment=speech_16k data.train_dir=... data.dev_dir=...`.

An experiment file in `configs/experiment/` is one complete run. Output goes to `output_dir`: checkpoints, logs, and the
configuration that made them. `resume=true` continues from the last checkpoint there.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import hydra
import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import LearningRateMonitor, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger

from codec import config as codec_config
from codec.models.multirate import MultirateCodec
from codec.pretrained import load
from recipes.data import SpeechData
from recipes.module import CodecTraining


def build_codec(config: DictConfig) -> MultirateCodec:
    """The codec to train: from `init_from` (a bundled name or a folder) with its weights, or new from `model`."""
    if config.init_from is not None:
        codec: Any = load(config.init_from).requires_grad_(True).train()
    else:
        codec = codec_config.build(codec_config.from_dict(OmegaConf.to_container(config.model, resolve=True), "model"))
    if not isinstance(codec, MultirateCodec):
        raise ValueError(f"this recipe trains multirate codecs, not {type(codec).__name__}")
    return codec


def train(config: DictConfig) -> CodecTraining:
    """Run one experiment; return the trained module. Raises ValueError for a configuration that cannot run."""
    output_dir = Path(config.output_dir)
    last = output_dir / "checkpoints" / "last.ckpt"
    if last.exists() and not config.resume:
        raise ValueError(f"{output_dir} holds a run already; pass resume=true to continue it, or another output_dir")
    if config.resume and not last.exists():
        raise ValueError(f"{output_dir} holds no checkpoint to resume from")
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    pl.seed_everything(config.seed, workers=True)
    codec = build_codec(config)
    module = CodecTraining(codec, config)
    data = SpeechData(config.data, sample_rate_hz=codec.sample_rate_hz, seed=config.seed)
    output_dir.mkdir(parents=True, exist_ok=True)
    # What was trained, even where it came from `init_from`: `tools.export` builds the model from this.
    trained = OmegaConf.merge(config, {"init_from": None})
    OmegaConf.update(trained, "model", codec_config.to_dict(codec.config), merge=False)
    OmegaConf.save(trained, output_dir / "config.yaml", resolve=True)
    trainer = pl.Trainer(
        **OmegaConf.to_container(config.trainer, resolve=True),  # type: ignore[arg-type]
        default_root_dir=output_dir,
        logger=CSVLogger(output_dir, name="logs"),
        callbacks=[
            ModelCheckpoint(output_dir / "checkpoints", save_last=True, every_n_epochs=1, save_top_k=1),
            LearningRateMonitor("step"),
        ],
        use_distributed_sampler=False,
    )
    trainer.fit(module, data, ckpt_path=str(last) if config.resume else None, weights_only=True)
    return module


@hydra.main(version_base="1.3", config_path="../configs", config_name="train")
def main(config: DictConfig) -> None:
    """Command line entry: a mistake in the configuration is one line, not a traceback."""
    try:
        train(config)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
