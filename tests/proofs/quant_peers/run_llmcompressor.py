"""llm-compressor, started by its own Python with a JSON job as the argument; writes what it took to OUT.json."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer


def recipe(job: dict[str, Any]) -> list[Any]:
    """The modifiers for a job: GPTQ on a symmetric grid, or AWQ with zero points."""
    weights: dict[str, Any] = {
        "num_bits": 4,
        "type": "int",
        "symmetric": job["method"] == "gptq",
        "strategy": "group",
        "group_size": job["group_size"],
    }
    if job["observer"]:
        weights["observer"] = job["observer"]
    what = {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}, "ignore": ["lm_head"]}
    if job["method"] == "gptq":
        return [GPTQModifier(**what)]
    return [AWQModifier(), QuantizationModifier(**what)]


def main() -> None:
    job = json.loads(sys.argv[1])
    if not torch.accelerator.is_available():
        # Its AWQ pins memory, which torch refuses where there is no accelerator to pin it for.
        torch.Tensor.pin_memory = lambda tensor: tensor
    rows = torch.tensor(json.loads(Path(job["tokens"]).read_text()))
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype="auto")
    calibration = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows]
    started, started_cpu = time.monotonic(), time.process_time()
    oneshot(
        model=model,
        tokenizer=AutoTokenizer.from_pretrained(job["model"]),
        dataset=DataLoader(calibration, batch_size=8),
        recipe=recipe(job),
        num_calibration_samples=len(calibration),
        max_seq_length=rows.shape[1],
    )
    figures = {"quantize_s": time.monotonic() - started, "quantize_cpu_s": time.process_time() - started_cpu}
    if job["device"] == "cuda":  # which it takes by itself where there is one
        figures["device_gb"] = torch.cuda.max_memory_allocated() / 1e9
    model.save_pretrained(job["out"], save_compressed=True)
    Path(job["out"] + ".json").write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
