"""The algorithms against definitions written out plainly, and against each other."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from quant import awq, gptq  # noqa: E402
from quant.config import Grid  # noqa: E402
from quant.errors import BadHessian  # noqa: E402
from quant.grid import (  # noqa: E402
    SHRINKS,
    as_groups,
    levels_of,
    round_to,
    rounding_error,
    search_levels,
    storable,
    values_of,
)
from quant.moments import Moments  # noqa: E402
from quant.pack import QuantizedLinear  # noqa: E402
from quant.rtn import block_importance, diagonal_importance, rtn  # noqa: E402

GRIDS = [Grid(group_size=32), Grid(group_size=32, symmetric=True), Grid(bits=8, group_size=64, symmetric=True)]
BF16 = torch.bfloat16


def make_case(n: int = 48, k: int = 128, tokens: int = 512, seed: int = 0):
    """A weight and correlated inputs with a few loud channels, as language models have."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=generator) / k**0.5 + torch.eye(k)
    x_TK = torch.randn(tokens, k, generator=generator) @ mix
    x_TK[:, :: k // 8] *= 8
    return torch.randn(n, k, generator=generator), x_TK, x_TK.t() @ x_TK / tokens


def output_error(linear: QuantizedLinear, w_NK, gram_KK) -> float:
    delta_NK = linear.dequantize() - w_NK
    return float(((delta_NK @ gram_KK) * delta_NK).sum())


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_rounding_is_to_the_nearest_level(grid: Grid) -> None:
    w_NGS = as_groups(make_case()[0], grid)
    levels = levels_of(w_NGS, grid, BF16)
    q_NGS = round_to(w_NGS, levels, grid)
    every = torch.arange(grid.max_level + 1).float()
    values = (every - levels.zero_NG[0, 0]) * levels.scale_NG[0, 0]
    nearest = (w_NGS[0, 0][:, None] - values).abs().amin(-1)
    chosen = (w_NGS[0, 0] - values_of(q_NGS, levels)[0, 0]).abs()
    assert torch.allclose(chosen, nearest, atol=1e-6)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_short_way_to_the_rounding_error_is_exact(grid: Grid) -> None:
    w_NGS = as_groups(make_case()[0], grid)
    levels = levels_of(w_NGS, grid, BF16, shrink=0.7)
    assert torch.equal(rounding_error(w_NGS, levels, grid), values_of(round_to(w_NGS, levels, grid), levels) - w_NGS)


@pytest.mark.parametrize("k", [7, 128])
def test_second_moments_are_summed_over_batches(k: int) -> None:
    x_TK = torch.randn(50, k, generator=torch.Generator().manual_seed(0))
    moments = Moments.zeros(k, torch.device("cpu"), full=True)
    for batch in (x_TK[:20].view(4, 5, k), x_TK[20:]):
        moments.add(batch)
    moments.mirror()
    torch.testing.assert_close(moments.mean_gram_KK, x_TK.t() @ x_TK / 50, rtol=1e-4, atol=1e-5)
    assert torch.equal(moments.mean_gram_KK, moments.mean_gram_KK.t())


def test_stored_scales_are_exact_in_both_half_types() -> None:
    scale = storable(torch.rand(1000) * 0.05 + 1e-7, BF16)
    assert torch.equal(scale, scale.half().float())
    assert torch.equal(scale, scale.bfloat16().float())
    assert storable(torch.zeros(1), BF16) == 1


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_weights_on_the_grid_are_kept_exactly(grid: Grid) -> None:
    q = torch.randint(0, grid.max_level + 1, (8, 128), generator=torch.Generator().manual_seed(3)).float()
    lowest = 1 if grid.symmetric else 0  # a symmetric range is as wide below as above
    q = q.clamp(min=lowest)
    q[:, 0::32], q[:, 1::32] = lowest, grid.max_level  # every group spans its whole range
    zero = float(grid.middle)
    w_NK = (q - zero) * 0.0078125
    assert torch.equal(rtn(w_NK, grid, BF16).dequantize(), w_NK)


@pytest.mark.parametrize("importance", ["none", "diagonal", "block"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_search_finds_the_best_of_its_candidates(grid: Grid, importance: str) -> None:
    w_NK, _, gram_KK = make_case(n=4)
    weigh = {"none": None, "diagonal": diagonal_importance(gram_KK.diagonal(), grid)}.get(importance)
    if importance == "block":
        weigh = block_importance(gram_KK, grid)
    w_NGS = as_groups(w_NK, grid)
    levels = search_levels(w_NGS, grid, BF16, weigh)

    def error(levels, row: int, group: int) -> float:
        delta = (values_of(round_to(w_NGS, levels, grid), levels) - w_NGS)[row, group]
        if weigh is None:
            return float(delta @ delta)
        moments = weigh[group] if weigh.dim() == 3 else torch.diag(weigh[group])
        return float(delta @ moments @ delta)

    for row, group in [(0, 0), (1, 1), (3, 1)]:
        best = min(error(levels_of(w_NGS, grid, BF16, shrink), row, group) for shrink in SHRINKS)
        assert error(levels, row, group) == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("grid", GRIDS[:2], ids=str)
def test_each_method_beats_the_simpler_one(grid: Grid) -> None:
    w_NK, x_TK, gram_KK = make_case()
    plain = QuantizedLinear(
        round_to(as_groups(w_NK, grid), (levels := levels_of(as_groups(w_NK, grid), grid, BF16)), grid)
        .view(w_NK.shape)
        .to(torch.uint8),
        levels.scale_NG,
        levels.zero_NG,
        grid,
    )
    searched = rtn(w_NK, grid, BF16, diagonal_importance(gram_KK.diagonal(), grid))
    scale_K = awq.search_scale([w_NK], [gram_KK], x_TK.abs().mean(0), grid, BF16)
    scaled = rtn(w_NK * scale_K, grid, BF16, block_importance(gram_KK / torch.outer(scale_K, scale_K), grid))
    delta_NK = scaled.dequantize() / scale_K - w_NK
    awq_error = float(((delta_NK @ gram_KK) * delta_NK).sum())
    solved = gptq.gptq(w_NK, gram_KK, grid, BF16)
    errors = [output_error(plain, w_NK, gram_KK), output_error(searched, w_NK, gram_KK), awq_error]
    assert errors[0] > errors[1] > errors[2]
    assert output_error(solved, w_NK, gram_KK) < 0.7 * errors[1]


def test_awq_scales_are_never_worse_than_none_and_respect_ties() -> None:
    w_NK, x_TK, gram_KK = make_case()
    grid = GRIDS[0]
    tie_K = torch.arange(64).repeat(2)
    scale_K = awq.search_scale([w_NK], [gram_KK], x_TK.abs().mean(0), grid, BF16, tie_K)
    assert torch.equal(scale_K[:64], scale_K[64:])
    none = awq.scaled_error(w_NK, gram_KK, torch.ones(128), grid, BF16)
    assert awq.scaled_error(w_NK, gram_KK, scale_K, grid, BF16) <= none


def test_gptq_equals_the_textbook_column_by_column() -> None:
    """Blocks, order and the Cholesky form change nothing against the plain update (Frantar et al., eq. 2 and 3)."""
    grid = Grid(group_size=32, symmetric=True)
    w_NK, _, gram_KK = make_case(n=16, k=256)
    gram_KK, w_NK = gram_KK.double(), w_NK.double()
    levels = search_levels(as_groups(w_NK, grid), grid, BF16, diagonal_importance(gram_KK.diagonal().float(), grid))
    scale_NK = levels.scale_NG.repeat_interleave(32, 1).double()
    damped_KK = gram_KK + 0.01 * gram_KK.diagonal().mean() * torch.eye(256).double()
    order = torch.argsort(gram_KK.diagonal(), descending=True, stable=True).tolist()
    work_NK, expected_NK, left = w_NK.clone(), torch.zeros_like(w_NK), list(order)
    for column in order:
        inverse = torch.linalg.inv(damped_KK[left][:, left])
        scale_N = scale_NK[:, column]
        q_N = ((work_NK[:, column] / scale_N).round() + 8).clamp(0, 15)
        expected_NK[:, column] = q_N
        error_N = (work_NK[:, column] - (q_N - 8) * scale_N) / inverse[0, 0]
        work_NK[:, left] -= torch.outer(error_N, inverse[0])
        left = left[1:]
    result = gptq.gptq(w_NK.float(), gram_KK.float(), grid, BF16)
    assert (result.q_NK != expected_NK).float().mean() < 0.005  # ties broken by float32 rounding


def test_gptq_damps_harder_when_it_must_and_gives_up_when_it_cannot() -> None:
    w_NK, x_TK, _ = make_case()
    thin_KK = x_TK[:3].t() @ x_TK[:3]  # three tokens: rank three
    assert torch.isfinite(gptq.gptq(w_NK, thin_KK, GRIDS[0], BF16, damping=1e-12).dequantize()).all()
    with pytest.raises(BadHessian, match="not positive definite"):
        gptq.inverse_factor(torch.diag(torch.tensor([-100.0, 101.0, 1.0, 1.0])), 0.01)
    with pytest.raises(BadHessian, match="not finite"):
        gptq.gptq(w_NK, torch.full((128, 128), float("nan")), GRIDS[0], BF16)
    with pytest.raises(BadHessian, match="no calibration token"):
        gptq.gptq(w_NK, torch.zeros(128, 128), GRIDS[0], BF16)


def test_the_factor_is_the_upper_one_of_the_damped_inverse() -> None:
    _, _, gram_KK = make_case(k=256)
    damped_KK = gram_KK.double() + 0.01 * gram_KK.diagonal().mean().double() * torch.eye(256).double()
    factor_KK = gptq.inverse_factor(gram_KK, 0.01)
    assert not factor_KK.tril(-1).any()
    expected_KK = torch.linalg.cholesky(torch.linalg.inv(damped_KK), upper=True)
    torch.testing.assert_close(factor_KK.double(), expected_KK, rtol=1e-4, atol=1e-6)
