"""How is an array written that is larger than memory? Its space is taken first: a full disk is an error, not a death."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

_UNKNOWN = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)
_BLOCK = 1 << 20


def large_array(path: str | Path, shape: tuple[int, ...]) -> np.memmap:
    """A new .npy file of float32 zeros, memory-mapped, to be filled and flushed.

    Writing to a map whose file has holes kills the process (SIGBUS) when the disk is full.

    Raises
    ------
    OSError : no space for all of it (disk, quota, largest file); `store.writing_to` says it clearly.
    """
    import numpy as np

    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
    with open(path, "r+b") as file:
        _reserve(file.fileno(), int(array.offset), os.fstat(file.fileno()).st_size)
    return array


def _reserve(handle: int, start: int, stop: int) -> None:
    """Take the space of bytes `start` ... `stop` - 1 of a file, which are zero."""
    if hasattr(os, "posix_fallocate") and stop > start:
        try:
            os.posix_fallocate(handle, start, stop - start)
            return
        except OSError as error:
            if error.errno not in _UNKNOWN:  # of a file system that cannot
                raise
    zeros = memoryview(bytes(_BLOCK))
    while start < stop:
        start += os.pwrite(handle, zeros[: stop - start], start)
    os.fsync(handle)
