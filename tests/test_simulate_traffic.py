"""Simulated traffic: that it runs against a server, and that it finds what is wrong."""

import asyncio
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from codec.pretrained import save
from codec.testing import tiny_codec

pytest.importorskip("fastapi")
from tools.simulate_traffic import Mismatch, Traffic, recordings_of
from tools.stream_load.server import running_server

ROOT = Path(__file__).parent.parent
CODEC = tiny_codec()


def test_traffic_against_a_real_server(tmp_path: Path) -> None:
    save(tiny_codec(), tmp_path / "model", name="tiny@1")
    command = [sys.executable, "-m", "tools.simulate_traffic", str(tmp_path / "model"), "--stream-hours", "0.02"]
    command += ["--sessions", "6", "--longest-s", "2", "--json", str(tmp_path / "result.json")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    result = json.loads((tmp_path / "result.json").read_text())
    assert done.returncode == 0, result["problems"]
    assert result["problems"] == []
    assert result["stream_hours"] >= 0.02
    assert result["sessions"]["decode"] > 0


class _Session:
    """One that gives these outputs."""

    def __init__(self, outputs: list[np.ndarray]) -> None:
        self.outputs = outputs

    async def __aiter__(self) -> Any:
        for output in self.outputs:
            yield output


@pytest.mark.parametrize("fault", ["none", "one sample is off", "a piece is missing", "the end is missing"])
def test_wrong_outputs_are_found(fault: str) -> None:
    recording = recordings_of(CODEC, random.Random(0), 1.0)[0]
    pieces = [piece.copy() for piece in np.array_split(recording.audio, 5, axis=1)]
    if fault == "one sample is off":
        pieces[3][0, 0] = np.nextafter(pieces[3][0, 0], np.float32(1))
    elif fault == "a piece is missing":
        del pieces[2]
    elif fault == "the end is missing":
        pieces[-1] = pieces[-1][:, :-1]
    traffic = Traffic("ws://127.0.0.1:1", CODEC, [recording], 0)
    check = traffic._expect(_Session(pieces), recording.audio, whole=True)  # type: ignore[arg-type]
    if fault == "none":
        asyncio.run(check)
        assert traffic.num_samples == recording.audio.shape[1]
    else:
        with pytest.raises(Mismatch):
            asyncio.run(check)


def test_a_server_that_does_not_start_is_one_line(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match=r"the server did not start: codec: .* is neither a bundled model"),
        running_server(str(tmp_path / "nowhere"), 4, tmp_path / "log"),
    ):
        pass
