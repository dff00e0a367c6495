"""The quantizer's loops on one device: seconds by the Triton kernels and without them, and what they set otherwise.

    python -m tests.proofs.quant_kernels [--device cuda] [--out FILE] [--shapes 6144x4096,4096x14336]

GPTQ's solver and the search for ranges on random weights and inputs of an 8B model's sizes, groups of 128. A line is
printed, and FILE (JSON) grows, as soon as a shape is done.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar
from unittest import mock

import torch
from torch import Tensor

from quant.config import Grid
from quant.gptq import gptq
from quant.grid import Levels, as_groups, search_levels
from quant.rtn import diagonal_importance

Result = TypeVar("Result")

_SHAPES = "6144x4096,4096x4096,28672x4096,4096x14336"  # query to value, output, gate and up, down: of 8B


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--shapes", default=_SHAPES, help="outputs x inputs, with commas between")
    given = parser.parse_args()
    rows = []
    for shape in given.shapes.split(","):
        n, k = (int(size) for size in shape.split("x"))
        rows.append({"shape": shape} | row(n, k, torch.device(given.device)))
        print(json.dumps(rows[-1]), flush=True)
        if given.out:
            given.out.write_text(json.dumps(rows, indent=1))


def row(n: int, k: int, device: torch.device) -> dict[str, float]:
    """The figures of one weight."""
    generator = torch.Generator(device).manual_seed(0)
    w_NK = torch.randn(n, k, generator=generator, device=device) * 0.02
    x_TK = torch.randn(2 * k, k, generator=generator, device=device) * torch.linspace(0.2, 3, k, device=device)
    gram_KK = x_TK.t() @ x_TK / (2 * k)
    del x_TK
    grid, dtype = Grid(group_size=128, symmetric=True), torch.bfloat16
    importance = diagonal_importance(gram_KK.diagonal(), grid)

    def search() -> Levels:
        return search_levels(as_groups(w_NK, grid), grid, dtype, importance)

    def solve() -> Tensor:
        return gptq(w_NK, gram_KK, grid, dtype).q_NK

    search_s, levels = timed(search, device)
    solve_s, q_NK = timed(solve, device)
    with without_kernels():
        plain_search_s, plain_levels = timed(search, device)
        plain_solve_s, plain_q_NK = timed(solve, device)
    return {
        "search_s": search_s,
        "search_plain_s": plain_search_s,
        "other_ranges": share(levels.scale_NG != plain_levels.scale_NG),
        "gptq_s": solve_s,
        "gptq_graph_s": plain_solve_s,
        "other_integers": share(q_NK != plain_q_NK),
    }


def timed(work: Callable[[], Result], device: torch.device) -> tuple[float, Result]:
    """(seconds of the second run, its result): the first loads and compiles."""
    work()
    synchronize(device)
    started = time.monotonic()
    result = work()
    synchronize(device)
    return round(time.monotonic() - started, 4), result


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def share(differing: Tensor) -> float:
    return round(float(differing.float().mean()), 6)


@contextlib.contextmanager
def without_kernels() -> Iterator[None]:
    """Inside, the loops are what they are where Triton is missing."""
    with mock.patch("quant.grid.works", lambda *_: False), mock.patch("quant.gptq_block.works", lambda *_: False):
        yield


if __name__ == "__main__":
    main()
