"""tools.prepare_data and what is under it: reports, packed folders, shards, broken files, interrupted runs."""

import contextlib
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from codec.audio import resample
from codec.testing import speech_like
from recipes import inspection
from recipes.corpora import open_corpus
from recipes.inspection import Finding, check_audio
from recipes.packing import pack_audio, write_shards
from recipes.recordings import Skipped
from tools import prepare_data

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    for index, rate_hz in enumerate((16000, 8000, 16000, 44100)):
        soundfile.write(folder / f"{index}.wav", speech_like(rate_hz, rate_hz=rate_hz, seed=index), rate_hz)
    soundfile.write(folder / "4.flac", np.stack([speech_like(8000, seed=s) for s in (4, 5)], axis=1), 16000)
    return folder


def _prepare(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tools.prepare_data", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"PYTHONWARNINGS": "error"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_report_counts_hours_rates_channels_clipping_and_silence(tmp_path: Path) -> None:
    clipped = np.clip(2 * speech_like(16000), -0.5, 0.5) * 2
    soundfile.write(tmp_path / "a.wav", clipped, 16000)
    half_silent = np.repeat([0.003, 0.0005], 8000)  # -50 and -66 dB
    soundfile.write(tmp_path / "b.wav", np.stack([half_silent, half_silent], axis=1), 8000)
    (tmp_path / "c.wav").write_bytes(b"broken")
    rows = "path\tcorpus\na.wav\tone\nb.wav\ttwo\nc.wav\ttwo\nd.wav\ttwo\n"
    (tmp_path / "list.tsv").write_text(rows)
    report = check_audio(tmp_path / "list.tsv")
    one, two = report.corpora["one"], report.corpora["two"]
    assert (one.num_recordings, one.num_broken, two.num_recordings, two.num_broken) == (1, 0, 1, 2)
    assert (one.seconds, one.seconds_of_rate, one.seconds_of_channels) == (1.0, {16000: 1.0}, {1: 1.0})
    assert (two.seconds, two.seconds_of_rate, two.seconds_of_channels) == (2.0, {8000: 2.0}, {2: 2.0})
    written = soundfile.read(tmp_path / "a.wav")[0]
    assert one.clipped_share == np.mean((written >= 32767 / 32768) | (written == -1)) > 0.001
    assert (two.clipped_share, two.silent_share) == (0.0, 0.5)
    assert [skipped.path for skipped in report.skipped] == ["c.wav", "d.wav"]
    assert report.skipped[1].reason == "no such file"


def test_packing_decodes_resamples_and_keeps_what_the_manifest_says(folder: Path, tmp_path: Path) -> None:
    (folder / "list.tsv").write_text("1.wav\ttrain\tc\ts\t8000\t1.0\tHELLO\n9.wav\tdev\tc\ts\t8000\t1.0\t\n")
    report = pack_audio(folder / "list.tsv", tmp_path / "out", sample_rate_hz=16000)
    assert report.num_samples == 16000
    corpus = open_corpus(tmp_path / "out")
    (clip,) = corpus.recordings
    assert (clip.path, clip.corpus, clip.speaker, clip.text, clip.num_samples) == ("1.wav", "c", "s", "HELLO", 16000)
    whole = resample(soundfile.read(folder / "1.wav", dtype="float32")[0][None], 8000, 16000)
    assert np.abs(corpus.read(0, 0, 16000) - whole).max() <= 0.5001 / 32768
    with pytest.raises(ValueError, match="has no rows of split 'test'"):
        pack_audio(folder / "list.tsv", tmp_path / "out", sample_rate_hz=16000, split="test")
    with pytest.raises(ValueError, match="neither a folder"):
        pack_audio(tmp_path / "nothing", tmp_path / "none", sample_rate_hz=16000)
    assert not (tmp_path / "none").exists()
    with pytest.raises(ValueError, match="is packed already"):
        pack_audio(tmp_path / "out", tmp_path / "again", sample_rate_hz=16000)
    with pytest.raises(ValueError, match="cannot make 0 channels of 16000 Hz"):
        pack_audio(folder, tmp_path / "out", sample_rate_hz=16000, num_channels=0)


def test_16_bit_samples_survive_packing(tmp_path: Path) -> None:
    samples = np.array([-32768, -32767, -1, 0, 1, 32766, 32767] * 10, np.int16)
    soundfile.write(tmp_path / "a.wav", samples, 16000)
    pack_audio(tmp_path, tmp_path / "out", sample_rate_hz=16000)
    assert np.array_equal(np.fromfile(tmp_path / "out" / "audio.i16", np.int16), samples)


def test_the_number_of_workers_changes_nothing(folder: Path, tmp_path: Path) -> None:
    for name, num_workers in (("one", 1), ("three", 3)):
        pack_audio(folder, tmp_path / name, sample_rate_hz=16000, num_channels=2, num_workers=num_workers)
    for file in ("audio.i16", "index.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "three" / file).read_bytes()
    assert sorted(file.name for file in (tmp_path / "one").iterdir()) == ["audio.i16", "index.json"]
    one, three = check_audio(folder), check_audio(folder, num_workers=3)
    assert one == three


def test_shards_are_webdataset_and_hold_what_packing_holds(folder: Path, tmp_path: Path) -> None:
    pack_audio(folder, tmp_path / "packed", sample_rate_hz=16000, num_channels=2)
    for name in ("shards", "again"):
        write_shards(folder, tmp_path / name, sample_rate_hz=16000, num_channels=2, shard_bytes=60_000)
    files = sorted(file.name for file in (tmp_path / "shards").iterdir())
    assert files == [f"shard-{number:06d}.tar" for number in range(len(files))]
    assert 1 < len(files) < 5
    for file in files:
        assert (tmp_path / "shards" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
    with tarfile.open(tmp_path / "shards" / files[0]) as archive:
        assert archive.getnames()[:2] == ["000000000.flac", "000000000.json"]
        assert json.loads(archive.extractfile("000000000.json").read())["path"] == "0.wav"  # type: ignore[union-attr]
    packed, shards = open_corpus(tmp_path / "packed"), open_corpus(tmp_path / "shards")
    assert len(packed.recordings) == len(shards.recordings) == 5
    for number, recording in enumerate(packed.recordings):
        assert shards.recordings[number].num_samples == recording.num_samples
        whole = packed.read(number, 0, recording.num_samples)
        assert np.array_equal(shards.read(number, 0, recording.num_samples), whole)
    with pytest.raises(ValueError, match="shard_bytes must be positive"):
        write_shards(folder, tmp_path / "none", sample_rate_hz=16000, shard_bytes=0)


@pytest.mark.parametrize("prepare", [pack_audio, write_shards])
def test_broken_recordings_are_left_out_and_listed(
    prepare: Callable[..., inspection.Report], folder: Path, tmp_path: Path
) -> None:
    whole = prepare(folder, tmp_path / "whole", sample_rate_hz=16000, num_channels=2)
    (folder / "1b.wav").write_bytes(b"RIFF")
    soundfile.write(folder / "3b.wav", np.zeros((100, 3)), 16000)
    soundfile.write(folder / "3c.wav", np.full(100, np.inf, np.float32), 16000, subtype="FLOAT")
    report = prepare(folder, tmp_path / "out", sample_rate_hz=16000, num_channels=2)
    assert report.num_samples == whole.num_samples
    assert [skipped.path for skipped in report.skipped] == ["1b.wav", "3b.wav", "3c.wav"]
    assert report.skipped[1] == Skipped("3b.wav", "it has 3 channels, neither 1 nor 2")
    assert "NaN or infinite" in report.skipped[2].reason
    rows = (tmp_path / "out" / "skipped.tsv").read_text().splitlines()
    assert rows[1] == "3b.wav\tit has 3 channels, neither 1 nor 2"
    assert len(rows) == 3
    assert len(open_corpus(tmp_path / "out").recordings) == 5
    for file in folder.iterdir():
        file.write_bytes(b"")
    with pytest.raises(ValueError, match=r"no recording can be used of 8; the first, 0\.wav: is empty"):
        prepare(folder, tmp_path / "empty", sample_rate_hz=16000)
    assert [file.name for file in (tmp_path / "empty").iterdir()] == ["skipped.tsv"]


@pytest.mark.parametrize("interrupted_at", [0, 1, 3])
@pytest.mark.parametrize("prepare", [pack_audio, write_shards])
def test_an_interrupted_run_goes_on_where_it_was(
    prepare: Callable[..., inspection.Report],
    interrupted_at: int,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = {"sample_rate_hz": 16000} | ({"shard_bytes": 20_000} if prepare is write_shards else {})
    (folder / "0b.wav").write_bytes(b"")
    expected = prepare(folder, tmp_path / "whole", **options)
    inspect, seen = inspection._inspect, []

    def interrupted(item: tuple[int, object], *rest: object, **options: object) -> Finding:
        if item[0] == interrupted_at and not seen.count("interrupt"):
            seen.append("interrupt")
            raise KeyboardInterrupt
        seen.append(item[0])
        return inspect(item, *rest, **options)  # type: ignore[arg-type, return-value]

    monkeypatch.setattr(inspection, "_inspect", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(folder, tmp_path / "out", **options)
    assert not (tmp_path / "out" / "index.json").exists()
    assert not list((tmp_path / "out").glob(".codec*"))
    for partial in (tmp_path / "out").glob("audio.i16.partial"):  # more was written than the journal knows
        partial.write_bytes(partial.read_bytes() + b"more")
    (tmp_path / "out" / "shard-000007.tar").write_bytes(b"of another run")
    report = prepare(folder, tmp_path / "out", **options)
    assert report == expected
    before, after = seen[: seen.index("interrupt")], seen[seen.index("interrupt") + 1 :]
    assert before == list(range(interrupted_at))
    assert after[0] <= interrupted_at
    if prepare is pack_audio:
        (tmp_path / "out" / "shard-000007.tar").unlink()
        assert after == list(range(interrupted_at, 6))  # nothing twice
    elif interrupted_at == 3:
        assert after[0] > 0  # only what no shard held
    files = sorted(file.name for file in (tmp_path / "whole").iterdir())
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == files
    for file in files:
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_a_run_with_other_settings_begins_anew(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inspect = inspection._inspect

    def interrupted(item: tuple[int, object], *rest: object, **options: object) -> Finding:
        if item[0] == 2:
            raise KeyboardInterrupt
        return inspect(item, *rest, **options)  # type: ignore[arg-type, return-value]

    with monkeypatch.context() as patched:
        patched.setattr(inspection, "_inspect", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pack_audio(folder, tmp_path / "out", sample_rate_hz=16000)
    partial = tmp_path / "out" / "audio.i16.partial"
    whole, journal = partial.read_bytes(), (tmp_path / "out" / "progress.jsonl").read_bytes()
    partial.write_bytes(whole[:-2])
    with pytest.raises(ValueError, match=r"was cut off; remove .* and begin anew"):
        pack_audio(folder, tmp_path / "out", sample_rate_hz=16000)
    assert (tmp_path / "out" / "progress.jsonl").read_bytes() == journal
    soundfile.write(folder / "0.wav", speech_like(5000, seed=9), 16000)  # what was packed is not what is there now
    pack_audio(folder, tmp_path / "out", sample_rate_hz=16000)
    pack_audio(folder, tmp_path / "whole", sample_rate_hz=16000)
    assert (tmp_path / "out" / "audio.i16").read_bytes() == (tmp_path / "whole" / "audio.i16").read_bytes()


@pytest.mark.parametrize("prepare", [pack_audio, write_shards])
def test_a_full_disk_is_no_fault_of_the_recordings(
    prepare: Callable[..., inspection.Report],
    folder: Path,
    tmp_path: Path,
    full_disk: Callable[[], contextlib.AbstractContextManager[None]],
) -> None:
    with full_disk(), pytest.raises(OSError, match="File too large"):
        prepare(folder, tmp_path / "out", sample_rate_hz=16000)
    assert not (tmp_path / "out" / "index.json").exists()
    assert not list((tmp_path / "out").glob("shard*"))
    assert prepare(folder, tmp_path / "out", sample_rate_hz=16000).skipped == []


def test_a_killed_worker_costs_one_recording(folder: Path, tmp_path: Path) -> None:
    found = inspection._died((3, open_corpus(folder).recordings[3]), 1)
    assert found.reason == "the process that read it was ended"
    assert found.path == "3.wav"


# The command


def test_the_command_packs_and_the_result_is_trained_from(folder: Path, tmp_path: Path) -> None:
    done = _prepare(folder, tmp_path / "out", "--num-workers", "2", "--num-channels", "2", "--sample-rate-hz", "8000")
    assert (done.returncode, done.stderr) == (0, "")
    assert "0.00 h at 8000 Hz, channels: 2" in done.stdout
    corpus = open_corpus(tmp_path / "out")
    assert {(r.sample_rate_hz, r.num_channels) for r in corpus.recordings} == {(8000, 2)}
    assert [recording.num_samples for recording in corpus.recordings] == [8000, 8000, 8000, 8000, 4000]


def test_the_command_checks_and_its_status_tells_of_broken_files(folder: Path, tmp_path: Path) -> None:
    done = _prepare(folder, "--check", "--num-workers", "1")
    assert (done.returncode, done.stderr) == (0, "")
    header, row = done.stdout.splitlines()
    assert header.split()[:6] == ["corpus", "files", "hours", "clipped", "silent", "broken"]
    assert row.split()[:2] == ["audio", "5"]
    assert "8000 (0.00), 16000 (0.00), 44100 (0.00); 1 (0.00), 2 (0.00)" in row
    for index in range(12):
        (folder / f"x{index:02d}.wav").write_bytes(b"")
    done = _prepare(folder, "--check", "--num-workers", "1")
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert lines[0] == "left out: x00.wav: is empty"
    assert lines[9:] == ["left out: x09.wav: is empty", "left out: 12 in all"]
    assert done.stdout.splitlines()[1].split()[5] == "12"
    assert _prepare(folder, "--check", "--skip-broken", "--num-workers", "1").returncode == 0
    done = _prepare(folder, tmp_path / "out", "--shards", "--num-workers", "1")
    assert done.returncode == 1
    assert len(open_corpus(tmp_path / "out").recordings) == 5


def test_the_command_measures(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tools import prepare_data

    monkeypatch.setattr(prepare_data, "_MEASURED_SECONDS", 0.05)
    monkeypatch.setattr(sys, "argv", ["prepare_data", str(folder), "--measure"])
    with pytest.raises(SystemExit) as ended:
        prepare_data.main()
    assert ended.value.code == 0
    assert "crops of one second, each second, from one process" in capsys.readouterr().out


def test_mistakes_are_one_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failure(*arguments: str | Path) -> tuple[object, str]:
        monkeypatch.setattr(sys, "argv", ["prepare_data", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            prepare_data.main()
        return ended.value.code, capsys.readouterr().err

    assert "OUT is needed" in failure(folder)[1]
    assert "--check and --measure take no OUT" in failure(folder, tmp_path / "out", "--check")[1]
    for arguments, message in {
        (tmp_path / "nothing", "--check"): "is neither a folder",
        (folder, tmp_path / "out", "--num-workers", "0"): "num_workers must be positive, not 0",
        (folder, folder / "0.wav"): "",
        (folder, tmp_path / "out", "--sample-rate-hz", "0"): "cannot make 1 channels of 0 Hz",
    }.items():
        error = str(failure(*arguments)[0])
        assert error.startswith("error: ")
        assert message in error
        assert "\n" not in error
