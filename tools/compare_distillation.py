r"""What distillation does to a codec: one model with no teacher and with several, trained alike, several seeds each.

    python -m tools.compare_distillation OUT --train-dir PACKED/train --dev-dir PACKED/dev --data SPEECH --split dev \
        --speech-teacher FOLDER --text-teacher FOLDER --words WORDS.jsonl --labels TEXTGRIDS

Every run starts from a bundled model and goes on for `--max-steps` steps. Conditions (`--only`):

- `none`;
- `speech`: the first stage learns from a speech model;
- `text_index`: from a text model as DM-Codec was published, slot i to frame i, padding included;
- `text_forced`: from a text model, by forced alignment;
- `speech_text`: from both, each with half of the weight, text by forced alignment.

The weights of objectives add up to `--weight`. Seeds decide the crops, so the runs of one seed hear the same speech in
the same order, and differences are paired.

Each run is exported and measured on SPEECH as `codec evaluate` does: quality, what the first row of codes tells of
phones, and the word errors of pocketsphinx, which has no part in any teacher; these of `--num-word-files` recordings,
for it is slow. The table has means over seeds, and of the differences from `none` 95 % intervals over seeds (Student's
t): what another seed may change, not another speaker.

What is finished stays in OUT, and a run that was interrupted goes on when this is started again.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from scipy.stats import t as student_t

CONDITIONS = ("none", "speech", "text_index", "text_forced", "speech_text")
METRICS = ("pesq_wb", "stoi")
_OF_ROW = ", row 0"
SEMANTICS = ("unseen_purity", "pnmi", "pnmi_by_chance", "probe", "abx_within", "abx_across")


@dataclass(frozen=True)
class Comparison:
    """What all runs share."""

    out: Path
    train_dir: str
    dev_dir: str
    data: str
    split: str | None
    speech_teacher: str
    speech_layers: str
    speech_cache: str | None
    text_teacher: str
    words: str
    labels: str
    init_from: str
    max_steps: int
    weight: float
    num_quantizers: tuple[int, ...]
    max_files: int | None
    num_word_files: int
    overrides: tuple[str, ...]

    def training(self, condition: str, seed: int, folder: Path) -> list[str]:
        """The arguments of `recipes.train`."""
        names = [name for name in ("speech", "text") if name in condition.split("_")]
        arguments = [
            *("experiment=speech_16k", f"init_from={self.init_from}", f"output_dir={folder}", f"seed={seed}"),
            *(f"data.train_dir={self.train_dir}", f"data.dev_dir={self.dev_dir}", "num_threads=1"),
            *("data.batch_size=6", "data.crop_samples=48000", f"trainer.max_steps={self.max_steps}"),
            *(f"data.steps_per_epoch={self.max_steps}", "average={decay: 0.98}", "optimizer.lr=1e-3"),
            # Or codebooks would not catch up with latents that have moved: an entry is dead after 300 steps otherwise.
            *("model.quantizer.ema_decay=0.97", "model.quantizer.dead_threshold=0.3"),
            f"distillation=[{','.join(names)}]",
            *(f"distillation.{name}.weight={self.weight / len(names)}" for name in names),
        ]
        if "speech" in names:
            arguments += [
                f"distillation.speech.teacher.source={self.speech_teacher}",
                f"distillation.speech.teacher.layers={self.speech_layers}",
            ]
            if self.speech_cache is not None:
                arguments.append(f"distillation.speech.teacher.cache={self.speech_cache}")
        if "text" in names:
            arguments += [
                f"distillation.text.teacher.source={self.text_teacher}",
                f"distillation.text.teacher.words={self.words}",
            ]
        if condition == "text_index":
            arguments += [
                *("distillation.text.alignment.type=index", "+distillation.text.alignment.pad_targets=true"),
                *("distillation.text.teacher.context=crop", "distillation.text.teacher.num_slots=149"),
            ]
        if last_checkpoint(folder).exists():
            arguments.append("resume=true")
        return [*arguments, *self.overrides]

    def measure(self, model: Path) -> dict[str, float]:
        """The columns of the table, of an exported model."""
        from codec.evaluation import evaluate

        found = evaluate(
            [str(model)],
            data=self.data,
            split=self.split,
            max_files=self.max_files,
            num_quantizers=self.num_quantizers,
            metrics=METRICS,
            labels=self.labels,
            measures_speed=False,
        )
        values = {
            f"{name}, {system.setting} rows": system.summaries[name].mean
            for name in METRICS
            for system in found.systems
        }
        values[f"wer, {self.num_quantizers[-1]} rows"] = self.word_error_rate(model)
        for told in (told for system in found.systems for told in system.semantics):
            if told.rows == "0":
                values |= {f"{name}{_OF_ROW}": told.values[name].mean for name in SEMANTICS}
        return values

    def word_error_rate(self, model: Path) -> float:
        """Word errors of what is decoded from the most rows of codes, over the words that were said."""
        from codec.evaluation.coders import model_coders
        from codec.evaluation.recordings import find_recordings
        from codec.evaluation.scorers import load_scorer

        scorer, rows = load_scorer("pocketsphinx"), self.num_quantizers[-1]
        (coder,) = model_coders([str(model)], [rows])
        num_errors = num_words = 0.0
        for recording in find_recordings(self.data, split=self.split, max_files=self.num_word_files):
            audio, rate_hz = recording.read()
            scored = scorer.score(audio, coder.code(audio, rate_hz, rows).audio, rate_hz, recording.text)
            if scored["wer_weight"]:
                num_errors += scored["wer"] * scored["wer_weight"]
                num_words += scored["wer_weight"]
        return num_errors / num_words


def last_checkpoint(folder: Path) -> Path:
    """Where a run's last checkpoint lies."""
    return folder / "checkpoints" / "last.ckpt"


def run(comparison: Comparison, condition: str, seed: int) -> dict[str, float]:
    """Train, export and measure one run, as far as that was not done."""
    import torch

    torch.set_num_threads(1)
    folder = comparison.out / f"{condition}_{seed}"
    model, found = folder / "model", folder / "values.json"
    if not found.exists():
        if not (model / "config.json").exists():
            _call(folder, "recipes.train", *comparison.training(condition, seed, folder / "run"))
            _call(folder, "tools.export", str(folder / "run"), str(model), "--name", f"{condition}_{seed}@1")
        values = comparison.measure(model)
        found.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        print(f"{condition}, seed {seed}: done", file=sys.stderr, flush=True)
    measured: dict[str, float] = json.loads(found.read_text(encoding="utf-8"))
    return measured


def _call(folder: Path, module: str, *arguments: str) -> None:
    """Run a module in a process of its own; ValueError with its last line where it fails."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HYDRA_FULL_ERROR": "1"}
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], capture_output=True, text=True, check=False, env=environment
    )
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise ValueError(f"{folder.name}: {module} failed: {lines[-1] if lines else 'no message'}")


def table(results: Mapping[str, Sequence[Mapping[str, float]]], columns: Sequence[str]) -> str:
    """Means over seeds, and differences from `none` with 95 % intervals over seeds, as Markdown."""
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
    parser.add_argument("--speech-layers", default="last", help="of the speech model, such as 9 (default: last)")
    parser.add_argument("--speech-cache", help="what tools.cache_features wrote of the training recordings")
    parser.add_argument("--split", help="rows of the manifest to measure on (default: all)")
    parser.add_argument("--max-files", type=int, help="recordings to measure on, evenly spread (default: all)")
    parser.add_argument("--num-word-files", type=int, default=24, help="recordings to count word errors on")
    parser.add_argument("--init-from", default="speech_16k")
    parser.add_argument("--max-steps", type=int, default=240)
    parser.add_argument("--weight", type=float, default=5.0)
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
        with ProcessPoolExecutor(num_processes, mp_context=multiprocessing.get_context("spawn")) as pool:
            jobs = {
                (condition, seed): pool.submit(run, comparison, condition, seed) for seed in seeds for condition in only
            }
            try:
                results = {c: [jobs[c, seed].result() for seed in seeds] for c in only}
            except ValueError:
                pool.shutdown(cancel_futures=True)
                raise
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    columns = list(results[only[0]][0])
    print(table(results, [column for column in columns if not column.endswith(_OF_ROW)]))
    print()
    print(table(results, [column for column in columns if column.endswith(_OF_ROW)]))


if __name__ == "__main__":
    main()
