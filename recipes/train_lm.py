"""Train a language model of tokens: `python -m recipes.train_lm data.train_dir=... data.dev_dir=... output_dir=...`.

The folders hold `.codec` files, as `codec encode` makes them. Output goes to `output_dir` as with `recipes.train`:
checkpoints, logs and `config.yaml`; `resume=true`, `trainer.max_time` and SIGTERM mean the same. `python -m
tools.export_lm RUN FOLDER` makes a model of it, which `tools.continue_speech` and `tools.evaluate_lm` take.

`--config-name lm_tiny` is a network of minutes on a CPU.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import hydra
import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor

from codec.config import from_values
from codec.token_format import TokenFormat
from codec.token_vocabulary import Vocabulary
from recipes.distributed import any_process, average_gradients, rank_and_size
from recipes.module import NonFiniteError
from recipes.optimizers import build_optimizer, schedule_factor
from recipes.runs import build_trainer, check_same_run, fit, last_checkpoint, run_command
from recipes.settings import OptimizerSettings, check_trainer, one_line
from recipes.token_data import CodeCorpus, TokenData, TokenDataSettings
from recipes.token_lm import NetworkConfig, TokenLM, TokenLMConfig

_FREE_ON_RESUME = (
    *("output_dir", "resume", "num_threads", "data.num_workers", "trainer.max_steps", "trainer.max_time"),
    *("trainer.log_every_n_steps", "trainer.enable_progress_bar", "trainer.enable_model_summary"),
)


@dataclass(frozen=True, kw_only=True)
class LMSettings:
    """A whole run; see `configs/lm.yaml`.

    `codec`: the model that made the files, a bundled one or a folder. `num_quantizers`: how many rows of codes take
    part, the coarsest first; null is all. `pattern`, `num_coarse`, `block_frames`: as `codec.Vocabulary` has them.
    """

    output_dir: str
    codec: str
    data: TokenDataSettings
    network: NetworkConfig
    optimizer: OptimizerSettings
    trainer: dict[str, Any]
    num_quantizers: int | None = None
    pattern: str = "flatten"
    num_coarse: int | None = None
    block_frames: int | None = None
    seed: int = 0
    num_threads: int | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        check_trainer(self.trainer)

    @property
    def max_steps(self) -> int:
        """Steps of the whole run."""
        return int(self.trainer["max_steps"])


def parse_lm(config: DictConfig) -> LMSettings:
    """The settings that a composed configuration says; ValueError of one line with the path of what is wrong."""
    try:
        values = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ValueError(one_line(error)) from error
    settings: LMSettings = from_values(LMSettings, values)
    return settings


class TokenLMTraining(pl.LightningModule):
    """One training run of a language model. Losses are nats per id.

    Every random draw depends on (seed, step) alone, so a resumed run continues as the whole one would have. A loss or
    gradient that is not finite raises `NonFiniteError` before it is used.
    """

    monitored = "val/loss"

    def __init__(self, lm: TokenLM, settings: LMSettings) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.lm, self.settings = lm, settings
        self._sums = torch.zeros(0)

    def training_step(self, ids: Tensor, batch_index: int) -> None:
        step, settings = self.global_step, self.settings.optimizer
        torch.manual_seed(self.settings.seed * 1_000_003 + step)  # of dropout
        losses, is_told = self.lm.losses(ids)
        loss = losses.sum() / is_told.sum()
        self._check_finite(loss.detach(), "the loss")
        loss.backward()
        optimizer: Any = self.optimizers()
        parameters = [parameter for parameter in self.lm.parameters() if parameter.grad is not None]
        average_gradients(parameters)
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        self._check_finite(norm, "a gradient")
        if settings.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, settings.clip_norm, norm)
        rate = settings.lr * schedule_factor(settings.schedule, step, total_steps=self.settings.max_steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % int(self.settings.trainer.get("log_every_n_steps", 50)) == 0:
            values: dict[str, Any] = {"train/total": loss.detach(), "gradient_norm/lm": norm, "learning_rate/lm": rate}
            self.log_dict(values, sync_dist=rank_and_size()[1] > 1)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["lm"] = json.loads(json.dumps(asdict(self.lm.config)))  # all that its weights need to be a model

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return build_optimizer(self.settings.optimizer, self.lm, "optimizer")

    def on_validation_epoch_start(self) -> None:
        # Sums and counts, of all ids and of the codes of each row.
        self._sums = torch.zeros(2, 1 + self.lm.config.vocabulary.num_quantizers, dtype=torch.float64)

    def validation_step(self, ids: Tensor, batch_index: int) -> None:
        self._sums += summed_losses(self.lm, ids)

    def on_validation_epoch_end(self) -> None:
        sums, counts = self._sums
        means = sums / counts
        values = {self.monitored: means[0], "val/perplexity": (sums[1:].sum() / counts[1:].sum()).exp()}
        values |= {f"val/loss/row_{row}": mean for row, mean in enumerate(means[1:])}
        several = rank_and_size()[1] > 1  # which all have the same values
        self.log_dict({name: value.float() for name, value in values.items()}, sync_dist=several)

    def _check_finite(self, value: Tensor, name: str) -> None:
        if any_process(not bool(torch.isfinite(value)), value.device):
            raise NonFiniteError(f"{name} is not finite in step {self.global_step}")


def summed_losses(lm: TokenLM, ids: Tensor) -> Tensor:
    """Sums of losses in nats, and how many there are: float64 [2, 1 + K], of all ids and of the codes of each row."""
    losses, is_told = lm.losses(ids)
    rows = lm.rows_of(ids[:, :, 1:])
    found = [is_told, *(is_told & (rows == row) for row in range(lm.config.vocabulary.num_quantizers))]
    return torch.stack([torch.stack([losses.double()[mask].sum(), mask.sum()]) for mask in found], dim=1).cpu()


def train_lm(config: DictConfig) -> TokenLMTraining:
    """Run one experiment; return the trained module. Raises ValueError for a configuration that cannot run."""
    settings = parse_lm(config)
    output_dir = Path(settings.output_dir)
    last = last_checkpoint(output_dir, resume=settings.resume)
    plain: dict[str, Any] = json.loads(json.dumps(asdict(settings)))
    if settings.resume:
        before = OmegaConf.to_container(OmegaConf.load(output_dir / "config.yaml"))
        check_same_run(output_dir, before, plain, free=_FREE_ON_RESUME)
    if settings.num_threads is not None:
        torch.set_num_threads(settings.num_threads)
    pl.seed_everything(settings.seed, workers=True, verbose=False)
    train, dev, vocabulary = open_data(settings)
    lm = TokenLM(TokenLMConfig(vocabulary=vocabulary, network=settings.network))
    module = TokenLMTraining(lm, settings)
    data = TokenData(
        # An epoch that is never whole would never be validated.
        replace(settings.data, steps_per_epoch=min(settings.data.steps_per_epoch, settings.max_steps)),
        train,
        dev,
        vocabulary,
        context_steps=settings.network.context_steps,
        seed=settings.seed,
    )
    trainer = build_trainer(settings.trainer, output_dir, monitor=module.monitored)
    if trainer.is_global_zero:
        (output_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
        OmegaConf.save(OmegaConf.create(plain), output_dir / "config.yaml")
    fit(trainer, module, data, last if settings.resume else None)
    if trainer.is_global_zero:
        print(f"step {trainer.global_step} of {settings.max_steps}; python -m tools.export_lm {output_dir} FOLDER")
    return module


def open_data(settings: LMSettings) -> tuple[CodeCorpus, CodeCorpus, Vocabulary]:
    """The files to learn from and to validate with, and the vocabulary of their tokens."""
    token_format = TokenFormat.load(settings.codec)
    num_rows = len(token_format.codebook_sizes) if settings.num_quantizers is None else settings.num_quantizers
    if num_rows not in token_format.valid_num_quantizers:
        raise ValueError(f"num_quantizers={num_rows} is not one of {token_format.valid_num_quantizers}")
    vocabulary = Vocabulary(
        codec_id=token_format.codec_id,
        hop_length=token_format.hop_length,
        codebook_sizes=token_format.codebook_sizes[:num_rows],
        pattern=settings.pattern,
        num_coarse=settings.num_coarse,
        block_frames=settings.block_frames,
        num_global_codes=token_format.num_global_codes,
        global_codebook_size=token_format.global_codebook_size,
    )
    corpora = []
    for name in ("train_dir", "dev_dir"):
        try:
            corpora.append(CodeCorpus(Path(getattr(settings.data, name)), token_format, num_rows))
        except ValueError as error:
            raise ValueError(f"data.{name}: {error}") from error
    return corpora[0], corpora[1], vocabulary


@hydra.main(version_base="1.3", config_path="../configs", config_name="lm")
def _run(config: DictConfig) -> None:
    try:
        train_lm(config)
    except (ValueError, NonFiniteError) as error:
        sys.exit(f"error: {one_line(error)}")


def main() -> None:
    """Command line entry: a mistake in the configuration is one line, not a traceback."""
    run_command(_run)


if __name__ == "__main__":
    main()
