"""Many files at once: trees, globs, processes, resuming, and what is told of them."""

import contextlib
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from commands import (
    RATE_HZ,
    Pipe,
    partial_files,
    read_all,
    read_json,
    run,
    snapshot,
    start,
    succeed,
    wait_until,
    write_wav,
)

from codec.bitstream import Reader
from codec.testing import speech_like

pytest_plugins = ["commands"]


@pytest.fixture
def tree(folder: Path) -> Path:
    """Good recordings in the current folder, below `in`: a.wav, b.flac, deep/c.wav."""
    (folder / "in/deep").mkdir(parents=True)
    write_wav("in/a.wav", speech_like(1000, seed=1)[None])
    soundfile.write("in/b.flac", speech_like(2000, seed=2), RATE_HZ)
    write_wav("in/deep/c.wav", np.stack([speech_like(3000, seed=3)] * 2), 44100)
    Path("in/notes.txt").write_text("no audio\n")
    return folder / "in"


GOOD = ["a", "b", "deep/c"]


def spoil(tree: Path) -> None:
    """Two more files, which are bad."""
    (tree / "deep/bad.wav").write_bytes(b"no audio")
    write_wav(tree / "nan.wav", np.full((1, 500), np.nan))


def several(*args: object) -> tuple[int, list[str], str]:
    """Exit status, lines on stderr, stdout. `--jobs 1`: in this process."""
    result = run(*args, "--jobs", 1)
    return result.exit_code, result.stderr.splitlines(), result.stdout


def test_a_folder_there_and_back(tree: Path, model: Path) -> None:
    status, lines, output = several("encode", "in", "coded", "--model", model)
    assert (status, output) == (0, "")
    assert len(lines) == 1
    assert lines[0].startswith("3 of 3 files done: 0.3 s of audio, ")
    assert {str(f.relative_to("coded")) for f in Path("coded").rglob("*.*")} == {f"{name}.codec" for name in GOOD}
    for name in GOOD:
        succeed("encode", next(tree.glob(f"{name}.*")), "alone.codec", "--model", model, "--force")
        assert Path("alone.codec").read_bytes() == Path(f"coded/{name}.codec").read_bytes()
    status, lines, _ = several("decode", "coded", "heard", "--model", model)
    assert (status, len(lines)) == (0, 1)
    assert {str(f.relative_to("heard")) for f in Path("heard").rglob("*.*")} == {f"{name}.wav" for name in GOOD}
    for name in GOOD:
        source, copy = soundfile.info(str(next(tree.glob(f"{name}.*")))), soundfile.info(f"heard/{name}.wav")
        assert (copy.frames, copy.samplerate, copy.channels) == (source.frames, source.samplerate, source.channels)
    status, _, _ = several("decode", "coded", "raw", "--raw", "--model", model)
    assert status == 0
    assert Path("raw/deep/c.pcm").stat().st_size == 2 * 2 * 3000


def test_lists_globs_and_folders_that_exist(tree: Path, model: Path) -> None:
    Path("out").mkdir()
    assert several("encode", "in/a.wav", "in/deep/c.wav", "out", "-m", model)[0] == 0
    assert several("encode", "in/*.flac", "out", "-m", model)[0] == 0
    assert several("encode", "in/deep", "in/a.wav", "new/folder", "-m", model)[0] == 0
    assert {str(file) for file in Path().rglob("*.codec")} == {
        "out/a.codec", "out/c.codec", "out/b.codec", "new/folder/c.codec", "new/folder/a.codec",
    }  # fmt: skip
    succeed("encode", "in/b.flac", "out/deep.codec", "-m", model)
    succeed("encode", "in/b.flac", "new", "-m", model)  # one file into a folder
    assert Path("new/b.codec").read_bytes() == Path("out/b.codec").read_bytes()


def test_the_good_ones_are_done_and_the_bad_ones_listed(tree: Path, model: Path) -> None:
    spoil(tree)
    status, lines, output = several("encode", "in", "coded", "--model", model)
    assert (status, output) == (1, "")
    assert lines[0].startswith("3 of 5 files done: ")
    assert len(lines) == 3
    assert all(line.startswith("codec: in/") for line in lines[1:])
    assert [("bad.wav" in line, "nan.wav" in line) for line in lines[1:]] == [(True, False), (False, True)]
    assert {str(f.relative_to("coded")) for f in Path("coded").rglob("*.*")} == {f"{name}.codec" for name in GOOD}
    # A damaged one, a cut one, and one of another kind.
    data = bytearray(Path("coded/a.codec").read_bytes())
    data[60] ^= 1
    Path("coded/damaged.codec").write_bytes(data)
    Path("coded/none.codec").write_bytes(b"RIFF")
    for name in GOOD:
        Path(f"coded/{name}.codec").rename(f"coded/{name}_.codec")
    succeed("encode", "in/a.wav", "coded/cut.codec", "--frames-per-block", "5", "-m", model)
    Path("coded/cut.codec").write_bytes(Path("coded/cut.codec").read_bytes()[:-20])
    status, lines, _ = several("decode", "coded", "heard", "--model", model)
    assert status == 1
    assert lines[0].startswith("4 of 6 files done: ")
    assert ["cut off" in line for line in lines[1:]] == [True, False, False]
    assert {str(f.relative_to("heard")) for f in Path("heard").rglob("*.*")} == {
        "a_.wav", "b_.wav", "deep/c_.wav", "cut.wav",
    }  # fmt: skip


def test_two_sources_with_one_target_are_wrong_usage(tree: Path, model: Path) -> None:
    shutil.copy("in/a.wav", "in/b.wav")
    before = snapshot(Path())
    for args in (["in", "out"], ["in/a.wav", "in/a.wav", "out"], ["in/a.wav", "in/b.wav", "in/a.wav"]):
        status, lines, output = several("encode", *args, "--model", model)
        assert (status, output) == (2, "")
        assert lines[-1].startswith("Error: ") or lines[-2].startswith("Error: ")
    assert snapshot(Path()) == before


def test_folders_without_audio_are_bad_input(folder: Path) -> None:
    Path("empty").mkdir()
    assert several("encode", "empty", "out")[:2] == (
        1, ["codec: no audio files under empty (looked for .flac, .mp3, .ogg, .opus, .wav)"]
    )  # fmt: skip
    assert several("decode", "empty", "out")[:2] == (1, ["codec: no .codec files under empty"])
    assert not Path("out").exists()


def test_json_is_complete(tree: Path, model: Path) -> None:
    spoil(tree)
    result = run("encode", "in", "coded", "--model", model, "--json", "--jobs", 1)
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 2
    report = read_json(result.stdout)
    assert (report["num_done"], report["num_skipped"], report["num_failed"]) == (3, 0, 2)
    files = {file["source"]: file for file in report["files"]}
    assert set(files) == {"in/a.wav", "in/b.flac", "in/deep/c.wav", "in/deep/bad.wav", "in/nan.wav"}
    for file in report["files"]:
        assert file["target"].startswith("coded/")
        assert (file["status"] == "done") == (file["error"] is None) == os.path.exists(file["target"])
    assert files["in/deep/c.wav"]["num_bytes"] == Path("coded/deep/c.codec").stat().st_size
    assert report["seconds"] == pytest.approx(3000 / RATE_HZ + 3000 / 44100, abs=1e-5)


def test_existing_files_need_force(tree: Path, model: Path) -> None:
    Path("out").mkdir()
    Path("out/a.codec").write_bytes(b"before")
    status, lines, _ = several("encode", "in", "out", "--model", model)
    assert status == 1
    assert lines[1:] == ["codec: out/a.codec exists already; --force replaces it"]
    assert Path("out/a.codec").read_bytes() == b"before"
    assert several("encode", "in", "out", "--model", model, "--force")[0] == 0
    assert Path("out/a.codec").read_bytes() != b"before"


def statuses(*args: object) -> dict[str, Any]:
    result = run(*args, "--json", "--jobs", 1, "--resume")
    assert (result.exit_code == 0) == (result.stderr == "")
    return {file["source"]: file["error"] or file["status"] for file in read_json(result.stdout)["files"]}


def times(folder: str) -> dict[Path, int]:
    return {file: file.stat().st_mtime_ns for file in Path(folder).rglob("*.*")}


def test_resuming_encodes_what_is_missing_broken_or_different(tree: Path, model: Path, other_model: Path) -> None:
    options = ("--model", model)
    done, skipped = "done", "skipped"
    assert statuses("encode", "in", "out", *options) == {
        "in/a.wav": done, "in/b.flac": done, "in/deep/c.wav": done
    }  # fmt: skip
    before, stamps = snapshot(Path("out")), times("out")
    assert set(statuses("encode", "in", "out", *options).values()) == {skipped}
    assert times("out") == stamps
    result = run("encode", "in", "out", *options, "--resume", "-j", 1)
    assert result.stderr.startswith("0 of 3 files done, 3 were there: ")

    Path("out/a.codec").unlink()
    Path("out/b.codec").write_bytes(Path("out/b.codec").read_bytes()[:-5])
    data = bytearray(Path("out/deep/c.codec").read_bytes())
    data[-20] ^= 4
    Path("out/deep/c.codec").write_bytes(data)
    assert set(statuses("encode", "in", "out", *options).values()) == {done}
    assert snapshot(Path("out")) == before

    write_wav("in/a.wav", speech_like(999)[None])  # another length
    soundfile.write("in/b.flac", speech_like(2000), 8000)  # another rate
    expected = {"in/a.wav": done, "in/b.flac": done, "in/deep/c.wav": skipped}
    assert statuses("encode", "in", "out", *options) == expected
    assert set(statuses("encode", "in", "out", *options, "-k", 2).values()) == {done}
    assert set(statuses("encode", "in", "out", *options, "-k", 2).values()) == {skipped}
    assert set(statuses("encode", "in", "out", "-m", other_model, "-k", 2).values()) == {done}
    assert set(statuses("encode", "in", "out", "-m", other_model, "-k", 2, "--duration", "0.01").values()) == {done}
    assert set(statuses("encode", "in", "out", "-m", other_model, "-k", 2, "--duration", "0.01").values()) == {skipped}

    Path("out/a.codec").write_text("a letter to a friend\n")
    Path("out/b.codec").write_bytes(b"")
    found = statuses("encode", "in", "out", *options)
    assert found.pop("in/deep/c.wav") == done
    assert all("is no .codec file; --force replaces it" in reason for reason in found.values())
    assert Path("out/a.codec").read_text() == "a letter to a friend\n"


@pytest.mark.parametrize("raw", [False, True])
def test_resuming_decodes_what_is_missing_or_different(raw: bool, tree: Path, model: Path) -> None:
    options = ["--model", model, *["--raw"] * raw]
    suffix = "pcm" if raw else "wav"
    assert several("encode", "in", "coded", "--model", model)[0] == 0
    assert set(statuses("decode", "coded", "out", *options).values()) == {"done"}
    before, stamps = snapshot(Path("out")), times("out")
    assert set(statuses("decode", "coded", "out", *options).values()) == {"skipped"}
    assert times("out") == stamps
    Path(f"out/a.{suffix}").unlink()
    if raw:
        Path("out/b.pcm").write_bytes(Path("out/b.pcm").read_bytes()[:-2])
    else:
        write_wav("out/b.wav", np.zeros((1, 1999)))
    assert statuses("decode", "coded", "out", *options) == {
        "coded/a.codec": "done", "coded/b.codec": "done", "coded/deep/c.codec": "skipped"
    }  # fmt: skip
    assert snapshot(Path("out")) == before
    if not raw:
        Path("out/a.wav").write_text("a letter to a friend\n")
        assert "--force replaces it" in statuses("decode", "coded", "out", *options)["coded/a.codec"]
        assert Path("out/a.wav").read_text() == "a letter to a friend\n"


def test_resuming_a_cut_file_warns_again(tree: Path, model: Path) -> None:
    succeed("encode", "in/a.wav", "cut.codec", "--frames-per-block", "5", "-m", model)
    Path("cut.codec").write_bytes(Path("cut.codec").read_bytes()[:-20])
    for status in ("done", "skipped"):
        result = run("decode", "cut.codec", "out.wav", "-m", model, "--resume", "--json")
        assert result.exit_code == 1
        assert "cut off" in result.stderr
        assert read_json(result.stdout)["files"][0]["status"] == status


def finish(*args: object) -> tuple[int, str, str]:
    with Pipe.opened() as output, Pipe.opened() as errors:
        process = start(*args, stdout=output.writing, stderr=errors.writing)
        output.close_writing()
        errors.close_writing()
        texts = [read_all(pipe.reading).decode() for pipe in (output, errors)]
        return process.wait(), *texts


def test_processes_give_the_bytes_of_one(tree: Path, model: Path) -> None:
    spoil(tree)
    alone = several("encode", "in", "one", "--model", model)
    status, _, errors = finish("encode", "in", "two", "--model", model, "--jobs", 2)
    assert (status, errors.splitlines()[1:]) == (1, alone[1][1:])
    one, two = snapshot(Path("one")), snapshot(Path("two"))
    assert {file.relative_to("one"): data for file, data in one.items()} == {
        file.relative_to("two"): data for file, data in two.items()
    }
    for name in GOOD:
        with Reader(f"two/{name}.codec") as reader:
            assert reader.num_samples > 0


def processes_with(path: str) -> set[int]:
    """Those that have a file open."""
    found = set()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):  # it may have ended, or not be ours
            if link.samefile(path):
                found.add(int(link.parts[2]))
    return found


def test_a_process_that_is_killed_costs_its_own_file_only(folder: Path, fast_model: Path) -> None:
    """The first file never ends, so that its process is known: it is a named pipe that nobody writes to."""
    Path("in").mkdir()
    os.mkfifo("in/a.wav")
    for name in "bcd":
        write_wav(f"in/{name}.wav", speech_like(5000)[None])
    with Pipe.opened() as errors:
        process = start("encode", "in", "out", "-m", fast_model, "--jobs", 2, stderr=errors.writing)
        errors.close_writing()
        feeder = os.open("in/a.wav", os.O_WRONLY)  # waits until it is being read
        helpers = [process for process in processes_with("in/a.wav") if process != os.getpid()]
        assert len(helpers) == 1
        wait_until(lambda: len(list(Path("out").glob("*.codec"))) == 3, "the other process does all the others")
        os.kill(helpers[0], signal.SIGKILL)
        lines = read_all(errors.reading).decode().splitlines()
        assert process.wait() == 1
        os.close(feeder)
    assert lines[0].startswith("3 of 4 files done")
    assert lines[1:] == ["codec: in/a.wav: its process was ended"]
    assert not partial_files(folder)
