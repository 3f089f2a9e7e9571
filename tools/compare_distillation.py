"""What distillation does to a codec: the same model with no teacher and with several, trained alike, several seeds each.

    python -m tools.compare_distillation OUT --train-dir PACKED/train --dev-dir PACKED/dev --data SPEECH --split dev \\
        --speech-teacher FOLDER --text-teacher FOLDER --words WORDS.jsonl --labels TEXTGRIDS

Every run starts from a bundled model and goes on for `--max-steps` steps. Conditions (`--only`): `none`; `speech`, whose
first stage learns from a speech model; `text_index`, from a text model, slot i to frame i; `text_forced`, by forced
alignment; `speech_text`, from both by half (text by forced alignment). The weights of objectives add up to `--weight` in
each. Seeds decide the crops, so the runs of one seed hear the same speech in the same order, and differences are paired.

Each run is exported and measured by `codec evaluate` on SPEECH: quality, the word errors of pocketsphinx, which no
teacher had a part in, and what the first row of codes tells of phones. The table has means over seeds, and of the
differences from `none` 95 % intervals over seeds (Student's t): how much another seed may change, not another speaker.

What is finished stays in OUT, and a run that was interrupted goes on when this is started again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy.stats import t as student_t

CONDITIONS = ("none", "speech", "text_index", "text_forced", "speech_text")
METRICS = ("pesq_wb", "stoi")


@dataclass(frozen=True)
class Comparison:
    """What all runs share."""

    out: Path
    train_dir: str
    dev_dir: str
    data: str
    split: str | None
    speech_teacher: str
    speech_cache: str | None
    text_teacher: str
    words: str
    labels: str
    init_from: str
    max_steps: int
    weight: float
    num_quantizers: tuple[int, ...]
    max_files: int | None
    overrides: tuple[str, ...]

    def training(self, condition: str, seed: int, folder: Path) -> list[str]:
        """The arguments of `recipes.train`."""
        objectives = {"none": [], "text_index": ["text"], "text_forced": ["text"], "speech_text": ["speech", "text"]}
        names = objectives.get(condition, [condition])
        arguments = [
            *("experiment=speech_16k", f"init_from={self.init_from}", f"output_dir={folder}", f"seed={seed}"),
            *(f"data.train_dir={self.train_dir}", f"data.dev_dir={self.dev_dir}", "num_threads=1"),
            *("data.batch_size=6", "data.crop_samples=48000", f"trainer.max_steps={self.max_steps}"),
            *(f"data.steps_per_epoch={self.max_steps}", "average={decay: 0.98}", "optimizer.lr=1e-3"),
            f"distillation=[{','.join(names)}]",
            *(f"distillation.{name}.weight={self.weight / len(names)}" for name in names),
        ]
        if "speech" in names:
            arguments.append(f"distillation.speech.teacher.source={self.speech_teacher}")
            if self.speech_cache is not None:
                arguments.append(f"distillation.speech.teacher.cache={self.speech_cache}")
        if "text" in names:
            arguments += [
                f"distillation.text.teacher.source={self.text_teacher}",
                f"distillation.text.teacher.words={self.words}",
            ]
        if condition == "text_index":  # as published: the text of the crop alone, with what stands around it
            arguments += ["distillation.text.alignment.type=index", "distillation.text.teacher.context=crop"]
        if last_checkpoint(folder).exists():
            arguments.append("resume=true")
        return [*arguments, *self.overrides]

    def measuring(self, model: Path) -> list[str]:
        """The arguments of `codec evaluate`."""
        arguments = [
            *("evaluate", str(model), "--data", self.data, "--labels", self.labels, "--scorer", "pocketsphinx"),
            *(part for name in METRICS for part in ("--metric", name)),
            *(part for rows in self.num_quantizers for part in ("-k", str(rows))),
            *("--no-speed", "--jobs", "1", "--json"),
        ]
        arguments += ["--split", self.split] if self.split is not None else []
        return arguments + (["--max-files", str(self.max_files)] if self.max_files is not None else [])


def last_checkpoint(folder: Path) -> Path:
    """Where a run's last checkpoint lies."""
    return folder / "checkpoints" / "last.ckpt"


def run(comparison: Comparison, condition: str, seed: int) -> dict[str, Any]:
    """Train, export and measure one run, as far as that was not done; what `codec evaluate` found."""
    folder = comparison.out / f"{condition}_{seed}"
    model, found = folder / "model", folder / "evaluation.json"
    if not found.exists():
        if not (model / "config.json").exists():
            _call(folder, "recipes.train", *comparison.training(condition, seed, folder / "run"))
            _call(folder, "tools.export", str(folder / "run"), str(model), "--name", f"{condition}_{seed}@1")
        output = _call(folder, "codec", *comparison.measuring(model))
        found.write_text(output, encoding="utf-8")
        print(f"{condition}, seed {seed}: done", file=sys.stderr, flush=True)
    measured: dict[str, Any] = json.loads(found.read_text(encoding="utf-8"))
    return measured


def _call(folder: Path, module: str, *arguments: str) -> str:
    """Run a module in a process of its own; ValueError with its last line where it fails."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HYDRA_FULL_ERROR": "1"}
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], capture_output=True, text=True, check=False, env=environment
    )
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise ValueError(f"{folder.name}: {module} failed: {lines[-1] if lines else 'no message'}")
    return done.stdout


def values_of(measured: Mapping[str, Any]) -> dict[str, float]:
    """The columns of the table, from what `codec evaluate` found of one model."""
    values: dict[str, float] = {}
    for system in measured["systems"]:
        if system["setting"] is None:
            continue
        for name in (*METRICS, "wer"):
            values[f"{name}, {system['setting']} rows"] = system["summaries"][name]["mean"]
    values |= {f"{name}, row 0": value for name, value in first_row(measured).items()}
    return values


def first_row(measured: Mapping[str, Any]) -> dict[str, float]:
    """What the first row of codes tells of phones."""
    raise NotImplementedError


def table(results: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Means over seeds, and differences from `none` with 95 % intervals over seeds, as Markdown."""
    columns = list(next(iter(results.values()))[0])
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for condition, runs in results.items():
        cells = []
        for column in columns:
            mean = statistics.mean(run[column] for run in runs)
            cell = f"{mean:.3f}"
            if condition != "none" and "none" in results:
                pairs = zip(runs, results["none"], strict=True)
                cell += f" ({_difference([ours[column] - theirs[column] for ours, theirs in pairs])})"
            cells.append(cell)
        lines.append(f"| {condition} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _difference(differences: Sequence[float]) -> str:
    mean = statistics.mean(differences)
    if len(differences) < 2:
        return f"{mean:+.3f}"
    half = student_t.ppf(0.975, len(differences) - 1) * statistics.stdev(differences) / math.sqrt(len(differences))
    return f"{mean:+.3f} ±{half:.3f}"


def main() -> None:
    """Parse arguments, run what is missing, print the table; a mistake is one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    for name, what in (
        ("train-dir", "a source of recordings to train on"),
        ("dev-dir", "a source of recordings to validate on"),
        ("data", "recordings with text to measure on, as codec evaluate takes them"),
        ("speech-teacher", "a speech model, as codec.features takes it"),
        ("text-teacher", "a folder of a text model"),
        ("words", "what tools.align_words wrote of the training recordings"),
        ("labels", "phones of the recordings to measure on, such as tools.align_phones writes"),
    ):
        parser.add_argument(f"--{name}", required=True, help=what)
    parser.add_argument("--speech-cache", help="what tools.cache_features wrote of the training recordings")
    parser.add_argument("--split", help="rows of the manifest to measure on (default: all)")
    parser.add_argument("--max-files", type=int, help="recordings to measure on, evenly spread (default: all)")
    parser.add_argument("--init-from", default="speech_16k")
    parser.add_argument("--max-steps", type=int, default=240)
    parser.add_argument("--weight", type=float, default=3.0)
    parser.add_argument("--num-quantizers", "-k", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=CONDITIONS, default=list(CONDITIONS))
    parser.add_argument("--num-processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="more settings of recipes.train")
    args = vars(parser.parse_args())
    seeds, only, num_processes = args.pop("seeds"), args.pop("only"), args.pop("num_processes")
    overrides, num_quantizers = tuple(args.pop("set")), tuple(args.pop("num_quantizers"))
    comparison = Comparison(overrides=overrides, num_quantizers=num_quantizers, **args)
    try:
        with ThreadPoolExecutor(num_processes) as pool:
            jobs = {
                (condition, seed): pool.submit(run, comparison, condition, seed)
                for seed in seeds
                for condition in only
            }
            try:
                results = {c: [values_of(jobs[c, seed].result()) for seed in seeds] for c in only}
            except ValueError:
                pool.shutdown(cancel_futures=True)
                raise
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(table(results))


if __name__ == "__main__":
    main()
