"""The programs in tools/ run, and a mistake in their arguments is one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile

import codec
from codec.testing import speech_like, tiny_codec

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = sorted(file.stem for file in (ROOT / "tools").glob("*.py") if file.stem != "__init__")


def _run(program: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"tools.{program}", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def model(tmp_path: Path) -> Path:
    codec.save(tiny_codec(), tmp_path / "tiny", name="tiny@1")
    return tmp_path / "tiny"


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_says_what_it_does(program: str) -> None:
    done = _run(program, "--help")
    assert done.returncode == 0
    assert "usage:" in done.stdout


def test_speed_is_measured_on_a_signal_of_its_own(model: Path) -> None:
    done = _run("benchmark", "--model", model, "--json", "speed", "--seconds", "1")
    speed = json.loads(done.stdout)["speed"]
    assert speed["encode_times_real_time"] > 0
    assert speed["push_decode_ms"]["p95"] >= speed["push_decode_ms"]["median"]
    assert speed["decode_delay_samples"] == 64


@pytest.mark.parametrize(
    ("program", "arguments"),
    [
        ("benchmark", ["--model", "nothing", "speed"]),
        ("prepare_data", ["nowhere", "out"]),
        ("export", ["nowhere", "out", "--name", "a@1"]),
    ],
)
def test_mistakes_are_one_line(program: str, arguments: list[str]) -> None:
    done = _run(program, *arguments)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    assert not (ROOT / "out").exists()


def test_training_without_data_is_one_line(tmp_path: Path) -> None:
    command = ["-m", "recipes.train", f"output_dir={tmp_path}/run", f"data.train_dir={tmp_path}", "data.dev_dir=x"]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in done.stderr


@pytest.fixture
def speech(tmp_path: Path) -> Path:
    folder = tmp_path / "speech"
    folder.mkdir()
    for seed in range(2):
        soundfile.write(folder / f"{seed}.wav", speech_like(16000, rate_hz=8000, seed=seed), 8000)
    return folder


def test_entropy_tables_are_fitted_and_measured(model: Path, speech: Path) -> None:
    done = _run("benchmark_files", "container", speech, "--model", model)
    assert done.returncode == 1
    assert "has no entropy tables" in done.stderr
    before = codec.load(model).codec_id
    done = _run("fit_entropy", model, speech, "--check", speech)
    assert done.returncode == 0, done.stderr
    assert "with context" in done.stdout
    fitted = codec.TokenFormat.load(model)
    assert fitted.tables is not None
    assert fitted.tables.id in done.stdout
    assert codec.load(model).codec_id == fitted.codec_id == before  # codes mean what they meant
    done = _run("benchmark_files", "container", speech, "--model", model, "--json")
    facts = json.loads(done.stdout)
    assert facts["files"] == 2
    assert facts["coded_bps"] < facts["packed_bps"]
    assert facts["entropy_coding_saves_net_of_blocks"] < facts["entropy_coding_saves"] < 1
    assert 0 < facts["block_overhead"] < facts["container_overhead"]
    assert 0 < facts["entropy_coding_share_of_encode_time"] < 1


def test_the_command_line_is_timed(model: Path, speech: Path) -> None:
    done = _run(
        "benchmark_files", "command", speech, "--model", model, "--minutes", "1", "--short-files", "2", "--json"
    )
    facts = json.loads(done.stdout)
    for name in ("encode", "decode", "short_files_one_process", "short_files_all_cores"):
        assert facts[f"{name}_times_real_time"] > 0
    assert facts["encode_peak_mb"] > 50
