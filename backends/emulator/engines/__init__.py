"""One file for each engine, over what they share."""

from __future__ import annotations

from backends.emulator.engines.base import Engine
from backends.emulator.engines.lmdeploy import Lmdeploy
from backends.emulator.engines.sglang import Sglang
from backends.emulator.engines.vllm import Vllm

ENGINES: dict[str, type[Engine]] = {"vllm": Vllm, "sglang": Sglang, "lmdeploy": Lmdeploy}
