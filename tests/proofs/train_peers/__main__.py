"""Fine-tune the demo model with this trainer, TRL and ms-swift: the same rows, batches, LoRA and precision, on the CPU.

    python -m tests.proofs.train_peers --out FOLDER [--layers N] [--steps 12] [--threads N] [TOOL ...]

Runs in an environment with torch (`.venv-torch`). Rows are conversations of 20 to 600 words, as they come in practice,
so that padding costs something. Each tool is a process of its own and runs twice: for two optimizer steps, and for
STEPS more. What the second run costs more is the steps' own: CPU seconds of the process tree, and wall seconds.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from quant.calib import BUNDLED
from quant.cli import find_model
from tests.proofs.cost import Cost, run
from tests.proofs.environments import NotHere, environment, versions
from tests.proofs.quant_peers.__main__ import cut_model, machine
from tests.proofs.train_peers.rows import answer_words

_RANK, _BATCH, _MAX_LENGTH, _WARM = 16, 8, 1024, 2
_COMMON = ("torch==2.13.0",)
_TRL = ("trl==1.16.0", "peft==0.21.2", "transformers==5.19.0", "datasets==5.2.0", "accelerate==1.15.0", *_COMMON)
_SWIFT = ("ms-swift==4.6.0", *_COMMON)


@dataclass(frozen=True)
class Tool:
    """A row of the table. command: of a run over `data` into `out`. Raises NotHere."""

    title: str
    command: Callable[[Path, Path, Path], list[str]]


def ours(*flags: str) -> Callable[[Path, Path, Path], list[str]]:
    """This trainer, with these flags."""

    def command(model: Path, data: Path, out: Path) -> list[str]:
        return [
            sys.executable, "-m", "trainer", "sft", "--model", str(model), "--dataset", str(data),
            "--output-dir", str(out), "--batch-size", str(_BATCH), "--epochs", "1",
            "--max-length", str(_MAX_LENGTH), "--learning-rate", "1e-4",
            "--lora-rank", str(_RANK), "--golden-prompts", "0", "--device", "cpu", "--dtype", "float32", *flags,
        ]  # fmt: skip

    return command


def trl(model: Path, data: Path, out: Path) -> list[str]:
    """TRL, which pads the rows of a batch to its longest."""
    job = {"model": str(model), "data": str(data), "out": str(out), "rank": _RANK, "batch": _BATCH}
    python = environment("tunegate-train-peers/trl", _TRL) / "bin/python"
    return [str(python), str(Path(__file__).with_name("run_trl.py")), json.dumps(job | {"max_length": _MAX_LENGTH})]


def swift(model: Path, data: Path, out: Path) -> list[str]:
    """ms-swift, which pads likewise."""
    settings = {
        "model": model, "model_type": "llama", "template": "chatml", "tuner_type": "lora", "dataset": data,
        "torch_dtype": "float32", "num_train_epochs": 1, "per_device_train_batch_size": _BATCH,
        "gradient_accumulation_steps": 1, "learning_rate": 1e-4, "lora_rank": _RANK, "lora_alpha": 2 * _RANK,
        "target_modules": "all-linear", "max_length": _MAX_LENGTH, "output_dir": out, "use_cpu": "true",
        "dataset_num_proc": 1, "save_strategy": "no", "report_to": "none", "gradient_checkpointing": "false",
        "split_dataset_ratio": 0, "use_hf": "true",
    }  # fmt: skip
    program = environment("tunegate-train-peers/ms-swift", _SWIFT) / "bin/swift"
    return [str(program), "sft", *(part for name, value in settings.items() for part in (f"--{name}", str(value)))]


TOOLS = {
    "ours": Tool("Tunegate, packed rows", ours("--micro-batch-tokens", "2048")),
    "ours-unpacked": Tool("Tunegate, one example a row (`--no-packing`)", ours("--no-packing")),
    "trl": Tool("TRL + peft, padded", trl),
    "ms-swift": Tool("ms-swift, padded", swift),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tools", nargs="*", metavar="TOOL", help=f"default: all of {', '.join(TOOLS)}")
    parser.add_argument("--out", type=Path, required=True, help="folder for everything; must not exist")
    parser.add_argument("--model", default="demo", help="checkpoint directory, or the name of a pulled model")
    parser.add_argument("--layers", type=int, help="cut the model to so many layers")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what was started is ended
    unknown = sorted(set(given.tools) - set(TOOLS))
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; allowed: {', '.join(TOOLS)}")
    given.out.mkdir(parents=True)
    model = find_model(given.model)
    if given.layers:
        model = cut_model(model, given.layers, given.out / "cut")
    counts = {"short": _WARM, "long": _WARM + given.steps}
    rows = list(conversations(_BATCH * max(counts.values())))
    for name, steps in counts.items():
        lines = [json.dumps(row) + "\n" for row in rows[: _BATCH * steps]]
        (given.out / f"{name}.jsonl").write_text("".join(lines))
    tokens = tokens_of(model, rows[_BATCH * _WARM :])
    print(f"{machine()}; {given.threads} threads; {given.steps} steps of {_BATCH} rows, {tokens} tokens", flush=True)
    environment_of = {"OMP_NUM_THREADS": str(given.threads), "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    for name in given.tools or TOOLS:
        tool = TOOLS[name]
        try:
            costs = {
                part: cost_of(
                    tool.command(model, given.out / f"{part}.jsonl", given.out / f"{name}-{part}"),
                    given.out / f"{name}-{part}.log",
                    environment_of,
                )
                for part in counts
            }
        except (NotHere, RuntimeError) as error:
            print(f"| {tool.title} | {error} |", flush=True)
            continue
        cpu_s, wall_s = (getattr(costs["long"], what) - getattr(costs["short"], what) for what in ("cpu_s", "wall_s"))
        print(
            f"| {tool.title} | {cpu_s:.1f} | {tokens / cpu_s:.0f} | {tokens / wall_s:.0f} | "
            f"{costs['long'].peak_bytes / 1e9:.1f} |",
            flush=True,
        )
    print(json.dumps({"ours": versions(sys.executable, ["torch", "transformers"])}))


def conversations(count: int) -> Iterator[dict[str, Any]]:
    """Questions with answers of 20 to 600 words, always the same."""
    with gzip.open(BUNDLED, "rt", encoding="utf-8") as lines:
        words = " ".join(json.loads(line).get("text", "") for line in lines).split()
    rng = np.random.default_rng(1)
    for length in answer_words(count):
        at = int(rng.integers(0, len(words) - length))
        answer = " ".join(words[at : at + length])
        yield {"messages": [{"role": "user", "content": "Go on."}, {"role": "assistant", "content": answer}]}


def tokens_of(model: Path, rows: list[dict[str, Any]]) -> int:
    """How many tokens these conversations have."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    return sum(len(tokenizer.apply_chat_template(row["messages"], return_dict=True)["input_ids"]) for row in rows)


def cost_of(command: list[str], log: Path, environment: dict[str, str]) -> Cost:
    """Raises RuntimeError where the command fails."""
    cost = run(command, log, environment)
    if cost.exit_code:
        raise RuntimeError(f"exit status {cost.exit_code}: {log.read_text(errors='replace')[-300:]}")
    return cost


if __name__ == "__main__":
    main()
