"""What happens around the steps of a run: checkpoints, stopping when asked to, and dev crops to hear and see."""

from __future__ import annotations

import math
import os
import re
import signal
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from recipes.data import Batch
from recipes.distributed import any_process, rank_and_size
from recipes.module import CodecTraining

# Of a process that SIGTERM ended, as shells count: a scheduler can tell "go on with resume=true" from "done".
SIGTERM_STATUS = 128 + signal.SIGTERM


class TimeIsUp(Exception):
    """The run has used up `trainer.max_time`; its last checkpoint is written."""


class Terminated(SystemExit):
    """The run was asked to stop by SIGTERM; its last checkpoint is written. The exit status is 143."""

    def __init__(self) -> None:
        super().__init__(SIGTERM_STATUS)


class Checkpoints(pl.Callback):
    """Writes `last.ckpt` after every epoch and when the run ends early, and `best.ckpt` by a value of validation.

    A run ends early after SIGTERM, and after `max_time` counted from the start of this process: at the end of the step
    it is in, without validation. What is written in the middle of an epoch resumes in the middle of that epoch, so
    that validation falls on the same steps as in a run that was not interrupted.

    Files are written beside and renamed, so a crash leaves the one before.
    """

    def __init__(self, folder: Path, *, monitor: str, max_time: timedelta | None = None) -> None:
        self.folder = folder
        self.monitor = monitor
        self.max_time = max_time
        self.best: float | None = None
        self._is_terminated = False
        self._deadline = math.inf

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._deadline = time.monotonic() + (math.inf if self.max_time is None else self.max_time.total_seconds())
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._on_sigterm)  # Lightning puts back what was there

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx + 1 == trainer.num_training_batches:
            return  # the end of the epoch is near, and with it a checkpoint
        is_asked = self._is_asked_to_stop(pl_module)
        if is_asked or trainer.global_step >= trainer.max_steps:
            self._save(trainer, "last.ckpt")
        if is_asked:
            self._stop(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.fit_loop.epoch_loop.batch_progress.current.completed < trainer.num_training_batches:
            return  # max_steps ended this epoch, and its last step has saved
        value = float(trainer.callback_metrics.get(self.monitor, math.nan))
        sign = -1.0 if "si_sdr_db" in self.monitor else 1.0
        if math.isfinite(value) and (self.best is None or sign * value < sign * self.best):
            self.best = value
            self._save(trainer, "best.ckpt")
        self._save(trainer, "last.ckpt")
        if trainer.global_step < trainer.max_steps and self._is_asked_to_stop(pl_module):
            self._stop(trainer)

    def _save(self, trainer: pl.Trainer, name: str) -> None:
        partial = self.folder / f"{name}.partial"
        trainer.save_checkpoint(partial, weights_only=False)
        if trainer.is_global_zero:
            os.replace(partial, self.folder / name)
        trainer.strategy.barrier()

    def _stop(self, trainer: pl.Trainer) -> None:
        reason = "SIGTERM" if self._is_terminated else "trainer.max_time"
        if trainer.is_global_zero:
            print(
                f"stopped by {reason} after step {trainer.global_step} of {trainer.max_steps}; "
                "resume=true goes on from there",
                file=sys.stderr,
            )
        raise Terminated() if self._is_terminated else TimeIsUp()

    def _is_asked_to_stop(self, module: pl.LightningModule) -> bool:
        self._is_terminated = any_process(self._is_terminated, module.device)
        return self._is_terminated or any_process(time.monotonic() >= self._deadline, module.device)

    def _on_sigterm(self, number: int, frame: FrameType | None) -> None:
        self._is_terminated = True


def parse_duration(text: str) -> timedelta:
    """`DD:HH:MM:SS` as a duration; ValueError for anything else."""
    matched = re.fullmatch(r"(\d+):(\d\d):(\d\d):(\d\d)", text)
    if matched is None:
        raise ValueError(f"trainer.max_time={text!r} is not of the form DD:HH:MM:SS")
    days, hours, minutes, seconds = map(int, matched.groups())
    return timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)


class ProgressBar(pl.Callback):
    """Steps of the whole run on a terminal, with the time that is left, the last loss and the last value of validation.

    Lightning's own bars count epochs, and know no end where a run has a number of steps.
    """

    def __init__(self, monitor: str) -> None:
        self.monitor = monitor
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[values]}"),
            console=Console(stderr=True),
        )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        self._task = self._progress.add_task("steps", total=trainer.max_steps, completed=trainer.global_step, values="")
        self._progress.start()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        shown = {name: trainer.callback_metrics.get(name) for name in ("train/total", self.monitor)}
        values = ", ".join(f"{name} {float(value):.4g}" for name, value in shown.items() if value is not None)
        if trainer.is_global_zero:
            self._progress.update(self._task, completed=trainer.global_step, values=values)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._progress.stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._progress.stop()


class DevExamples(pl.Callback):
    """The first dev crops and what the codec makes of them, as audio and spectrograms in TensorBoard."""

    def __init__(self, num_examples: int) -> None:
        self.num_examples = num_examples

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        board = next((logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)), None)
        if board is None or batch_idx or not self.num_examples or rank_and_size()[0]:
            return
        assert isinstance(pl_module, CodecTraining)
        audio = batch.audio[: self.num_examples]
        rate_hz = pl_module.codec.sample_rate_hz
        for name, heard in {"recording": audio, **pl_module.reconstructions(audio)}.items():
            for index, channels in enumerate(heard.cpu()):
                mono = channels.mean(0).clamp(-1, 1)
                board.experiment.add_audio(f"{name}/{index}", mono, trainer.global_step, rate_hz)
                board.experiment.add_image(f"{name}/{index}", spectrogram_image(mono), trainer.global_step)


def spectrogram_image(audio: Tensor) -> Tensor:
    """Samples [T] -> a grey picture [1, height, width] in 0..1: log magnitudes, loud is light, low is below."""
    window = torch.hann_window(512)
    spectrum = torch.stft(audio, 512, 128, window=window, return_complex=True).abs() / window.sum()
    level_db = 20 * torch.log10(spectrum.clamp_min(1e-5))
    return ((level_db + 100) / 80).clamp(0, 1).flip(0)[None]
