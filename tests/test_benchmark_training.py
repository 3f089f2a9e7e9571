"""The benchmark of training runs, and its mistakes are one line."""

import json
from pathlib import Path

import pytest
import soundfile

from codec.testing import speech_like
from tools.benchmark_training import main, settings_for


def test_costs_of_an_adversary_and_of_a_change_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    main(["light", "light,num_active=1,crop_samples=2000", "--batch-size", "1", "--num-runs", "1", "--json"])
    rows = json.loads(capsys.readouterr().out)["training"]
    assert [row["adversary"] for row in rows] == ["light", "light,num_active=1,crop_samples=2000"]
    assert rows[0]["codec_ms"] == rows[1]["codec_ms"]  # measured once, side by side
    for row in rows:
        added_ms = row["discriminators_ms"] + row["adversary_ms"]
        assert min(row["codec_ms"], row["discriminators_ms"], row["adversary_ms"]) > 0.0
        assert row["adversary_share"] == pytest.approx(added_ms / row["codec_ms"])
        assert row["audio_s_per_s"] == pytest.approx(1000 / (row["codec_ms"] + added_ms))  # one second of audio
    main(["light", "--batch-size", "1", "--num-runs", "1"])
    assert capsys.readouterr().out.split()[:2] == ["adversary", "discriminators"]


def test_parts_of_a_step_are_all_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    soundfile.write(tmp_path / "a.wav", speech_like(80000), 16000)
    options = ["--data", str(tmp_path), "--batch-size", "1", "--num-runs", "1", "--json"]
    main(["--parts", "speech_16k_tiny", "encodec_24k_tiny", *options])
    ours, theirs = json.loads(capsys.readouterr().out)["training"]
    assert ours["discriminators_ms"] == 0.0 < theirs["discriminators_ms"]
    for row, seconds in ((ours, 0.5), (theirs, 0.5)):
        total_ms = row["codec_ms"] + row["quantizer_ms"] + row["discriminators_ms"]
        assert min(row["data_ms"], row["codec_ms"], row["quantizer_ms"]) > 0.0
        assert row["codec_share"] + row["quantizer_share"] + row["discriminators_share"] == pytest.approx(1.0)
        assert row["audio_s_per_s"] == pytest.approx(1000 * seconds / total_ms)


def test_changes_reach_the_settings() -> None:
    adversary = settings_for("encodec,crop_samples=4000,num_active=2").adversary
    assert adversary is not None
    assert (adversary.crop_samples, adversary.num_active) == (4000, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "error: nothing: .*Could not find 'adversary/nothing'"),
        (["none"], "error: none has no discriminators to measure"),
        (["light,colour=1"], "error: light,colour=1: Could not override 'adversary.colour'"),
        (["light,crop_samples=0"], "error: .*crop_samples must be positive"),
        (["light", "--num-runs", "0"], "must be positive"),
        ([], "name adversaries, or else --parts"),
        (["--parts", "speech_16k_tiny"], "name adversaries, or else --parts with --data"),
        (["--parts", "nothing", "--data", "."], "Could not find 'experiment/nothing'"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        main([*arguments, "--batch-size", "1"])
