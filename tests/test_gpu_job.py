"""The parts of `tools.gpu_job`, without a GPU."""

import os
import time
from pathlib import Path

import pytest

from tools import gpu_job


def test_a_part_is_shown_and_kept_and_stopped_in_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_job.run_part("good", ["-c", "print(6 * 7)"], tmp_path, 60)
    assert not gpu_job.run_part("bad", ["-c", "raise SystemExit('no such GPU')"], tmp_path, 60)
    # It starts a child that would go on.
    child_code = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child_code!r}])"
    started = time.monotonic()
    assert not gpu_job.run_part("slow", ["-c", code], tmp_path, 3)
    assert time.monotonic() - started < 60
    shown = capsys.readouterr().out
    assert "42" in shown
    assert "no such GPU" in shown
    assert "stopped after 3 s" in shown
    assert (tmp_path / "good.txt").read_text() == "42\n"
    child = int((tmp_path / "slow.txt").read_text())
    for _ in range(100):  # until somebody has reaped it
        if not Path(f"/proc/{child}").exists() or Path(f"/proc/{child}/stat").read_text().split()[2] == "Z":
            break
        time.sleep(0.1)
    else:
        os.kill(child, 9)
        pytest.fail("the child goes on")


def test_which_parts_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts: dict[str, list[str]] = {}
    failing: set[str] = set()

    def run_part(name: str, arguments: list[str], out: Path, limit_seconds: float | None = None) -> bool:
        parts[name] = arguments
        return name not in failing

    def run(*arguments: str) -> object:
        parts.clear()
        with pytest.raises(SystemExit) as stop:
            gpu_job.main([str(tmp_path / "out"), *arguments])
        return stop.value.code

    monkeypatch.setattr(gpu_job, "run_part", run_part)
    assert run() == 0
    assert list(parts) == ["gpu", "tests", "pool", "search", "quantizer", "streams"]
    data = ("--train-dir", str(tmp_path), "--dev-dir", str(tmp_path))
    assert run(*data, "--minutes", "67", "--overrides", "optimizer.lr=0.1") == 0
    training = parts["training"]
    assert {"resume=false", "trainer.max_time=00:01:07:00", "optimizer.lr=0.1"} <= set(training)
    last = tmp_path / "out" / "run" / "checkpoints" / "last.ckpt"
    last.parent.mkdir(parents=True)
    last.touch()
    failing.add("quantizer")
    assert run(*data) == 1
    assert "resume=true" in parts["training"]
    failing.add("tests")
    assert run(*data) == 1
    assert "training" not in parts
    failing.add("gpu")
    assert run(*data) == "error: no GPU that PyTorch and Triton can use"
    assert list(parts) == ["gpu"]
    assert run("--train-dir", "x") == 2
    assert not parts
