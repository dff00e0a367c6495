"""Which engine loads a quantized checkpoint, decided from its configuration and headers alone (no torch, no engine).

The rules themselves are data: rules.toml.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from quant.errors import BadCheckpoint, UnsupportedModel
from quant.formats import PACKED_SUFFIX, Scheme, read_scheme, shapes_of, size_of
from quant.headers import TensorEntry, read_entries, read_json

RULES = Path(__file__).with_name("rules.toml")
Outcome = Literal["accepted", "slow", "refused"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one engine would do with the checkpoint, and why."""

    engine: str
    device: str
    verified: str  # engine version the rule was checked against
    outcome: Outcome
    reasons: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True, slots=True)
class Facts:
    """What a quantized checkpoint says of itself, in one vocabulary for all formats."""

    scheme: Scheme
    properties: Mapping[str, Any]
    linears: Mapping[str, tuple[int, int]] = field(default_factory=dict)  # name -> (outputs, inputs)
    architecture: str = ""  # as config.json names it; "" when it does not

    def __repr__(self) -> str:
        shown = " ".join(f"{name}={value}" for name, value in self.properties.items())
        return f"<Facts {self.scheme.format} {shown} linears={len(self.linears)}>"


def read_facts(directory: Path) -> Facts:
    """Read and cross-check a quantized checkpoint. Raises BadCheckpoint, UnsupportedModel."""
    config = read_json(directory / "config.json")
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict):
        raise UnsupportedModel(f"{directory} is not quantized: its config.json has no quantization_config")
    scheme = read_scheme(quantization)
    return facts_of(scheme, _check_linears(read_entries(directory), scheme), config)


def facts_of(scheme: Scheme, linears: Mapping[str, tuple[int, int]], config: Mapping[str, Any]) -> Facts:
    """The facts of a checkpoint with this scheme, these packed linears (name -> outputs, inputs) and config.json."""
    return Facts(scheme, _properties(scheme), linears, _first(config.get("architectures")))


def _first(names: Any) -> str:
    """The first of a list of names; "" of anything else, as an engine's own choice then stands."""
    return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""


def turbomind_knows(facts: Facts) -> bool:
    """Whether LMDeploy serves this architecture by TurboMind; every other one by its PyTorch engine."""
    return not facts.architecture or facts.architecture in _table()["turbomind_architectures"]


def judge(facts: Facts, engine: str | None = None, device: str | None = None) -> list[Verdict]:
    """A verdict for every matching rule, in the table's order. `None` matches all engines, or all devices."""
    rules = _table()["rule"]
    wanted = [
        rule
        for rule in rules
        if rule["format"] == facts.scheme.format
        and (engine is None or rule["engine"] == engine or rule["engine"].startswith(f"{engine}-"))
        and (device is None or rule["device"] == device)
    ]
    if not wanted:
        known = sorted({f"{rule['engine']} on {rule['device']}" for rule in rules})
        raise UnsupportedModel(f"no rule for engine {engine!r} on {device or 'any device'}; known: {', '.join(known)}")
    return [_apply(rule, facts) for rule in wanted]


@cache
def _table() -> dict[str, Any]:
    return tomllib.loads(RULES.read_text())


def _apply(rule: Mapping[str, Any], facts: Facts) -> Verdict:
    def verdict(outcome: Outcome, reasons: list[str]) -> Verdict:
        return Verdict(rule["engine"], rule["device"], rule["verified"], outcome, tuple(reasons), rule.get("note", ""))

    if "refused" in rule:
        return verdict("refused", [rule["refused"]])
    refusals = []
    if rule["engine"] == "lmdeploy-turbomind" and not turbomind_knows(facts):
        refusals.append(f"it does not know {facts.architecture}: LMDeploy serves that by its PyTorch engine")
    for name, allowed in rule.get("allow", {}).items():
        value = facts.properties[name]
        if value not in allowed:
            because = rule.get("because", {}).get(name)
            given = f"{name} is {_shown(value)}, allowed: {', '.join(_shown(choice) for choice in allowed)}"
            given += f" ({because})" if because else ""
            refusals.append(given + (_other_groups(allowed, facts) if name == "group_size" else ""))
    refusals += _not_divisible(rule.get("multiple", {}), facts)
    if refusals:
        return verdict("refused", refusals)
    slow = [
        f"{name} is {_shown(facts.properties[name])}: not on the fast kernels"
        for name, values in rule.get("slow", {}).items()
        if facts.properties[name] in values
    ]
    slow += _off_tiles(rule.get("fast_tiles", []), facts)
    return verdict("slow" if slow else "accepted", slow)


def _other_groups(allowed: Sequence[int], facts: Facts) -> str:
    """Whether the model could be quantized in groups that are allowed, in words."""
    fitting = [size for size in allowed if not any(k % size for _, k in facts.linears.values())]
    if fitting:
        return f", and {max(fitting)} divides all inputs: quantize with --group-size {max(fitting)}"
    name, k = next((name, k) for name, (_, k) in facts.linears.items() if k % min(allowed))
    return f", and {min(allowed)} does not divide the {k} inputs of {name}"


def _off_tiles(tiles: Sequence[Mapping[str, int]], facts: Facts) -> list[str]:
    """What to say of linears that fill no kind of tile; nothing where all do."""
    bad = [
        (name, n, k)
        for name, (n, k) in facts.linears.items()
        if tiles and all(n % tile["n"] or k % tile["k"] for tile in tiles)
    ]
    if not bad:
        return []
    (name, n, k), kinds = bad[0], " or ".join(f"{tile['n']} x {tile['k']}" for tile in tiles)
    text = f"{len(bad)} linears do not divide into {kinds} (outputs x inputs), first {name} ({n} x {k})"
    return [f"{text}: padded, or off the fast kernels"]


def _not_divisible(divisors: Mapping[str, int], facts: Facts) -> list[str]:
    texts = []
    for axis, divisor in divisors.items():
        sizes = {name: n if axis == "n" else k for name, (n, k) in facts.linears.items()}
        bad = [name for name, size in sizes.items() if size % divisor]
        if bad:
            word = "outputs" if axis == "n" else "inputs"
            texts.append(f"{len(bad)} linears have {word} not divisible by {divisor}, first {bad[0]} ({sizes[bad[0]]})")
    return texts


def _properties(scheme: Scheme) -> dict[str, Any]:
    config = scheme.config
    common = {"bits": scheme.grid.bits, "group_size": scheme.grid.group_size}
    if scheme.format == "awq":
        return common | {"zero_point": config.get("zero_point"), "version": str(config.get("version", "")).lower()}
    if scheme.format == "gptq":
        own = {"symmetric": config.get("sym"), "desc_act": config.get("desc_act")}
        return common | own | {"checkpoint_format": config.get("checkpoint_format", "gptq")}
    (group,) = config["config_groups"].values()
    own = {"symmetric": scheme.grid.symmetric, "actorder": group["weights"].get("actorder") or "none"}
    return common | own | {"group_format": group.get("format")}


def _check_linears(entries: Mapping[str, TensorEntry], scheme: Scheme) -> dict[str, tuple[int, int]]:
    """Sizes of all packed linears, after checking that their tensors fit each other and the configuration."""
    marker = PACKED_SUFFIX[scheme.format]
    linears: dict[str, tuple[int, int]] = {}
    for name, entry in entries.items():
        if not name.endswith(f".{marker}"):
            continue
        module = name.removesuffix(f".{marker}")
        if f"{module}.weight" in entries:
            raise BadCheckpoint(f"{module} is stored both packed and unpacked")
        n, k = linears[module] = size_of(scheme.format, marker, entry.shape, scheme.grid.bits)
        if k % scheme.grid.group_size:
            raise BadCheckpoint(f"{module} has {k} inputs, which group size {scheme.grid.group_size} does not divide")
        for suffix, shape in shapes_of(scheme.format, n, k, scheme.grid).items():
            found = entries.get(f"{module}.{suffix}")
            if found is None and suffix == "g_idx":
                continue
            if found is None or found.shape != shape:
                given = "missing" if found is None else str(list(found.shape))
                raise BadCheckpoint(f"{module}.{suffix} is {given}, expected {list(shape)} by the configuration")
    if not linears:
        raise BadCheckpoint(f"the configuration says {scheme.format}, but no tensor is named *.{marker}")
    return linears


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
