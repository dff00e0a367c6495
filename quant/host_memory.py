"""Host memory that the C library keeps after it was freed."""

from __future__ import annotations

import ctypes


def give_back_memory() -> None:
    """Return what layers freed to the system, where the C library can (glibc).

    Its allocator keeps freed blocks that lie below ones in use: without this a job's memory grows with its layers.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))
