"""Standard input and output, and named pipes: the same bytes as from files, and at once."""

import contextlib
import os
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
from commands import (
    HOP_LENGTH,
    RATE_HZ,
    Finished,
    Pipe,
    Process,
    pipe_through,
    read_all,
    read_json,
    refusal,
    start,
    succeed,
    the_line,
    write_all,
    write_wav,
)

from codec.bitstream import Reader
from codec.testing import speech_like

pytest_plugins = ["commands"]


def wav_header(num_channels: int, num_riff_bytes: int, num_data_bytes: int, *chunks: bytes) -> bytes:
    """Of 16-bit samples; `chunks` stand before them."""
    form = struct.pack("<HHIIHH", 1, num_channels, RATE_HZ, 2 * num_channels * RATE_HZ, 2 * num_channels, 16)
    start_ = struct.pack("<4sI4s4sI", b"RIFF", num_riff_bytes, b"WAVE", b"fmt ", 16)
    return start_ + form + b"".join(chunks) + struct.pack("<4sI", b"data", num_data_bytes)


def samples(num_samples: int, num_channels: int = 1) -> np.ndarray:
    """int16 [T, C]"""
    audio = np.stack([speech_like(num_samples, seed=seed) for seed in range(num_channels)], axis=1)
    return np.round(audio * 2**15).astype("<i2")


def ok(finished: Finished) -> bytes:
    assert (finished.status, finished.stderr) == (0, "")
    return finished.stdout


LIST = struct.pack("<4sI4s4sI14s", b"LIST", 26, b"INFO", b"ISFT", 14, b"Lavf58.76.100\0")


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param("true", id="true"),
        pytest.param((2**32 - 1, 2**32 - 1), id="ffmpeg"),
        pytest.param((0x7FFFF024, 0x7FFFF000), id="sox"),
        pytest.param((0, 0), id="never_completed"),
        pytest.param((2**31 - 1, 2**31), id="arecord"),
    ],
)
@pytest.mark.parametrize("num_channels", [1, 2])
@pytest.mark.parametrize("chunks", [(), (LIST,)], ids=["plain", "with_tags"])
def test_wav_from_a_pipe(
    sizes: str | tuple[int, int], num_channels: int, chunks: tuple[bytes], folder: Path, model: Path
) -> None:
    audio = samples(5001, num_channels)
    soundfile.write("in.wav", audio, RATE_HZ)
    succeed("encode", "in.wav", "out.codec", "-m", model)
    num_bytes = len(audio.tobytes())
    riff, data = (36 + sum(map(len, chunks)) + num_bytes, num_bytes) if isinstance(sizes, str) else sizes
    stream = wav_header(num_channels, riff, data, *chunks) + audio.tobytes()
    succeed_in_this_process_from(stream, "piped.codec", model)
    assert Path("piped.codec").read_bytes() == Path("out.codec").read_bytes()
    if num_channels == 1:
        assert ok(pipe_through("encode", "-", "-", "-m", model, stdin=stream)) == Path("out.codec").read_bytes()


@contextlib.contextmanager
def fed(data: bytes) -> Iterator[int]:
    """The reading end of a pipe that gives this."""
    with Pipe.opened() as pipe:

        def feed() -> None:
            with contextlib.suppress(BrokenPipeError):
                write_all(pipe.writing, data)
            pipe.close_writing()

        feeder = threading.Thread(target=feed)
        feeder.start()
        yield pipe.reading
        pipe.close_reading()
        feeder.join()


def succeed_in_this_process_from(stream: bytes, target: str, model: Path, *options: object) -> None:
    """By the name that a shell's process substitution gives."""
    with fed(stream) as descriptor:
        succeed("encode", f"/dev/fd/{descriptor}", target, "-m", model, *options)


@pytest.mark.parametrize(
    ("format", "subtype"),
    [("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III"), ("WAV", "ULAW")],
)
def test_other_formats_from_a_pipe(format: str, subtype: str, folder: Path, model: Path) -> None:
    soundfile.write("in.audio", speech_like(30000), RATE_HZ, format=format, subtype=subtype)
    succeed("encode", "in.audio", "out.codec", "-m", model)
    data = Path("in.audio").read_bytes()
    assert ok(pipe_through("encode", "-", "-", "-m", model, stdin=data)) == Path("out.codec").read_bytes()
    succeed_in_this_process_from(data, "piped.codec", model)
    assert Path("piped.codec").read_bytes() == Path("out.codec").read_bytes()


def test_raw_samples_in_a_pipe(folder: Path, model: Path) -> None:
    audio = samples(5001, 2)
    soundfile.write("in.wav", audio, RATE_HZ)
    succeed("encode", "in.wav", "out.codec", "-m", model)
    succeed("decode", "out.codec", "out.wav", "-m", model)
    raw = ("--raw", "--rate", RATE_HZ, "--channels", 2)
    coded = ok(pipe_through("encode", "-", "-", "-m", model, *raw, stdin=audio.tobytes()))
    assert coded == Path("out.codec").read_bytes()
    heard = ok(pipe_through("decode", "-", "-", "-m", model, "--raw", stdin=coded))
    assert heard == Path("out.wav").read_bytes()[44:]


def test_stretches_from_a_pipe(folder: Path, model: Path) -> None:
    audio = samples(5000)
    soundfile.write("in.wav", audio, RATE_HZ)
    options = ("--start", "0.1", "--duration", "0.15", "-m", model)
    succeed("encode", "in.wav", "out.codec", *options)
    expected = Path("out.codec").read_bytes()
    for size in (10000, 2**32 - 1):
        stream = wav_header(1, size, size) + audio.tobytes()
        assert ok(pipe_through("encode", "-", "-", *options, stdin=stream)) == expected
    raw = ("--raw", "--rate", RATE_HZ)
    assert ok(pipe_through("encode", "-", "-", *raw, *options, stdin=audio.tobytes())) == expected
    for times in (["--start", "9"], ["--start", "0.3125"], ["--duration", "0"]):
        result = pipe_through("encode", "-", "out", "-m", model, *raw, *times, stdin=audio.tobytes())
        assert result.status == 1
        assert "standard input" in the_line(result.stderr)
    assert {file.name for file in folder.iterdir()} == {"in.wav", "out.codec"}


@pytest.fixture
def coded(folder: Path, model: Path) -> bytes:
    """A container of several blocks, and its audio as `out.wav`."""
    soundfile.write("in.wav", samples(20000, 2), RATE_HZ)
    succeed("encode", "in.wav", "in.codec", "-m", model, "--frames-per-block", "40")
    succeed("decode", "in.codec", "out.wav", "-m", model)
    return Path("in.codec").read_bytes()


def test_decoding_to_a_pipe(coded: bytes, model: Path) -> None:
    expected = Path("out.wav").read_bytes()
    assert ok(pipe_through("decode", "in.codec", "-", "-m", model)) == expected
    assert ok(pipe_through("decode", "in.codec", "-", "-m", model, "--raw")) == expected[44:]
    piped = ok(pipe_through("decode", "-", "-", "-m", model, stdin=coded))
    assert piped == wav_header(2, 2**32 - 1, 2**32 - 1) + expected[44:]  # the length is known at the end only
    heard = ok(pipe_through("decode", "-", "-", "-m", model, "--start", "0.5", "--duration", "0.2", stdin=coded))
    assert heard == wav_header(2, 36 + 12800, 12800) + expected[44 + 4 * 8000 :][:12800]
    for suffix in ("wav", "flac", "ogg"):
        ok(pipe_through("decode", "-", f"piped.{suffix}", "-m", model, stdin=coded))
        assert soundfile.info(f"piped.{suffix}").frames == 20000
    np.testing.assert_array_equal(*(soundfile.read(name, dtype="int16")[0] for name in ("piped.flac", "out.wav")))


def test_files_as_standard_streams(coded: bytes, model: Path) -> None:
    for args, source, expected in [
        (["encode", "-", "-", "-m", model, "--frames-per-block", 40], "in.wav", "in.codec"),
        (["decode", "-", "-", "-m", model], "in.codec", "out.wav"),
    ]:
        with open(source, "rb") as stdin, open("result", "wb") as stdout:
            assert start(*args, stdin=stdin.fileno(), stdout=stdout.fileno()).wait() == 0
        assert Path("result").read_bytes() == Path(expected).read_bytes()


def test_one_command_into_the_other(coded: bytes, model: Path) -> None:
    """A shell would say: encode - - | decode - -"""
    with Pipe.opened() as audio, Pipe.opened() as codes, Pipe.opened() as heard, Pipe.opened() as errors:
        encoder = start(
            "encode", "-", "-", "-m", model, stdin=audio.reading, stdout=codes.writing, stderr=errors.writing
        )
        decoder = start(
            "decode", "-", "-", "-m", model, stdin=codes.reading, stdout=heard.writing, stderr=errors.writing
        )
        for close in (audio.close_reading, codes.close_reading, codes.close_writing, heard.close_writing):
            close()
        errors.close_writing()
        data = Path("in.wav").read_bytes()
        feeder = threading.Thread(target=lambda: (write_all(audio.writing, data), audio.close_writing()))
        feeder.start()
        assert read_all(heard.reading)[44:] == Path("out.wav").read_bytes()[44:]
        feeder.join()
        assert (encoder.wait(), decoder.wait()) == (0, 0)
        assert read_all(errors.reading) == b""


@contextlib.contextmanager
def ended_in_time(process: Process) -> Iterator[None]:
    """A test that waits for ever fails instead."""
    timer = threading.Timer(30, process.send, [9])
    timer.start()
    yield
    timer.cancel()


@pytest.mark.parametrize("kind", ["raw", "wav"])
def test_codes_appear_while_audio_is_still_coming_in(kind: str, folder: Path, model: Path) -> None:
    audio = samples(30000)
    soundfile.write("in.wav", audio, RATE_HZ)
    succeed("encode", "in.wav", "in.codec", "-m", model)
    with Reader("in.codec") as reader:
        expected = reader.read()
    options = ["--raw", "--rate", RATE_HZ] if kind == "raw" else []
    with Pipe.opened() as source, Pipe.opened() as result:
        process = start(
            "encode", "-", "-", "-m", model, "--frames-per-block", 2, *options,
            stdin=source.reading, stdout=result.writing,
        )  # fmt: skip
        result.close_writing()
        with ended_in_time(process), open(result.reading, "rb", buffering=0, closefd=False) as stream:
            if kind == "wav":
                write_all(source.writing, wav_header(1, 2**32 - 1, 2**32 - 1))
            reader, blocks, given, seen = None, iter(()), 0, 0
            for num_samples in (2000, 100, 5000, 1, 10000):
                write_all(source.writing, audio[given : given + num_samples].tobytes())
                given += num_samples
                if reader is None:
                    reader = Reader(stream)  # type: ignore[arg-type]
                    blocks = reader.blocks()
                while seen < given // HOP_LENGTH - 18:  # all but what is in a piece, or block, that is not full
                    codes = next(blocks)
                    np.testing.assert_array_equal(codes, expected[:, :, seen : seen + codes.shape[2]])
                    seen += codes.shape[2]
            write_all(source.writing, audio[given:].tobytes())
            source.close_writing()
            for codes in blocks:
                np.testing.assert_array_equal(codes, expected[:, :, seen : seen + codes.shape[2]])
                seen += codes.shape[2]
        assert (seen, process.wait()) == (expected.shape[2], 0)


def test_audio_appears_while_codes_are_still_coming_in(coded: bytes, model: Path) -> None:
    expected = Path("out.wav").read_bytes()[44:]
    with Pipe.opened() as source, Pipe.opened() as result:
        process = start("decode", "-", "-", "-m", model, stdin=source.reading, stdout=result.writing)
        result.close_writing()
        half = len(coded) // 2
        num_frames = half // ((40 * 2 * 15 + 7) // 8 + 8) * 40 - 40  # of the blocks that are whole, and one less
        with ended_in_time(process):
            write_all(source.writing, coded[:half])
            first = (num_frames - 3) * HOP_LENGTH * 4
            assert first > 10000
            assert read_all(result.reading, 44) == wav_header(2, 2**32 - 1, 2**32 - 1)
            assert read_all(result.reading, first) == expected[:first]
            write_all(source.writing, coded[half:])
            source.close_writing()
            assert read_all(result.reading) == expected[first:]
        assert process.wait() == 0


def test_info_cut_and_join_from_a_pipe(coded: bytes, model: Path) -> None:
    facts = read_json(ok(pipe_through("info", "-", "--json", stdin=coded)).decode())
    assert facts | {"file": "in.codec"} == read_json(succeed("info", "in.codec", "--json"))
    with open("in.codec", "rb") as stdin, Pipe.opened() as result:
        process = start("info", "-", "--json", stdin=stdin.fileno(), stdout=result.writing)
        result.close_writing()
        assert read_json(read_all(result.reading).decode()) == facts
        assert process.wait() == 0
    succeed("cut", "in.codec", "cut.codec", "--start", "0.3", "--duration", "0.4")
    piece = ok(pipe_through("cut", "-", "-", "--start", "0.3", "--duration", "0.4", stdin=coded))
    assert piece == Path("cut.codec").read_bytes()
    succeed("join", "in.codec", "cut.codec", "joined.codec")
    assert ok(pipe_through("join", "in.codec", "-", "-", stdin=piece)) == Path("joined.codec").read_bytes()


def test_named_pipes_are_read(coded: bytes, model: Path) -> None:
    os.mkfifo("pipe")
    for command, source, expected in (("encode", "in.wav", "in.codec"), ("decode", "in.codec", "out.wav")):
        feeder = threading.Thread(target=Path("pipe").write_bytes, args=[Path(source).read_bytes()])
        feeder.start()
        target = f"piped{Path(expected).suffix}"
        succeed(command, "pipe", target, "-m", model, *["--frames-per-block", 40] * (command == "encode"))
        feeder.join()
        assert soundfile_or_bytes(target) == soundfile_or_bytes(expected)


def soundfile_or_bytes(path: str) -> bytes:
    """Headers of WAV differ where its length was not known."""
    return soundfile.read(path, dtype="int16")[0].tobytes() if path.endswith(".wav") else Path(path).read_bytes()


def test_the_input_ends_where_its_header_says(coded: bytes, model: Path) -> None:
    """What follows is left to the next program, or is other chunks."""
    data = Path("in.wav").read_bytes()
    for more in (b"more", LIST):
        result = ok(pipe_through("encode", "-", "-", "-m", model, "--frames-per-block", 40, stdin=data + more))
        assert result == coded


@pytest.mark.parametrize("command", ["encode", "decode"])
def test_closed_streams_are_told(command: str, coded: bytes, model: Path) -> None:
    source = "in.wav" if command == "encode" else "in.codec"
    result = pipe_through(command, "-", "new.wav", "-m", model, closed=[0])
    assert (result.status, the_line(result.stderr)) == (1, "codec: standard input is closed\n")
    result = pipe_through(command, source, "-", "-m", model, closed=[1])
    assert (result.status, the_line(result.stderr)) == (1, "codec: standard output is closed\n")
    result = pipe_through(command, source, "new.wav", "-m", model, closed=[0, 1, 2])
    assert result.status == 0
    expected = Path("out.wav" if command == "decode" else "in.codec").read_bytes()
    if command == "decode":
        assert Path("new.wav").read_bytes() == expected


@pytest.mark.parametrize("command", ["encode", "decode"])
@pytest.mark.parametrize("num_read", [0, 10, 1000])
def test_a_reader_that_goes_away(command: str, num_read: int, folder: Path, fast_model: Path) -> None:
    """| head -c 10"""
    soundfile.write("in.wav", np.zeros(3_000_000, "<i2"), RATE_HZ)
    succeed("encode", "in.wav", "in.codec", "-m", fast_model)
    source = "in.wav" if command == "encode" else "in.codec"
    options = ["--frames-per-block", 1] if command == "encode" else []  # more than a pipe holds
    result = pipe_through(command, source, "-", "-m", fast_model, *options, num_read=num_read)
    assert (result.status, len(result.stdout)) == (1, num_read)
    assert the_line(result.stderr) == "codec: standard output was closed\n"


@pytest.mark.parametrize(
    "args", [["info", "in.codec"], ["info", "in.codec", "--json"], ["cut", "in.codec", "-"], ["--help"]], ids=" ".join
)
def test_nobody_listens(args: list[str], coded: bytes) -> None:
    with Pipe.opened() as result, Pipe.opened() as errors:
        result.close_reading()
        process = start(*args, stdout=result.writing, stderr=errors.writing)
        errors.close_writing()
        line = the_line(read_all(errors.reading).decode())
        assert (process.wait(), line) == (1, "codec: standard output was closed\n")
    full = os.open("/dev/full", os.O_WRONLY)
    with Pipe.opened() as errors:
        process = start(*args, stdout=full, stderr=errors.writing)
        errors.close_writing()
        line = the_line(read_all(errors.reading).decode())
        assert process.wait() == 1
        assert "No space left on device" in line
    os.close(full)


def test_devices_and_folders_are_no_targets_but_standard_output_may_be_one(coded: bytes, model: Path) -> None:
    os.mkfifo("pipe")
    for target in ("pipe", os.devnull, "/dev/full"):
        assert f"{target} is no ordinary file" in refusal("encode", "in.wav", target, "-m", model, "--force")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    assert start("encode", "in.wav", "-", "-m", model, stdout=nowhere).wait() == 0
    os.close(nowhere)


def read_terminal(descriptor: int) -> str:
    data = b""
    with contextlib.suppress(OSError):  # how a terminal says that nobody writes to it any more
        while piece := os.read(descriptor, 2**16):
            data += piece
    return data.decode()


def test_results_do_not_go_to_a_terminal(coded: bytes, model: Path) -> None:
    for args in (
        ["encode", "in.wav", "-"],
        ["decode", "in.codec", "-"],
        ["cut", "in.codec", "-"],
        ["join", "in.codec", "-"],
    ):
        ours, theirs = os.openpty()
        process = start(*args, "-m", model, stdout=theirs, stderr=theirs)
        os.close(theirs)
        text = read_terminal(ours)
        os.close(ours)
        assert process.wait() == 2
        assert "the result would go to a terminal" in " ".join(text.split())


def test_a_terminal_sees_progress_and_a_summary(coded: bytes, model: Path) -> None:
    ours, theirs = os.openpty()
    process = start("decode", "in.codec", "new.wav", "-m", model, stderr=theirs)
    os.close(theirs)
    text = read_terminal(ours)
    os.close(ours)
    assert process.wait() == 0
    assert "100%" in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor is back
    assert "1 of 1 files done: 1.2 s of audio, " in text


def test_a_bad_recording_in_a_pipe_is_one_line(folder: Path, model: Path) -> None:
    write_wav("nan.wav", np.array([[0.1, np.nan]]))
    for data in (b"", b"no audio", Path("nan.wav").read_bytes(), wav_header(1, 36, 0)):
        result = pipe_through("encode", "-", "out.codec", "-m", model, stdin=data)
        assert (result.status, result.stdout) == (1, b"")
        assert "standard input" in the_line(result.stderr)
        result = pipe_through("decode", "-", "out.wav", "-m", model, stdin=data)
        assert (result.status, result.stdout) == (1, b"")
        assert "standard input" in the_line(result.stderr)
    assert {file.name for file in folder.iterdir()} == {"nan.wav"}
