"""The Triton kernels: by the interpreter on the CPU, and compiled where there is a CUDA device."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from quant import gptq, gptq_block, kernels  # noqa: E402
from quant import grid as grid_module  # noqa: E402
from quant.grid import as_groups, search_levels  # noqa: E402
from quant.rtn import diagonal_importance  # noqa: E402
from quant.warm_up import warm_up  # noqa: E402

from .test_algorithms import BF16, GRIDS, make_case, output_error  # noqa: E402

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@needs_triton
def test_interpreted_the_kernels_do_what_the_plain_ways_do() -> None:
    """Every integer and every range: the interpreter does not fuse multiplications with additions, nor does the CPU."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.quant.kernel_against_loop"],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert [float(share) for share in done.stdout.split()] == [0.0] * 9


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_compiled_the_kernel_and_the_graph_round_as_the_loop(grid, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for ties: a fused multiplication may round the last bit of a weight otherwise."""
    w_NK, _, gram_KK = (part.cuda() for part in make_case(n=200, k=320))
    by_kernel = gptq.gptq(w_NK, gram_KK, grid, BF16)
    assert kernels._works == {"GPTQ": True, "the search for ranges": True}
    monkeypatch.setattr(gptq_block, "works", lambda *_: False)
    by_graph = gptq.gptq(w_NK, gram_KK, grid, BF16)
    on_cpu = gptq.gptq(w_NK.cpu(), gram_KK.cpu(), grid, BF16)
    assert (by_kernel.q_NK != by_graph.q_NK).float().mean() < 0.002
    lost = [output_error(part, w_NK.to(part.q_NK.device), gram_KK.to(part.q_NK.device))
            for part in (by_kernel, by_graph, on_cpu)]  # fmt: skip
    assert lost == pytest.approx([lost[2]] * 3, rel=0.01)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float16, BF16], ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_compiled_the_search_finds_what_the_plain_one_does(grid, dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    w_NK, _, gram_KK = (part.cuda() for part in make_case(n=200, k=320))
    w_NGS, importance = as_groups(w_NK, grid), diagonal_importance(gram_KK.diagonal(), grid)
    by_kernel = search_levels(w_NGS, grid, dtype, importance)
    monkeypatch.setattr(grid_module, "works", lambda *_: False)
    plain = search_levels(w_NGS, grid, dtype, importance)
    differing = (by_kernel.scale_NG != plain.scale_NG) | (by_kernel.zero_NG != plain.zero_NG)
    assert differing.float().mean() < 0.01


def no_triton() -> None:
    raise ModuleNotFoundError("No module named 'triton'")


def no_compiler() -> None:
    raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable")


def no_driver() -> None:
    raise AssertionError("libcuda.so cannot found!")


@pytest.mark.parametrize(
    ("probe", "reason"),
    [
        (no_driver, "libcuda.so cannot found"),
        (no_triton, "No module named 'triton'"),
        (no_compiler, "Failed to find C compiler"),
    ],
)
def test_without_a_kernel_the_job_goes_on_and_says_so_once(probe, reason, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_works", {})
    with pytest.warns(UserWarning, match=f"GPTQ goes on without its Triton kernel, several times slower: {reason}"):
        assert not kernels.works("GPTQ", probe)
    assert not kernels.works("GPTQ", probe)


@needs_triton
def test_a_kernel_that_does_not_compile_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.errors import PTXASError

    def probe() -> None:
        raise PTXASError("an unknown device")

    monkeypatch.setattr(kernels, "_works", {})
    with pytest.warns(UserWarning, match="PTXAS error: an unknown device"):
        assert not kernels.works("GPTQ", probe)


def test_a_failing_device_is_not_taken_for_a_missing_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def probe() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(kernels, "_works", {})
    with pytest.raises(RuntimeError, match="illegal memory access"):
        kernels.works("GPTQ", probe)


@pytest.mark.parametrize("method", ["rtn", "awq", "gptq"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_warming_up_works_for_every_job(method, grid) -> None:
    warm_up(method, grid, BF16, torch.device("cpu"))
