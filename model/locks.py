"""Files that keep other processes out: one at a time fills a cache, or writes a set of outputs."""

import contextlib
import os
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from model.files import encode_text


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder, created if need be, against other processes; wait while another one holds it.

    Closing the file, or dying, releases the lock. Raises OSError where it cannot be written or locked.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "wb") as file:
        while not try_lock(file):
            time.sleep(0.05)
        yield


@contextlib.contextmanager
def claimed(path: Path, cure: str) -> Iterator[None]:
    """Hold a set of output files, by the name of one of them, against other processes; dying releases it.

    Raises ValueError, naming the process that holds it, and OSError where nothing can be written. Where there
    are no locks, nothing is held.
    """
    lock = path.with_name(f".{path.name}.lock")
    with contextlib.ExitStack() as stack:
        file, holder = take_lock(lock)
        stack.enter_context(file)
        if holder:
            raise ValueError(f"{path} is being written by {holder}: {cure}")
        stack.callback(lock.unlink, missing_ok=True)  # while it is held: see take_lock()
        command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])[:500]
        file.truncate(0)
        file.write(encode_text(f"process {os.getpid()} on {platform.node()} ({command})"))
        file.flush()
        yield


def take_lock(lock: Path) -> tuple[IO[bytes], str]:
    """A lock file, open, and who holds it; "" if this process does now."""
    while True:
        file = open(lock, "a+b")  # noqa: SIM115
        try:
            import fcntl

            # Not flock(): the loader's workers would inherit it, and hold it on as orphans for seconds.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            return file, file.read(1000).decode(errors="replace").strip() or "another process"
        except (ImportError, OSError):  # Windows, or a file system without locks
            return file, ""
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(lock)):
                return file, ""
        file.close()  # it was removed by its last holder after it had been opened here: it locks out nobody


def try_lock(file: IO[bytes]) -> bool:
    """Take an exclusive lock on an open file; False if another process holds it.

    Raises OSError where the system or the file system has no locks.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        raise OSError("this system has no file locks") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
