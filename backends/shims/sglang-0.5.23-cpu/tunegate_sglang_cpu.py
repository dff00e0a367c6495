"""What lets SGLang's CUDA wheel run on a CPU, for development and tests only.

- `stand_in` makes `sgl_kernel` and `torchvision` importable: no CPU wheel of the first exists, none of the second
  matches the CPU torch. SGLang imports names from both at start, and on this path calls none of them: it computes
  with plain torch. A call raises, so that no wrong result can pass for a right one.
- `drop_pinned_memory` (entry point `sglang.srt.plugins`) ignores requests for pinned host memory, which need CUDA.
"""

import functools
import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Callable
from typing import Any

import torch


class _AbsentType(type):
    """A class whose unknown attributes are their own names, as members of an enumeration would be."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name

    def __call__(cls, *args: object, **options: object) -> object:
        raise RuntimeError(
            f"{cls.__module__}.{cls.__name__} is not there: this SGLang runs on a CPU with stand-ins for CUDA-only "
            "packages, for development and tests; what needs it works only on a CUDA device"
        )


class _AbsentModule(types.ModuleType):
    """A module that has every name and every submodule."""

    __path__ = ()

    def __getattr__(self, name: str) -> type:
        return _absent(self.__name__, name)


class _AbsentSubmodules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds `package.anything` for the packages that stand in."""

    def __init__(self, package: str) -> None:
        self._prefix = package + "."

    def find_spec(self, fullname: str, path: object, target: object = None) -> importlib.machinery.ModuleSpec | None:
        if not fullname.startswith(self._prefix):
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _AbsentModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing to run: `_AbsentModule` answers by itself."""


def stand_in(package: str) -> Callable[[str], type]:
    """The `__getattr__` of a package that stands in for an absent one; makes its submodules importable."""
    sys.meta_path.append(_AbsentSubmodules(package))
    return functools.partial(_absent, package)


def _absent(module: str, name: str) -> type:
    if name.startswith("__"):
        raise AttributeError(name)
    return _AbsentType(name, (), {"__module__": module})


def drop_pinned_memory() -> None:
    """Make torch ignore `pin_memory`; called once in each of SGLang's processes."""
    if torch.cuda.is_available():
        return
    for name in ("tensor", "empty", "zeros", "ones", "full", "arange", "empty_like", "zeros_like", "empty_strided"):
        setattr(torch, name, _without_pinning(getattr(torch, name)))
    torch.Tensor.pin_memory = lambda self, *args, **options: self


def _without_pinning(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(make)
    def unpinned(*args: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        return make(*args, **options)

    return unpinned
