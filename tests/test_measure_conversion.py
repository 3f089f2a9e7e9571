"""The measurement of voice conversion: which pairs it draws, what it says of them, and its command."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import write_wav

from codec.evaluation import UsageError
from codec.evaluation.recordings import Recording, find_recordings
from codec.evaluation.results import Summary
from codec.evaluation.scorers import load_scorer
from codec.testing import speech_like
from tools import measure_conversion
from tools.measure_conversion import EDITS, GAIN, NEARER, SOURCE, TARGET, Measurement, draw_pairs, summaries, table

pytest_plugins = ["commands"]

SPEAKERS = ("test_measure_conversion:Level", "test_measure_conversion:Length")


class Level:
    """An embedder: how loud somebody speaks, as an angle."""

    name = "level"
    version = "1"

    def embed(self, audio: np.ndarray, rate_hz: int) -> np.ndarray:
        angle = min(1.0, float(np.abs(audio).mean())) * np.pi / 2
        return np.array([np.cos(angle), np.sin(angle)], np.float32)


class Length:
    """A further scorer, with weights."""

    name = "length"
    version = "1"

    def score(self, reference: np.ndarray, decoded: np.ndarray, rate_hz: int, text: str) -> dict[str, float]:
        assert reference.shape == decoded.shape
        return {"words": float(len(text.split())), "words_weight": float(len(text))}


def names(num_speakers: int, num_recordings: int) -> list[Recording]:
    return [
        Recording(Path(f"{speaker}{n}.wav"), f"{speaker}{n}.wav", f"s{speaker}", "")
        for n in range(num_recordings)
        for speaker in range(num_speakers)
    ]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two speakers, a loud one and a soft one, three recordings each."""
    folder = tmp_path_factory.mktemp("data")
    rows = []
    for speaker, level in (("loud", 1.0), ("soft", 0.05)):
        for number in range(3):
            name = f"{speaker}{number}.wav"
            write_wav(folder / name, level * speech_like(4500 + 500 * number, seed=number)[None])
            rows.append(f"{name}\tdev\tmade\t{speaker}\t16000\t0.3\t{'word ' * (number + 1)}\n")
    (folder / "manifest.tsv").write_text("".join(rows))
    return folder


def test_pairs_are_the_same_for_a_seed_and_go_every_way_alike() -> None:
    recordings = names(3, 4)
    pairs = draw_pairs(recordings, 24, seed=1)
    assert pairs == draw_pairs(recordings, 24, seed=1) == draw_pairs(recordings, 30, seed=1)[:24]
    assert pairs != draw_pairs(recordings, 24, seed=2)
    directions = [(pair.source.speaker, pair.reference.speaker) for pair in pairs]
    assert {directions.count(direction) for direction in directions} == {4}
    assert len(set(directions)) == 6
    for pair in pairs:
        for others, one in ((pair.of_source, pair.source), (pair.of_target, pair.reference)):
            assert len(others) == 3
            assert {other.speaker for other in others} == {one.speaker}
            assert one not in others
    # Every recording is a source before one is again.
    assert len({pair.source for pair in pairs}) == 12


@pytest.mark.parametrize(("num_speakers", "num_recordings"), [(0, 0), (1, 5), (2, 1)])
def test_too_few_to_convert(num_speakers: int, num_recordings: int) -> None:
    with pytest.raises(ValueError, match="two speakers or more, each with two recordings or more"):
        draw_pairs(names(num_speakers, num_recordings), 1, seed=0)


def test_what_is_measured_of_a_pair(data: Path, voiced_model: Path) -> None:
    (pair,) = draw_pairs(find_recordings(data), 1, seed=0)
    assert (pair.source.speaker, pair.reference.speaker) == ("loud", "soft")
    measured = Measurement(str(voiced_model), (1, 4), (f"speaker={SPEAKERS[0]}", SPEAKERS[1]))(pair)
    assert list(measured) == [
        *("utterance", "reference"),
        *(f"{name}, {rows}" for rows in ("1 row", "4 rows") for name in ("own voice", "converted")),
    ]
    for name, values in measured.items():
        assert values[GAIN] == pytest.approx(values[TARGET] - values[SOURCE])
        assert values[NEARER] == (values[GAIN] > 0)
        assert ("words" in values) == (EDITS in values) == (name != "reference")
    embed = Level().embed
    voices = {}
    for role, others in ((SOURCE, pair.of_source), (TARGET, pair.of_target)):
        mean = np.mean([embed(*other.read()) for other in others], axis=0)
        voices[role] = mean / np.linalg.norm(mean)
    for name, recording in (("utterance", pair.source), ("reference", pair.reference)):
        for role, voice in voices.items():
            assert measured[name][role] == pytest.approx(float(voice @ embed(*recording.read())))
    assert (measured["utterance"][NEARER], measured["reference"][NEARER]) == (0, 1)
    assert measured["utterance"][EDITS] == 0
    assert measured["own voice, 1 row"] != measured["converted, 1 row"]
    assert measured["converted, 1 row"]["words"] == len(pair.source.text.split())


def test_means_are_weighted_and_shown() -> None:
    first = {"heard": {"a": 1.0, "words": 2.0, "words_weight": 1.0}, "other": {"a": 5.0}}
    second = {"heard": {"a": 2.0, "words": 5.0, "words_weight": 3.0}, "other": {"a": float("nan")}}
    found = summaries([first, second])
    assert (found["heard"]["a"].mean, found["heard"]["words"].mean, found["other"]["a"].mean) == (1.5, 4.25, 5.0)
    assert set(found["heard"]) == {"a", "words"}
    shown = table({"heard": {"a": Summary(0.5, 0.25, 0.75, 0.5, 2)}, "other": {"b": Summary(1.0, 1.0, 1.0, 1.0, 2)}})
    assert shown.splitlines() == [
        "| | a | b |",
        "|---|---|---|",
        "| heard | 0.500 (0.250 to 0.750) |  |",
        "| other |  | 1.000 (1.000 to 1.000) |",
    ]


def command(monkeypatch: pytest.MonkeyPatch, *args: object) -> None:
    monkeypatch.setattr(sys, "argv", ["measure_conversion", *map(str, args)])
    measure_conversion.main()


def test_the_command_writes_what_it_shows(
    data: Path, voiced_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = (voiced_model, "--data", data, "--split", "dev", "--num-pairs", 3, "--scorer", f"speaker={SPEAKERS[0]}")
    command(monkeypatch, *args, "--out", tmp_path / "out.json")
    shown = capsys.readouterr().out
    made = json.loads((tmp_path / "out.json").read_text())
    assert (made["model"], made["num_global_bits"], made["bitrates_bps"]) == (
        "voiced@1",
        24,
        {"1": 1500.0, "4": 5250.0},
    )
    assert (made["scorers"], made["speakers"], len(made["pairs"])) == ({"speaker": "1"}, ["loud", "soft"], 3)
    gain = made["means"]["converted, 1 row"][GAIN]
    assert f"| converted, 1 row | {made['means']['converted, 1 row'][TARGET]['mean']:.3f}" in shown
    assert f"{gain['mean']:.3f} ({gain['low']:.3f} to {gain['high']:.3f})" in shown
    assert gain["mean"] == pytest.approx(np.mean([p["values"]["converted, 1 row"][GAIN] for p in made["pairs"]]))


def test_mistakes_are_one_line(data: Path, voiced_model: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    speaker = ("--scorer", f"speaker={SPEAKERS[0]}")
    for args, reason in (
        ((model, "--data", data, *speaker), "tiny@1 does not keep the voice apart"),
        ((voiced_model, "--data", data, "--scorer", SPEAKERS[1]), "one --scorer that tells voices apart"),
        ((voiced_model, "--data", data, *speaker, *speaker[:1], "resemblyzer=x"), "neither one of"),
        ((voiced_model, "--data", data, *speaker, "-k", 7), "num_quantizers=7"),
        ((voiced_model, "--data", data, *speaker, "--speakers", "loud"), "two speakers or more"),
        ((voiced_model, "--data", data / "nowhere", *speaker), "neither a folder nor a manifest"),
        ((voiced_model, "--data", data, *speaker, "--num-pairs", 0), "must be positive"),
    ):
        with pytest.raises(SystemExit, match=f"error: .*{reason}"):
            command(monkeypatch, *args)
    with pytest.raises(UsageError, match="cannot be imported"):
        load_scorer("speaker=test_measure_conversion:Missing")
