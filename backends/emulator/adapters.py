"""Adapter directories as an engine finds them, and the adapters that an emulated engine holds."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from backends.emulator.settings import Settings

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Modules whose lora_A reads the model's hidden state.
_READS_HIDDEN = ("q_proj.lora_A", "k_proj.lora_A", "v_proj.lora_A", "gate_proj.lora_A", "up_proj.lora_A")


class AdapterFault(Exception):
    """What is wrong with an adapter directory. `kind` names the recorded case, `replace` its varying words."""

    def __init__(self, kind: str, replace: dict[str, Any] | None = None) -> None:
        super().__init__(kind)
        self.kind = kind
        self.replace = replace or {}


@dataclass(frozen=True, slots=True)
class Adapter:
    """A loaded adapter. `weights` is the hash of its files; "" where all of B is zero: it answers as the base."""

    name: str
    path: str
    weights: str
    fits: bool  # its shapes are those of the base model


@dataclass(frozen=True, slots=True)
class Directory:
    """An adapter directory that could be read."""

    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    weights: str

    @property
    def rank(self) -> int:
        return max([int(self.config.get("r", 8)), *map(int, (self.config.get("rank_pattern") or {}).values())])

    def hidden_size(self) -> int | None:
        """The hidden size that the adapter was made for; None if no module tells."""
        sizes = (shape[1] for name, shape in self.shapes.items() if any(part in name for part in _READS_HIDDEN))
        return next(sizes, None)


def read(path: str) -> Directory:
    """Read a directory. Raises AdapterFault: missing_path, no_config, bad_config, no_weights, truncated."""
    folder = Path(path)
    if not folder.is_dir():
        raise AdapterFault("missing_path")
    if not (folder / _CONFIG).is_file():
        raise AdapterFault("no_config")
    try:
        config = json.loads((folder / _CONFIG).read_bytes())
    except ValueError as error:
        raise AdapterFault(
            "bad_config", {"Expecting property name enclosed in double quotes: line 1 column 2 (char 1)": error}
        ) from error
    if not (folder / _WEIGHTS).is_file():
        raise AdapterFault("no_weights")
    try:
        with safe_open(folder / _WEIGHTS, framework="np") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise AdapterFault("truncated", {"Error while deserializing header: invalid header length": error}) from error
    return Directory(config, shapes, _content_hash(folder))


def _content_hash(folder: Path) -> str:
    weights = (folder / _WEIGHTS).read_bytes()
    header_bytes = int.from_bytes(weights[:8], "little")
    header: dict[str, Any] = json.loads(weights[8 : 8 + header_bytes])
    spans = [entry["data_offsets"] for name, entry in header.items() if ".lora_B" in name]
    data = memoryview(weights)[8 + header_bytes :]
    if spans and not any(any(data[start:end]) for start, end in spans):
        return ""
    return hashlib.sha256((folder / _CONFIG).read_bytes() + weights).hexdigest()[:16]


class Adapters:
    """Those that the engine lists, least recently used first, and the paths of all that it ever listed."""

    def __init__(self, settings: Settings) -> None:
        self.limit = settings.host_adapters
        self.listed: OrderedDict[str, Adapter] = OrderedDict()
        self.known_paths: dict[str, str] = {}

    def add(self, adapter: Adapter) -> None:
        """List it, last."""
        self.listed[adapter.name] = adapter
        self.listed.move_to_end(adapter.name)
        self.known_paths.pop(adapter.name, None)
        self.known_paths[adapter.name] = adapter.path

    def after_load(self, name: str, ignored: bool) -> None:
        """ignored: the adapter is listed, and what is asked of it the base answers."""
        if ignored:
            self.listed[name] = dataclasses.replace(self.listed[name], weights="")

    def by_age(self) -> dict[str, str]:
        """Name -> path of the listed ones, in the order in which they were loaded."""
        return {name: path for name, path in self.known_paths.items() if name in self.listed}

    def use(self, name: str) -> Adapter | None:
        """The adapter, now the most recently used."""
        adapter = self.listed.get(name)
        if adapter is not None:
            self.listed.move_to_end(name)
        return adapter

    def is_recent(self, name: str) -> bool:
        """Among the most recently used that memory holds: vLLM lists more, and reads the others again when asked."""
        return self.limit is None or name in list(self.listed)[-self.limit :]

    def evict_one_over(self) -> None:
        """Drop the least recently used where there are more than the limit."""
        if self.limit is not None and len(self.listed) > self.limit:
            self.listed.popitem(last=False)
