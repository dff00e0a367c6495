"""GPTQModel on the CPU, started by its own Python with a JSON job as the argument; writes seconds to OUT.json."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from types import ModuleType

from transformers.utils import is_torchvision_available

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # its own choice on two cores is one, with which it does not start
if not is_torchvision_available():  # imported for a vision model that is not used here, and not among its requirements
    for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional"):
        sys.modules[name] = ModuleType(name)
    sys.modules["torchvision"].transforms = sys.modules["torchvision.transforms"]
    sys.modules["torchvision.transforms.functional"].InterpolationMode = None

from gptqmodel import GPTQModel, QuantizeConfig


def main() -> None:
    job = json.loads(sys.argv[1])
    rows = json.loads(Path(job["tokens"]).read_text())
    # desc_act False with act_group_aware, its default, is the order by activations that engines can load.
    settings = QuantizeConfig(
        bits=4, group_size=job["group_size"], sym=True, desc_act=False, mse=job["mse"], offload_to_disk=False
    )
    model = GPTQModel.load(job["model"], settings, device="cpu")
    started, started_cpu = time.monotonic(), time.process_time()
    calibration = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows]
    model.quantize(calibration, batch_size=8)
    figures = {"quantize_s": time.monotonic() - started, "quantize_cpu_s": time.process_time() - started_cpu}
    model.save(job["out"])
    Path(job["out"] + ".json").write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
