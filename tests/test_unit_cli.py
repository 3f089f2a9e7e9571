"""`codec units`: train and apply, from files, folders and pipes; mistakes are one line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import pipe_through, refusal, run, succeed, the_line, write_wav

from codec.audio import read_audio, resample
from codec.testing import speech_like
from codec.units import load_units

pytest_plugins = ["commands"]


@pytest.fixture
def recordings(folder: Path) -> Path:
    """Three recordings of one second, one of them at another rate and one in stereo."""
    (folder / "data" / "more").mkdir(parents=True)
    write_wav(folder / "data" / "a.wav", speech_like(16000)[None])
    write_wav(folder / "data" / "b.wav", speech_like(8000, rate_hz=8000, seed=1)[None], 8000)
    both = speech_like(16000, seed=2)
    write_wav(folder / "data" / "more" / "c.wav", torch.stack([torch.from_numpy(both)] * 2).numpy())
    return folder / "data"


@pytest.fixture
def units(recordings: Path) -> Path:
    told = succeed("units", "train", recordings, "units", "--log-mel", "--num-units", 5)
    assert told == "units      5, 50 a second\nfeatures   log-mels, 80 bands\n"
    return recordings.parent / "units"


def lines_of(text: str | bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_a_line_for_every_recording(units: Path, recordings: Path) -> None:
    succeed("units", "apply", units, "data", "out.jsonl")
    lines = lines_of(Path("out.jsonl").read_text())
    assert [line["path"] for line in lines] == ["data/a.wav", "data/b.wav", "data/more/c.wav"]
    loaded = load_units(units)
    for line in lines:
        audio, rate_hz = read_audio(line["path"])
        heard = resample(audio[:1], rate_hz, 16000)  # both channels are alike
        assert line["units"] == loaded.encode(torch.from_numpy(heard.copy()))[0][0].tolist()
        assert line["durations"] == [1] * 50
        assert (line["frame_rate_hz"], line["num_units"]) == (50.0, 5)


def test_runs_become_one(units: Path) -> None:
    succeed("units", "apply", units, "data/*.wav", "all.jsonl")
    succeed("units", "apply", units, "data/a.wav", "data/b.wav", "few.jsonl", "--dedup")
    for all_frames, few in zip(*(lines_of(Path(f"{name}.jsonl").read_text()) for name in ("all", "few")), strict=True):
        pairs = zip(few["units"], few["durations"], strict=True)
        assert [unit for unit, duration in pairs for _ in range(duration)] == all_frames["units"]
        assert len(few["units"]) < len(all_frames["units"])


def test_pipes(units: Path) -> None:
    succeed("units", "apply", units, "data/a.wav", "out.jsonl")
    piped = pipe_through("units", "apply", units, "-", "-", stdin=Path("data/a.wav").read_bytes())
    assert (piped.status, piped.stderr) == (0, "")
    expected = lines_of(Path("out.jsonl").read_text())[0]
    assert lines_of(piped.stdout) == [expected | {"path": "-"}]


def test_units_of_a_codec(recordings: Path, model: Path) -> None:
    told = succeed("units", "train", recordings, "units", "--codec", model, "-k", 1, "--num-units", 4, "--max-files", 2)
    assert told.splitlines()[0] == "units      4, 250 a second"
    assert told.splitlines()[1].startswith("features   tiny@1, id ")
    succeed("units", "apply", "units", recordings / "a.wav", "out.jsonl")
    assert len(lines_of(Path("out.jsonl").read_text())[0]["units"]) == 250


def test_units_are_replaced_only_with_force(units: Path) -> None:
    before = (units / "units.safetensors").read_bytes()
    assert "units exists already" in refusal("units", "train", "data", units, "--log-mel")
    succeed("units", "train", "data", units, "--log-mel", "--num-units", 5, "--seed", 1, "--force")
    assert (units / "units.safetensors").read_bytes() != before
    succeed("units", "apply", units, "data/a.wav", "out.jsonl")
    assert "out.jsonl exists already" in refusal("units", "apply", units, "data/b.wav", "out.jsonl")
    succeed("units", "apply", units, "data/b.wav", "out.jsonl", "--force")
    assert lines_of(Path("out.jsonl").read_text())[0]["path"] == "data/b.wav"
    assert "is the input itself" in refusal("units", "apply", units, "data/b.wav", "data/b.wav", "--force")


def test_good_recordings_are_done_and_bad_ones_told(units: Path) -> None:
    Path("data/bad.wav").write_bytes(b"nothing")
    result = run("units", "apply", units, "data", "out.jsonl")
    assert result.exit_code == 1
    assert "data/bad.wav" in the_line(result.stderr)
    assert len(lines_of(Path("out.jsonl").read_text())) == 3
    assert "data/bad.wav" in refusal("units", "apply", units, "data/bad.wav", "none.jsonl")


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (("train", "nowhere", "new", "--log-mel"), "neither a folder nor a manifest"),
        (("train", "data", "new", "--log-mel", "--num-units", "500"), "frames are too few for 500 units"),
        (("train", "data", "new", "--teacher", "data", "--layer", "1"), "holds no model.safetensors"),
        (("train", "data", "new", "--codec", "nothing"), "neither a bundled model"),
        (("train", "data", "data/more", "--log-mel"), "exists already"),
        (("train", "data", "data/more", "--log-mel", "--force"), "not to be replaced"),
        (("train", "data", "new", "--log-mel", "--split", "dev"), "no manifest.tsv"),
        (("apply", "data", "data", "new"), "holds no units.json"),
        (("apply", "units", "none/*.wav", "new"), "matches no files"),
        (("apply", "units", "nothing.wav", "new"), "nothing.wav"),
        (("apply", "units", "data", "new", "--model", "other"), "of no model"),
        (("apply", "units", "data", "nowhere/new"), "is not a folder"),
    ],
)
def test_mistakes_are_one_line(units: Path, args: tuple[str, ...], told: str) -> None:
    assert told in refusal("units", *args)


@pytest.mark.parametrize(
    "args",
    [
        (),
        ("--teacher", "x"),
        ("--layer", "1", "--log-mel"),
        ("--teacher", "x", "--layer", "1", "--log-mel"),
        ("--log-mel", "--num-quantizers", "1"),
    ],
)
def test_choices_that_exclude_one_another_are_wrong_usage(folder: Path, args: tuple[str, ...]) -> None:
    assert run("units", "train", "data", "new", *args).exit_code == 2
