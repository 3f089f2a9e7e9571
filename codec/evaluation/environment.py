"""Where and with what something was measured: versions, machine, commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

_PACKAGES = ("torch", "numpy", "soxr", "pesq", "pystoi", "librosa", "transformers")


def environment() -> dict[str, Any]:
    """For a report. Packages that are not installed are left out."""
    from codec import __version__

    versions = {"python": platform.python_version(), "exact-codec": __version__}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "versions": versions,
        "machine": _processor(),
        "num_cores": os.cpu_count(),
        "commit": _commit(),
    }


def peak_memory_mb() -> float:
    """The most that this process had. `ru_maxrss` would count the process that started it, where Linux knows better."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    except OSError:
        pass
    scale = 1 if sys.platform == "darwin" else 1024  # bytes there
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 1e6


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _commit() -> str | None:
    """Of the checkout that this file belongs to, with a plus where it was changed; None where there is none."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        answers = [
            subprocess.run(["git", *command], cwd=root, capture_output=True, text=True, check=True, timeout=20).stdout
            for command in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]
    except (OSError, subprocess.SubprocessError):
        return None
    return answers[0].strip() + ("+" if answers[1].strip() else "")
