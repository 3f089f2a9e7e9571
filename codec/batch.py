"""Many files: what is to be done, in how many processes, with a progress bar, and what came of it."""

from __future__ import annotations

import contextlib
import glob
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar, cast

from codec.files import discard_all, discard_of

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
STANDARD = "-"  # standard input or output, in place of a path


@dataclass(frozen=True)
class Job:
    """One file to make of another; "-" stands for standard input and output."""

    source: str
    target: str
    makes_folders: bool = False  # whether folders on the way to the target are made


@dataclass(frozen=True)
class Outcome:
    """What came of a job. `error` says why there is no result, `warning` what is wrong with it.

    `notice` is about what was asked for, and no failure.
    """

    source: str
    target: str
    status: str  # done, skipped, failed
    num_samples: int = 0
    rate_hz: int = 0
    num_channels: int = 0
    num_bytes: int = 0
    error: str | None = None
    warning: str | None = None
    notice: str | None = None

    @property
    def seconds(self) -> float:
        """Duration of the audio."""
        return self.num_samples / self.rate_hz if self.rate_hz else 0.0

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"seconds": round(self.seconds, 6)}


class PlanError(ValueError):
    """The sources and the target do not make sense together."""


def plan(sources: list[str], target: str, find: Callable[[Path], list[Path]], suffix: str) -> list[Job]:
    """The jobs for files, folders and glob patterns. `find` lists a folder's files, `suffix` is that of the results.

    One file goes to `target`, or into it where that is a folder; several go into the folder `target`, and those of a
    folder keep their tree. PlanError where two would become the same file, or several have no folder to go to.
    """
    named: list[tuple[str, Path]] = []  # each source, and its place below the target folder
    is_single = True
    for source in sources:
        path = Path(source)
        if source == STANDARD:
            named.append((source, Path("stdin")))
        elif os.path.isdir(source):  # the empty name is none, other than for Path
            is_single = False
            named += [(str(file), file.relative_to(path)) for file in find(path)]
        elif not os.path.lexists(source) and glob.has_magic(source):
            is_single = False
            matches = sorted(match for match in glob.glob(source, recursive=True) if not os.path.isdir(match))
            if not matches:
                raise PlanError(f"{source} matches no files")
            named += [(match, Path(Path(match).name)) for match in matches]
        else:
            named.append((source, Path(path.name)))
    if is_single and len(named) == 1 and not (target != STANDARD and os.path.isdir(target)):
        return [Job(named[0][0], target)]
    if target == STANDARD or (os.path.lexists(target) and not os.path.isdir(target)):
        raise PlanError(f"several files need a folder to go to, which {target} is not")
    if len(named) > 1 and STANDARD in sources:
        raise PlanError("standard input cannot be one of several files")
    jobs = [Job(source, str(Path(target) / place.with_suffix(suffix)), makes_folders=True) for source, place in named]
    taken: dict[str, str] = {}
    for job in jobs:
        if job.target in taken:
            raise PlanError(f"both {taken[job.target]} and {job.source} would become {job.target}")
        taken[job.target] = job.source
    return jobs


# Called with the number of samples done since the last call, and of all samples where that is known.
Advance = Callable[[int, int | None], None]
Work = Callable[[Job, Advance], Outcome]


def run(jobs: list[Job], work: Work, *, num_processes: int) -> list[Outcome]:
    """Do all jobs, in processes of their own where there are several. The outcomes come in the order of the jobs.

    `work` must not raise for a user's mistake, and must be picklable.
    """
    num_processes = min(num_processes, len(jobs))
    with progress_bar() as advance:
        if len(jobs) == 1:
            return [work(jobs[0], advance)]
        if num_processes > 1:
            return _run_in_processes(jobs, work, num_processes, advance)
        outcomes = []
        for job in jobs:
            outcomes.append(work(job, _ignore))
            advance(1, len(jobs))
        return outcomes


def _run_in_processes(jobs: list[Job], work: Work, num_processes: int, advance: Advance) -> list[Outcome]:
    def died(job: Job, process: int) -> Outcome:
        discard_of(process, Path(job.target).parent)
        return Outcome(job.source, job.target, "failed", error=f"{job.source}: its process was ended")

    outcomes: dict[int, Outcome] = {}
    for number, outcome in in_processes(jobs, work, died, num_processes=num_processes):
        outcomes[number] = outcome
        advance(1, len(jobs))
    return [outcomes[number] for number in range(len(jobs))]


def in_processes(
    items: Sequence[_Item],
    work: Callable[[_Item, Advance], _Result],
    died: Callable[[_Item, int], _Result],
    *,
    num_processes: int,
) -> Iterator[tuple[int, _Result]]:
    """`work` on every item, each in one of so many processes; (number of the item, result) as they are done.

    Both `work` and what goes to and fro are picklable, and `work` raises nothing. `died(item, process id)` is the
    result of an item whose process was killed.
    """
    waiting = list(enumerate(items))[::-1]
    idle: list[_Helper] = []
    busy: dict[Connection, tuple[_Helper, int]] = {}
    with contextlib.ExitStack() as helpers:
        while waiting or busy:
            while waiting and len(busy) < num_processes:
                helper = idle.pop() if idle else helpers.enter_context(_helper(work))
                number, item = waiting.pop()
                busy[helper.connection] = helper, number
                with contextlib.suppress(OSError):  # of one that has died, which is found below
                    helper.connection.send(item)
            for connection in cast(list[Connection], wait(list(busy))):
                helper, number = busy.pop(connection)
                try:
                    result: _Result = connection.recv()
                    idle.append(helper)
                except (EOFError, OSError):
                    helper.process.join()
                    result = died(items[number], helper.process.pid or 0)
                yield number, result


@dataclass(frozen=True)
class _Helper:
    process: BaseProcess
    connection: Connection


@contextlib.contextmanager
def _helper(work: Callable[[Any, Advance], Any]) -> Iterator[_Helper]:
    """A process that does the jobs it is sent, one after the other, and ends with the connection."""
    context = multiprocessing.get_context("spawn")  # forking a process that has run PyTorch is not safe
    ours, theirs = context.Pipe()
    process = context.Process(target=_help, args=(theirs, work))
    resource_tracker.ensure_running()  # not within `start`, since it lets signals through
    with _signals_wait():  # until this process knows its helper
        process.start()
    theirs.close()
    try:
        yield _Helper(process, ours)
    finally:
        ours.close()
        process.join()


@contextlib.contextmanager
def _signals_wait() -> Iterator[None]:
    """Signals to this process wait, and processes started meanwhile inherit that they wait: Ctrl-C is not for them."""
    arrived: list[int] = []
    is_main = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in _SIGNALS} if is_main else {}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    # A thread of a library does not have the mask. What it takes in, Python hands to the main thread, mask or not.
    for number, handler in handlers.items():
        if handler not in (signal.SIG_IGN, None):  # started processes inherit SIG_IGN, and shall
            signal.signal(number, lambda number, frame: arrived.append(number))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            if handler is not None:
                signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for late in arrived:
            signal.raise_signal(late)


def _help(connection: Connection, work: Callable[[Any, Advance], Any]) -> None:
    signal.signal(signal.SIGTERM, _end_helper)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM,))
    with contextlib.suppress(EOFError, OSError):  # there is no more to do, or nobody to do it for
        while True:
            connection.send(work(connection.recv(), _ignore))


def _end_helper(number: int, frame: FrameType | None) -> None:
    discard_all()
    os._exit(128 + number)


def _ignore(num_done: int, num_in_all: int | None) -> None:
    pass


@contextlib.contextmanager
def progress_bar() -> Iterator[Advance]:
    """A bar on a terminal; nothing elsewhere."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield _ignore
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TimeRemainingColumn

    columns = (BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda num_done, num_in_all: bar.update(task, advance=num_done, total=num_in_all)
