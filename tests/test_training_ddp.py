"""Two processes with half the batch each take the step that one process takes."""

import csv
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from runs import ADVERSARY, LIGHTNING_WARNINGS, tiny_run, write_recordings

import codec
from codec.testing import tiny_codec
from recipes.distributed import num_processes
from recipes.train import train

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [pytest.mark.filterwarnings(warning) for warning in LIGHTNING_WARNINGS]

# Losses that are means over items, so that the mean over halves is the mean over all; a balancer; all that is drawn.
SECTIONS: dict[str, Any] = {
    "optimizer": {"algorithm": "adamw", "lr": 1e-3, "betas": [0.5, 0.9]},
    "adversary": ADVERSARY,
    "average": {"decay": 0.5},
    "loss": {
        "terms": {"waveform": {"type": "waveform"}, "mel": {"type": "mel", "window_samples": [256], "num_mels": [16]}},
        "weights": {"waveform": 1.0, "mel": 2.0, "commitment": 1.0},
        "balancer": {"decay": 0.9},
    },
    "quantization": {"dropout_share": 1.0, "dropout": "batch"},
}
_COMMAND = """
import sys
from omegaconf import OmegaConf
from recipes.train import train
train(OmegaConf.load(sys.argv[1]))
"""


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
    return port


def _metrics(folder: Path) -> dict[str, float]:
    """The logged values of the first step."""
    with (folder / "logs" / "version_0" / "metrics.csv").open() as file:
        row = next(csv.DictReader(file))
    return {name: float(value) for name, value in row.items() if value}


def test_two_processes_are_one_with_twice_the_batch(tmp_path: Path) -> None:
    recordings = write_recordings(tmp_path / "audio")
    codec.save(tiny_codec(), tmp_path / "tiny", name="tiny@1", dtype="float32")
    steps = ("trainer.max_steps=1", f"init_from={tmp_path / 'tiny'}")
    train(tiny_run(recordings, tmp_path / "one", *steps, "data.batch_size=4", **SECTIONS))
    config = tiny_run(recordings, tmp_path / "two", *steps, "data.batch_size=2", "trainer.devices=2", **SECTIONS)
    OmegaConf.save(config, tmp_path / "two.yaml")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": "2", "NODE_RANK": "0"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", _COMMAND, tmp_path / "two.yaml"],
            env=environment | {"LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors

    one, two = (torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True) for name in ("one", "two"))
    # The codes: how often each entry was used, exactly.
    counts = [state["quantization"]["quantizer"]["counts"] for state in (one, two)]
    assert torch.equal(*counts)
    assert not torch.equal(counts[0], torch.full_like(counts[0], float(counts[0].mean())))
    # The losses: sums of the same numbers in another order, in float32.
    ours, theirs = _metrics(tmp_path / "two"), _metrics(tmp_path / "one")
    losses = [name for name in theirs if name.startswith(("train/", "gradient_norm/c", "gradient_norm/d"))]
    assert {"train/mel", "train/commitment", "train/adversarial", "train/feature", "train/discriminators"} <= {*losses}
    for name in losses:
        assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name
    # The gradients, of which Adam's first moments are parts: to float32's rounding of sums, relative to the largest.
    # (Its first step does not tell: it moves a weight by the learning rate, however small the gradient.)
    for optimizer, other in zip(one["optimizer_states"], two["optimizer_states"], strict=True):
        moments = [[state["exp_avg"] for state in part["state"].values()] for part in (optimizer, other)]
        largest = max(float(moment.abs().max()) for moment in moments[0])
        assert largest > 0
        for a, b in zip(*moments, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * largest)


@pytest.mark.parametrize(
    ("trainer", "expected"),
    [
        ({"devices": 1}, 1),
        ({"devices": 3, "accelerator": "cpu"}, 3),
        ({"devices": 2, "num_nodes": 4}, 8),
        ({"devices": [0, 2]}, 2),
        ({"devices": "0,2,3"}, 3),
        ({"devices": "auto", "accelerator": "cpu"}, 1),
        ({}, max(1, torch.cuda.device_count())),
    ],
)
def test_processes_are_counted_as_lightning_does(trainer: dict[str, Any], expected: int) -> None:
    assert num_processes(trainer) == expected
