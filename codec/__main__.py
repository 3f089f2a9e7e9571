"""Entry point of the `codec` command: nothing heavy is imported before an interrupt is a matter of one line."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
from types import FrameType

from codec.files import discard_all


def _end(number: int, frame: FrameType | None) -> None:
    """Leave at once, whatever was going on: half-written files go, helpers end, old files stay as they were."""
    helpers = multiprocessing.active_children()
    for helper in helpers:
        helper.terminate()
    discard_all()
    for helper in helpers:
        helper.join(5)  # seconds; it ends as soon as it is not inside a library
    show_cursor = b"\x1b[?25h" if os.isatty(2) else b""  # a progress bar hides it
    with contextlib.suppress(OSError):
        os.write(2, show_cursor + f"codec: ended by {signal.Signals(number).name}\n".encode())
    os._exit(128 + number)


def main() -> None:
    """Run the command line. Exit status: 0 fine, 1 bad input, 2 wrong usage, 128 + n ended by signal n."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup, or a script's background job
            signal.signal(number, _end)
    status: object = 0
    try:
        from codec.cli import app

        app()
    except (OSError, SystemExit) as end:
        status = end.code if isinstance(end, SystemExit) else 1
        error = end.__context__ if isinstance(end, SystemExit) else end  # typer hides a broken pipe behind an exit
        if isinstance(error, OSError):
            reason = " was closed" if isinstance(error, BrokenPipeError) else f": {error.strerror}"
            print(f"codec: standard output{reason}", file=sys.stderr)
    finally:
        discard_all()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # whoever reads them may have gone
            if stream is not None:
                stream.flush()
    # At once: taking PyTorch down properly costs most of a second and 100 MB.
    os._exit(status if isinstance(status, int) else 1)


if __name__ == "__main__":
    main()
