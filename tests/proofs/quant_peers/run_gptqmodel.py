"""GPTQModel, started by its own Python with a JSON job as the argument; writes what it took to OUT.json."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from transformers.utils import is_torchvision_available

if len(os.sched_getaffinity(0)) <= 2:
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # its own choice is then one, with which it does not start
if not is_torchvision_available():  # imported for a vision model that is not used here, and not among its requirements
    for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional"):
        sys.modules[name] = ModuleType(name)
    sys.modules["torchvision"].transforms = sys.modules["torchvision.transforms"]
    sys.modules["torchvision.transforms.functional"].InterpolationMode = None

from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.utils.cpp import load_pack_block_extension


def settings(job: dict[str, Any]) -> dict[str, Any]:
    """Its configuration for a job."""
    # Kept in memory, which its default spills to the disk for the sake of models larger than these.
    common = {"bits": 4, "group_size": job["group_size"], "device": job["device"], "offload_to_disk": False}
    if job["method"] == "awq":
        return common | {"method": "awq", "format": "gemm", "sym": False}
    # desc_act False with act_group_aware, its default, is the order by activations that engines can load.
    return common | {"sym": True, "desc_act": False, "mse": job["mse"]}


def main() -> None:
    job = json.loads(sys.argv[1])
    rows = json.loads(Path(job["tokens"]).read_text())
    model = GPTQModel.load(job["model"], QuantizeConfig(**settings(job)))
    load_pack_block_extension()  # compiled once a machine: not a job's time
    # Its kernel for AWQ would be compiled for CUDA first, and only holds what was packed.
    backend = BACKEND.AWQ_TORCH if job["method"] == "awq" else BACKEND.AUTO
    started, started_cpu = time.monotonic(), time.process_time()
    calibration = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows]
    model.quantize(calibration, batch_size=8, backend=backend)
    figures = {"quantize_s": time.monotonic() - started, "quantize_cpu_s": time.process_time() - started_cpu}
    if job["device"] == "cuda":
        figures["device_gb"] = torch.cuda.max_memory_allocated() / 1e9
    model.save(job["out"])
    Path(job["out"] + ".json").write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
