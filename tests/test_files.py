import contextlib
import errno
import os
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from codec import files
from codec.files import AtomicFile, discard_all

FullDisk = Callable[[], contextlib.AbstractContextManager[None]]


@pytest.fixture(autouse=True)
def nothing_is_left_behind(tmp_path: Path) -> Iterator[None]:
    yield
    assert not list(tmp_path.rglob("*.partial"))
    assert not files._partials


@pytest.fixture
def umask() -> Iterator[int]:
    before = os.umask(0o027)
    yield 0o027
    os.umask(before)


def write(target: Path, content: bytes) -> None:
    with AtomicFile(target) as new:
        new.file.write(content)
        new.commit()


def test_the_old_file_is_there_until_commit(tmp_path: Path) -> None:
    target = tmp_path / "file"
    write(target, b"old")
    with AtomicFile(target) as new:
        new.file.write(b"new" * 100000)
        assert new.path.parent == tmp_path
        assert target.read_bytes() == b"old"
        new.commit()
        assert target.read_bytes() == b"new" * 100000
    assert list(tmp_path.iterdir()) == [target]


def test_what_is_not_committed_never_was(tmp_path: Path) -> None:
    with AtomicFile(tmp_path / "file") as new:
        new.file.write(b"half")
    assert not list(tmp_path.iterdir())
    with contextlib.suppress(KeyboardInterrupt), AtomicFile(tmp_path / "file") as new:
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    new.discard()


def test_discarding_after_commit_does_nothing(tmp_path: Path) -> None:
    write(tmp_path / "file", b"whole")
    discard_all()
    assert (tmp_path / "file").read_bytes() == b"whole"


def test_the_file_can_be_read_back_and_changed_before_commit(tmp_path: Path) -> None:
    with AtomicFile(tmp_path / "file") as new:
        new.file.write(b"....body")
        new.file.seek(0)
        new.file.write(b"head")
        new.commit()
    assert (tmp_path / "file").read_bytes() == b"headbody"


def test_discard_all_removes_every_partial_file_but_not_those_of_a_parent(tmp_path: Path) -> None:
    opened = [AtomicFile(tmp_path / name) for name in ("a", "b")]
    child = os.fork()
    if child == 0:
        discard_all()
        os._exit(0)
    os.waitpid(child, 0)
    assert len(list(tmp_path.iterdir())) == 2
    discard_all()
    assert not list(tmp_path.iterdir())
    for new in opened:
        new.discard()


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # an interrupt before anyone could close it
def test_an_interrupt_anywhere_leaves_all_or_nothing(tmp_path: Path) -> None:
    target = tmp_path / "file"
    num_opcodes = 0
    ends = set()

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal num_left
        if frame.f_code.co_filename not in (files.__file__, write.__code__.co_filename):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            num_left -= 1
            if num_left == 0:
                raise KeyboardInterrupt
        return trace

    interrupted = True
    while interrupted:
        num_opcodes += 1
        num_left = num_opcodes
        target.write_bytes(b"old")
        before = sys.gettrace()
        sys.settrace(trace)
        try:
            write(target, b"new")
            interrupted = False
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before)
        discard_all()
        assert list(tmp_path.iterdir()) == [target]
        ends.add(target.read_bytes())
    assert num_opcodes > 100
    assert ends == {b"old", b"new"}


@pytest.mark.parametrize("size", [5000, 100, 100000])
def test_a_full_disk_is_an_error_and_leaves_nothing(size: int, tmp_path: Path, full_disk: FullDisk) -> None:
    target = tmp_path / "file"
    target.write_bytes(b"old")
    expected = pytest.raises(OSError, match="File too large") if size > 4000 else contextlib.nullcontext()
    with full_disk(), expected:
        write(target, b"x" * size)
    assert list(tmp_path.iterdir()) == [target]
    assert target.read_bytes() == (b"old" if size > 4000 else b"x" * size)


def test_new_files_obey_the_umask_and_old_ones_keep_their_permissions(tmp_path: Path, umask: int) -> None:
    target = tmp_path / "file"
    write(target, b"")
    assert stat.S_IMODE(target.stat().st_mode) == 0o666 & ~umask
    target.chmod(0o604)
    write(target, b"new")
    assert stat.S_IMODE(target.stat().st_mode) == 0o604


def test_a_link_stays_and_its_target_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    real, link, second = tmp_path / "elsewhere" / "real", tmp_path / "link", tmp_path / "second"
    link.symlink_to(Path("elsewhere", "real"))
    second.symlink_to(link)
    for content in (b"made through the link", b"replaced"):
        write(second, content)
        assert real.read_bytes() == content
        assert link.is_symlink()
        assert second.is_symlink()


def test_a_link_to_itself_is_an_error(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(link)
    with pytest.raises(OSError, match="symbolic links"):
        AtomicFile(link)
    assert link.is_symlink()


@pytest.mark.parametrize("name", ["x" * 255, "ü" * 127, " leading space", "-dash", "line\nbreak"])
def test_every_legal_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / name, b"content")
    assert (tmp_path / name).read_bytes() == b"content"
    monkeypatch.chdir(tmp_path)
    with AtomicFile(name) as new:
        new.commit()
    assert (tmp_path / name).read_bytes() == b""


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("missing/file", errno.ENOENT),
        ("a_file/file", errno.ENOTDIR),
        ("folder", errno.EISDIR),
        ("x" * 256, errno.ENAMETOOLONG),
        ("queue", errno.EINVAL),
        ("/dev/null", errno.EINVAL),
        ("/proc/file", errno.ENOENT),
    ],
)
def test_errors_name_the_target(name: str, error: int, tmp_path: Path) -> None:
    (tmp_path / "a_file").touch()
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "queue")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OSError, match=r"^\[Errno") as caught:
        AtomicFile(tmp_path / name)
    assert caught.value.errno == error
    assert caught.value.filename == str(tmp_path / name)
    assert caught.value.filename2 is None
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_failing_rename_names_the_target(tmp_path: Path) -> None:
    target = tmp_path / "file"
    with AtomicFile(target) as new:
        target.mkdir()  # meanwhile
        with pytest.raises(IsADirectoryError) as caught:
            new.commit()
    assert (caught.value.filename, caught.value.filename2) == (str(target), None)
    assert list(tmp_path.iterdir()) == [target]
