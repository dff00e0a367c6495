"""What the table's stages do: each finds its models, and hands them to a module that is imported only then."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from backends.spec import BackendName
from scripts.gpu_suite.report import Report
from scripts.gpu_suite.serving import Engine
from scripts.gpu_suite.stages import FORMS, Options

_ADAPTERS = 64


def engine_of(options: Options, name: BackendName, share: float | None = None) -> Engine:
    """The engine with this run's flags for it, and the share of the GPU that its stage has."""
    flags = tuple(flag for given, flag in options.flags if given == name)
    return Engine(name, options.device, flags, options.share if share is None else share)


def oracle(report: Report, options: Options, out: Path) -> None:
    """Adapters for the demo model, and what peft answers."""
    made = options.made("oracle")
    if not (made / "done").exists():
        with report.check("peft's answers"):
            shutil.rmtree(made, ignore_errors=True)
            made.parent.mkdir(parents=True, exist_ok=True)
            _torch(options, "demo", options.demo, made)
            (made / "done").touch()
    with report.check("they are there"):
        assert (made / "expected.json").exists(), made


def weights(report: Report, options: Options, out: Path) -> None:
    """Random weights in the shape of the bench, and adapters for them."""
    base = options.made(options.bench_shape)
    with report.check(f"random weights, {options.bench_shape}"):
        _torch(options, "random", options.bench_shape, options.demo, base)
    with report.check(f"{_ADAPTERS} random adapters"):
        _torch(options, "lora", base, options.made(f"{options.bench_shape}-lora"), _ADAPTERS)


def packed_weights(report: Report, options: Options, out: Path) -> None:
    """The same shape in 4 bits: as fast as a real one, and no more use than that."""
    for form in FORMS:
        with report.check(f"random {form} weights, {options.bench_shape}"):
            made = options.made(f"{options.bench_shape}-{form}")
            _torch(options, "packed", options.bench_shape, options.demo, made, form)


def small(report: Report, options: Options, out: Path) -> None:
    """A random model that fits every engine's fast kernels, and its answers."""
    made = options.made("small")
    with report.check("random model and its answers"):
        _torch(options, "random", "small", options.demo, made)
        _torch(options, "expect", made, made.with_suffix(".json"))


def checkpoint(form: str, report: Report, options: Options, out: Path) -> None:
    """What our quantizer makes of that model."""
    with report.check(f"{form} of the random model"):
        _quantize(options, options.made("small"), options.made(f"small-{form}"), form, 128)


def checkpoint_of_demo(report: Report, options: Options, out: Path) -> None:
    """The demo model in 4 bits, in groups of 64: its width allows no more."""
    with report.check("awq of the demo model"):
        _quantize(options, options.demo, options.made("demo-awq"), "awq", 64)


def main(engine: BackendName, report: Report, options: Options, out: Path) -> None:
    """The main job with the demo model."""
    from scripts.gpu_suite.main_job import main_job

    main_job(report, engine_of(options, engine), options.demo, options.made("oracle"), out)


def quantized(engine: BackendName, form: str, report: Report, options: Options, out: Path, *, of_demo: bool) -> None:
    """One of our quantized checkpoints. The demo model is too narrow for the engines' fast kernels."""
    from scripts.gpu_suite.quantized import FAST_KERNELS, quantized_job

    checkpoint = options.made("demo-awq" if of_demo else f"small-{form}")
    must_name = "" if of_demo else FAST_KERNELS.get(engine, "")
    quantized_job(report, engine_of(options, engine), checkpoint, form, out, must_name)


def bench(engine: BackendName, form: str, report: Report, options: Options, out: Path) -> None:
    """The table of one engine, on random weights; `form`: see `bench_job.points`."""
    from scripts.gpu_suite import bench_job

    shape = options.bench_shape
    report.figures["shape"] = shape
    packed = form in FORMS
    loras = [] if packed else sorted(options.made(f"{shape}-lora").glob("a*"), key=lambda path: int(path.name[1:]))

    def asked(point: object) -> bool:
        return not options.points or bool({str(point), f"{report.stage}:{point}"} & set(options.points))

    points = list(filter(asked, bench_job.points(engine, form)))
    if not points:
        raise LookupError(f"none of its points is among {', '.join(options.points)}")
    model = options.made(f"{shape}-{form}" if packed else shape)
    swap = asked(bench_job.SWAP)
    bench_job.bench_job(report, engine_of(options, engine), model, loras, points, out, swap=swap)


def switch(engines: Sequence[BackendName], report: Report, options: Options, out: Path) -> None:
    """From engine to engine under load."""
    from scripts.gpu_suite.switch_job import switch_job

    chosen = [engine_of(options, name, options.share / len(engines)) for name in engines]  # all side by side
    switch_job(report, chosen, options.demo, options.made("oracle"), out)


def parallel(engine: BackendName, report: Report, options: Options, out: Path) -> None:
    """One engine on two GPUs, with the small model."""
    from scripts.gpu_suite.parallel_job import parallel_job

    small = options.made("small")
    parallel_job(report, engine_of(options, engine), small, small.with_suffix(".json"), out)


def parallel_bench(engine: BackendName, report: Report, options: Options, out: Path) -> None:
    """One engine on two GPUs, two points of the table."""
    from scripts.gpu_suite.parallel_job import parallel_points

    parallel_points(report, engine_of(options, engine), options.made(options.bench_shape), out)


def record(engine: BackendName, report: Report, options: Options, out: Path) -> None:
    """What the engine answers, for the emulators."""
    from scripts.gpu_suite.record_job import record_job

    record_job(report, engine_of(options, engine), options.demo, out)


def _quantize(options: Options, model: Path, out: Path, form: str, group_size: int) -> None:
    """By our own command, then what the result must answer, into OUT.json. Raises CalledProcessError."""
    if not out.exists():
        command = [options.torch_python, "-m", "quant", "--method", form, "--format", form, "--model", str(model)]
        command += ["--out", str(out), "--group-size", str(group_size), "--calib-samples", "32"]
        subprocess.run(command, check=True)
    _torch(options, "expect", out, out.with_suffix(".json"))


def _torch(options: Options, *arguments: object) -> None:
    command = [options.torch_python, "-m", "scripts.gpu_suite.torch_side", *map(str, arguments)]
    subprocess.run(command, check=True)
