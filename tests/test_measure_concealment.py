"""The measurement of concealment: which frames it loses, the ways it decodes, and its command."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import write_wav

from codec.pretrained import load
from codec.streaming import StreamingDecoder
from codec.testing import speech_like, tiny_codec, tiny_voiced_codec
from tools import measure_concealment
from tools.measure_concealment import ABSENT, CONCEALED, DISTANCE, LOSSLESS, LOUDEST, ZEROS, decoded, draw_losses

pytest_plugins = ["commands"]


@pytest.mark.parametrize(("loss_percent", "burst"), [(5, 1), (10, 3), (20, 4), (50, 2)])
def test_as_many_frames_are_lost_as_were_asked_for_in_bursts(loss_percent: float, burst: int) -> None:
    lost = draw_losses(40000, loss_percent=loss_percent, burst=burst, seed=3)
    assert lost.mean() == pytest.approx(loss_percent / 100, rel=0.1)
    places = np.flatnonzero(np.diff(np.r_[False, lost, False]))
    assert set((places[1::2] - places[::2])[:-1]) == {burst}
    assert not lost[0]
    assert np.array_equal(lost, draw_losses(40000, loss_percent=loss_percent, burst=burst, seed=3))
    assert not np.array_equal(lost, draw_losses(40000, loss_percent=loss_percent, burst=burst, seed=4))


@pytest.mark.parametrize("make", [tiny_codec, tiny_voiced_codec])
def test_the_ways_to_decode(make: type) -> None:
    codec = make()
    tokens = codec.encode(torch.from_numpy(speech_like(3000))[None, None])
    lost = np.zeros(tokens.codes.shape[2], bool)
    assert all(len(decoded(codec, tokens, lost, way)) == 3000 for way in (CONCEALED, ABSENT, ZEROS, LOSSLESS))
    whole = codec.decode(tokens)[0, 0].numpy()
    for way in (CONCEALED, ABSENT, ZEROS, LOSSLESS):
        assert np.array_equal(decoded(codec, tokens, lost, way), whole)
    lost[5:8] = lost[46] = True
    heard = {way: decoded(codec, tokens, lost, way) for way in (CONCEALED, ABSENT, ZEROS, LOSSLESS)}
    assert np.array_equal(heard[LOSSLESS], whole)
    assert not heard[ZEROS][5 * 64 : 8 * 64].any()
    assert not heard[ZEROS][46 * 64 :].any()
    assert np.array_equal(heard[CONCEALED][: 4 * 64], whole[: 4 * 64])
    decoder = StreamingDecoder(codec, global_codes=tokens.global_codes)
    parts = [decoder.push(tokens.codes[0, :, :5]), decoder.conceal(3), decoder.push(tokens.codes[0, :, 8:46])]
    expected = torch.cat([*parts, decoder.conceal(1), decoder.flush()], dim=1)[0, :3000]
    assert np.array_equal(heard[CONCEALED], expected.numpy())
    codes = tokens.codes.masked_fill(torch.from_numpy(lost), -1)
    decoder.reset()
    expected = torch.cat([decoder.push(codes[0]), decoder.flush()], dim=1)[0, :3000]
    assert np.array_equal(heard[ABSENT], expected.numpy())


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["measure_concealment", *map(str, arguments)])
    measure_concealment.main()


def test_the_command(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(2):
        write_wav(tmp_path / f"{number}.wav", speech_like(24000, seed=number)[None])
    out = tmp_path / "out.json"
    run(monkeypatch, model, "--data", tmp_path, "--loss", 10, "--burst", 2, 3, "-k", 2, "--out", out)
    printed = capsys.readouterr().out
    assert printed.startswith(f"tiny@1, id {load(model).codec_id}, 2 rows: 2 recordings, seed 0\n")
    facts = json.loads(out.read_text())
    ways = [LOSSLESS, *(f"10 % in {burst}, {way}" for burst in (2, 3) for way in (CONCEALED, ABSENT, ZEROS))]
    assert list(facts["means"]) == ways
    for way in ways:
        row = next(line for line in printed.splitlines() if line.startswith(f"| {way} |"))
        assert f"{facts['means'][way][LOUDEST]['mean']:.3f} (" in row
    assert facts["means"][LOSSLESS][DISTANCE]["mean"] == 0.0
    assert facts["means"]["10 % in 3, concealed"][DISTANCE]["mean"] > 0.0
    assert set(facts["recordings"]) == {"0.wav", "1.wav"}


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--loss", "0"], "a loss of 0.0 % in bursts of 1 frames cannot be drawn"),
        (["--loss", "90"], "bursts of 1 frames are too short for a loss of 90.0 %"),
        (["-k", "9"], "num_quantizers=9 is not one of"),
        (["--data", "nowhere"], "nowhere is neither a folder nor a manifest"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], reason: str, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match=f"^error: .*{reason}"):
        run(monkeypatch, model, "--data", tmp_path, *arguments)
