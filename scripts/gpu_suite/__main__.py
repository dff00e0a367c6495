"""Run stages on all GPUs of the machine: `python -m scripts.gpu_suite --out DIR [STAGE ...]`.

Without names all stages run, in the order of the table (--list prints it); with names these, in the order given, and
those that they come after. Each is a process of its own, which sees only its GPUs (those of the NVIDIA driver, or of
CUDA_VISIBLE_DEVICES); stages that only check share one, those that measure have theirs to themselves. Where there is
one GPU, those of the bench start side by side on it, and measure in turn while nothing else is busy there.
DIR/STAGE.log holds what a stage printed, DIR/STAGE/ its files, DIR/made/ what stages make for others, and
DIR/results.json everything that is known, rewritten whenever that changes. A stage with a DIR/STAGE.json is through
and is run again only with --again.

With --until, stages wait for engines and models that are still being brought to the machine, in the first four minutes
with whole GPUs kept for them, and one whose estimate would end later is not begun; without it, what is not there is
named as not run. SIGTERM ends everything.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from scripts.gpu_suite import machine, table
from scripts.gpu_suite.runner import Suite, lacks
from scripts.gpu_suite.stages import Options


def main() -> int:
    """Exit status 0 when every stage asked for passed."""
    arguments = _arguments()
    options = Options(
        out=arguments.out.resolve(), model=arguments.model, torch_python=arguments.torch_python,
        device=arguments.device, flags=tuple(arguments.flag), bench_shape=arguments.bench_shape,
        points=tuple(arguments.points), text=arguments.text and arguments.text.resolve(),
        peer_pythons=dict(arguments.peer_python),
    )  # fmt: skip
    found = machine.gpus() if options.device == "cuda" else []
    if found:
        options = replace(options, gpus=len(found), gpu_bytes=min(gpu.memory_bytes for gpu in found))
    known = table.stages(options)
    for part, why in known.broken.items():
        print(f"{part} is left out: {why}", flush=True)
    try:
        wanted = known.wanted(arguments.stage)
    except LookupError as error:
        sys.exit(str(error.args[0]))
    if arguments.list:
        for stage in wanted:
            after = f" after {', '.join(stage.after)}" if stage.after else ""
            print(f"{stage.name}: {stage.gpus} x {stage.share:g} GPU, {stage.estimate_s:g} s{after} "
                  f"{lacks(stage, options)}")  # fmt: skip
        return 0
    if options.device == "cuda" and not found:
        sys.exit("the NVIDIA driver lists no GPU that CUDA_VISIBLE_DEVICES allows; use --device cpu")
    options.out.mkdir(parents=True, exist_ok=True)
    if arguments.again:
        for stage in wanted if not arguments.stage else [known.stages[name] for name in arguments.stage]:
            (options.out / f"{stage.name}.json").unlink(missing_ok=True)
    facts = machine.facts(options.torch_python, found) | ({"left out": known.broken} if known.broken else {})
    names = [gpu.index for gpu in found] or [""]
    return 0 if Suite(wanted, options, names, arguments.until, facts).run() else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m scripts.gpu_suite", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("stage", nargs="*", help="which stages; all without a name")
    parser.add_argument("--out", type=Path, required=True, help="results, logs, and what the stages make")
    parser.add_argument("--until", type=float, metavar="SECONDS", help="from now: begin nothing that would end later")
    parser.add_argument("--list", action="store_true", help="print the stages, and what they wait for, and end")
    parser.add_argument("--again", action="store_true", help="run stages again that have a result")
    parser.add_argument("--model", default="demo", help="the demo model: its name or directory")
    parser.add_argument(
        "--torch-python", default=".venv-torch/bin/python", help="a Python with torch, transformers, peft"
    )
    parser.add_argument("--peer-python", action="append", default=[], type=_peer, metavar="NAME=PATH",
                        help="the Python of a tool that ours is measured beside; repeatable")  # fmt: skip
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--flag", action="append", default=[], type=lambda text: tuple(text.split(":", 1)),
                        metavar="ENGINE:FLAG", help="a flag of `gateway serve` for one engine")  # fmt: skip
    parser.add_argument("--bench-shape", default="qwen3-8b", help="of the random weights: qwen3-8b, qwen3-1.7b, tiny")
    parser.add_argument("--points", nargs="*", default=[],
                        help="only these points of the table, such as c64 bench-vllm:c64-8lora; "
                             "swap, beside one with adapters, is the swap under load")  # fmt: skip
    parser.add_argument("--text", type=Path, help="a text file that perplexity is taken on")
    return parser.parse_args()


def _peer(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PATH")
    return name, Path(path).expanduser().absolute()


if __name__ == "__main__":
    sys.exit(main())
