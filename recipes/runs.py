"""What every training command does in the same way: where a run's files are, resuming it, its trainer, its mistakes."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger

from recipes.callbacks import Checkpoints, ProgressBar, TimeIsUp, parse_duration
from recipes.distributed import AllReduceStrategy, num_processes
from recipes.settings import one_line


def last_checkpoint(output_dir: Path, *, resume: bool) -> Path:
    """Where a run's last checkpoint is. ValueError where one is there and is not wanted, or wanted and not there."""
    last = output_dir / "checkpoints" / "last.ckpt"
    if last.exists() and not resume:
        raise ValueError(f"{output_dir} holds a run already; pass resume=true to continue it, or another output_dir")
    if resume and not last.exists():
        raise ValueError(f"{output_dir} holds no checkpoint to resume from")
    return last


def check_same_run(folder: Path, before: Any, now: Any, *, free: tuple[str, ...]) -> None:
    """ValueError where a run in a folder had other values than those now; paths that begin as `free` may differ."""
    changes = [change for change in changes_between(before, now, "") if not change[0].startswith(free)]
    if changes:
        told = ", ".join(f"{path} was {old}, now {new}" for path, old, new in changes[:3])
        rest = f" and {len(changes) - 3} more" if len(changes) > 3 else ""
        raise ValueError(f"this is not the run in {folder}: {told}{rest}; another run needs another output_dir")


def changes_between(before: Any, after: Any, path: str) -> list[tuple[str, Any, Any]]:
    """Dotted paths at which two trees of plain values differ, with both values."""
    if not (isinstance(before, dict) and isinstance(after, dict)):
        return [] if before == after else [(path, before, after)]
    return [
        change
        for key in (*before, *(key for key in after if key not in before))
        for change in changes_between(before.get(key), after.get(key), f"{path}.{key}" if path else str(key))
    ]


def build_trainer(
    settings: Mapping[str, Any], output_dir: Path, *, monitor: str, callbacks: Sequence[pl.Callback] = ()
) -> pl.Trainer:
    """The trainer of a run, from the section `trainer`; checkpoints are chosen by the value `monitor`."""
    values = dict(settings)
    max_time, has_progress_bar = values.pop("max_time", None), values.pop("enable_progress_bar", None)
    duration = parse_duration(max_time) if max_time is not None else None
    chosen = [*callbacks, Checkpoints(output_dir / "checkpoints", monitor=monitor, max_time=duration)]
    if has_progress_bar or (has_progress_bar is None and sys.stderr.isatty()):
        chosen.insert(0, ProgressBar(monitor))  # to be gone before the line of whoever stops the run
    return pl.Trainer(
        **values,
        strategy=AllReduceStrategy() if num_processes(values) > 1 else "auto",
        default_root_dir=output_dir,
        logger=_loggers(output_dir),
        callbacks=chosen,
        enable_checkpointing=False,
        enable_progress_bar=False,
        use_distributed_sampler=False,
    )


def fit(trainer: pl.Trainer, module: pl.LightningModule, data: pl.LightningDataModule, last: Path | None) -> None:
    """Train, from a checkpoint where one is given. Returns when the steps are done, or the time is up."""
    with warnings.catch_warnings():
        # It is: the items of a step follow from its number.
        warnings.filterwarnings("ignore", message=".*your dataloader is not resumable.*")
        with contextlib.suppress(TimeIsUp):
            trainer.fit(module, data, ckpt_path=None if last is None else str(last), weights_only=True)


def hush_lightning() -> None:
    """Have Lightning say nothing but warnings that somebody can heed: for programs, not for libraries."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # of PyTorch 2.11


def run_command(run: Callable[[], None]) -> None:
    """Call what `hydra.main` made: a mistake in the configuration is one line, not a traceback."""
    hush_lightning()
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # let Hydra's errors come through to here
    try:
        run()
    except (HydraException, OmegaConfBaseException) as error:
        sys.exit(f"error: {one_line(error)}")


def _loggers(output_dir: Path) -> list[Any]:
    loggers: list[Any] = [CSVLogger(output_dir, name="logs")]
    if importlib.util.find_spec("tensorboard") is not None:
        loggers.append(TensorBoardLogger(output_dir, name="tensorboard", default_hp_metric=False))
    return loggers
