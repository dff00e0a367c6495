"""What a stage of the suite is, and what the command line tells it. The table of stages is in `table.py`.

Made once for others, below DIR/made: `oracle`, `small`, `small-awq`, `small-gptq`, `demo-awq` and their `NAME.json`
with expected answers; `qwen3-8b` (--bench-shape; stage `weights`), `qwen3-8b-lora`, `qwen3-8b-awq`, `qwen3-8b-gptq`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from backends.spec import BackendName
from gateway import models
from scripts.gpu_suite.report import Report

FORMS = ("awq", "gptq")  # of 4 bits, that every engine takes


@dataclass(frozen=True)
class Options:
    """The command line, as every stage's job gets it."""

    out: Path  # of the whole suite; a job writes into the directory that it is given, DIR/STAGE
    model: str = "demo"
    torch_python: str = ".venv-torch/bin/python"  # has torch, transformers, peft
    device: Literal["cuda", "cpu"] = "cuda"
    flags: tuple[tuple[str, str], ...] = ()  # (engine, flag of `gateway serve`)
    bench_shape: str = "qwen3-8b"
    points: tuple[str, ...] = ()  # only these points of the table; all when empty
    text: Path | None = None  # what perplexity is taken on
    peer_pythons: dict[str, Path] = field(default_factory=dict)  # peer's name -> its Python
    share: float = 1.0  # of each of its GPUs, for the stage that runs
    gpus: int = 1  # of the machine
    gpu_bytes: int = 80 << 30  # memory of the smallest of them

    @property
    def demo(self) -> Path:
        """The demo model's directory. Raises ModelError while it is not here."""
        return models.resolve(self.model)

    def made(self, name: str) -> Path:
        """Where a thing lies that one stage makes for others; complete when the `done` in it exists."""
        return self.out / "made" / name

    def to_json(self) -> dict[str, Any]:
        """For a stage's own process."""
        return json.loads(json.dumps(asdict(self), default=str))  # type: ignore[no-any-return]

    @classmethod
    def from_json(cls, given: dict[str, Any]) -> Options:
        """What `to_json` made."""
        return cls(**given | {
            "out": Path(given["out"]),
            "flags": tuple((engine, flag) for engine, flag in given["flags"]),
            "points": tuple(given["points"]),
            "text": Path(given["text"]) if given["text"] else None,
            "peer_pythons": {name: Path(path) for name, path in given["peer_pythons"].items()},
        })  # fmt: skip


Job = Callable[[Report, Options, Path], None]  # figures and checks go to the report, files below the path


def nothing(options: Options) -> Sequence[Path]:
    """No files are waited for."""
    return ()


@dataclass(frozen=True)
class StageSpec:
    """A stage as data. It runs as a process of its own, which sees its GPUs only.

    It starts, in the order of the table, once its engines, files and (with `demo`) the demo model are on the machine,
    the stages of `after` have passed, and its GPUs have `share` free. One of `after` that failed: it is not run.
    """

    name: str
    job: Job
    estimate_s: float  # not begun where it would end past --until
    limit_s: float  # then its whole process group is ended; waiting for its turn does not count
    gpus: int = 1
    share: float = 1.0  # of each GPU's memory; 1.0: it measures, and has the GPUs to itself
    in_turn: bool = False  # its job takes its turns on the GPU itself (`quiet.py`); others are busy from first to last
    after: tuple[str, ...] = ()
    engines: tuple[BackendName, ...] = ()
    demo: bool = False
    files: Callable[[Options], Sequence[Path]] = nothing
