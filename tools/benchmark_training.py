"""Measure what training costs on this machine: `python -m tools.benchmark_training light encodec`.

Each argument is one of `configs/adversary`, as it is or changed: `encodec,crop_samples=8000,num_active=1`. In one run,
one after another in every repetition, it times

- the codec's own step: forward, reconstruction losses, backward, optimizer, codebooks;
- the discriminators' step: both judgements, loss, backward, optimizer;
- what the adversary adds to the codec's step: judgements, losses, and the gradient at the decoded audio.

All of it as a run does it: batch, crops, precision and optimizers are those of the experiment. Numbers are medians over
repetitions; where discriminators take turns, a repetition is the mean over one round of them.

    python -m tools.benchmark_training --parts speech_16k encodec_24k --data SOURCE --batch-size 4

tells instead what the parts of a whole step of these experiments take, each alone: reading a batch in one process
(a worker does it beside the rest), codec, quantizer and discriminators; and how much audio a second all get through.
Losses are a weighted sum here, also where a run balances their gradients.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.errors import HydraException
from torch import Tensor

from codec.layers.conv import add_weight_norm
from codec.models.interface import Codec
from codec.pretrained import load
from codec.quantizers.interface import Quantized
from codec.testing import speech_like
from codec.token_format import DEFAULT_MODEL
from recipes.adversary import Adversary
from recipes.crops import Crops
from recipes.data import SpeechData
from recipes.losses import ReconstructionLoss
from recipes.module import wants_weight_norm
from recipes.optimizers import build_optimizer
from recipes.settings import Settings, parse
from recipes.train import build_codec

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


@dataclass(frozen=True)
class Cost:
    """Medians in milliseconds, and what they amount to.

    `adversary_share` is the time of discriminators and adversary relative to the codec's own step; `audio_s_per_s` is
    how much audio all of it together gets through.
    """

    adversary: str
    discriminators: int
    weights_millions: float
    codec_ms: float
    discriminators_ms: float
    adversary_ms: float
    adversary_share: float
    audio_s_per_s: float


@dataclass(frozen=True)
class Parts:
    """Median milliseconds of the parts of one step, and how much audio they get through; data is read beside them."""

    experiment: str
    batch_size: int
    data_ms: float
    codec_ms: float
    quantizer_ms: float
    discriminators_ms: float
    codec_share: float
    quantizer_share: float
    discriminators_share: float
    audio_s_per_s: float


def settings_for(adversary: str | None, *, experiment: str = "speech_16k", data: str = "none") -> Settings:
    """The settings of an experiment, with its own adversary or another, `"name"` or `"name,key=value,..."`.

    ValueError where there is no such experiment, adversary or setting.
    """
    overrides = [f"experiment={experiment}", "output_dir=none", f"data.train_dir={data}", f"data.dev_dir={data}"]
    if adversary is not None:
        name, *changes = adversary.split(",")
        overrides += [f"adversary={name}", *(f"adversary.{change}" for change in changes)]
    try:
        with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
            composed = hydra.compose("train", overrides)
    except HydraException as error:
        raise ValueError(f"{adversary or experiment}: {str(error).splitlines()[0]}") from error
    return parse(composed)


class CodecStep:
    """The codec's own step in training, on one batch of made-up speech again and again."""

    def __init__(self, codec: Codec, settings: Settings, *, batch_size: int) -> None:
        self.codec = codec.requires_grad_(True).train()
        if wants_weight_norm(codec, settings):
            add_weight_norm(codec)
        self.settings = settings
        self.quantizer_ms = 0.0  # of the last step
        self.precision = settings.trainer["precision"]
        self.reconstruction = ReconstructionLoss(settings.loss.terms, sample_rate_hz=codec.sample_rate_hz)
        self.optimizer = build_optimizer(settings.optimizer, codec, "optimizer")
        num_samples, rate_hz = int(settings.data["crop_samples"]), codec.sample_rate_hz
        rows = [
            torch.from_numpy(speech_like(num_samples, rate_hz=rate_hz, seed=seed))
            for seed in range(batch_size * codec.num_channels)
        ]
        self.audio = torch.stack(rows).view(batch_size, codec.num_channels, num_samples)
        self.estimate = self()

    def __call__(self) -> Tensor:
        """One step; returns the decoded audio [B, C, T], detached."""
        made: list[Quantized] = []
        self.quantizer_ms = 0.0

        def quantize(latents: Tensor) -> Tensor:
            started = time.perf_counter()
            with torch.autocast("cpu", enabled=False):
                made.append(self.codec.quantizer(latents.float()))
            self.quantizer_ms += 1000 * (time.perf_counter() - started)
            return made[0].latents

        with mixed(self.precision):
            estimate = self.codec.reconstruct(self.audio, quantize).float()
            losses = self.reconstruction(estimate, self.audio) | made[0].losses
            self.optimizer.zero_grad()
            torch.stack([self.settings.loss.weights[name] * loss for name, loss in losses.items()]).sum().backward()
        self.optimizer.step()
        started = time.perf_counter()
        self.codec.quantizer.update(*made)
        self.quantizer_ms += 1000 * (time.perf_counter() - started)
        return estimate.detach()


class AdversarySteps:
    """The discriminators' step, and the adversary's part of the codec's step, on the same batch again and again."""

    def __init__(self, name: str, settings: Settings, codec_step: CodecStep) -> None:
        if settings.adversary is None:
            raise ValueError(f"{name} has no discriminators to measure")
        self.name = name
        self.precision = settings.trainer["precision"]
        self.adversary = Adversary(settings.adversary)
        self.every_n_steps = settings.adversary.every_n_steps
        self.optimizer = build_optimizer(settings.adversary.optimizer, self.adversary, "adversary.optimizer")
        self.audio, self.estimate = codec_step.audio, codec_step.estimate
        num_members = len(self.adversary.discriminators.members)
        self.first_step = settings.adversary.start_step
        # After so many steps all have had as many turns.
        self.round = num_members if settings.adversary.num_active is not None else 1

    def discriminators(self, step: int) -> None:
        """One step of the discriminators."""
        with mixed(self.precision):
            heard = self.adversary.listen(self.audio, self.estimate, step, torch.Generator().manual_seed(step))
            loss = self.adversary.own_loss(heard)
            self.optimizer.zero_grad()
            loss.backward()
        self.optimizer.step()

    def generator(self, step: int) -> None:
        """The adversary's losses for the codec, and their gradient at the decoded audio."""
        estimate = self.estimate.clone().requires_grad_()
        with mixed(self.precision):
            heard = self.adversary.listen(self.audio, estimate, step, torch.Generator().manual_seed(step))
            torch.stack(list(self.adversary.losses_for_codec(heard).values())).sum().backward()

    def over_a_round(self, call: Callable[[int], None]) -> float:
        """Mean milliseconds of a call over steps in which all discriminators had as many turns."""
        started = time.perf_counter()
        for turn in range(self.round):
            call(self.first_step + turn * self.every_n_steps)
        return 1000 * (time.perf_counter() - started) / self.round


def mixed(precision: str) -> torch.autocast:
    """Autocast on the CPU as a Lightning precision says."""
    return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed")


def measure(adversaries: Sequence[str], *, experiment: str, batch_size: int | None, num_runs: int) -> list[Cost]:
    """Time every adversary beside the codec's own step, on as many CPU threads as torch has."""
    all_settings = [settings_for(adversary, experiment=experiment) for adversary in adversaries]
    rows = batch_size or int(all_settings[0].data["batch_size"])
    codec_step = CodecStep(load(DEFAULT_MODEL), all_settings[0], batch_size=rows)
    contenders = [
        AdversarySteps(name, settings, codec_step) for name, settings in zip(adversaries, all_settings, strict=True)
    ]
    for contender in contenders:  # not timed: allocations and choices of kernels
        contender.discriminators(contender.first_step)
        contender.generator(contender.first_step)
    own_ms = []
    their_ms: dict[str, list[tuple[float, float]]] = {contender.name: [] for contender in contenders}
    for _ in range(num_runs):
        started = time.perf_counter()
        codec_step()
        own_ms.append(1000 * (time.perf_counter() - started))
        for contender in contenders:
            times = contender.over_a_round(contender.discriminators), contender.over_a_round(contender.generator)
            their_ms[contender.name].append(times)
    codec_ms = statistics.median(own_ms)
    seconds = codec_step.audio.shape[0] * codec_step.audio.shape[2] / codec_step.codec.sample_rate_hz
    costs = []
    for contender in contenders:
        discriminators_ms, adversary_ms = (
            statistics.median(times) for times in zip(*their_ms[contender.name], strict=True)
        )
        added_ms = discriminators_ms / contender.every_n_steps + adversary_ms
        costs.append(
            Cost(
                adversary=contender.name,
                discriminators=len(contender.adversary.discriminators.members),
                weights_millions=sum(weights.numel() for weights in contender.adversary.parameters()) / 1e6,
                codec_ms=codec_ms,
                discriminators_ms=discriminators_ms,
                adversary_ms=adversary_ms,
                adversary_share=added_ms / codec_ms,
                audio_s_per_s=1000 * seconds / (codec_ms + added_ms),
            )
        )
    return costs


def measure_parts(experiment: str, *, data: str, batch_size: int | None, num_runs: int) -> Parts:
    """Time the parts of a step of an experiment, new from its model, on as many CPU threads as torch has."""
    settings = settings_for(None, experiment=experiment, data=data)
    rows = batch_size or int(settings.data["batch_size"])
    crops = _crops(settings)
    codec_step = CodecStep(build_codec(settings), settings, batch_size=rows)
    adversary = AdversarySteps(experiment, settings, codec_step) if settings.adversary else None
    times: list[tuple[float, float, float, float]] = []
    for run in range(num_runs + 1):
        started = time.perf_counter()
        for item in range(run * rows, (run + 1) * rows):
            crops[item]
        data_ms = 1000 * (time.perf_counter() - started)
        started = time.perf_counter()
        codec_step()
        codec_ms = 1000 * (time.perf_counter() - started) - codec_step.quantizer_ms
        discriminators_ms = 0.0
        if adversary is not None:
            own_ms = adversary.over_a_round(adversary.discriminators) / adversary.every_n_steps
            discriminators_ms = own_ms + adversary.over_a_round(adversary.generator)
        times.append((data_ms, codec_ms, codec_step.quantizer_ms, discriminators_ms))
    medians = (statistics.median(taken) for taken in zip(*times[1:], strict=True))  # the first: not timed
    data_ms, codec_ms, quantizer_ms, discriminators_ms = medians
    total_ms = codec_ms + quantizer_ms + discriminators_ms
    seconds = rows * codec_step.audio.shape[2] / codec_step.codec.sample_rate_hz
    return Parts(
        experiment=experiment,
        batch_size=rows,
        data_ms=data_ms,
        codec_ms=codec_ms,
        quantizer_ms=quantizer_ms,
        discriminators_ms=discriminators_ms,
        codec_share=codec_ms / total_ms,
        quantizer_share=quantizer_ms / total_ms,
        discriminators_share=discriminators_ms / total_ms,
        audio_s_per_s=1000 * seconds / total_ms,
    )


def _crops(settings: Settings) -> Crops:
    codec = build_codec(settings)
    data = SpeechData(
        settings.data, sample_rate_hz=codec.sample_rate_hz, num_channels=codec.num_channels, seed=settings.seed
    )
    return data.crops()


def _print_table(rows: Sequence[dict[str, Any]]) -> None:
    names = list(rows[0])
    cells = [[f"{row[name]:.2f}" if isinstance(row[name], float) else str(row[name]) for name in names] for row in rows]
    widths = [max(len(line[index]) for line in [names, *cells]) for index in range(len(names))]
    for line in [names, *cells]:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse arguments and measure; a mistake in them is one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adversaries", nargs="*", metavar="NAME[,KEY=VALUE...]", help="see configs/adversary")
    parser.add_argument("--experiment", default="speech_16k", help="of the bundled model (default: speech_16k)")
    parser.add_argument("--parts", nargs="+", default=[], metavar="EXPERIMENT", help="time the parts of their steps")
    parser.add_argument("--data", help="with --parts: recordings to draw batches from")
    parser.add_argument("--batch-size", type=int, help="crops per step (default: the experiment's)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--num-runs", type=int, default=3, help="repetitions (default: 3)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    try:
        if min(args.num_runs, args.threads, args.batch_size or 1) < 1:
            raise ValueError("--num-runs, --threads and --batch-size must be positive")
        if bool(args.parts) == bool(args.adversaries) or bool(args.parts) != bool(args.data):
            raise ValueError("name adversaries, or else --parts with --data")
        amounts = {"batch_size": args.batch_size, "num_runs": args.num_runs}
        rows = [asdict(measure_parts(name, data=args.data, **amounts)) for name in args.parts]
        if args.adversaries:
            rows = [asdict(cost) for cost in measure(args.adversaries, experiment=args.experiment, **amounts)]
    except ValueError as error:
        sys.exit(f"error: {error}")
    if args.json:
        about = {"threads": args.threads, "torch": torch.__version__, "machine": platform.processor()}
        print(json.dumps(about | {"training": rows}))
    else:
        _print_table(rows)


if __name__ == "__main__":
    main()
