"""The one-line form of a workload: `random:512/128,spread=0.2`."""

from __future__ import annotations

import difflib
from pathlib import Path

import msgspec

# kind -> the options it takes, with their defaults; PATH kinds begin with a file name, LENGTHS ones with IN/OUT
_OPTIONS: dict[str, dict[str, float]] = {
    "random": {"spread": 0.0},
    "prefix": {"groups": 8, "prefix": 1024},
    "turns": {"turns": 4, "next": 64, "think": 0.0},
    "sharegpt": {"out": 0, "max": 1024},
    "trace": {"speed": 1.0},
}
_FILES = ("sharegpt", "trace")
FORMS = """random:IN/OUT[,spread=0.2]            random words, lengths in tokens, each +-spread
prefix:IN/OUT[,groups=8,prefix=1024]  IN tokens of its own after one of `groups` shared prefixes
turns:IN/OUT[,turns=4,next=64,think=0] conversations: first turn IN, later ones `next` tokens, think in seconds
sharegpt:FILE[,out=N,max=1024]        first turns of a ShareGPT-format file
trace:FILE[,speed=1]                  JSON lines of timestamp (ms), input_length, output_length, hash_ids?, model?"""


class WorkloadSpec(msgspec.Struct, frozen=True):
    """A parsed workload."""

    kind: str
    input_tokens: int = 0
    output_tokens: int = 0
    path: str = ""
    options: dict[str, float] = {}

    def option(self, name: str) -> float:
        """An option's value, given or default."""
        return self.options.get(name, _OPTIONS[self.kind][name])


def parse_spec(text: str) -> WorkloadSpec:
    """Read a workload's one-line form. Raises ValueError that shows the forms allowed."""
    kind, _, rest = text.partition(":")
    if kind not in _OPTIONS:
        near = difflib.get_close_matches(kind, _OPTIONS, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown workload {text!r}; {hint}allowed:\n{FORMS}")
    first, *pairs = rest.split(",")
    options = dict(_option(kind, pair, text) for pair in pairs)
    if kind in _FILES:
        if not Path(first).is_file():
            raise ValueError(f"workload {text!r}: no file {first!r}")
        return WorkloadSpec(kind, path=str(Path(first).resolve()), options=options)
    lengths = first.split("/")
    if len(lengths) != 2 or not all(part.isdecimal() and int(part) > 0 for part in lengths):
        raise ValueError(f"workload {text!r}: lengths are IN/OUT in tokens, such as {kind}:512/128")
    return WorkloadSpec(kind, int(lengths[0]), int(lengths[1]), options=options)


def _option(kind: str, pair: str, text: str) -> tuple[str, float]:
    name, separator, value = pair.partition("=")
    if name not in _OPTIONS[kind] or not separator:
        raise ValueError(f"workload {text!r}: unknown option {pair!r}; allowed: {', '.join(_OPTIONS[kind])}")
    try:
        return name, float(value)
    except ValueError as error:
        raise ValueError(f"workload {text!r}: {name} is a number, got {value!r}") from error
