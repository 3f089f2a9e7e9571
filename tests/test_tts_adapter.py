"""The example of a text-to-speech loop gives the audio of its codes, in frames of 10 ms."""

import asyncio
import os
import subprocess
import sys
import wave
from pathlib import Path

import numpy as np
import torch
from servers import serving

import codec
from codec.streaming import StreamingDecoder
from codec.testing import tiny_codec
from tools.examples.tts_adapter import CodecTTSService, FakeLanguageModel, speak

CODEC = tiny_codec()
CODEC.name = "tiny@1"
CODES = np.random.default_rng(0).integers(0, 32, (3, 41))
ROOT = Path(__file__).resolve().parent.parent


def _pcm(codes: np.ndarray) -> bytes:
    decoder = StreamingDecoder(CODEC)
    audio = torch.cat([decoder.push(torch.from_numpy(codes)), decoder.flush()], dim=1)[0].numpy()
    return np.clip(np.round(audio * 32768), -32768, 32767).astype("<i2").tobytes()


def test_frames_are_10_ms_of_what_the_codes_say() -> None:
    with serving(CODEC) as server:
        frames, first_s = asyncio.run(speak(server.address, CODES[:2]))
    assert b"".join(frame.audio for frame in frames) == _pcm(CODES[:2])
    assert {(frame.sample_rate, frame.num_channels) for frame in frames} == {(16000, 1)}
    assert {len(frame.audio) for frame in frames[:-1]} == {320}
    assert 0 < first_s < 10


def test_whoever_stops_listening_ends_the_session() -> None:
    async def run(url: str) -> None:
        service = CodecTTSService(url, FakeLanguageModel(np.tile(CODES, 50)))
        frames = service.run_tts("A long story.")
        await anext(frames)
        await frames.aclose()  # type: ignore[attr-defined]

    with serving(CODEC) as server:
        asyncio.run(run(server.address))
        assert not server.service.sessions


def test_it_runs_as_a_program(tmp_path: Path) -> None:
    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "tools.examples.tts_adapter", *map(str, arguments)],
            cwd=ROOT,
            env=os.environ | {"PYTHONWARNINGS": "ignore"},
            capture_output=True,
            text=True,
            check=False,
        )

    folder = tmp_path / "tiny"
    codec.save(tiny_codec(), folder, name="tiny@1", dtype="float32")
    codec.write(tmp_path / "said.codec", CODES[None], model=folder)
    with serving(CODEC) as server:
        done = run(server.address, tmp_path / "said.codec", "--out", tmp_path / "heard.wav")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("17 frames, 0.16 s of speech; first audio ")
    with wave.open(str(tmp_path / "heard.wav")) as file:
        assert file.readframes(10**6) == _pcm(CODES)
    done = run(server.address, tmp_path / "said.codec")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
