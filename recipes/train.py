"""Train a codec: `python -m recipes.train experiment=speech_16k data.train_dir=... data.dev_dir=...`.

An experiment file in `configs/experiment/` is one complete run. Output goes to `output_dir`: checkpoints (`last.ckpt`,
and `best.ckpt` by a value of validation), logs, and the configuration that made them. `resume=true` continues from the
last checkpoint there, and comes to the same numbers as a run that was never interrupted.

`init_from=` starts from the weights of a model that `codec.load` finds, imported ones included; discriminators are new.
`warm_start=` starts another architecture from those of its weights that fit.

`trainer.max_time=00:02:00:00` ends a run after two hours of this process, and SIGTERM ends it after the step that it is
in; both leave a checkpoint to resume from. The exit status is then 0 and 143; 1 where something is wrong, in one line.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import hydra
import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf

from codec import config as codec_config
from codec.features import load_speech_model
from codec.models.bicodec import BiCodec
from codec.models.interface import Codec
from codec.pretrained import load
from recipes import published_bugs as _published_bugs  # noqa: F401  (registers its configuration)
from recipes.callbacks import DevExamples
from recipes.data import DataSettings, SpeechData, parse_data
from recipes.distributed import num_processes
from recipes.module import CodecTraining, NonFiniteError
from recipes.runs import build_trainer, changes_between, check_same_run, fit, last_checkpoint, run_command
from recipes.settings import Settings, one_line, parse

# What may differ when a run is resumed: nothing of it changes what the steps compute, but `max_steps`, which says how
# far they go, and over how many the learning rate falls.
_FREE_ON_RESUME = (
    *("output_dir", "resume", "num_threads", "data.num_workers", "validation.num_examples", "trainer.max_steps"),
    *("trainer.max_time", "trainer.log_every_n_steps", "trainer.enable_progress_bar", "trainer.enable_model_summary"),
)
# Of a model, what weights do not depend on: how its quantizer learns.
_FREE_FROM_WEIGHTS = tuple(
    f"model.quantizer.{name}"
    for name in ("ema_decay", "dead_threshold", "assignment", "gradient", "sinkhorn_epsilon", "num_sinkhorn_iterations")
)


def build_codec(settings: Settings) -> Codec:
    """The codec to train: new from `model`, or from `init_from` (a bundled name or a folder) with its weights.

    Where both are given they must describe the same architecture, though its quantizer may learn otherwise;
    `model=none` takes whatever `init_from` is. A resumed run has weights of its own.
    """
    if settings.init_from is None or settings.resume:
        if settings.model is None:
            raise ValueError("model or init_from is needed")
        config = codec_config.from_dict(settings.model, "model")
        try:
            new = _checked(codec_config.build(config))
        except ValueError as error:
            raise ValueError(f"model: {error}") from error
        if settings.warm_start is not None and not settings.resume:
            _take_over(new, settings.warm_start)
        return new
    codec = load(settings.init_from).requires_grad_(True).train()
    if settings.model is None:
        return codec
    config = codec_config.from_dict(settings.model, "model")
    wanted = codec_config.to_dict(config)
    changes = changes_between(codec_config.to_dict(codec.config), wanted, "model")
    others = [change for change in changes if change[0] not in _FREE_FROM_WEIGHTS]
    if others:
        path, theirs, ours = others[0]
        raise ValueError(
            f"init_from={settings.init_from} has another architecture than model: {path} is {theirs}, not {ours} "
            "(model=none takes what init_from has)"
        )
    if changes:
        tuned: Codec = codec_config.build(config)
        tuned.load_state_dict(codec.state_dict())
        return tuned
    return codec


def _take_over(codec: Codec, source: str) -> None:
    """Give a codec all weights of another model that have the names and shapes of its own, and say how many."""
    own, theirs = codec.state_dict(), load(source).state_dict()
    fitting = {name: value for name, value in theirs.items() if name in own and own[name].shape == value.shape}
    if not fitting:
        raise ValueError(f"warm_start={source}: none of its weights has the name and shape of one of this model's")
    codec.load_state_dict(own | fitting)
    print(f"warm_start: {len(fitting)} of {len(own)} tensors are those of {source}")


def train(config: DictConfig) -> CodecTraining:
    """Run one experiment; return the trained module. Raises ValueError for a configuration that cannot run."""
    settings = parse(config)
    output_dir = Path(settings.output_dir)
    last = last_checkpoint(output_dir, resume=settings.resume)
    if settings.num_threads is not None:
        torch.set_num_threads(settings.num_threads)
    pl.seed_everything(settings.seed, workers=True, verbose=False)
    if settings.resume:
        settings = _resumed(settings, output_dir / "config.yaml")
    codec = build_codec(settings)
    _attach_features(codec, settings.features)
    module = CodecTraining(codec, settings)
    data_settings = parse_data(settings.data)
    _check_crops(module, data_settings)
    # An epoch that is never whole would never be validated.
    data_settings = replace(data_settings, steps_per_epoch=min(data_settings.steps_per_epoch, settings.max_steps))
    data = SpeechData(
        data_settings,
        sample_rate_hz=codec.sample_rate_hz,
        num_channels=codec.num_channels,
        seed=settings.seed,
        output_dir=output_dir,
    )
    data.setup()
    if module.distillation is not None:
        module.distillation.check(data)
    trainer = build_trainer(
        settings.trainer,
        output_dir,
        monitor=module.monitored,
        callbacks=[DevExamples(settings.validation.num_examples)],
    )
    if trainer.is_global_zero:
        (output_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
        config = OmegaConf.create(_plain(settings) | {"model": codec_config.to_dict(codec.config)})
        OmegaConf.save(config, output_dir / "config.yaml")
        _warn_of_a_late_quantizer(module, data_settings, num_processes(settings.trainer))
    fit(trainer, module, data, last if settings.resume else None)
    if trainer.is_global_zero:
        print(f"step {trainer.global_step} of {settings.max_steps}; python -m tools.export {output_dir} FOLDER")
    return module


def _checked(codec: Any) -> Codec:
    if not isinstance(codec, Codec):
        raise ValueError(f"{type(codec).__name__} is not a codec")
    return codec


def _attach_features(codec: Codec, source: str | None) -> None:
    """Give a codec the speech model that it hears by, if it does: the one in `source`, or that of `init_from`."""
    if not isinstance(codec, BiCodec):
        if source is not None:
            raise ValueError("features: this model hears audio itself, not by a speech model")
        return
    if source is None and codec.feature_folder is not None and codec.feature_folder.is_dir():
        source = str(codec.feature_folder)
    if source is None:
        raise ValueError("features is needed: the folder of the speech model that this codec hears by")
    try:
        codec.attach_features(load_speech_model(source))
    except ValueError as error:
        raise ValueError(f"features: {error}") from error


def _check_crops(module: CodecTraining, data: DataSettings) -> None:
    """Crops that are too short for a spectrum would fail in the first step; silence tells before."""
    if data.context_samples and not module.codec.hears_by_features:
        raise ValueError("data.context_samples: nothing hears it, for this model hears no more than its crops")
    if data.context_samples % module.codec.hop_length:
        raise ValueError(f"data.context_samples must be whole frames, of {module.codec.hop_length} samples each")
    shortest = module.adversary.min_samples if module.adversary is not None else 1
    heard = data.crop_samples
    if module.adversary is not None and module.adversary.settings.crop_samples is not None:
        heard = min(heard, module.adversary.settings.crop_samples)
    if heard < shortest:
        raise ValueError(f"the discriminators need crops of {shortest} samples or more, they get {heard}")
    for name, length in (("crop_samples", data.crop_samples), ("dev_crop_samples", data.dev_crop_samples)):
        silence = torch.zeros(1, module.codec.num_channels, length)
        try:
            with torch.no_grad():
                module.reconstruction(silence, silence)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"data.{name}={length} is too short for the loss: {one_line(error)}") from error


def _warn_of_a_late_quantizer(module: CodecTraining, data: DataSettings, num_processes: int) -> None:
    """Say it where a run ends before its quantizer is in use: it would export codebooks that nothing set."""
    if module.quantization.since is not None or module.settings.resume:
        return
    wanted = module.codec.quantizer.num_frames_to_initialize
    num_frames = module.codec.num_frames_for(data.crop_samples) * data.batch_size * num_processes
    first = module.settings.quantization.start_step + max(0, -(-wanted // num_frames) - 1)
    if first >= module.settings.max_steps:
        print(
            f"warning: trainer.max_steps={module.settings.max_steps} ends this run before its quantizer is in use, at "
            f"step {first}: that is quantization.start_step and the time for {wanted} frames that set its codebooks",
            file=sys.stderr,
        )


def _plain(settings: Settings) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(json.dumps(asdict(settings)))
    if settings.model is not None:
        values["model"] = codec_config.to_dict(codec_config.from_dict(settings.model, "model"))
    return values


def _resumed(settings: Settings, file: Path) -> Settings:
    """These settings with the model that the run has; ValueError where they would make it another run."""
    before: Any = OmegaConf.to_container(OmegaConf.load(file))
    now = _plain(settings)
    if settings.model is None:
        now["model"] = before["model"]
    check_same_run(file.parent, before, now, free=_FREE_ON_RESUME)
    return replace(settings, model=before["model"])


@hydra.main(version_base="1.3", config_path="../configs", config_name="train")
def _run(config: DictConfig) -> None:
    try:
        train(config)
    except (ValueError, NonFiniteError) as error:
        sys.exit(f"error: {one_line(error)}")


def main() -> None:
    """Command line entry: a mistake in the configuration is one line, not a traceback."""
    run_command(_run)


if __name__ == "__main__":
    main()
