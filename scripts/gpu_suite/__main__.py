"""Run stages: `python -m scripts.gpu_suite --out DIR [STAGE ...]`; without names, all of them.

A stage writes DIR/STAGE.json when it is through and is not run again unless --again says so; DIR/results.json holds
all of them.
Stages that only check may run side by side, as several commands; those that measure wait until they have the GPU alone.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from backends.spec import BACKEND_NAMES, BackendName
from gateway import models
from scripts.gpu_suite.bench_job import Point, bench_job
from scripts.gpu_suite.main_job import main_job
from scripts.gpu_suite.quantized import FAST_KERNELS, make, quantized_job
from scripts.gpu_suite.report import Report
from scripts.gpu_suite.serving import Engine

_BASE_POINTS = [Point(64, 12), Point(1, 10), Point(256, 24), Point(16, 10)]
_ADAPTER_POINTS = [Point(64, 12, 1), Point(64, 8, 8)]
_RUNTIME_LORA = ("vllm", "sglang")


class Suite:
    """The stages by name, and where they keep their things."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.out: Path = options.out
        self.stages: dict[str, Callable[[Report], None]] = {
            "oracle": self.oracle,
            "checkpoints": self.checkpoints,
            "checkpoint-demo": self.checkpoint_of_demo,
        }
        for name in BACKEND_NAMES:
            self.stages[f"main-{name}"] = partial(self.main, name)
            for form in ("awq", "gptq"):
                self.stages[f"quant-{name}-{form}"] = partial(self.quant, name, form, False)
            self.stages[f"bench-{name}"] = partial(self.bench, name, False)
        self.stages["quant-vllm-demo"] = partial(self.quant, "vllm", "awq", True)
        self.stages["bench-vllm-awq"] = partial(self.bench, "vllm", True)

    # -- stages

    def oracle(self, report: Report) -> None:
        """Adapters for the demo model, and what peft answers."""
        with report.check("peft's answers"):
            self._torch("demo", self.demo, self.made("oracle"))

    def checkpoints(self, report: Report) -> None:
        """A small random model that fits every engine's fast kernels, and what our quantizer makes of it."""
        with report.check("random model"):
            self._torch("random", "small", self.demo, self.made("small"))
        for form in ("awq", "gptq"):
            with report.check(f"{form} of the random model"):
                make(self.options.torch_python, self.made("small"), self.made(f"small-{form}"), form, form, 128)

    def checkpoint_of_demo(self, report: Report) -> None:
        """The demo model in 4 bits, in groups of 64: its width allows no more."""
        with report.check("awq of the demo model"):
            make(self.options.torch_python, self.demo, self.made("demo-awq"), "awq", "awq", 64)

    def main(self, engine: BackendName, report: Report) -> None:
        """The main job with the demo model."""
        main_job(report, self.engine(engine), self.demo, self.made("oracle"), self.work(report))

    def quant(self, engine: BackendName, form: str, of_demo: bool, report: Report) -> None:
        """One of our quantized checkpoints. The demo model is too narrow for the engines' fast kernels."""
        checkpoint = self.made("demo-awq" if of_demo else f"small-{form}")
        must_name = "" if of_demo else FAST_KERNELS.get(engine, "")
        quantized_job(report, self.engine(engine), checkpoint, form, self.work(report), must_name)

    def bench(self, engine: BackendName, packed: bool, report: Report) -> None:
        """The table of one engine, on random weights."""
        shape = self.options.bench_shape
        base, loras = self.made(shape), self.made(f"{shape}-lora")
        model = self.made(f"{shape}-awq") if packed else base
        with report.check("random weights"), self._gpu(shared=True):
            if packed:
                self._torch("packed", shape, self.demo, model)
            else:
                self._torch("random", shape, self.demo, base)
                if engine in _RUNTIME_LORA:
                    self._torch("lora", base, loras, "8")
        report.figures["shape"] = shape
        points = [Point(1, 10), Point(64, 12)] if packed else list(_BASE_POINTS)
        if engine in _RUNTIME_LORA and not packed:
            points += _ADAPTER_POINTS
        if self.options.points:
            points = [point for point in points if str(point) in self.options.points]
        with contextlib.ExitStack() as starting:
            starting.enter_context(self._gpu(shared=True))
            bench_job(report, self.engine(engine), model, sorted(loras.glob("a*")), points, self.work(report),
                      self._alone(starting))  # fmt: skip

    # -- what they share

    @property
    def demo(self) -> Path:
        """The demo model's directory."""
        return models.resolve(self.options.model)

    def made(self, name: str) -> Path:
        """Where a thing lies that stages make once."""
        return self.out / "made" / name

    def work(self, report: Report) -> Path:
        """A stage's own directory, emptied."""
        folder = self.out / report.stage
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def engine(self, name: BackendName) -> Engine:
        """The engine with this run's extra flags for it."""
        flags = tuple(flag for given, flag in self.options.flag if given == name)
        return Engine(name, self.options.device, flags)

    def _torch(self, *arguments: object) -> None:
        out = next(argument for argument in reversed(arguments) if isinstance(argument, Path))
        if (out / "done").exists():
            return
        shutil.rmtree(out, ignore_errors=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        command = [self.options.torch_python, "-m", "scripts.gpu_suite.torch_side", *map(str, arguments)]
        subprocess.run(command, check=True)
        (out / "done").touch()

    @contextlib.contextmanager
    def _gpu(self, shared: bool) -> Iterator[None]:
        """Hold the GPU with others, or alone."""
        with (self.out / "gpu.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
            yield

    @contextlib.contextmanager
    def _alone(self, starting: contextlib.ExitStack) -> Iterator[None]:
        """Give up the shared hold, then have the GPU alone."""
        starting.close()
        with self._gpu(shared=False):
            yield

    def run(self, name: str) -> bool:
        """One stage; True when all its checks passed."""
        path = self.out / f"{name}.json"
        if path.exists() and not self.options.again:
            return bool(json.loads(path.read_text())["ok"])
        report = Report(name)
        sharing = contextlib.nullcontext() if name.startswith("bench") else self._gpu(shared=True)
        try:
            with sharing:
                self.stages[name](report)
        except Exception as error:  # the other stages are still worth their time
            (self.out / f"{name}.crash.txt").write_text(traceback.format_exc())
            with report.check("the stage ran to its end"):
                raise AssertionError(f"{type(error).__name__}: {error}") from error
        report.save(path)
        return not report.failures


def main() -> int:
    """Exit status 0 when every check of the stages asked for passed."""
    options = _options()
    options.out.mkdir(parents=True, exist_ok=True)
    suite = Suite(options)
    if unknown := set(options.stage) - set(suite.stages):
        sys.exit(f"no stage is called {', '.join(sorted(unknown))}; there are {', '.join(suite.stages)}")
    passed = [suite.run(name) for name in options.stage or suite.stages]
    results = {
        path.stem: json.loads(path.read_text())
        for path in sorted(options.out.glob("*.json"))
        if path.stem in suite.stages
    }
    (options.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    return 0 if all(passed) else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m scripts.gpu_suite", description=__doc__)
    parser.add_argument("stage", nargs="*", help="which stages; all without a name")
    parser.add_argument("--out", type=Path, required=True, help="results, logs, and what the stages make")
    parser.add_argument("--model", default="demo", help="the demo model: its name or directory")
    parser.add_argument(
        "--torch-python", default=".venv-torch/bin/python", help="a Python with torch, transformers, peft"
    )
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--flag", action="append", default=[], type=lambda text: tuple(text.split(":", 1)),
                        metavar="ENGINE:FLAG", help="a flag of `gateway serve` for one engine")  # fmt: skip
    parser.add_argument("--bench-shape", default="qwen3-8b", help="of the random weights: qwen3-8b, qwen3-1.7b")
    parser.add_argument("--points", nargs="*", default=[], help="only these points of the table, such as c64 c64-8lora")
    parser.add_argument("--again", action="store_true", help="run stages again that have a result")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
