"""The command line in tests: in this process, and as processes that start at once.

Importing torch takes seconds, so `start` forks processes from one that has imported it, once per test session. They run
`codec.__main__.main` with standard streams and signals of their own, as `python -m codec` does.

Test files name this module in `pytest_plugins`, for its fixtures; they also import it, hence: PYTEST_DONT_REWRITE
"""

import atexit
import contextlib
import functools
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from typer.testing import CliRunner, Result

from codec.cli import app
from codec.pretrained import save
from codec.testing import speech_like, tiny_codec, tiny_voiced_codec

HOP_LENGTH, RATE_HZ = 64, 16000  # of the tiny codec


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny model."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save(tiny_codec(), folder, name="tiny@1", dtype="float32")
    return folder


@pytest.fixture(scope="session")
def voiced_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One with global codes: those of the first 4000 samples."""
    folder = tmp_path_factory.mktemp("models") / "voiced"
    save(tiny_voiced_codec(), folder, name="voiced@1", dtype="float32")
    return folder


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "other"
    save(tiny_codec(seed=1), folder, name="other@1", dtype="float32")
    return folder


@pytest.fixture(scope="session")
def fast_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One with long frames (1280 samples), thousands of times faster than real time."""
    folder = tmp_path_factory.mktemp("models") / "fast"
    save(tiny_codec(patch_samples=160, strides=(2, 4)), folder, name="fast@1", dtype="float32")
    return folder


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, empty. Commands may change the number of threads; it comes back."""
    num_threads = torch.get_num_threads()
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    torch.set_num_threads(num_threads)


@pytest.fixture
def speech(folder: Path) -> Path:
    path = folder / "speech.wav"
    write_wav(path, np.stack([speech_like(3000, seed=1), speech_like(3000, seed=2)]))
    return path


@pytest.fixture
def container(speech: Path, model: Path) -> Path:
    """What `speech` becomes."""
    path = speech.with_name("speech.codec")
    succeed("encode", speech, path, "--model", model)
    return path


_SERVER = """
import contextlib, io, json, os, signal, socket, sys, traceback
import torch
import codec.__main__, codec.audio, codec.cli, codec.jobs, codec.pretrained, codec.reports, codec.transcode

torch.set_num_threads(1)
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
with contextlib.suppress(SystemExit), contextlib.redirect_stderr(io.StringIO()):
    codec.cli.app(["info", "nowhere"])  # what is imported late is imported now
server = socket.socket(fileno=int(sys.argv[1]))

def command(request, streams):
    os.setsid()
    server.close()
    os.chdir(request["folder"])
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    for number in request["closed"]:
        os.close(number)
    for number in SIGNALS:  # as main does it: no signal comes before it has begun
        signal.signal(number, signal.SIG_IGN if number in request["ignored"] else codec.__main__._end)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    open_stream = lambda number, mode: None if number in request["closed"] else open(number, mode, closefd=False)
    sys.stdin, sys.stdout, sys.stderr = open_stream(0, "r"), open_stream(1, "w"), open_stream(2, "w")
    sys.argv = ["codec", *request["args"]]
    codec.__main__.main()

while True:
    data, streams, _, _ = socket.recv_fds(server, 2**20, 3)
    if not data:
        break
    request = json.loads(data)
    if "args" in request:
        answer = os.fork()
        if answer == 0:
            try:
                command(request, streams)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(99)  # main ends the process itself
        for stream in streams:
            os.close(stream)
    else:
        _, status, usage = os.wait4(request["process"], 0)
        answer = os.waitstatus_to_exitcode(status), usage.ru_maxrss
    server.send(json.dumps(answer).encode())
"""


@functools.cache
def _server() -> socket.socket:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(120)
    environment = os.environ | {"OMP_WAIT_POLICY": "passive"}
    process = subprocess.Popen(
        [sys.executable, "-c", _SERVER, str(theirs.fileno())], pass_fds=[theirs.fileno()], env=environment
    )
    theirs.close()

    def end() -> None:
        ours.close()
        process.wait()

    atexit.register(end)
    return ours


@dataclass
class Process:
    """A `codec` command that runs."""

    id: int

    def send(self, signal_number: int) -> None:
        os.kill(self.id, signal_number)

    def wait(self) -> int:
        """Exit status; the negative number of a signal that ended the process unhandled."""
        return self.wait_and_weigh()[0]

    def wait_and_weigh(self) -> tuple[int, int]:
        """The same, and the largest amount of memory that it had, in KiB."""
        _server().send(json.dumps({"process": self.id}).encode())
        status, peak = json.loads(_server().recv(2**10))
        return status, peak


def start(
    *args: object,
    stdin: int | None = None,
    stdout: int | None = None,
    stderr: int | None = None,
    closed: Sequence[int] = (),
    ignored: Sequence[int] = (),
) -> Process:
    """Start a command in the current folder. Streams are file descriptors, by default those to nowhere."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    request = {"args": list(map(str, args)), "folder": os.getcwd(), "closed": list(closed), "ignored": list(ignored)}
    try:
        streams = [nowhere if stream is None else stream for stream in (stdin, stdout, stderr)]
        socket.send_fds(_server(), [json.dumps(request).encode()], streams)
    finally:
        os.close(nowhere)
    return Process(json.loads(_server().recv(2**10)))


@dataclass
class Pipe:
    """Both ends of a pipe, for `start`."""

    reading: int
    writing: int

    @staticmethod
    @contextlib.contextmanager
    def opened() -> "Iterator[Pipe]":
        pipe = Pipe(*os.pipe())
        try:
            yield pipe
        finally:
            pipe.close_reading()
            pipe.close_writing()

    def close_reading(self) -> None:
        if self.reading >= 0:
            os.close(self.reading)
        self.reading = -1

    def close_writing(self) -> None:
        if self.writing >= 0:
            os.close(self.writing)
        self.writing = -1


@dataclass
class Finished:
    status: int
    stdout: bytes
    stderr: str


def pipe_through(
    *args: object, stdin: bytes | Callable[[int], None] = b"", num_read: int | None = None, closed: Sequence[int] = ()
) -> Finished:
    """A whole process with pipes. `stdin`: what is written, or a function that writes to a descriptor.

    With `num_read`, standard output is closed after so many bytes.
    """
    with Pipe.opened() as source, Pipe.opened() as result, Pipe.opened() as errors:
        process = start(*args, stdin=source.reading, stdout=result.writing, stderr=errors.writing, closed=closed)
        source.close_reading()
        result.close_writing()
        errors.close_writing()

        def feed() -> None:
            with contextlib.suppress(BrokenPipeError):
                if callable(stdin):
                    stdin(source.writing)
                else:
                    write_all(source.writing, stdin)
            source.close_writing()

        feeder = threading.Thread(target=feed)
        feeder.start()
        output = read_all(result.reading, num_read)
        result.close_reading()
        messages = read_all(errors.reading)
        feeder.join()
        return Finished(process.wait(), output, messages.decode())


def write_all(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def read_all(descriptor: int, num_bytes: int | None = None) -> bytes:
    data = b""
    while (num_bytes is None or len(data) < num_bytes) and (
        piece := os.read(descriptor, 2**16 if num_bytes is None else num_bytes - len(data))
    ):
        data += piece
    return data


def wait_until(is_true: Callable[[], bool], what: str, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < end, f"not in {seconds} s: {what}"
        time.sleep(0.01)


def run(*args: object) -> Result:
    """In this process."""
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    # Everything but an exit on purpose would be a traceback for the user.
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    return result


def succeed(*args: object) -> str:
    result = run(*args)
    assert (result.exit_code, result.stderr) == (0, "")
    return result.stdout


def snapshot(folder: Path) -> dict[Path, object]:
    return {f: f.readlink() if f.is_symlink() else f.read_bytes() if f.is_file() else None for f in folder.rglob("*")}


def refusal(*args: object) -> str:
    """The one line on stderr of a command that fails with status 1 and changes nothing in the current folder."""
    before = snapshot(Path.cwd())
    result = run(*args)
    assert (result.exit_code, result.stdout) == (1, "")
    assert snapshot(Path.cwd()) == before
    return the_line(result.stderr)


def the_line(stderr: str) -> str:
    """What was said, which must be one line of the command's own."""
    assert stderr.startswith("codec: "), stderr
    assert stderr.endswith("\n")
    assert len(stderr.splitlines()) == 1, stderr
    return stderr


def read_json(text: str) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    facts: dict[str, Any] = json.loads(text, parse_constant=refuse)
    return facts


def write_wav(path: str | Path, audio: np.ndarray, rate_hz: int = RATE_HZ, subtype: str = "FLOAT") -> None:
    soundfile.write(path, audio.T, rate_hz, subtype=subtype, format="WAV")


def assert_wav(path: str | Path, num_channels: int, num_samples: int, rate_hz: int) -> None:
    info = soundfile.info(os.fsencode(path))  # also of names that are not UTF-8
    assert (info.format, info.subtype) == ("WAV", "PCM_16")
    assert (info.channels, info.frames, info.samplerate) == (num_channels, num_samples, rate_hz)


def partial_files(folder: Path) -> list[Path]:
    return list(folder.rglob("*.partial"))
