"""The three on-disk layouts as data: `quantization_config` and the packed tensors of one linear. Needs no torch.

Legend: N output features, K input features, G = K / group_size groups, b bits.

    awq                 qweight [K, N*b/32] i32   qzeros [G, N*b/32] i32   scales [G, N]
    gptq                qweight [K*b/32, N] i32   qzeros [G, N*b/32] i32   scales [G, N]   g_idx [K] i32
    compressed-tensors  weight_packed [N, K*b/32] i32   weight_scale [N, G]   weight_shape [2] i64
                        and, asymmetric only, weight_zero_point [N*b/32, G] i32
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quant.config import FORMATS, Format, Grid
from quant.errors import UnsupportedModel

# The tensor whose name marks a linear as packed, per format.
PACKED_SUFFIX: dict[Format, str] = {"awq": "qweight", "gptq": "qweight", "compressed-tensors": "weight_packed"}


@dataclass(frozen=True, slots=True)
class Scheme:
    """How a checkpoint says it is quantized."""

    format: Format
    grid: Grid
    config: Mapping[str, Any]  # the quantization_config it was read from or will be written as


def shapes_of(form: Format, n: int, k: int, grid: Grid) -> dict[str, tuple[int, ...]]:
    """Suffix -> shape of the packed tensors of one linear with N=n outputs and K=k inputs."""
    per_word, groups = 32 // grid.bits, k // grid.group_size
    if form == "awq":
        return {"qweight": (k, n // per_word), "qzeros": (groups, n // per_word), "scales": (groups, n)}
    if form == "gptq":
        shapes: dict[str, tuple[int, ...]] = {"qweight": (k // per_word, n), "qzeros": (groups, n // per_word)}
        return shapes | {"scales": (groups, n), "g_idx": (k,)}
    shapes = {"weight_packed": (n, k // per_word), "weight_scale": (n, groups), "weight_shape": (2,)}
    return shapes if grid.symmetric else shapes | {"weight_zero_point": (n // per_word, groups)}


def size_of(form: Format, suffix: str, shape: tuple[int, ...], bits: int) -> tuple[int, int]:
    """(N, K) of a linear from the shape of its PACKED_SUFFIX tensor."""
    assert suffix == PACKED_SUFFIX[form]
    per_word = 32 // bits
    if form == "awq":
        return shape[1] * per_word, shape[0]
    if form == "gptq":
        return shape[1], shape[0] * per_word
    return shape[0], shape[1] * per_word


def quantization_config(form: Format, grid: Grid, skipped: list[str]) -> dict[str, Any]:
    """The `quantization_config` of config.json. `skipped`: names of linears left unquantized."""
    if form == "awq":
        return {
            "quant_method": "awq",
            "version": "gemm",
            "bits": grid.bits,
            "group_size": grid.group_size,
            "zero_point": True,  # required by LMDeploy, and by the fast kernels elsewhere, symmetric grid or not
            "modules_to_not_convert": skipped,
        }
    if form == "gptq":
        config: dict[str, Any] = {
            "quant_method": "gptq",
            "checkpoint_format": "gptq",  # v1: zero points stored minus one; LMDeploy reads nothing else right
            "bits": grid.bits,
            "group_size": grid.group_size,
            "sym": True,
            "desc_act": False,
            "lm_head": False,
            "pack_dtype": "int32",
            "meta": {"quantizer": ["tunegate"]},
        }
        others = [name for name in skipped if name != "lm_head"]
        return config | ({"dynamic": {f"-:{_regex(name)}": {} for name in others}} if others else {})
    weights = {
        "num_bits": grid.bits,
        "type": "int",
        "symmetric": grid.symmetric,
        "strategy": "group",
        "group_size": grid.group_size,
        "dynamic": False,
        "actorder": None,
    }
    group = {"targets": ["Linear"], "format": "pack-quantized", "weights": weights}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": skipped,
    }


def read_scheme(config: Mapping[str, Any]) -> Scheme:
    """The scheme a `quantization_config` describes. Raises UnsupportedModel, naming what is unknown."""
    method = config.get("quant_method")
    form = next((form for form in FORMATS if form == method), None)
    if form is None:
        raise UnsupportedModel(f"quant_method is {method!r}; allowed: {', '.join(FORMATS)}")
    if method == "compressed-tensors":
        bits, group_size, symmetric = _compressed_tensors_grid(config)
    else:
        bits = config.get("bits", config.get("w_bit"))
        group_size = config.get("group_size", config.get("q_group_size"))
        symmetric = bool(config.get("sym", True)) if method == "gptq" else False
        own = [pattern for pattern in config.get("dynamic") or {} if not pattern.startswith("-:")]
        if own:
            raise UnsupportedModel(f"`dynamic` gives {own[0]!r} a grid of its own; read here: one grid for all linears")
    if bits not in (4, 8) or not isinstance(group_size, int) or group_size < 8:
        raise UnsupportedModel(
            f"bits is {bits!r}, group_size {group_size!r}; read here: 4 or 8 bits, groups of 8 or more"
        )
    return Scheme(form, Grid(bits=bits, group_size=group_size, symmetric=symmetric), config)


def _compressed_tensors_grid(config: Mapping[str, Any]) -> tuple[Any, Any, bool]:
    groups = config.get("config_groups") or {}
    if len(groups) != 1:
        raise UnsupportedModel(f"config_groups has {len(groups)} groups; read here: exactly one")
    (group,) = groups.values()
    form = group.get("format") or config.get("format")
    if form != "pack-quantized":
        raise UnsupportedModel(f"compressed-tensors format is {form!r}; read here: 'pack-quantized'")
    weights = group.get("weights") or {}
    return weights.get("num_bits"), weights.get("group_size"), bool(weights.get("symmetric", True))


def _regex(name: str) -> str:
    return "".join(f"\\{letter}" if letter in ".*+?[](){}|^$" else letter for letter in name) + "$"
