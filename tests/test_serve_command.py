"""`codec serve` as a command: what it says, how it ends, and mistakes in one line."""

import json
import os
import re
import signal
import socket
import sys
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from commands import Pipe, read_all, refusal, start, wait_until

from codec.serving.client import decode
from codec.serving.protocol import SessionError

pytest_plugins = ["commands"]


def _announced(reading: int) -> tuple[str, str]:
    """The line that a server says, and the address in it."""
    line = b""
    while not line.endswith(b"\n"):
        piece = os.read(reading, 1)
        assert piece, line
        line += piece
    text = line.decode()
    found = re.search(r"http://127\.0\.0\.1:\d+", text)
    assert found, text
    return text, found[0]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_server_says_where_it_is_and_ends_well(model: Path, folder: Path, number: int) -> None:
    (folder / "token").write_text("open sesame\n")
    with Pipe.opened() as errors:
        process = start("serve", model, "--port", 0, "--token-file", "token", stderr=errors.writing)
        errors.close_writing()
        line, address = _announced(errors.reading)
        assert line == f"tiny@1 at {address}, 64 sessions, with a token\n"
        codes = np.zeros((3, 4), np.int64)
        assert decode(address, codes, token="open sesame", model="tiny@1").shape == (1, 4 * 64)
        with pytest.raises(SessionError, match="wants a token"):
            decode(address, codes)
        with urllib.request.urlopen(address + "/health", timeout=10) as answer:
            assert json.loads(answer.read())["status"] == "ok"
        process.send(number)
        assert process.wait() == 0
        assert read_all(errors.reading) == b""


def test_a_second_signal_does_not_wait(model: Path, folder: Path) -> None:
    with Pipe.opened() as errors:
        process = start("serve", model, "--port", 0, "--drain-s", 60, stderr=errors.writing)
        errors.close_writing()
        _, address = _announced(errors.reading)
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(
                f"GET /stream HTTP/1.1\r\nHost: {host}:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
            )
            assert connection.recv(12) == b"HTTP/1.1 101"

            def is_draining() -> bool:
                try:
                    urllib.request.urlopen(address + "/health", timeout=10).close()
                except urllib.error.HTTPError as error:
                    error.close()
                    return error.code == 503
                return False

            process.send(signal.SIGTERM)
            wait_until(is_draining, "draining")
            process.send(signal.SIGTERM)
            assert process.wait() == 0


def test_mistakes_are_one_line(
    model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    assert "'nothing' is neither a bundled model" in refusal("serve", "nothing")
    assert "No such file" in refusal("serve", model, "--token-file", "nothing")
    (folder / "token").touch()
    assert "token is empty" in refusal("serve", model, "--token-file", "token")
    assert "idle_timeout_s must be positive" in refusal("serve", model, "--idle-timeout-s", 0)
    assert "origin 'example.org'" in refusal("serve", model, "--allow-origin", "example.org")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "in use" in refusal("serve", model, "--port", taken.getsockname()[1])
    assert "Name or service" in refusal("serve", model, "--host", "no.such.host.invalid")
    monkeypatch.setenv("CODEC_TOKEN", "a\tb")
    assert "the token must be" in refusal("serve", model)


def test_a_model_that_does_not_stream_is_refused(model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("codec.models.multirate.MultirateCodec.is_streamable", False)
    assert "tiny@1 is not causal and cannot stream" in refusal("serve", model, "--port", 0)


def test_without_its_extra_it_says_how_to_get_it(model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("codec.serving.") or name == "fastapi"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert "fastapi is missing, which serving needs: pip install 'exact-codec[serving]'" in refusal("serve", model)
