"""One engine over two GPUs: it answers right, an adapter too, and a stop leaves no process."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from scripts.gpu_suite import machine
from scripts.gpu_suite.bench_job import Point, in_short, measure
from scripts.gpu_suite.reference import Expected, as_reference
from scripts.gpu_suite.report import Report
from scripts.gpu_suite.serving import FAST_START, Engine, Served, greedy, serving, upload
from tests.support.gateway import command_line, descendants

_POINTS = (Point(64, 13.5, ramp_s=1), Point(1, 9))
_NO_MULTICAST = {
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NVSHMEM_DISABLE_NVLS": "1",
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
    "VLLM_ALLREDUCE_USE_FLASHINFER": "0",
}
# Their own all-reduce may go through multicast, and so may FlashInfer's, which vLLM fuses with the norm on Hopper;
# NCCL's does not, with the environment above.
_PLAIN_ALL_REDUCE = {
    "vllm": ("--disable-custom-all-reduce", '--compilation-config={"pass_config":{"fuse_allreduce_rms":false}}'),
    "sglang": ("--disable-custom-all-reduce",),
}
_HELD_BYTES = 256 << 20  # on a GPU: less is a CUDA context's
_STOP_S = 120.0


def parallel_job(report: Report, engine: Engine, model: Path, expected: Path, work: Path) -> None:
    """`--tp 2` with the small model."""
    answers: Expected = json.loads(expected.read_text())
    report.figures["environment"] = _NO_MULTICAST
    with serving(engine, model, work / "state", *flags(engine, small=True), name="base", env=_NO_MULTICAST) as served:
        report.figures |= {"ready_s": served.ready_s, "version": served.version()}
        print(f"{report.stage}: ready after {served.ready_s} s", flush=True)
        with report.check("both GPUs hold a part"):
            report.figures["held_bytes"] = held = used_bytes(descendants(served.gateway.process.pid))
            assert engine.device == "cpu" or (len(held) == 2 and min(held.values()) > _HELD_BYTES), held
        with report.check("the engine's processes have the environment"):
            _environment_passed(served)
        with report.check("answers as its weights do in float32"), served.client() as client:
            report.figures["sure_tokens"] = as_reference(client, "base", answers["base"])
        adapter = expected.with_name(f"{expected.stem}-adapter")
        if adapter.exists():
            with report.check("an adapter answers as peft does, and not as the base"):
                _adapter(report, served, adapter, answers)
        _stop(report, served)


def parallel_points(report: Report, engine: Engine, big: Path, work: Path) -> None:
    """`--tp 2` with the table's model: two of its points."""
    with serving(engine, big, work / "big", *flags(engine, small=False), name="base", env=_NO_MULTICAST) as served:
        report.figures |= {"ready_s": served.ready_s, "version": served.version(), "points": {}}
        for point in _POINTS:
            with report.check(f"{big.name}, {point}"):
                found = report.figures["points"][str(point)] = measure(served, point, work)
                print(f"{report.stage}: {point}: {in_short(found)}", flush=True)


def used_bytes(pids: Collection[int]) -> dict[str, int]:
    """UUID -> what these processes take on each GPU, as the driver counts it; {} without a driver."""
    if not machine.gpus():
        return {}
    command = ["nvidia-smi", "--query-compute-apps=pid,gpu_uuid,used_memory", "--format=csv,noheader,nounits"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    return of_processes(said, pids)


def of_processes(listing: str, pids: Collection[int]) -> dict[str, int]:
    """Read nvidia-smi's lines: process, UUID of the GPU, MiB."""
    found: dict[str, int] = {}
    for line in listing.splitlines():
        pid, uuid, mib = (cell.strip() for cell in line.split(","))
        if int(pid) in pids:
            found[uuid] = found.get(uuid, 0) + (int(mib) << 20)
    return found


def flags(engine: Engine, *, small: bool) -> list[str]:
    """The small model is to be up soon and takes adapters; the large one is started as users do."""
    given = ["--max-model-len", "2048", "--adapter-slots", "2" if small else "0", "--max-adapter-rank", "16"]
    if engine.device == "cpu":  # a trial: there is nothing to divide
        return [*given, "--dtype", "float32"]
    arguments = [*_PLAIN_ALL_REDUCE.get(engine.name, ()), *((FAST_START[engine.name],) if small else ())]
    return [*given, "--tp", "2", "--dtype", "bfloat16", *(f"--engine-arg={argument}" for argument in arguments)]


def _environment_passed(served: Served) -> None:
    """The variables are in the engine's tree: in one process whole, and in none with another value.

    Processes that give themselves a title have written it over their environment.
    """
    whole = 0
    for pid in [served.state()["engine_pid"], *descendants(served.state()["engine_pid"])]:
        try:
            text = Path(f"/proc/{pid}/environ").read_text(errors="replace")
        except OSError:  # it has ended meanwhile
            continue
        held = dict(pair.partition("=")[::2] for pair in text.split("\0") if "=" in pair)
        other = {name: held[name] for name, value in _NO_MULTICAST.items() if held.get(name, value) != value}
        assert not other, f"{command_line(pid)[:200].strip()}: {other}"
        whole += all(name in held for name in _NO_MULTICAST)
    assert whole, "no process of the engine's has them"


def _adapter(report: Report, served: Served, adapter: Path, answers: Expected) -> None:
    report.figures["upload_ready_s"] = upload(served, "adapter", adapter)
    with served.client() as client:
        texts: dict[str, Any] = {
            name: [greedy(client, name, prompt) for prompt in answers["base"]] for name in ("base", "adapter")
        }
        assert texts["base"] != texts["adapter"], texts
        if "adapter" in answers:
            report.figures["adapter_sure_tokens"] = as_reference(client, "adapter", answers["adapter"])


def _stop(report: Report, served: Served) -> None:
    """End the gateway; no process of it is left, and so nothing on a GPU."""
    with report.check("a stop leaves no process"):
        below = descendants(served.gateway.process.pid)
        began_s = time.monotonic()
        status = served.gateway.stop(_STOP_S)
        report.figures["stop_s"] = round(time.monotonic() - began_s, 1)
        assert status == 0, status
        left = [command_line(pid) for pid in below if command_line(pid)]
        assert not left, left
