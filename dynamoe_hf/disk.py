# SPDX-License-Identifier: Apache-2.0
"""What it takes to write whole or not at all: locks, names aside, what killed runs left, and waiting for the disk."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


@contextmanager
def held(lock: Path, what: Path, wait: float = 0.0) -> Iterator[None]:
    """
    Keep other runs out of `what` while the block runs, by the lock of a file beside or in it. A lock ends with its process, however
    that ends. The folder of the file is made if it is missing. `wait`: seconds for which another run may hold the lock.

    Raises:
        BlockingIOError: another run holds the lock.
        OSError: nothing can be written there.
    """
    with told_of(what):
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = FileLock(lock)
        try:
            file.acquire(timeout=wait)
        except Timeout:
            raise BlockingIOError(
                f"Another run is writing {what}: found {lock} locked. Wait until it has ended, or choose another folder."
            ) from None
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        file.release()


@contextmanager
def told_of(what: Path) -> Iterator[None]:
    """Errors of the operating system as one sentence that names `what` and says what to do."""
    try:
        yield
    except OSError as error:
        if error.strerror is None:  # a sentence already
            raise
        raise OSError(
            f"{what} cannot be written: {error.strerror} ({error.filename}). Choose another folder, or make room or rights for this one."
        ) from error


def staging_of(path: Path) -> Path:
    """Where this process writes what becomes `path`."""
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove what killed processes had begun to write, or to delete, in `folder`: all of it, or that of `name`."""
    of_name = "" if name is None else re.escape(f"{name}.")
    for path in folder.iterdir():
        found = re.fullmatch(rf"\.{of_name}(.*\.)?(?P<process>\d+)\.partial", path.name)
        # A process of another container can have had this one's number; this one begins only now.
        if found and (int(found["process"]) == os.getpid() or not _is_alive(int(found["process"]))):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def sync(folder: Path) -> None:
    """Have the disk take a folder with all that is in it: a name given after this is not lost in a power cut."""
    for path in (*folder.rglob("*"), folder):
        if not path.is_symlink() and (path.is_file() or os.name == "posix"):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def sync_entry(path: Path) -> None:
    """Have the disk take the name of `path` in its folder."""
    if os.name == "posix":
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
