"""Many files: what is planned, and processes that work, fail and die. The work here is copying; no model is needed."""

import json
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from codec import batch
from codec.batch import STANDARD, Advance, Job, Outcome, PlanError, plan, run
from codec.files import AtomicFile

pytest_plugins = ["commands"]


def find(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.wav"))


@pytest.fixture
def files(folder: Path) -> Path:
    """The current folder, with `in/a.wav`, `in/deep/er/b.wav`, `in/note.txt` and `one.wav`, all empty."""
    (folder / "in/deep/er").mkdir(parents=True)
    for name in ("in/a.wav", "in/deep/er/b.wav", "in/note.txt", "one.wav"):
        (folder / name).touch()
    return folder


def planned(sources: list[str], target: str) -> list[tuple[str, str, bool]]:
    return [(job.source, job.target, job.makes_folders) for job in plan(sources, target, find, ".codec")]


@pytest.mark.usefixtures("files")
def test_one_file_goes_where_it_is_told() -> None:
    assert planned(["one.wav"], "out.codec") == [("one.wav", "out.codec", False)]
    assert planned(["one.wav"], "new/out.codec") == [("one.wav", "new/out.codec", False)]
    assert planned(["missing"], "-") == [("missing", STANDARD, False)]
    assert planned(["-"], "-") == [(STANDARD, STANDARD, False)]
    assert planned(["-"], "out.codec") == [(STANDARD, "out.codec", False)]
    assert planned([""], "out.codec") == [("", "out.codec", False)]


@pytest.mark.usefixtures("files")
def test_into_a_folder_that_exists() -> None:
    assert planned(["one.wav"], "in") == [("one.wav", "in/one.codec", True)]
    assert planned(["-"], "in") == [(STANDARD, "in/stdin.codec", True)]


@pytest.mark.parametrize("target", ["out", "in"])
def test_a_folder_keeps_its_tree(target: str, files: Path) -> None:
    expected = [("in/a.wav", f"{target}/a.codec", True), ("in/deep/er/b.wav", f"{target}/deep/er/b.codec", True)]
    assert planned(["in"], target) == expected
    assert planned(["in", "one.wav"], target) == [*expected, ("one.wav", f"{target}/one.codec", True)]
    assert planned(["in/deep"], "out") == [("in/deep/er/b.wav", "out/er/b.codec", True)]
    os.symlink("in", files / "link")
    assert planned(["link"], target)[1] == ("link/deep/er/b.wav", f"{target}/deep/er/b.codec", True)


def test_globs(files: Path) -> None:
    assert planned(["in/*"], "out") == [("in/a.wav", "out/a.codec", True), ("in/note.txt", "out/note.codec", True)]
    assert planned(["in/**/b*"], "out") == [("in/deep/er/b.wav", "out/b.codec", True)]
    assert planned(["o?e.wav"], "out") == [("one.wav", "out/one.codec", True)]
    (files / "o?e.wav").touch()  # a file with such a name is that file
    assert planned(["o?e.wav"], "out") == [("o?e.wav", "out", False)]
    with pytest.raises(PlanError, match="matches no files"):
        planned(["in/*.flac"], "out")


@pytest.mark.parametrize(
    ("sources", "target", "reason"),
    [
        (["in/a.wav", "one.wav"], "-", "need a folder"),
        (["in"], "-", "need a folder"),
        (["in/a.wav", "one.wav"], "in/note.txt", "need a folder"),
        (["in"], "in/note.txt", "need a folder"),
        (["in/*.wav"], "in/note.txt", "need a folder"),
        (["one.wav", "one.wav"], "out", "would become"),
        (["in/a.wav", "in"], "out", "would become"),
        (["in/a.wav", "deep/a.flac"], "out", "would become"),
        (["-", "one.wav"], "out", "standard input"),
        (["in", "-"], "out", "standard input"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("files")
def test_plans_that_make_no_sense(sources: list[str], target: str, reason: str) -> None:
    with pytest.raises(PlanError, match=reason):
        planned(sources, target)


def copy(job: Job, advance: Advance) -> Outcome:
    """The work of these tests; its source says how it goes."""
    name = Path(job.source).name
    if name.startswith("kill"):
        AtomicFile(job.target)
        os.kill(os.getpid(), signal.SIGKILL)
    if name.startswith("slow"):
        time.sleep(0.3)
    if name.startswith("bad"):
        return Outcome(job.source, job.target, "failed", error="bad")
    shutil.copyfile(job.source, job.target)
    Path(job.target).with_suffix(".process").write_text(str(os.getpid()))
    return Outcome(job.source, job.target, "done", num_samples=8000, rate_hz=16000)


def jobs_for(folder: Path, names: list[str]) -> list[Job]:
    for name in names:
        (folder / name).write_text(name)
    return [Job(name, f"{name}.out") for name in names]


@pytest.mark.parametrize("num_processes", [1, 2])
def test_outcomes_come_in_the_order_of_the_jobs(num_processes: int, folder: Path) -> None:
    names = ["slow_a", "b", "bad_c", "d", "slow_e", "f"]
    outcomes = run(jobs_for(folder, names), copy, num_processes=num_processes)
    assert [outcome.source for outcome in outcomes] == names
    assert [outcome.status for outcome in outcomes] == ["done", "done", "failed", "done", "done", "done"]
    processes = {int(file.read_text()) for file in folder.glob("*.process")}
    assert len(processes) == num_processes
    assert (os.getpid() in processes) == (num_processes == 1)
    assert all((folder / f"{name}.out").read_text() == name for name in names if name != "bad_c")
    assert outcomes[0].to_dict()["seconds"] == 0.5


def test_one_job_needs_no_process(folder: Path) -> None:
    run(jobs_for(folder, ["a"]), copy, num_processes=8)
    assert (folder / "a.process").read_text() == str(os.getpid())


def test_a_process_that_dies_takes_its_own_job_with_it_and_no_other(folder: Path) -> None:
    names = ["slow_a", "kill_b", "c", "kill_d", "e", "f", "kill_g"]
    outcomes = run(jobs_for(folder, names), copy, num_processes=2)
    for name, outcome in zip(names, outcomes, strict=True):
        is_dead = name.startswith("kill")
        assert outcome.status == ("failed" if is_dead else "done")
        assert outcome.error == (f"{name}: its process was ended" if is_dead else None)
    assert not list(folder.glob(".codec-*"))


def test_a_process_ends_with_the_one_that_started_it(folder: Path) -> None:
    """Even where that is killed, and cannot say so."""
    from commands import wait_until  # not above: the helpers import this file, and that imports torch

    names = [f"slow_{i}" for i in range(60)]
    jobs_for(folder, names)
    program = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from codec.batch import Job, run\nfrom test_batch import copy\n"
        f"run([Job(name, name + '.out') for name in {json.dumps(names)}], copy, num_processes=2)\n"
    )
    process = os.posix_spawn(sys.executable, [sys.executable, "-c", program], os.environ)
    wait_until(lambda: len({f.read_text() for f in folder.glob("*.process")} - {""}) == 2, "two processes work")
    helpers = {int(file.read_text()) for file in folder.glob("*.process")}
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    wait_until(lambda: not any(map(is_running, helpers)), "its helpers are gone")
    num_done = len(list(folder.glob("*.out")))
    time.sleep(0.5)
    assert len(list(folder.glob("*.out"))) == num_done < len(names)


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_signals_wait_while_a_helper_starts_whichever_thread_takes_them() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    taker = threading.Thread(target=time.sleep, args=(0.5,))  # has no mask, as threads of libraries have none
    try:
        taker.start()
        with batch._signals_wait():
            os.kill(os.getpid(), signal.SIGTERM)
            taker.join()
            assert seen == []
        assert seen == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)
