"""Sums as prompts with their answer: `python make_data.py` writes data/train.jsonl and data/eval.jsonl."""

from __future__ import annotations

import json
import random
from pathlib import Path


def main(directory: Path) -> None:
    pairs = [(a, b) for a in range(1, 13) for b in range(1, 13)]
    random.Random(0).shuffle(pairs)
    directory.mkdir(exist_ok=True)
    for name, part in (("eval", pairs[:24]), ("train", pairs[24:])):
        rows = [{"prompt": f"{a} + {b} = ? Reply with the number only.", "sum": a + b} for a, b in part]
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main(Path(__file__).with_name("data"))
