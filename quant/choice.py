"""The grid of a checkpoint that is yet to be made, from the original's headers: needs neither torch nor weights."""

from __future__ import annotations

import re
from pathlib import Path

from quant.config import GROUP_SIZES, Format, Grid, default_symmetric
from quant.formats import Scheme, quantization_config
from quant.headers import read_entries, read_json
from quant.rules import Facts, facts_of

_OF_A_LAYER = re.compile(r"\.\d+\..*\.weight$")  # of a numbered module: neither the embedding nor the head
_ROUTER = re.compile(r"\.(gate|router)\.weight$")


def linears_of(directory: Path) -> dict[str, tuple[int, int]]:
    """Name -> (outputs, inputs) of the matrices in a plain checkpoint's layers. Raises BadCheckpoint."""
    return {
        name.removesuffix(".weight"): (entry.shape[0], entry.shape[1])
        for name, entry in read_entries(directory).items()
        if len(entry.shape) == 2 and _OF_A_LAYER.search(name) and not _ROUTER.search(name)
    }


def group_size_for(directory: Path) -> int:
    """The largest group size that divides the inputs of every matrix; the largest of all where none does.

    Larger groups store fewer scales; a linear whose inputs are not divided would be left unquantized.
    Raises BadCheckpoint.
    """
    inputs = {k for _, k in linears_of(directory).values()}
    sizes = sorted(GROUP_SIZES, reverse=True)
    return next((size for size in sizes if not any(k % size for k in inputs)), sizes[0])


def planned_facts(directory: Path, form: Format) -> Facts:
    """What `quantize` would make of a plain checkpoint by default, for `rules.judge`. Raises BadCheckpoint."""
    grid = Grid(group_size=group_size_for(directory), symmetric=default_symmetric(form))
    linears = {name: (n, k) for name, (n, k) in linears_of(directory).items() if k % grid.group_size == 0}
    scheme = Scheme(form, grid, quantization_config(form, grid, []))
    return facts_of(scheme, linears, read_json(directory / "config.json"))
