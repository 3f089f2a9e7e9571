"""Files and folders that appear whole or not at all: written beside their place, then renamed."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import stat
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import BinaryIO

_partials: set[tuple[int, Path]] = (
    set()
)  # with the process that made them: a forked child must leave its parent's alone


class AtomicFile:
    """A new file, or a new content for an old one, that nobody sees before `commit`.

    A symbolic link stays, and what it points to is replaced. A new file obeys the umask; an old one's permissions are
    kept. OSError, with the target as its file name, where the target cannot be written: missing or write-protected
    folder, a folder or device in its place, a name that is too long. Leaving the `with` block discards the partial
    file unless it was committed.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with AtomicFile(Path(folder, "hello.txt")) as new:
    ...         num_bytes = new.file.write(b"hello")
    ...         new.commit()
    ...     Path(folder, "hello.txt").read_bytes()
    b'hello'
    """

    path: Path  # the partial file, in the target's folder
    file: BinaryIO  # it, open for writing; position and seeking are free

    def __init__(self, target: str | os.PathLike[str]) -> None:
        self._named = os.fspath(target)
        with self._errors_name_the_target():
            self._target = Path(os.path.realpath(self._named))
            _check_replaceable(self._target)
            # Its own short name: the target's may be as long as names can be.
            self.path = self._target.with_name(f".codec-{os.getpid()}-{secrets.token_hex(8)}.partial")
            _partials.add((os.getpid(), self.path))  # before it is there, so that no interrupt finds it unknown
            try:
                self.file = open(self.path, "xb")  # noqa: SIM115
            except OSError:
                _forget(self.path)
                raise

    def commit(self) -> None:
        """Put the file in its place. Its name is the only way to it from then on."""
        with self._errors_name_the_target():
            self.file.close()  # flushes; fails on a full disk
            if self._target.exists():
                shutil.copymode(self._target, self.path)
            os.replace(self.path, self._target)
        _forget(self.path)

    def discard(self) -> None:
        """Remove the partial file. Does nothing after `commit`, or when called again."""
        with contextlib.suppress(OSError):  # a full disk does not take what is still in the buffer
            self.file.close()
        with contextlib.suppress(OSError):
            _remove(self.path)

    def __enter__(self) -> AtomicFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.discard()

    @contextlib.contextmanager
    def _errors_name_the_target(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror or str(error), self._named) from error


def check_new_folder(target: str | os.PathLike[str], *, replaceable: Collection[str] = ()) -> None:
    """OSError, with the target as its file name, where `new_folder` would refuse to put a folder there."""
    path = Path(target)
    if not Path(os.path.realpath(path)).parent.is_dir():
        raise OSError(errno.ENOENT, "Its folder does not exist", os.fspath(path))
    if path.is_dir():
        if others := sorted({entry.name for entry in path.iterdir()} - set(replaceable)):
            raise OSError(errno.ENOTEMPTY, f"It holds {others[0]}, which is not to be replaced", os.fspath(path))
    elif path.exists() or path.is_symlink():
        raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), os.fspath(path))


@contextlib.contextmanager
def new_folder(target: str | os.PathLike[str], *, replaceable: Collection[str] = ()) -> Iterator[Path]:
    """A folder to fill, which takes its place at the end of the `with` block, or goes if the block raises.

    A folder that is there is replaced as a whole where it is empty or holds nothing but files of the names that are
    `replaceable`; else OSError. A symbolic link stays, and what it points to is replaced.
    """
    check_new_folder(target, replaceable=replaceable)
    path = Path(os.path.realpath(target))
    partial, aside = (path.with_name(f".codec-{os.getpid()}-{secrets.token_hex(8)}.partial") for _ in range(2))
    _partials.add((os.getpid(), partial))
    try:
        partial.mkdir()
        yield partial
        check_new_folder(target, replaceable=replaceable)  # somebody may have put more into it
        if path.is_dir():
            os.rename(path, aside)  # no registered partial yet: until the new one is there, it must survive
        try:
            os.rename(partial, path)
        except OSError:
            if aside.is_dir():
                os.rename(aside, path)
            raise
        shutil.rmtree(aside, ignore_errors=True)
    finally:
        _remove(partial)


def discard_all() -> None:
    """Remove every partial file of this process: the last act of a program, whatever ended it."""
    for process, path in list(_partials):
        if process == os.getpid():
            with contextlib.suppress(OSError):
                _remove(path)


def discard_of(process: int, folder: Path) -> None:
    """Remove from a folder what a process left that was killed."""
    for path in folder.glob(f".codec-{process}-*.partial"):
        with contextlib.suppress(OSError):
            path.unlink()


def _remove(path: Path) -> None:
    if (os.getpid(), path) in _partials:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        _forget(path)


def _forget(path: Path) -> None:
    _partials.discard((os.getpid(), path))


def _check_replaceable(target: Path) -> None:
    """OSError where renaming onto the target would fail at the end of the work, or destroy what is no file."""
    try:
        mode = target.lstat().st_mode  # also fails where the name is too long
    except FileNotFoundError:
        return
    if stat.S_ISDIR(mode):
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
    if stat.S_ISLNK(mode):  # all links are resolved, so this one leads to itself
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "Not an ordinary file")
