"""The table of stages, in the order in which they are wanted. What measures has its GPUs to itself."""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from backends.spec import BACKEND_NAMES, BackendName
from scripts.gpu_suite import jobs
from scripts.gpu_suite.stages import FORMS, Job, Options, StageSpec

_SIDE = 0.15  # of a GPU, for the demo model: several such stages run side by side
_SWITCH_SHARE = 0.3  # for the demo model on three engines
_RECORD = 0.25  # several engines at once, with little memory each
_MAINS: dict[BackendName, tuple[float, float]] = {"vllm": (_SIDE, 400), "sglang": (_SIDE, 330), "lmdeploy": (0.2, 400)}
_BENCH_S: dict[BackendName, float] = {"vllm": 600, "sglang": 540, "lmdeploy": 300}
_SHARES_OF = 80 << 30  # bytes: of a larger GPU, a stage that shares it takes no more of them
_BENCH_GB = {"": 49, "lora": 49, "plain": 34, "awq": 17, "gptq": 17}  # weights, a cache for 230 users, graphs
_START_S: dict[BackendName, float] = {"vllm": 110, "sglang": 110, "lmdeploy": 40}  # beside others, a small model
_RESTART_S = 90  # seen: 64 to 85 on one GPU
_CPU_PATIENCE = 10
# (module, its mapping of names to stages): the stages that other parts declare
_GUESTS = (("quant_job", "QUANT_STAGES"), ("train_job", "TRAIN_STAGES"))


_QUANT_PEERS, _TRAIN_PEERS = ("gptqmodel", "llmcompressor"), ("trl", "unsloth", "ms-swift")
_PEERS = {"quant-8b-peers": _QUANT_PEERS, "quant-quality": _QUANT_PEERS, "train-speed": _TRAIN_PEERS,
          "train-packing": _TRAIN_PEERS, "train-qlora": _TRAIN_PEERS}  # fmt: skip
_FAST = ("quant-8b-rtn", "quant-8b-awq", "quant-8b-gptq")
_ON_WEIGHTS = (*_FAST, "quant-8b-peers", "quant-nccl")
_BROKEN = (ImportError, SyntaxError, AttributeError, NameError, TypeError, ValueError, LookupError, OSError)


@dataclass
class Table:
    """All stages by name, in order, and which parts could not be read and why."""

    stages: dict[str, StageSpec] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)

    def wanted(self, names: Iterable[str]) -> list[StageSpec]:
        """These stages in the order given, each behind those that it comes after; all without a name.

        Raises LookupError for a name that is no stage's.
        """
        chosen: dict[str, StageSpec] = {}

        def add(name: str) -> None:
            if name not in self.stages:
                broken = "".join(f"; {part} could not be read: {why}" for part, why in self.broken.items())
                raise LookupError(f"no stage is called {name}; there are {', '.join(self.stages)}{broken}")
            for before in self.stages[name].after:
                add(before)
            chosen.setdefault(name, self.stages[name])

        for name in list(names) or self.stages:
            add(name)
        return list(chosen.values())


def stages(options: Options) -> Table:
    """The table for this run. A part whose module cannot be imported is left out, and named."""
    guests: dict[str, dict[str, StageSpec]] = {}
    table = Table()
    for module, name in _GUESTS:
        try:
            guests[name] = dict(getattr(importlib.import_module(f"scripts.gpu_suite.{module}"), name))
        except _BROKEN as error:  # the other parts are still worth their time
            table.broken[module] = "".join(traceback.format_exception_only(error)).strip()
            guests[name] = {}
    quant = [_when_brought(spec) for spec in guests["QUANT_STAGES"].values()]
    train = [_when_brought(spec) for spec in guests["TRAIN_STAGES"].values()]
    fast = [spec for spec in quant if spec.name in _FAST]
    rows = [
        *_made(),
        _bench(options, "vllm"),
        _bench(options, "sglang"),
        *map(_main, BACKEND_NAMES),
        _switch(options),
        _parallel("vllm"),
        _parallel("lmdeploy"),
        _parallel("sglang"),
        _bench(options, "lmdeploy"),
        _parallel_bench("vllm"),
        *fast,
        _bench(options, "vllm", "awq"),
        *(_quant(engine, form) for engine in BACKEND_NAMES for form in FORMS),
        _demo_quant("vllm"),
        _demo_quant("sglang"),
        *map(_record, BACKEND_NAMES),
        *(spec for spec in (*quant, *train) if spec not in fast),
        _bench(options, "vllm", "plain"),
        _bench(options, "sglang", "plain"),
        _bench(options, "vllm", "gptq"),
        _bench(options, "lmdeploy", "awq"),
        _bench(options, "sglang", "awq"),
        _bench(options, "lmdeploy", "gptq"),
        _bench(options, "sglang", "gptq"),
        _bench(options, "lmdeploy", "lora"),
    ]
    for spec in rows:
        if options.device == "cpu":  # stages take turns there, and take their time
            spec = replace(spec, share=1.0, limit_s=_CPU_PATIENCE * spec.limit_s)
        elif spec.share < 1.0 and not spec.in_turn:
            spec = replace(spec, share=spec.share * min(1.0, _SHARES_OF / options.gpu_bytes))
        table.stages[spec.name] = spec
    return table


def _when_brought(spec: StageSpec) -> StageSpec:
    """A part's stage, which begins once its weights are made, and the tools that it is measured beside are there."""
    after = ("weights",) if spec.name in _ON_WEIGHTS else ()
    return replace(spec, after=(*spec.after, *after), files=partial(_brought, spec.name))


def _brought(stage: str, options: Options) -> list[Path]:
    """What the command line names for a stage, and somebody brings meanwhile."""
    tools = [options.peer_pythons[name] for name in _PEERS.get(stage, ()) if name in options.peer_pythons]
    return tools + ([options.text] if options.text and stage == "quant-quality" else [])


def _stage(name: str, job: Job, estimate_s: float, **given: Any) -> StageSpec:
    """A stage whose limit leaves room for a slow disk, and not for one that hangs."""
    return StageSpec(name, job, estimate_s, 1.4 * estimate_s + 60, **given)


def _made() -> list[StageSpec]:
    """What others stand on."""
    return [
        _stage("oracle", jobs.oracle, 40, share=0.1, demo=True),
        _stage("weights", jobs.weights, 60, share=0.2, demo=True),
        _stage("small", jobs.small, 45, share=0.1, demo=True),
        *(
            _stage(f"checkpoint-{form}", partial(jobs.checkpoint, form), 70, share=0.1, after=("small",), demo=True)
            for form in FORMS
        ),
        _stage("checkpoint-demo", jobs.checkpoint_of_demo, 110, share=0.1, demo=True),
        _stage("weights-packed", jobs.packed_weights, 60, share=0.1, demo=True),
    ]


def _main(engine: BackendName) -> StageSpec:
    share, estimate_s = _MAINS[engine]
    return _stage(f"main-{engine}", partial(jobs.main, engine), estimate_s, share=share, after=("oracle",),
                  engines=(engine,), demo=True)  # fmt: skip


def _bench(options: Options, engine: BackendName, form: str = "") -> StageSpec:
    name = f"bench-{engine}" + (f"-{form}" if form else "")
    estimate_s = _BENCH_S[engine] if form in ("", "lora") else _START_S[engine] + 80
    share = min(1.0, _BENCH_GB[form] * 1e9 / options.gpu_bytes) if options.gpus == 1 else 1.0
    return _stage(name, partial(jobs.bench, engine, form), estimate_s, share=share, in_turn=True,
                  after=("weights-packed" if form in FORMS else "weights",), engines=(engine,))  # fmt: skip


def _quant(engine: BackendName, form: str) -> StageSpec:
    return _stage(f"quant-{engine}-{form}", partial(jobs.quantized, engine, form, of_demo=False),
                  _START_S[engine], share=0.1, after=(f"checkpoint-{form}",), engines=(engine,))  # fmt: skip


def _demo_quant(engine: BackendName) -> StageSpec:
    return _stage(f"quant-{engine}-demo", partial(jobs.quantized, engine, "awq", of_demo=True),
                  _START_S[engine], share=0.1, after=("checkpoint-demo",), engines=(engine,))  # fmt: skip


def _switch(options: Options) -> StageSpec:
    share = _SWITCH_SHARE if options.gpus == 1 else 1.0
    return _stage("switch", partial(jobs.switch, BACKEND_NAMES), 420, share=share, after=("oracle",),
                  engines=BACKEND_NAMES, demo=True)  # fmt: skip


def _parallel(engine: BackendName) -> StageSpec:
    # LMDeploy: an adapter starts it again, on its slower PyTorch engine. SGLang refuses GPUs that others fill unevenly.
    estimate_s = _START_S[engine] + (40 + _RESTART_S if engine == "lmdeploy" else 40)
    share = 1.0 if engine == "sglang" else _SIDE
    return _stage(f"parallel-{engine}", partial(jobs.parallel, engine), estimate_s, gpus=2, share=share,
                  after=("small",), engines=(engine,))  # fmt: skip


def _parallel_bench(engine: BackendName) -> StageSpec:
    return _stage(f"bench-{engine}-tp2", partial(jobs.parallel_bench, engine), _START_S[engine] + 80, gpus=2,
                  after=("weights",), engines=(engine,))  # fmt: skip


def _record(engine: BackendName) -> StageSpec:
    return _stage(f"record-{engine}", partial(jobs.record, engine), 160, share=_RECORD, engines=(engine,), demo=True)
