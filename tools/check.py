"""Set up and check the project, with nothing but Python 3.11+ and git.

    python3 tools/check.py demo          encode and decode speech with the bundled model, and say what came out
    python3 tools/check.py test          lint, types and all tests (what .ci/run calls); --fast leaves out the slow ones

Both make a virtual environment in `.venv` the first time, with the versions in constraints.txt.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = ROOT / ".venv"
BIN = ENVIRONMENT / ("Scripts" if os.name == "nt" else "bin")


def _run(*command: str | Path) -> None:
    """Run a command in the checkout; where it fails, end with its status and one line."""
    text = " ".join(str(part) for part in command).replace(f"{ROOT}{os.sep}", "")
    print(f"+ {text}", flush=True)
    # Threads that wait asleep instead of spinning: on a busy machine spinning makes small tests 30 times slower.
    environment = {"OMP_WAIT_POLICY": "PASSIVE"} | os.environ
    done = subprocess.run([str(part) for part in command], cwd=ROOT, env=environment, check=False)
    if done.returncode:
        sys.exit(f"failed ({done.returncode}): {text}")


def set_up(extras: str) -> None:
    """Make `.venv` and install the project with its extras, unless that was done for these very requirements."""
    stamp = ENVIRONMENT / "installed"
    wanted = extras + (ROOT / "pyproject.toml").read_text() + (ROOT / "constraints.txt").read_text()
    if stamp.is_file() and wanted in stamp.read_text().split("\0"):
        return
    if not (BIN / "python").exists():
        print(f"making {ENVIRONMENT} (once; downloads PyTorch)", flush=True)
        venv.create(ENVIRONMENT, with_pip=True)
    _run(
        BIN / "python",
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "-c",
        "constraints.txt",
        "-e",
        f".[{extras}]",
    )
    before = stamp.read_text() if stamp.is_file() else ""
    stamp.write_text(before + "\0" + wanted)


def demo() -> None:
    """The main job, on a recording that lies in the repository."""
    set_up("metrics")
    out = Path("try")
    (ROOT / out).mkdir(exist_ok=True)
    codec, speech = BIN / "codec", Path("tests", "data", "speech.flac")
    _run(codec, "encode", speech, out / "speech.codec", "--force")
    _run(codec, "info", out / "speech.codec")
    _run(codec, "decode", out / "speech.codec", out / "speech.wav", "--force")
    _run(codec, "roundtrip", speech, out / "speech.wav", "--force")
    print(f"\nListen to {out / 'speech.wav'}, and try: {BIN.relative_to(ROOT) / 'codec'} --help")


def test(*, fast: bool) -> None:
    """Lint, types, tests."""
    set_up("tests")
    python = BIN / "python"
    _run(python, "-m", "ruff", "check", ".")
    _run(python, "-m", "ruff", "format", "--check", ".")
    _run(python, "-m", "mypy")
    _run(python, "-m", "pytest", "-q", *(["-m", "not slow"] if fast else []))


def main() -> None:
    """Parse arguments and run."""
    if sys.version_info < (3, 11):  # noqa: UP036  (this file starts before anything is installed)
        sys.exit("Python 3.11 or newer is needed")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=["demo", "test"])
    parser.add_argument("--fast", action="store_true", help="leave out the slow tests")
    args = parser.parse_args()
    if args.job == "demo":
        demo()
    else:
        test(fast=args.fast)


if __name__ == "__main__":
    main()
