"""Tokens a second, MFU and peak memory of LoRA training steps on a GPU: ours, or a peer's on the same shape.

    python -m tests.proofs.train_speed [--trainer NAME] [--rows full|conversations] [--compile] [--four-bit]
    torchrun --nproc-per-node 2 -m tests.proofs.train_speed --parallel ddp|fsdp

A Qwen3-8B-shaped model with random weights; rank 16 on all linear layers, bfloat16, fused AdamW. Rows are full
(sequences of 4096 random tokens without padding, one forward pass a step) or conversations of 20 to 600 words as they
come in practice, 128 a step: ours packs them, peers pad them (16 to a forward pass), or pack them with --pack. Loss on
every token. Speed is of the steps after the warm-up, in tokens that are no padding; the device is waited for at both
ends only. MFU counts 4 operations a weight and token: attention is left out. Each trainer is a process of its own; a
peer's runs in its own Python.
"""

from __future__ import annotations

import argparse
import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from tests.proofs.train_speed.clock import Speed
from tests.proofs.train_speed.shape import CONVERSATIONS, FULL, multiplied_weights

_PEAK_FLOPS = 989e12  # of an H100 or H200, dense bfloat16
_PACKAGES = {
    "ours": ("torch", "transformers"),
    "trl": ("torch", "transformers", "trl", "peft"),
    "trl-liger": ("torch", "transformers", "trl", "peft", "liger_kernel"),
    "unsloth": ("torch", "transformers", "unsloth", "trl", "peft"),
    "ms-swift": ("torch", "transformers", "ms_swift", "peft", "liger_kernel"),
}


def main() -> None:
    given = _arguments()
    torch.manual_seed(0)
    if given.trainer == "ours":
        from tests.proofs.train_speed import ours
        from trainer import ranks

        with ours.processes(given) as device:
            found = ours.speed(given, device)
            peaks = torch.zeros(ranks.count())
            peaks[ranks.rank()] = _peak_gb()
            processes, peaks_gb = ranks.count(), [round(float(peak), 2) for peak in ranks.total(peaks)]
            if ranks.is_first():
                report(given, found, processes, peaks_gb)
        return
    from tests.proofs.train_speed import peers

    found = peers.ms_swift(given) if given.trainer == "ms-swift" else peers.hugging_face(given)
    report(given, found, 1, [_peak_gb()])


def report(given: argparse.Namespace, speed: Speed, processes: int, peaks_gb: list[float]) -> None:
    """Print the figures; append them to the file asked for."""
    tokens_per_s = processes * speed.tokens_per_s
    figures: dict[str, Any] = {
        name: getattr(given, name)
        for name in ("trainer", "rows", "sequences", "tokens", "compile", "checkpointing", "four_bit", "pack",
                     "packing", "parallel")
    }  # fmt: skip
    figures |= {
        "processes": processes,
        "tokens_per_s": round(tokens_per_s),
        "mfu": round(4 * multiplied_weights(given) * tokens_per_s / processes / _PEAK_FLOPS, 4),
        "peak_gb": max(peaks_gb),
        "peaks_gb": peaks_gb,
        "first_step_s": round(speed.first_step_s, 2),
        "step_s": round(speed.step_s, 4),
        "tokens_of_all_steps": processes * speed.tokens,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": {name: _version(name) for name in _PACKAGES[given.trainer]},
    }
    line = json.dumps(figures)
    print(line, flush=True)
    if given.json:
        with given.json.open("a") as stream:
            stream.write(line + "\n")


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _peak_gb() -> float:
    return round(torch.cuda.max_memory_allocated() / 1e9, 2)  # 0 without CUDA


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainer", choices=_PACKAGES, default="ours")
    parser.add_argument("--rows", choices=[FULL, CONVERSATIONS], default=FULL)
    parser.add_argument("--sequences", type=int, default=2, help="full rows of a forward pass; its most tokens")
    parser.add_argument("--tokens", type=int, default=4096, help="of a full row")
    parser.add_argument("--batch", type=int, default=128, help="conversations of a step")
    parser.add_argument("--accumulation", type=int, default=8, help="forward passes of a step where they are padded")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warmup", type=int, default=3, help="steps that do not count")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--four-bit", action="store_true", help="the frozen layers in four bits (ours, unsloth)")
    parser.add_argument(
        "--no-packing", dest="packing", action="store_false", help="ours: a conversation a forward pass"
    )
    parser.add_argument("--pack", action="store_true", help="trl, unsloth: their own packing")
    parser.add_argument("--parallel", choices=["none", "ddp", "fsdp"], default="none", help="ours, under torchrun")
    parser.add_argument("--checkpoint", type=Path, default=Path("/dev/shm/train-speed"),
                        help="where the random model is kept for trainers that load one; stays")  # fmt: skip
    parser.add_argument("--tiny", action="store_true", help="a shape for a machine without a GPU")
    parser.add_argument("--json", type=Path, help="append the figures to this file, one object a line")
    given = parser.parse_args()
    if not given.tiny and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; --tiny is for machines without one")
    return given


if __name__ == "__main__":
    main()
