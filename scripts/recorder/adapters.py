"""The adapters that recordings are made with: two good ones, and each kind of bad one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tests.support.peft_files import Adapter, Shapes, write_adapter


def write_all(folder: Path, model_path: Path) -> None:
    """Write every adapter under `folder` for the checkpoint at `model_path`."""
    shapes = Shapes.of(model_path)
    for seed, name in enumerate(("good", "second", "third", "fourth", "fifth")):
        write_adapter(folder / name, shapes, Adapter(seed=seed))
    write_adapter(folder / "rank64", shapes, Adapter(rank=64))
    write_adapter(folder / "dora", shapes, Adapter(config={"use_dora": True}))
    write_adapter(folder / "modules_to_save", shapes, Adapter(config={"modules_to_save": ["lm_head"]}))
    larger = replace(shapes, hidden=shapes.hidden * 2, heads=shapes.heads * 2, intermediate=shapes.intermediate * 2)
    smaller = replace(shapes, hidden=128, heads=2, kv_heads=2, intermediate=256, layers=2)
    write_adapter(folder / "larger", larger, base="other/base")
    write_adapter(folder / "smaller", smaller, base="other/base")
    write_adapter(folder / "no_weights", shapes)
    (folder / "no_weights" / "adapter_model.safetensors").unlink()
    write_adapter(folder / "no_config", shapes)
    (folder / "no_config" / "adapter_config.json").unlink()
    write_adapter(folder / "bad_config", shapes)
    (folder / "bad_config" / "adapter_config.json").write_text("{not json")
    weights = write_adapter(folder / "truncated", shapes) / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
