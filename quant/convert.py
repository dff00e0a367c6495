"""From one quantized format to another without touching a weight: the integers, zero points and scales are kept.

Exact: gptq <-> compressed-tensors (symmetric), gptq -> awq, awq <-> compressed-tensors with zero points, and
awq -> gptq when every zero point happens to be the middle. Anything else raises NotExact.
"""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor

from quant.checkpoint import Checkpoint, take_packed
from quant.config import Format, Grid
from quant.errors import NotExact, UnsupportedModel
from quant.formats import Scheme, quantization_config
from quant.headers import TensorEntry
from quant.pack import QuantizedLinear, pack
from quant.workspace import Workspace


def convert(source_dir: Path, form: Format, out: Path) -> None:
    """Write `source_dir` in another format to `out`, shard by shard. Raises QuantError, OSError."""
    source = Checkpoint(source_dir)
    if source.scheme is None:
        raise UnsupportedModel(f"{source_dir} is not quantized: nothing to convert")
    grid = target_grid(source.scheme, form)
    shards = _shards(source)
    packed = set(source.quantized_modules)
    modules = {name.rpartition(".")[0] for name, entry in source.entries.items() if len(entry.shape) == 2}
    left = sorted((modules - packed - {"model.embed_tokens"}) | {"lm_head"})
    config = quantization_config(form, grid, left)
    job = {
        "convert": form,
        "source": str(source_dir.resolve()),
        "quantization_config": source.config["quantization_config"],
    }
    with Workspace(out, json.loads(json.dumps(job))) as workspace:
        for number, names in enumerate(shards, start=1):
            shard = f"model-{number:05d}.safetensors"
            if not workspace.has(shard):
                workspace.put(shard, converted(source.tensors(names), source.scheme, form, grid), None)
        manifest = {"kind": "checkpoint", "manifest_version": 1, "format": form, "grid": grid.model_dump()}
        manifest |= {"converted_from": {"name": source_dir.name, "format": source.scheme.format}}
        workspace.commit(source_dir, source.config | {"quantization_config": config}, manifest, None)


def converted(stored: dict[str, Tensor], scheme: Scheme, form: Format, grid: Grid) -> dict[str, Tensor]:
    """The tensors of one shard in the new format. Raises NotExact, naming the linear that does not fit."""
    tensors = dict(stored)
    for module, linear in take_packed(tensors, scheme).items():
        regridded = QuantizedLinear(linear.q_NK, linear.scale_NG, linear.zero_NG, grid)
        try:
            tensors |= {f"{module}.{suffix}": tensor for suffix, tensor in pack(regridded, form).items()}
        except NotExact as error:
            raise NotExact(f"{module}: {error}; quantize the original again instead") from error
    return tensors


def target_grid(scheme: Scheme, form: Format) -> Grid:
    """The grid the integers keep, seen by the target format. Raises NotExact for one it cannot express."""
    grid = scheme.grid
    if form == scheme.format:
        raise NotExact(f"the checkpoint is in the {form} format already")
    if form == "awq":
        if grid.bits != 4:
            raise NotExact(f"the awq format holds 4 bits, these weights have {grid.bits}")
        return grid.model_copy(update={"symmetric": False})
    return grid.model_copy(update={"symmetric": grid.symmetric or form == "gptq"})


def _shards(source: Checkpoint) -> list[list[str]]:
    """Names by output shard: the source's own shards, except that a linear split over two moves to its first."""
    home: dict[str, Path] = {}

    def file_of(name: str, entry: TensorEntry) -> Path:
        module = name.rpartition(".")[0]
        return home.setdefault(module, entry.file)

    by_file: dict[Path, list[str]] = {}
    for name, entry in source.entries.items():
        by_file.setdefault(file_of(name, entry), []).append(name)
    return list(by_file.values())
