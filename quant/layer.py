"""Quantizing one decoder layer: its weights, structure and input moments in, the tensors to store out.

Legend: N outputs, K inputs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from quant.awq import search_scale
from quant.config import Method, QuantOptions
from quant.errors import BadHessian
from quant.gptq import gptq
from quant.moments import Moments
from quant.pack import QuantizedLinear, pack
from quant.phases import Phases
from quant.plan import InputGroup, LayerPlan, apply_fold
from quant.precision import fast_products
from quant.ranks import Ranks
from quant.rtn import block_importance, diagonal_importance, rtn


@dataclass(frozen=True, slots=True)
class LinearReport:
    """What happened to one linear, as it stands in the report."""

    name: str
    method: str
    error: float  # expected squared output error relative to the expected squared output
    tokens: int  # calibration tokens that reached it
    note: str = ""

    def as_json(self) -> dict[str, object]:
        return asdict(self)


@dataclass(slots=True)
class LayerResult:
    """Everything to store of one layer; names relative to it."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    linears: list[LinearReport] = field(default_factory=list)


def skip_reasons(plan: LayerPlan, weights: Mapping[str, Tensor], prefix: str, options: QuantOptions) -> dict[str, str]:
    """Linear -> why it is left alone. Linears that share an input go together, as engines fuse them."""
    grid = options.grid
    reasons: dict[str, str] = {}
    per_word = 32 // grid.bits
    for group in plan.groups:
        for name in group.linears:
            n, k = weights[f"{name}.weight"].shape
            reason = ""
            if any(re.search(pattern, prefix + name) for pattern in options.skip):
                reason = "skipped by request"
            elif k % grid.group_size:
                reason = f"its {k} inputs are not divisible by group size {grid.group_size}"
            elif n % per_word:
                reason = f"its {n} outputs do not fill 32-bit words of {per_word} values"
            if reason:
                reasons |= {
                    member: reason if member == name else f"shares its input with {name}" for member in group.linears
                }
                break
    return reasons


def quantize_layer(
    weights: Mapping[str, Tensor],
    plan: LayerPlan,
    moments: Mapping[str, Moments],
    skipped: Mapping[str, str],
    options: QuantOptions,
    dtype: torch.dtype,
    ranks: Ranks,
    phases: Phases,
) -> LayerResult:
    """Quantize every planned linear of `weights` (relative names, as stored in the checkpoint) on their device.

    Of several processes each takes some; the result is whole in the first. It stays on the device, but on the host
    where it came by messages.
    """
    work = {name: tensor.float() for name, tensor in weights.items()}
    scales: dict[str, Tensor] = {}  # linear -> scale of its input channels
    folded: set[str] = set()
    if options.method == "awq":
        with phases("scales"), fast_products():
            work, scales, folded = _fold_scales(work, plan, moments, skipped, options, dtype, ranks)

    planned = {group.site: group for group in plan.groups if group.linears[0] not in skipped}
    mine = ranks.dealt({site: _cost(group, work) for site, group in planned.items()})
    home = work[next(iter(work))].device if ranks.size == 1 else torch.device("cpu")
    own: dict[str, LayerResult] = {}
    for site, group in planned.items():
        if site not in mine:
            continue
        own[site] = LayerResult()
        parts = _quantize_group(group, work, scales, moments, options, dtype, phases)
        with phases("pack"):
            for name, linear, report in parts:
                own[site].linears.append(report)
                packed = pack(linear, options.format)
                own[site].tensors |= {f"{name}.{suffix}": tensor.to(home) for suffix, tensor in packed.items()}
    solved = {site: part for share in ranks.gathered(own) for site, part in share.items()}
    result = LayerResult()
    for part in (solved[site] for site in planned if site in solved):
        result.linears += part.linears
        result.tensors |= part.tensors
    done = {f"{name}.weight" for group in planned.values() for name in group.linears}
    for name, original in weights.items():
        if name not in done:
            result.tensors[name] = (work[name].to(original.dtype) if name in folded else original).to(home)
    return result


def _cost(group: InputGroup, work: Mapping[str, Tensor]) -> float:
    """In proportion to the multiplications of solving it: N K^2, and K^3 for its inputs' own."""
    shapes = [work[f"{name}.weight"].shape for name in group.linears]
    return float(sum(n * k * k for n, k in shapes) + shapes[0][1] ** 3)


def _fold_scales(
    work: dict[str, Tensor],
    plan: LayerPlan,
    moments: Mapping[str, Moments],
    skipped: Mapping[str, str],
    options: QuantOptions,
    dtype: torch.dtype,
    ranks: Ranks,
) -> tuple[dict[str, Tensor], dict[str, Tensor], set[str]]:
    """AWQ's scales, folded: (weights, scale of each linear's inputs, names of the weights that changed)."""
    site_of = {name: group for group in plan.groups for name in group.linears}
    scales: dict[str, Tensor] = {}
    changed: set[str] = set()
    original = work
    for fold in plan.folds:
        targets = [name for name in fold.consumers if name in site_of and name not in skipped]
        seen = [name for name in targets if _moments_for(site_of[name], moments)]
        if not seen or fold.site not in moments:
            continue
        scale_K = search_scale(
            [original[f"{name}.weight"] for name in seen],
            [_weighted_gram(site_of[name], moments) for name in seen],
            moments[fold.site].mean_abs_K,
            options.grid,
            dtype,
            None if fold.rows is None else torch.tensor(fold.rows, device=moments[fold.site].abs_K.device),
        )
        scale_K = ranks.same(scale_K)
        work = apply_fold(work, fold, scale_K)
        scales |= dict.fromkeys(fold.consumers, scale_K)
        changed |= {f"{name}.weight" for name in (*fold.consumers, fold.producer)} | {f"{fold.producer}.bias"}
    return work, scales, changed & work.keys()


def _quantize_group(
    group: InputGroup,
    work: Mapping[str, Tensor],
    scales: Mapping[str, Tensor],
    moments: Mapping[str, Moments],
    options: QuantOptions,
    dtype: torch.dtype,
    phases: Phases,
) -> list[tuple[str, QuantizedLinear, LinearReport]]:
    weights = [work[f"{name}.weight"] for name in group.linears]
    seen, scale_K = _moments_for(group, moments), scales.get(group.linears[0])
    with phases("solve"):
        linear, method, note = _solved(torch.cat(weights), seen, scale_K, options, dtype)
    tokens = moments[group.site].tokens if group.site in moments else 0
    if options.calib_samples and not tokens:
        unreached = "no calibration token reached this expert; " + (
            "statistics of all its layer's tokens" if seen else "none used"
        )
        note = note or unreached
    parts, start = [], 0
    with phases("judge"), fast_products():
        for name, weight_NK in zip(group.linears, weights, strict=True):
            stop = start + weight_NK.shape[0]
            part = QuantizedLinear(
                linear.q_NK[start:stop], linear.scale_NG[start:stop], linear.zero_NG[start:stop], linear.grid
            )
            error = _relative_error(weight_NK, part.dequantize() - weight_NK, seen, scale_K)
            parts.append((name, part, LinearReport(name, method, error, tokens, note)))
            start = stop
    return parts


def _solved(
    w_NK: Tensor, seen: Moments | None, scale_K: Tensor | None, options: QuantOptions, dtype: torch.dtype
) -> tuple[QuantizedLinear, Method, str]:
    """(the weight on its grid, the method that did it, a note where it is not the one asked for)"""
    grid = options.grid
    if options.method == "gptq" and seen is not None:
        try:
            return gptq(w_NK, seen.mean_gram_KK, grid, dtype, options.damping), "gptq", ""
        except BadHessian as bad:
            return rtn(w_NK, grid, dtype, _finite_importance(seen, options)), "rtn", f"fell back to RTN: {bad}"
    if options.method == "awq" and seen is not None:
        gram_KK = seen.mean_gram_KK if scale_K is None else seen.mean_gram_KK / torch.outer(scale_K, scale_K)
        with fast_products():
            return rtn(w_NK, grid, dtype, block_importance(gram_KK, grid)), "awq", ""
    return rtn(w_NK, grid, dtype, _finite_importance(seen, options)), "rtn", ""


def _moments_for(group: InputGroup, moments: Mapping[str, Moments]) -> Moments | None:
    """The group's own statistics; for an expert that no token reached, those of all tokens of its layer if they fit."""
    if group.site in moments:
        return moments[group.site]
    if group.bank is not None and group.bank in moments and group.site.endswith(("gate_proj", "up_proj")):
        return moments[group.bank]
    return None


def _weighted_gram(group: InputGroup, moments: Mapping[str, Moments]) -> Tensor:
    """Sums, not means: an expert counts in a shared scale by the tokens it serves."""
    seen = _moments_for(group, moments)
    assert seen is not None and seen.gram_KK is not None
    return seen.gram_KK if group.site in moments else seen.mean_gram_KK


def _finite_importance(seen: Moments | None, options: QuantOptions) -> Tensor | None:
    if seen is None or not bool(torch.isfinite(seen.square_K).all()):
        return None
    return diagonal_importance(seen.mean_square_K, options.grid)


def _relative_error(weight_NK: Tensor, delta_NK: Tensor, seen: Moments | None, scale_K: Tensor | None) -> float:
    if seen is None:
        return float(delta_NK.square().sum() / weight_NK.square().sum().clamp(min=1e-30))
    if scale_K is not None:
        weight_NK, delta_NK = weight_NK / scale_K, delta_NK / scale_K
    if seen.gram_KK is None:
        weigh = seen.square_K  # sums do as well as means: the number of tokens cancels
        return float((delta_NK.square() * weigh).sum() / (weight_NK.square() * weigh).sum().clamp(min=1e-30))
    gram_KK = seen.gram_KK
    lost, whole = ((delta_NK @ gram_KK) * delta_NK).sum(), ((weight_NK @ gram_KK) * weight_NK).sum()
    return float(lost / whole.clamp(min=1e-30))


def sites_of(plan: LayerPlan) -> list[str]:
    """The modules whose inputs calibration must listen to."""
    sites = [group.site for group in plan.groups] + [fold.site for fold in plan.folds]
    return list(dict.fromkeys([*sites, *plan.banks]))
