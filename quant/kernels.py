"""Whether the Triton kernels can be had: the library, a compiler for the current CUDA device, a C compiler."""

from __future__ import annotations

import subprocess
import warnings
from collections.abc import Callable

_works: dict[str, bool] = {}


def works(name: str, probe: Callable[[], object]) -> bool:
    """Whether `probe`, which imports a kernel and runs it on the device, can. Asked once; a no is told in a warning."""
    if name not in _works:
        try:
            probe()
            _works[name] = True
        except _failures() as error:
            nameless = isinstance(error, (RuntimeError, AssertionError))  # of Triton, without a type of their own
            if nameless and not any(missing in str(error) for missing in ("C compiler", "libcuda")):
                raise
            _works[name] = False
            warnings.warn(f"{name} goes on without its Triton kernel, several times slower: {error}", stacklevel=2)
    return _works[name]


def _failures() -> tuple[type[Exception], ...]:
    named = (ImportError, subprocess.CalledProcessError, RuntimeError, AssertionError)  # the second: no Python.h
    try:
        from triton.errors import TritonError
    except ImportError:
        return named
    return (*named, TritonError)
