"""Runs where torch lives: quantizes a model once, in all formats, and computes what its dequantized weights say.

    python quantized_oracle.py MODEL_DIR OUT_DIR

OUT_DIR gets a checkpoint a format, and `expected.json`: {"sequences": token ids, "perplexity": of them, in float32}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from quant.calib import calibration_tokens
from quant.config import FORMATS, Grid, QuantOptions
from quant.convert import convert
from quant.evaluate import evaluate
from quant.walk import quantize_checkpoint


def main(model_dir: Path, out_dir: Path) -> None:
    grid = Grid(group_size=64, symmetric=True)
    options = QuantOptions(model=model_dir, format="gptq", grid=grid, calib_samples=0, device="cpu")
    quantize_checkpoint(options, out_dir / "gptq", lambda step: None)
    for form in FORMATS:
        if form != "gptq":
            convert(out_dir / "gptq", form, out_dir / form)  # exact: all three hold the same weights
    tokens_BT = calibration_tokens(model_dir, None, 2, 256, seed=5)
    quality = evaluate(model_dir, out_dir / "gptq", tokens_BT, torch.device("cpu"))
    expected = {"sequences": tokens_BT.tolist(), "perplexity": quality.perplexity}
    (out_dir / "expected.json").write_text(json.dumps(expected))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
