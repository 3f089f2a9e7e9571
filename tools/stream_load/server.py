"""A `codec serve` of one's own, for as long as something is measured."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def running_server(model: str, num_sessions: int, log: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A running server, and its address; `log` gets what it writes. ValueError where it does not start."""
    command = [sys.executable, "-m", "codec", "serve", model, "--port", "0", "--max-sessions", str(num_sessions)]
    with log.open("wb") as stderr:
        process = subprocess.Popen(command, stderr=stderr)
    try:
        for _ in range(600):
            found = re.search(r"http://[^\s,]+", log.read_text(errors="replace"))
            if found or process.poll() is not None:
                break
            time.sleep(0.1)
        if not found:
            raise ValueError(f"the server did not start: {log.read_text(errors='replace').strip()[-300:]}")
        yield process, found[0]
    finally:
        process.kill()
        process.wait()


def resident_mib(process: subprocess.Popen[bytes]) -> float:
    """Memory that a process holds. Linux only."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024  # type: ignore[index]


def cpu_seconds(process: subprocess.Popen[bytes]) -> float:
    """Time that all threads of a process have computed. Linux only."""
    nanoseconds = 0
    for task in Path(f"/proc/{process.pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError):  # it ended meanwhile
            nanoseconds += int((task / "schedstat").read_text().split()[0])
    return nanoseconds / 1e9
