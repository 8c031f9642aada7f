"""A work directory belongs to one run at a time, and is writable, before anything is compiled."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK = ".lock"
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)  # file systems that know none


class WorkdirError(ValueError):
    """A work directory that cannot be written, or that another process is using."""


def located(workdir: Path | str) -> Path:
    """A work directory as it was named, its `~` resolved.

    Raises:
        WorkdirError: an address of a bucket, which would be taken for a folder here.
    """
    if re.match(r"[A-Za-z][A-Za-z0-9+.\-]+:/", str(workdir)):  # a Path has lost the second slash
        raise WorkdirError(
            f"--workdir={workdir} is an address: name a folder, which all hosts see where there are many"
        )
    return Path(os.path.expanduser(workdir))  # which leaves "~old" alone where there is no such user


@contextmanager
def held(workdir: Path, is_main: bool = True) -> Iterator[None]:
    """Makes the work directory where it is missing and holds it for this process; of several, the first one does.

    The lock belongs to the open file: the system gives it up when the process ends, however it ends, so none is ever
    left behind. On a file system without locks nothing is refused.

    Raises:
        WorkdirError: it cannot be written, or another process holds it.
    """
    if not is_main:
        yield
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = (workdir / LOCK).open("a+", encoding="utf-8")
    except OSError as error:
        raise WorkdirError(
            f"cannot write to the work directory {workdir} ({error}): choose another --workdir"
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise WorkdirError(
                f"{workdir} is in use by {holder}: wait for it, stop it, or choose another --workdir"
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        try:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
        except OSError as error:
            raise WorkdirError(f"cannot write to the work directory {workdir} ({error})") from error
        yield
