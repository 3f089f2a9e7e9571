"""The benchmark of training runs, and its mistakes are one line."""

import json

import pytest

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
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        main([*arguments, "--batch-size", "1"])
