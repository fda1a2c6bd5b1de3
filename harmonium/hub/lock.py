"""One download at a time: advisory locks on files, which end with the process that holds them."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from harmonium.errors import HubError

_POLL_SECONDS = 0.25
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


@contextmanager
def locked(path: Path, wait_notice: Callable[[], None]) -> Iterator[None]:
    """Hold the lock of a file, made where it is not there; it stays, because another may wait at it.

    wait_notice: called once when somebody else holds it. Where a file system has no locks there is none to
    hold. huggingface_hub locks its blobs in the same way (flock). Raises HubError when it cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise HubError(f"{path}: cannot be written ({error.strerror or error})") from None
    try:
        is_told = False
        while not _try_lock(descriptor, path):
            if not is_told:
                wait_notice()
            is_told = True
            time.sleep(_POLL_SECONDS)
        yield
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int, path: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise HubError(f"{path}: cannot be locked ({error.strerror or error})") from None
    return True
