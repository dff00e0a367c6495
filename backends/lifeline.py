"""Ties a child's life to its parent's (Linux). Standard library only: it runs between fork and exec."""

from __future__ import annotations

import ctypes
import os
import signal

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
_LIBC = ctypes.CDLL(None, use_errno=True)  # loaded before any fork


def prctl(option: int, value: int) -> None:
    """The system call. Raises OSError."""
    if _LIBC.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}, {value})")


def end_with_parent(number: signal.Signals, parent_pid: int) -> None:
    """In the child: the kernel sends `number` when the parent ends; ends at once if it already has."""
    prctl(PR_SET_PDEATHSIG, number)
    if os.getppid() != parent_pid:
        os._exit(1)
