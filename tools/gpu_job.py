"""What to run when a GPU is at hand, in one call: tests of kernels and pools, their speed, and training.

    python -m tools.gpu_job OUT
    python -m tools.gpu_job OUT --train-dir PACKED/train --dev-dir PACKED/dev --minutes 4

Tests and speed take at most five minutes together: what takes longer is stopped. Training goes on with the bundled
model, on recordings that `tools.prepare_data` packed, for as many minutes as are given; called again with the same OUT,
it continues where it stopped.

The tests need pytest and hypothesis besides PyTorch, and the speed of the search nothing; the comparison of quantizers
needs the library's requirements; training its extra `train`. A part whose packages are missing fails by itself, and the
others run; but with kernels that fail their tests nothing is trained.

OUT receives what each part prints (gpu.txt, tests.txt, pool.txt, search.txt, quantizer.txt, streams.txt, training.txt),
search.json, quantizer.json, and run/ as `recipes.train` writes it. The exit status is 1 where a part failed.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TEST_SECONDS, POOL_SECONDS, SEARCH_SECONDS, SPEED_SECONDS, STREAMS_SECONDS = 90, 40, 60, 70, 40


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the parts, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--train-dir", type=Path, help="packed recordings; without them nothing is trained")
    parser.add_argument("--dev-dir", type=Path)
    parser.add_argument("--minutes", type=int, default=4, help="of training (default: 4)")
    parser.add_argument("--experiment", default="speech_16k_adversarial")
    parser.add_argument("--overrides", nargs="+", default=[], metavar="KEY=VALUE", help="for recipes.train")
    args = parser.parse_args(arguments)
    if (args.train_dir is None) != (args.dev_dir is None):
        parser.error("--train-dir and --dev-dir belong together")
    if args.minutes < 1:
        parser.error("--minutes must be positive")
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)

    about = "import torch, triton; print(torch.__version__, triton.__version__, torch.cuda.get_device_name())"
    if not run_part("gpu", ["-c", about], out, SEARCH_SECONDS):
        sys.exit("error: no GPU that PyTorch and Triton can use")
    tests_pass = run_part("tests", ["-m", "pytest", "-q", "tests/triton_cases.py"], out, TEST_SECONDS)
    pool = ["-m", "pytest", "-q", "-m", "cuda", "tests/test_stream_pool.py"]
    all_pass = run_part("pool", pool, out, POOL_SECONDS) and tests_pass
    search = ["-m", "tools.benchmark_gpu_search", "--json", str(out / "search.json")]
    all_pass = run_part("search", search, out, SEARCH_SECONDS) and all_pass
    speed = ["-m", "tools.benchmark", "quantizer", "--device", "cuda", "--json", str(out / "quantizer.json")]
    all_pass = run_part("quantizer", speed, out, SPEED_SECONDS) and all_pass
    streams = ["streams", "--device", "cuda", "--ways", "pool", "--streams", "1", "64", "256", "1024", "--seconds", "4"]
    all_pass = run_part("streams", ["-m", "tools.benchmark", *streams], out, STREAMS_SECONDS) and all_pass
    if args.train_dir and tests_pass:
        all_pass = run_part("training", ["-m", "recipes.train", *_training(args, out)], out) and all_pass
    sys.exit(0 if all_pass else 1)


def run_part(name: str, arguments: Sequence[str], out: Path, limit_seconds: float | None = None) -> bool:
    """Run a Python program in the checkout, show and keep what it prints; whether it succeeded in time."""
    print(f"== {name}: python {' '.join(arguments)}", flush=True)
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    started = time.monotonic()
    with open(out / f"{name}.txt", "w+", encoding="utf-8") as file:
        # A session of its own: its children end with it.
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=environment | {"PYTHONUNBUFFERED": "1"},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = str(process.wait(limit_seconds))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status = f"stopped after {limit_seconds:.0f} s"
        file.seek(0)
        print(file.read()[-6000:])
    print(f"== {name}: status {status}, {time.monotonic() - started:.0f} s\n", flush=True)
    return status == "0"


def _training(args: argparse.Namespace, out: Path) -> list[str]:
    run = out / "run"
    return [
        f"experiment={args.experiment}",
        "data=speech_16k",
        f"data.train_dir={args.train_dir.resolve()}",
        f"data.dev_dir={args.dev_dir.resolve()}",
        f"output_dir={run}",
        f"resume={str((run / 'checkpoints' / 'last.ckpt').exists()).lower()}",
        f"trainer.max_time=00:{args.minutes // 60:02d}:{args.minutes % 60:02d}:00",
        "trainer.accelerator=gpu",
        *args.overrides,
    ]


if __name__ == "__main__":
    main()
