"""How exactly CUDA multiplies float32 matrices: in full, but inside `fast_products`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def fast_products() -> Iterator[None]:
    """Inside, CUDA multiplies float32 matrices in TF32: ten bits of mantissa, as many as float16 has.

    For running the model, summing moments and comparing errors; what GPTQ solves with needs all bits.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
