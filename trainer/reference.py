"""Golden prompts for an adapter that was trained elsewhere: written into its manifest.json, beside what is there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainer import config as configs
from trainer.checkpoint import write_whole
from trainer.errors import ModelError
from trainer.export import MANIFEST
from trainer.golden import golden_answers
from trainer.learner import Learner
from trainer.lora import LoraSettings, inject
from trainer.model import load_base
from trainer.peft_files import CONFIG, load_adapter


class _Given:
    """Prompts that are a user's messages, by number."""

    def __init__(self, tokenizer: Any, texts: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._texts = texts

    def __len__(self) -> int:
        return len(self._texts)

    def prompt_ids(self, example: int) -> np.ndarray:
        messages = [{"role": "user", "content": self._texts[example]}]
        encoded = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        return np.array(encoded["input_ids"], np.int32)


def write_goldens(model: str, adapter: Path, prompts: Sequence[str]) -> int:
    """Answer each prompt as a user's message with the adapter, and record it; how many answers were written.

    Raises ModelError, CheckpointError, OSError.
    """
    settings = _settings(adapter / CONFIG)
    # The settings of a run say how a model is loaded; this one trains nothing and leaves no output.
    run = configs.load("sft", None, {"model": model, "dataset": (adapter / CONFIG,), "output_dir": adapter})
    base = load_base(run)
    learner = Learner(base, inject(base.model, settings, torch.Generator()), weight_decay=0.0)
    assert learner.adapter is not None
    with torch.no_grad():
        load_adapter(learner.adapter, adapter)
    goldens = golden_answers(learner, _Given(base.tokenizer, prompts), len(prompts))
    path = adapter / MANIFEST
    before: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    dtype = str(base.dtype).removeprefix("torch.")
    write_whole(path, json.dumps({**before, "dtype": dtype, "golden": goldens}, indent=2))
    return len(goldens)


def _settings(file: Path) -> LoraSettings:
    """What peft's configuration says of the adapter. Raises ModelError, OSError."""
    values: dict[str, Any] = json.loads(file.read_text())
    if values.get("peft_type") != "LORA" or values.get("use_dora") or values.get("modules_to_save"):
        raise ModelError(f"{file} is not of a plain LoRA; only those have golden prompts")
    targets = values["target_modules"]
    return LoraSettings(
        rank=values["r"],
        alpha=float(values["lora_alpha"]),
        rank_stabilised=bool(values.get("use_rslora")),
        targets=(targets,) if isinstance(targets, str) else tuple(targets),
        rank_pattern=values.get("rank_pattern") or {},
        alpha_pattern=values.get("alpha_pattern") or {},
    )
