"""Give memory that malloc holds, and no tensor uses, back to the system."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

WORTH_BYTES = 256 * 2**20
"""Free memory that is worth the tenths of a second that giving it back takes."""


class _Mallinfo2(ctypes.Structure):
    """What glibc's `mallinfo2` returns."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


def return_freed_memory() -> bool:
    """Return free memory between allocated blocks to the system, if there is much of it; return True if it was done.

    Activations of a pass leave such holes, which the next pass with other lengths does not fill exactly: the process
    would grow by half of what a pass takes. Does nothing without glibc.
    """
    glibc = _glibc()
    if glibc is None or glibc.mallinfo2().fordblks < WORTH_BYTES:
        return False
    return bool(glibc.malloc_trim(0))


@functools.cache
def _glibc() -> Any:
    try:
        library = ctypes.CDLL("libc.so.6")
        library.mallinfo2.restype = _Mallinfo2
        library.malloc_trim.argtypes = [ctypes.c_size_t]
    except (OSError, AttributeError):
        return None
    return library
