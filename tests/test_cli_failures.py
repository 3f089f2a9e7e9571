"""What must fail does so in one line, with the right exit status, and leaves nothing behind."""

import contextlib
import io
import os
import random
import signal
import struct
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from commands import (
    RATE_HZ,
    Pipe,
    assert_wav,
    partial_files,
    pipe_through,
    read_all,
    read_json,
    refusal,
    run,
    snapshot,
    start,
    succeed,
    the_line,
    wait_until,
    write_wav,
)
from containers import block, chained, end_block, leb128, sealed

from codec.bitstream import Header, Reader, Writer
from codec.pretrained import load
from codec.testing import speech_like
from codec.token_format import TokenFormat

pytest_plugins = ["commands"]

FullDisk = Callable[[], contextlib.AbstractContextManager[None]]


@pytest.fixture
def bad_files(folder: Path) -> None:
    (folder / "folder").mkdir()
    (folder / "empty").touch()
    (folder / "text").write_text("neither audio\nnor a container\n")
    (folder / "random").write_bytes(np.random.default_rng(0).bytes(5000))
    soundfile.write(folder / "zero_samples", np.zeros(0), RATE_HZ, format="WAV")
    soundfile.write(folder / "nan", np.array([0.1, np.nan]), RATE_HZ, format="WAV", subtype="FLOAT")
    late = speech_like(50000)
    late[49999] = np.inf
    soundfile.write(folder / "infinity", late, RATE_HZ, format="WAV", subtype="FLOAT")
    soundfile.write(folder / "cut", speech_like(5000), RATE_HZ, format="WAV")
    (folder / "cut").write_bytes((folder / "cut").read_bytes()[:-100])
    os.symlink("nowhere", folder / "dangling")
    os.symlink("loop", folder / "loop")


@pytest.mark.usefixtures("bad_files")
@pytest.mark.parametrize("command", ["encode", "roundtrip"])
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing", "no such file"),
        ("dangling", "no such file"),
        ("", "no such file"),
        ("empty", "is empty"),
        ("text", "cannot be read as audio"),
        ("random", "cannot be read as audio"),
        ("zero_samples", "holds no samples"),
        ("nan", "NaN or infinite samples, the first at sample 1"),
        ("infinity", "NaN or infinite samples, the first at sample 49999"),
        ("cut", "ended after"),
        ("loop", "Too many levels of symbolic links"),
        ("text/inside", "Not a directory"),
        ("x" * 300, "File name too long"),
        ("/proc/self/mem", "/proc/self/mem"),
    ],
)
@pytest.mark.parametrize("force", [False, True])
def test_bad_audio(command: str, name: str, reason: str, force: bool, model: Path) -> None:
    if force:
        Path("out.wav").write_bytes(b"before")
    message = refusal(command, name, "out.wav", "--model", model, *["--force"] * force)
    assert reason in message
    assert name in message


@pytest.mark.usefixtures("bad_files")
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing", "No such file"),
        ("folder", "s a directory"),
        ("empty", "is empty"),
        ("text", "not a .codec file"),
        ("nan", "not a .codec file"),
        ("loop", "Too many levels of symbolic links"),
        ("text/inside", "Not a directory"),
    ],
)
def test_what_is_no_container(name: str, reason: str, model: Path) -> None:
    commands: list[list[Any]] = [["info", name], ["info", name, "--json"]]
    if name != "folder":
        commands += [
            ["decode", name, "out.wav", "--model", model],
            ["cut", name, "out", "--duration", "1"],
            ["join", name, "out"],
        ]
    for command in commands:
        message = refusal(*command)
        assert name in message
        assert reason in message


@contextlib.contextmanager
def no_privileges() -> Iterator[Path]:
    """A folder to work in as one who may not read everything, which root may."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name, contextlib.chdir(name):
        os.chmod(name, 0o755)
        before = os.geteuid()
        try:
            yield Path(name)
        finally:
            os.seteuid(before)


def test_what_may_not_be_read_or_written(container: Path, speech: Path, model: Path) -> None:
    with no_privileges() as folder:
        for file in (speech, container):
            (folder / file.name).write_bytes(file.read_bytes())
        succeed("decode", container.name, "heard.wav", "-m", model)  # all is imported now
        (folder / "closed").mkdir(mode=0o555)
        for file in (speech, container):
            (folder / file.name).chmod(0)
        names = sorted(file.name for file in folder.rglob("*"))
        if os.geteuid() == 0:
            os.seteuid(65534)
        for source, *args in (
            (speech.name, "encode", "out", "-m", model),
            (speech.name, "roundtrip", "out.wav", "-m", model),
            (container.name, "info"),
            (container.name, "decode", "out.wav", "-m", model),
            (container.name, "cut", "out"),
            (container.name, "join", "out"),
            ("heard.wav", "roundtrip", "closed/out.wav", "-m", model),
            ("heard.wav", "encode", "closed/out", "-m", model),
        ):
            result = run(args[0], source, *args[1:])
            assert (result.exit_code, result.stdout) == (1, "")
            line = the_line(result.stderr)
            assert "Permission denied" in line
            assert (source if source != "heard.wav" else "closed/out") in line
        assert sorted(file.name for file in folder.rglob("*")) == names


def test_places_that_cannot_be_written(speech: Path, container: Path, model: Path) -> None:
    Path("folder").mkdir()
    os.mkfifo("pipe")
    for command, source in (
        ("encode", speech),
        ("roundtrip", speech),
        ("decode", container),
        ("cut", container),
        ("join", container),
    ):
        Path("there.wav").write_bytes(b"before")
        for name in ("hard_link", "link"):
            Path(name).unlink(missing_ok=True)
        os.link(source, "hard_link")
        os.symlink(source, "link")
        options = [] if command in ("cut", "join") else ["--model", model]
        for force in ([], ["--force"]):
            for target, reason in [
                ("missing/out.wav", "missing is not a folder"),
                ("there.wav/out.wav", "there.wav is not a folder"),
                (source, "is the input itself"),
                ("hard_link", "is the input itself"),
                ("link", "is the input itself"),
                ("pipe", "is no ordinary file"),
                (os.devnull, "is no ordinary file"),
                (f"{'x' * 300}.wav", "name too long"),
            ]:
                assert reason in refusal(command, source, target, *options, *force)
        if command in ("roundtrip", "cut", "join"):
            assert "folder is a folder" in refusal(command, source, "folder", *options)
        message = refusal(command, source, "there.wav", *options)
        assert message == "codec: there.wav exists already; --force replaces it\n"
        succeed(*filter(None, [command, source, "there.wav", *options, "--force", "--json" * (command == "roundtrip")]))
        assert Path("there.wav").read_bytes() != b"before"
        assert not partial_files(Path())


def test_a_full_disk(folder: Path, model: Path, full_disk: FullDisk) -> None:
    write_wav("in.wav", speech_like(150_000)[None])
    succeed("encode", "in.wav", "in.codec", "-m", model)
    assert Path("in.codec").stat().st_size > 4400
    Path("old.wav").write_bytes(b"before")
    for command, source in (
        ("encode", "in.wav"),
        ("decode", "in.codec"),
        ("roundtrip", "in.wav"),
        ("cut", "in.codec"),
        ("join", "in.codec"),
    ):
        options = [] if command in ("cut", "join") else ["--model", model]
        for target in ("old.wav", "new.wav", *["new.flac", "new.ogg", "new.mp3"] * (command == "decode")):
            with full_disk():
                message = refusal(command, source, target, *options, "--force")
            assert target in message
            assert "File too large" in message


def test_a_full_disk_and_many_files(folder: Path, model: Path, full_disk: FullDisk) -> None:
    Path("in").mkdir()
    write_wav("in/long.wav", speech_like(150_000)[None])
    write_wav("in/short.wav", speech_like(500)[None])
    with full_disk():
        result = run("encode", "in", "out", "-m", model, "-j", 1)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[1:] == ["codec: out/long.codec: File too large"]
    assert [file.name for file in Path("out").iterdir()] == ["short.codec"]


@pytest.fixture
def blocks(speech: Path, model: Path) -> bytes:
    """A container of five blocks; as it decodes in `whole.wav`."""
    succeed("encode", speech, "blocks.codec", "--model", model, "--frames-per-block", 10)
    succeed("decode", "blocks.codec", "whole.wav", "--model", model)
    return Path("blocks.codec").read_bytes()


def assert_good_part(path: str, num_samples: int) -> None:
    """It is what the whole begins with, up to the last frame: of that, the decoder does not know what follows."""
    whole, _ = soundfile.read("whole.wav", dtype="int16")
    part, _ = soundfile.read(path, dtype="int16")
    assert len(part) == num_samples
    num_sure = min(num_samples - 64, len(whole))
    np.testing.assert_array_equal(part[:num_sure], whole[:num_sure])


def test_a_truncated_container_gives_its_good_part(blocks: bytes, model: Path) -> None:
    header_bytes = len(load(model).token_format.header(num_channels=2).to_bytes())  # type: ignore[union-attr]
    block_bytes = 45  # 10 frames of 2 x 15 bits, their number, size and checksum
    last_bytes = 34  # 7 frames
    assert len(blocks) - header_bytes - 4 * block_bytes - last_bytes == 10
    for size in [0, 1, 7, 8, header_bytes - 1, header_bytes, *range(header_bytes + 1, len(blocks), 9), len(blocks) - 1]:
        Path("cut.codec").write_bytes(blocks[:size])
        num_good = 47 if size >= len(blocks) - 10 else (size - header_bytes) // block_bytes * 10
        if size < header_bytes + block_bytes:
            for command in (["decode", "cut.codec", "out.wav", "-m", model], ["info", "cut.codec"]):
                assert "cut.codec: the file " in refusal(*command)
            continue
        result = run("decode", "cut.codec", "out.wav", "-m", model, "--force")
        line = the_line(result.stderr)
        num_samples = num_good * 64
        seconds = f"{num_samples / RATE_HZ:.3f}"
        assert line == f"codec: cut.codec: the file is cut off; {seconds} s of it are good, and those were taken\n"
        assert (result.exit_code, result.stdout) == (1, "")
        assert_good_part("out.wav", num_samples)
        piped = pipe_through_in_process("decode", "cut.codec", "piped.wav", model)
        assert piped == line.replace("cut.codec", "/dev/fd/N")
        assert soundfile.read("piped.wav")[0].tolist() == soundfile.read("out.wav")[0].tolist()

        result = run("info", "cut.codec", "--json")
        assert (result.exit_code, the_line(result.stderr)) == (1, line)
        facts = read_json(result.stdout)
        assert (facts["is_truncated"], facts["num_samples"]) == (True, num_samples)
        result = run("cut", "cut.codec", "piece.codec", "--force")
        assert (result.exit_code, the_line(result.stderr)) == (1, line)
        with Reader("piece.codec") as reader:
            assert reader.num_samples == num_samples
        assert "cut.codec: the file ends inside a block" in refusal("join", "cut.codec", "joined.codec")
    assert not partial_files(Path())


def pipe_through_in_process(command: str, source: str, target: str, model: Path) -> str:
    """What is said of a source that is a pipe, which a container of this size fits into."""
    with Pipe.opened() as pipe:
        os.write(pipe.writing, Path(source).read_bytes())
        pipe.close_writing()
        result = run(command, f"/dev/fd/{pipe.reading}", target, "-m", model, "--force")
        return result.stderr.replace(f"/dev/fd/{pipe.reading}", "/dev/fd/N")


def test_every_damaged_byte_is_found(blocks: bytes, model: Path) -> None:
    before = snapshot(Path.cwd())
    random.seed(0)
    for at in range(len(blocks)):
        damaged = bytearray(blocks)
        damaged[at] ^= 1 << random.randrange(8)
        Path("damaged.codec").write_bytes(damaged)
        result = run("decode", "damaged.codec", "out.wav", "--model", model)
        assert (result.exit_code, result.stdout) == (1, "")
        assert "damaged.codec: " in the_line(result.stderr)
        if Path("out.wav").exists():  # a block's size that is wrong looks as a file that ends too early
            assert "the file is cut off" in result.stderr
            num_samples = soundfile.info("out.wav").frames
            assert num_samples % 640 == 0
            assert_good_part("out.wav", num_samples)
            Path("out.wav").unlink()
        result = run("info", "damaged.codec")
        assert result.exit_code == 1
        assert "damaged.codec: " in the_line(result.stderr)
    Path("damaged.codec").unlink()
    assert snapshot(Path.cwd()) == before


def test_a_container_of_another_model(container: Path, other_model: Path) -> None:
    message = refusal("decode", container, "out.wav", "--model", other_model)
    for words in ("tiny@1", "other@1", load(other_model).codec_id):
        assert words in message
    assert "tiny@1, which is not bundled; --model says where it is" in refusal("decode", container, "out.wav")


def test_a_name_in_a_file_never_stands_for_a_folder(
    container: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model.parent)  # here "tiny" is a folder with the very model
    assert "tiny@1, which is not bundled" in refusal("decode", container, "out.wav")


def test_files_of_different_kinds_are_not_joined(container: Path, model: Path, other_model: Path) -> None:
    write_wav("mono.wav", speech_like(1000)[None])
    write_wav("fast.wav", np.stack([speech_like(1000)] * 2), 48000)
    succeed("encode", "mono.wav", "mono.codec", "-m", model)
    succeed("encode", "fast.wav", "fast.codec", "-m", model)
    succeed("encode", "speech.wav", "rows.codec", "-m", model, "-k", 2)
    succeed("encode", "speech.wav", "other.codec", "-m", other_model)
    for name in ("mono", "fast", "rows", "other"):
        assert "cannot be joined" in refusal("join", container, f"{name}.codec", "joined.codec")


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"codec_rate_hz": 8000}, id="codec_rate"),
        pytest.param({"hop_length": 32}, id="hop"),
        pytest.param({"codebook_sizes": (64, 32, 32)}, id="codebook_size"),
        pytest.param({"codebook_sizes": (32,) * 4}, id="rows"),
        pytest.param({"num_frames_before": 0}, id="context"),
        pytest.param({"rate_hz": 999_999}, id="rate"),
    ],
)
def test_a_header_that_lies(changes: dict[str, Any], model: Path, folder: Path) -> None:
    header = replace(TokenFormat.load(model).header(), **changes)
    with Writer(folder / "lies.codec", header) as writer:
        writer.write(np.full((1, len(header.codebook_sizes), 1), 31))
        writer.finish(min(1, header.num_samples_in(1)))
    if "rate_hz" in changes:  # one that is strange, but true
        succeed("decode", "lies.codec", "out.wav", "--model", model)
    else:
        assert "lies.codec: " in refusal("decode", "lies.codec", "out.wav", "--model", model)


def test_a_container_without_samples(model: Path, folder: Path) -> None:
    with Writer(folder / "nothing.codec", TokenFormat.load(model).header()) as writer:
        writer.finish(0)
    refusal("decode", "nothing.codec", "out.wav", "--model", model)
    assert "holds no audio" in refusal("cut", "nothing.codec", "out.codec")


def test_future_versions(container: Path, model: Path) -> None:
    header = bytearray(load(model).token_format.header(num_channels=2).to_bytes()[:-4])  # type: ignore[union-attr]
    rest = container.read_bytes()[len(header) + 4 :]
    for at, value in ((6, 2), (6, 0), (7, 2), (7, 0x80)):
        changed = bytearray(header)
        changed[at] = value
        Path("future.codec").write_bytes(sealed(bytes(changed)) + rest)
        assert "needs a newer version" in refusal("decode", "future.codec", "out.wav", "-m", model)
        assert "needs a newer version" in refusal("info", "future.codec")


def test_claims_of_terabytes(container: Path, model: Path) -> None:
    """Of blocks, frames, samples, channels and WAV: refused without room being made for them."""
    header = TokenFormat.load(model).header()
    start_ = header.to_bytes()
    many = replace(header, num_channels=1024).to_bytes()
    frames = block(1, leb128(1) + bytes(2))
    riff = struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", 2**31 - 2**14, b"WAVE", b"fmt ", 16, 1, 1, 16000, 32000, 2, 16,
                       b"data", 2**31 - 2**14 - 36)  # fmt: skip
    tracemalloc.start()
    try:
        for data in (
            (start_, leb128(8 * 2**40 + 1) + bytes(100)),
            (start_, leb128(8 * 2**20 + 9) + bytes(100)),
            (start_, block(1, leb128(2**40) + bytes(2))),
            (start_, block(2, leb128(2**40) + bytes(2))),
            (start_, block(3, leb128(2**40, 2**20) + bytes(2))),
            (start_, frames, end_block(2**50, 1)),
            (start_, frames, end_block(64, 2**50)),
            (start_, frames, end_block(64, 1, 2**50)),
            (start_, block(4, leb128(0, 2**50)), frames, end_block(1, 1)),
            (many, block(1, leb128(2**16) + bytes(2))),
        ):
            Path("claims.codec").write_bytes(chained(*data))
            for command in (["info", "claims.codec"], ["decode", "claims.codec", "out.wav", "-m", model]):
                assert "claims.codec: " in refusal(*command)
        for channels, rate_hz, num_bytes in ((1, 16000, 2**31 - 2**14 - 36), (65535, 2**31, 100)):
            changed = bytearray(riff)
            changed[22:28] = struct.pack("<HI", channels, rate_hz)
            changed[40:44] = struct.pack("<I", num_bytes)
            Path("claims.wav").write_bytes(bytes(changed) + bytes(1000))
            assert "claims.wav" in refusal("encode", "claims.wav", "out.codec", "-m", model)
        assert tracemalloc.get_traced_memory()[1] < 30e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("num_quantizers", [-1, 0, 4])
@pytest.mark.parametrize("command", ["encode", "roundtrip"])
def test_wrong_numbers_of_quantizers(command: str, num_quantizers: int, speech: Path, model: Path) -> None:
    message = refusal(command, speech, "out.wav", "--model", model, "--num-quantizers", num_quantizers)
    assert f"num_quantizers={num_quantizers} is not one of (1, 2, 3)" in message


def test_unknown_models(speech: Path, container: Path) -> None:
    Path("no_model").mkdir()
    for name in ("nonsense", "no_model", "../../etc", ""):
        for command, source in (("encode", speech), ("roundtrip", speech), ("decode", container)):
            assert f"{name!r} is neither a bundled model" in refusal(command, source, "out.wav", "--model", name)


def test_devices_that_are_not_there(speech: Path, container: Path, model: Path) -> None:
    for device in ("nonsense", "cuda:77", *["cuda"] * (not torch.cuda.is_available())):
        for command, source in (("encode", speech), ("roundtrip", speech), ("decode", container)):
            message = refusal(command, source, "out.wav", "-m", model, "--device", device)
            assert message.startswith(f"codec: device {device!r} cannot be used: ")


def test_raw_input_that_makes_no_sense(folder: Path, model: Path) -> None:
    Path("in.pcm").write_bytes(bytes(1001))
    for options in (["--channels", 2000], [], ["--channels", 2]):
        refusal("encode", "in.pcm", "out.codec", "-m", model, "--raw", "--rate", 16000, *options)
    Path("in.pcm").write_bytes(bytes(1000))
    refusal("encode", "in.pcm", "out.codec", "-m", model, "--raw", "--rate", 10**9)


def test_audio_that_ends_before_its_end_in_a_pipe(speech: Path, container: Path, model: Path) -> None:
    data, before = speech.read_bytes(), snapshot(Path.cwd())
    for size in (20, 50, 1000, len(data) - 1):
        result = pipe_through("encode", "-", "out.codec", "-m", model, stdin=data[:size])
        assert result.status == 1
        assert "standard input" in the_line(result.stderr)
    assert snapshot(Path.cwd()) == before
    result = pipe_through("decode", "-", "out.wav", "-m", model, stdin=container.read_bytes()[:-2])
    assert result.status == 1
    assert the_line(result.stderr).startswith("codec: standard input: the file is cut off; 0.188 s of it are good")
    assert_wav("out.wav", 2, 47 * 64, RATE_HZ)
    result = pipe_through("decode", "-", "-", "-m", model, stdin=container.read_bytes()[:-2])
    assert (result.status, len(result.stdout)) == (1, 44 + 4 * 47 * 64)
    the_line(result.stderr)


SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.fixture
def long_files(folder: Path, fast_model: Path) -> Path:
    """Three minutes: `in.wav`, `in.codec`, `expected.wav`."""
    soundfile.write("in.wav", np.tile(np.round(speech_like(80_000) * 2**15).astype("<i2"), 36), RATE_HZ)
    succeed("encode", "in.wav", "in.codec", "-m", fast_model)
    succeed("decode", "in.codec", "expected.wav", "-m", fast_model)
    return folder


@pytest.mark.parametrize("command", ["encode", "decode"])
def test_signals_at_any_moment(command: str, long_files: Path, fast_model: Path) -> None:
    source, target, expected = (
        ("in.wav", "out.codec", "in.codec") if command == "encode" else ("in.codec", "out.wav", "expected.wav")
    )
    data = Path(expected).read_bytes()
    names = {*os.listdir(), target}
    assert start("--help").wait() == 0  # whatever the first one of all waits for
    started = time.monotonic()
    assert start(command, source, target, "-m", fast_model).wait() == 0
    whole_time = time.monotonic() - started
    assert Path(target).read_bytes() == data
    random.seed(command)
    statuses = set()
    for i in range(27):
        number, is_there = SIGNALS[i % 3], i % 2 == 1
        if is_there:
            Path(target).write_bytes(b"before")
        else:
            Path(target).unlink(missing_ok=True)
        with Pipe.opened() as errors:
            process = start(command, source, target, "-m", fast_model, *["--force"] * is_there, stderr=errors.writing)
            errors.close_writing()
            time.sleep(whole_time * 1.1 * (i + random.random()) / 27)
            process.send(number)
            status = process.wait()
            statuses.add(status)
            text = read_all(errors.reading).decode()
        assert set(os.listdir()) - {target} == names - {target}, "nothing half-written"
        result = Path(target).read_bytes() if Path(target).exists() else None
        assert result in (data, b"before" if is_there else None)
        if status == 0:
            assert (text, result) == ("", data)
        else:
            assert (status, text) == (128 + number, f"codec: ended by {number.name}\n")
    assert {128 + number for number in SIGNALS} <= statuses


def handles(process: int, number: int) -> bool:
    """Whether a process has a handler for a signal: the command's first act."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    return bool(int(fields["SigCgt"], 16) >> (number - 1) & 1)


@pytest.mark.parametrize(("number", "delay"), [(signal.SIGINT, 0.0), (signal.SIGTERM, 0.4), (signal.SIGHUP, 1.1)])
def test_signals_while_all_is_being_imported(number: int, delay: float, long_files: Path, fast_model: Path) -> None:
    before = snapshot(Path.cwd())
    process = subprocess.Popen(
        [sys.executable, "-m", "codec", "encode", "in.wav", "out.codec", "-m", fast_model], stderr=subprocess.PIPE
    )
    wait_until(lambda: handles(process.pid, signal.SIGHUP), "main has begun")
    time.sleep(delay)
    process.send_signal(number)
    _, errors = process.communicate()
    assert process.returncode == 128 + number
    assert errors.decode() == f"codec: ended by {signal.Signals(number).name}\n"
    assert snapshot(Path.cwd()) == before


def test_signals_that_are_ignored_stay_so(long_files: Path, fast_model: Path) -> None:
    """By nohup, say."""
    process = start("encode", "in.wav", "out.codec", "-m", fast_model, ignored=[signal.SIGHUP, signal.SIGINT])
    process.send(signal.SIGHUP)
    process.send(signal.SIGINT)
    assert process.wait() == 0
    assert Path("out.codec").read_bytes() == Path("in.codec").read_bytes()


def test_a_signal_while_waiting_for_input(folder: Path, model: Path) -> None:
    for number in SIGNALS:
        with Pipe.opened() as source, Pipe.opened() as errors:
            process = start("encode", "-", "out.codec", "-m", model, stdin=source.reading, stderr=errors.writing)
            errors.close_writing()
            os.write(source.writing, Path(__file__).read_bytes()[:2])
            time.sleep(0.1)
            process.send(number)
            assert process.wait() == 128 + number
            assert the_line(read_all(errors.reading).decode()) == f"codec: ended by {number.name}\n"
    assert not list(folder.iterdir())


def processes_of(session: int) -> list[str]:
    """Command lines of the processes of a session that run, empty for those that are about to end."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, its_session = file.read_text().rpartition(")")[2].split()[:4]
            if int(its_session) == session and state != "Z":
                found.append(file.with_name("cmdline").read_text().replace("\0", " "))
    return found


@pytest.mark.parametrize(
    ("number", "delay", "to_all"),
    [
        (signal.SIGTERM, 0.03, False),
        (signal.SIGINT, 0.4, True),
        (signal.SIGTERM, None, False),
        (signal.SIGHUP, None, True),
    ],
)
def test_signals_to_a_batch(
    number: signal.Signals, delay: float | None, to_all: bool, long_files: Path, fast_model: Path
) -> None:
    """Sent to the first process, or to all of them, as a terminal does; before or after the helpers begin to work."""
    Path("in").mkdir()
    for i in range(40):
        os.link("in.wav", f"in/{i}.wav")
    os.mkfifo("in/last.wav")  # nobody writes to it, so the batch does not end by itself
    data = Path("in.codec").read_bytes()
    with Pipe.opened() as errors:
        process = start("encode", "in", "out", "-m", fast_model, "--jobs", 2, stderr=errors.writing)
        errors.close_writing()
        if delay is None:
            wait_until(lambda: bool(list(Path("out").glob("*.codec"))), "files appear")
            delay = 0.3 * random.random()
        time.sleep(delay)
        os.killpg(process.id, number) if to_all else process.send(number)
        assert process.wait() == 128 + number
        assert not partial_files(Path.cwd())
        assert not [line for line in processes_of(process.id) if line and "resource_tracker" not in line]
        assert read_all(errors.reading).decode() == f"codec: ended by {number.name}\n"
    for file in Path("out").glob("*"):
        assert file.read_bytes() == data
    wait_until(lambda: not processes_of(process.id), "the resource tracker is gone, too")


def test_memory_does_not_grow_with_the_file(folder: Path, fast_model: Path) -> None:
    minute = np.tile(np.round(speech_like(80_000) * 2**15).astype("<i2"), 12)
    peaks: dict[str, list[int]] = {}
    for minutes in (1, 20):
        soundfile.write("in.wav", np.tile(minute, minutes), RATE_HZ)
        for args in (
            ["encode", "in.wav", "out.codec", "-f", "-m", fast_model],
            ["decode", "out.codec", "out.wav", "-f", "-m", fast_model],
            ["decode", "out.codec", "out.flac", "-f", "-m", fast_model],
            ["cut", "out.codec", "cut.codec", "-f", "--start", "1"],
            ["info", "out.codec"],
        ):
            status, peak = start(*args).wait_and_weigh()
            assert status == 0
            peaks.setdefault(" ".join(map(str, args[:3])), []).append(peak)
    for command, (small, large) in peaks.items():
        assert large - small < 6 * 1024, f"KiB at most: {command}: {small} for a minute, {large} for 20"


def test_memory_in_a_pipe_does_not_grow_either(folder: Path, fast_model: Path) -> None:
    minute = bytes(2 * 60 * RATE_HZ)
    peaks = []
    for minutes in (1, 10):
        with Pipe.opened() as source:
            options = ("--raw", "--rate", RATE_HZ, "-f", "-m", fast_model)
            process = start("encode", "-", "out.codec", *options, stdin=source.reading)
            source.close_reading()
            with open(source.writing, "wb", closefd=False) as stream:
                for _ in range(minutes):
                    stream.write(minute)
            source.close_writing()
            status, peak = process.wait_and_weigh()
            assert status == 0
            peaks.append(peak)
    assert peaks[1] - peaks[0] < 6 * 1024


def test_headers_of_tests_are_headers(model: Path) -> None:
    """What the tests above forge is what the format says, but for the lie."""
    header = TokenFormat.load(model).header()
    stream = io.BytesIO(chained(header.to_bytes(), block(1, leb128(1) + bytes(2)), end_block(64, 1)))
    reader = Reader(stream)
    assert isinstance(reader.header, Header)
    assert (reader.num_samples, reader.read().tolist()) == (64, [[[0], [0], [0]]])
