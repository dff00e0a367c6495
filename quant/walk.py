"""The job: layer by layer from the source's shards to the output's, one layer in memory at a time.

For each layer: load it, run the calibration sequences through it while its inputs are summed up, quantize, store, and
run the sequences again through what was stored, so that the next layer is calibrated on what it will really see.
The next layer is read and the last one written meanwhile (`streams.py`). After a kill, finished layers are read back
from their shards and only run. How processes share the work: `ranks.py`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from quant.calib import calibration_tokens, fingerprint
from quant.checkpoint import Checkpoint, dequantized
from quant.config import QuantOptions
from quant.errors import BadDevice, UnsupportedModel
from quant.formats import Scheme, quantization_config
from quant.host_memory import give_back_memory
from quant.layer import LayerResult, quantize_layer, sites_of, skip_reasons
from quant.moments import LastSiteReached, Moments, gathering
from quant.phases import Phases
from quant.plan import LayerPlan, make_plan
from quant.precision import fast_products
from quant.ranks import ALONE, Ranks, local_rank
from quant.skeleton import Skeleton, check_finite
from quant.streams import ReadAhead, WriteBehind
from quant.warm_up import warm_up
from quant.workspace import Workspace

_PROBE_TOKENS = 32  # enough to tell a right fold from a wrong one


@dataclass(frozen=True, slots=True)
class Progress:
    """One finished layer."""

    layer: int
    layers: int
    elapsed_s: float
    eta_s: float
    worst_error: float  # largest relative output error among its linears
    resumed: bool


def quantize_checkpoint(
    options: QuantOptions, out: Path, on_progress: Callable[[Progress], None], ranks: Ranks = ALONE
) -> dict[str, Any]:
    """Quantize `options.model` into `out` and return the report. Raises QuantError, OSError.

    Of several processes (`ranks`) only the first writes, tells of progress and has the whole report.
    """
    source = Checkpoint(options.model)
    if source.scheme:
        raise UnsupportedModel(
            f"{options.model} is already quantized ({source.scheme.format}, {source.scheme.grid.bits} bits): start "
            "from the original, or change its format with `quantize convert`"
        )
    device = resolve_device(options.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # for CUDA graphs and collectives, which take the current one
    phases = Phases(device)
    with phases("start"):
        skeleton = Skeleton(source, device, runs_head=False)
        tokens_BT = None
        if options.calib_samples:
            tokens_BT = calibration_tokens(
                options.model, options.calib, options.calib_samples, options.calib_tokens, options.seed
            )
    job = {"options": json.loads(options.model_dump_json(exclude={"device", "batch_tokens", "model", "calib"}))}
    job |= {"source": _source_fingerprint(source), "calibration": None if tokens_BT is None else fingerprint(tokens_BT)}
    with Workspace(out, job) if ranks.is_first else contextlib.nullcontext() as workspace:
        report = _Walk(options, skeleton, workspace, tokens_BT, device, ranks, phases).run(on_progress)
        if workspace:
            _commit(workspace, source, options, report)
    return report


class _Walk:
    """The state that goes from layer to layer: the hidden states of the calibration sequences."""

    def __init__(
        self,
        options: QuantOptions,
        skeleton: Skeleton,
        workspace: Workspace | None,
        tokens_BT: Tensor | None,
        device: torch.device,
        ranks: Ranks,
        phases: Phases,
    ) -> None:
        """workspace: the first process's. tokens_BT: of all processes."""
        self.options, self.skeleton, self.workspace, self.device = options, skeleton, workspace, device
        self.ranks, self.phases = ranks, phases
        self.calibration_tokens = 0 if tokens_BT is None else tokens_BT.numel()
        self.scheme = Scheme(options.format, options.grid, quantization_config(options.format, options.grid, []))
        self.tokens_BT = None if tokens_BT is None else ranks.share(tokens_BT)
        self.hidden: list[Tensor] = []  # batches [b, T, H], on `resting`
        self.resting = self._resting_device()
        self.plans: dict[tuple[Any, ...], LayerPlan] = {}  # by the layer's shape
        self.skipped: dict[str, str] = {}  # full module name -> reason

    def run(self, on_progress: Callable[[Progress], None]) -> dict[str, Any]:
        started, started_cpu, layers = time.monotonic(), time.process_time(), len(self.skeleton.layers)
        workspace = self.workspace
        finished = self.ranks.told([workspace is not None and workspace.has(shard_name(i)) for i in range(layers)])
        fresh = [index for index in range(layers) if not finished[index]]
        entries, fresh_s, done = [], 0.0, 0
        with ReadAhead(self._read, fresh, self.device) as reader, self._writer() as writer:
            self._write_rest(writer)
            if fresh and self.device.type == "cuda":
                with self.phases("warm_up"):
                    warm_up(self.options.method, self.options.grid, self.skeleton.checkpoint.dtype, self.device)
            if self.tokens_BT is not None:
                batches = self.tokens_BT.split(max(1, self.options.batch_tokens // self.tokens_BT.shape[1]))
                with self.phases("embed"):
                    self.hidden = [self.skeleton.embed(batch).to(self.resting) for batch in batches]
            for index in range(layers):
                layer_started = time.monotonic()
                entry = self._resume(index) if finished[index] else self._quantize(index, reader, writer)
                entries.append(entry)
                give_back_memory()
                if not finished[index]:
                    fresh_s, done = fresh_s + time.monotonic() - layer_started, done + 1
                eta_s = fresh_s / max(done, 1) * (layers - index - 1)
                worst = max((linear["error"] for linear in entry["linears"]), default=0.0)
                on_progress(Progress(index + 1, layers, time.monotonic() - started, eta_s, worst, finished[index]))
            leaving = time.monotonic()
        self.phases.add("write", time.monotonic() - leaving)
        return self._report(entries, time.monotonic() - started, time.process_time() - started_cpu)

    def _read(self, index: int) -> dict[str, Tensor]:
        return self.skeleton.checkpoint.weights(self.skeleton.layer_prefix(index))

    def _writer(self) -> contextlib.AbstractContextManager[WriteBehind | None]:
        return WriteBehind(self.workspace.put) if self.workspace else contextlib.nullcontext()

    def _write_rest(self, writer: WriteBehind | None) -> None:
        """What is outside the layers: it depends on none, so the disk has it while the first ones are computed."""
        rest = shard_name(len(self.skeleton.layers))
        if writer and self.workspace and not self.workspace.has(rest):
            writer.put(rest, self.skeleton.checkpoint.tensors(self.skeleton.outside_names), None)

    def _quantize(self, index: int, reader: ReadAhead, writer: WriteBehind | None) -> dict[str, Any]:
        started, prefix, before = time.monotonic(), self.skeleton.layer_prefix(index), self.phases.total()
        with self.phases("load"):
            weights = reader.take()
            check_finite({prefix + name: tensor for name, tensor in weights.items()})
        moments: dict[str, Moments] = {}
        with self.phases("calibrate"), self.skeleton.loaded(index, weights) as layer:
            plan = self._plan(index, layer)
            if self.hidden:
                full = self.options.method != "rtn"
                with fast_products(), gathering(layer, sites_of(plan), full, plan.last_site) as moments:
                    for batch in self.hidden:
                        with contextlib.suppress(LastSiteReached):
                            self.skeleton.run(layer, index, batch.to(self.device))
                moments = self.ranks.summed(moments, sites_of(plan), full, self.device)
        reasons = skip_reasons(plan, weights, prefix, self.options)
        result = quantize_layer(
            weights, plan, moments, reasons, self.options, self.skeleton.checkpoint.dtype, self.ranks, self.phases
        )
        stored = {prefix + name: tensor for name, tensor in result.tensors.items()}
        del weights, moments
        entry = self._entry(index, plan, result, reasons, time.monotonic() - started)
        entry["phases_s"] = self.phases.since(before)
        if writer:
            with self.phases("write"):
                writer.put(shard_name(index), stored, entry)
        if self.hidden:
            with self.phases("forward"):
                self._forward(index, self.ranks.told(stored))
        return entry | {"phases_s": self.phases.since(before)}

    def _resume(self, index: int) -> dict[str, Any]:
        shard = shard_name(index)
        entry: dict[str, Any] = self.ranks.told(self.workspace.notes(shard) if self.workspace else {})
        self.skipped |= entry["skipped"]
        if self.hidden:
            self._forward(index, self.ranks.told(self.workspace.read(shard) if self.workspace else {}))
        return entry

    def _forward(self, index: int, stored: dict[str, Tensor]) -> None:
        """Run the calibration sequences through the layer as stored, to the input of the next."""
        if index == len(self.skeleton.layers) - 1:
            return
        prefix = self.skeleton.layer_prefix(index)
        moved = {name: tensor.to(self.device) for name, tensor in stored.items()}
        weights = dequantized(moved, self.scheme, self.skeleton.checkpoint.dtype)
        relative = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
        with self.skeleton.loaded(index, relative) as layer, fast_products():
            for number, batch in enumerate(self.hidden):  # in place: never all of them twice
                self.hidden[number] = self.skeleton.run(layer, index, batch.to(self.device)).to(self.resting)

    def _resting_device(self) -> torch.device:
        """Where hidden states wait between layers: the device if they take at most a quarter of what is free there."""
        if self.tokens_BT is None or self.device.type != "cuda":
            return torch.device("cpu")
        channels = self.skeleton.model.get_input_embeddings().embedding_dim
        free_bytes, _ = torch.cuda.mem_get_info(self.device)
        return self.device if 4 * self.tokens_BT.numel() * channels <= free_bytes / 4 else torch.device("cpu")

    def _plan(self, index: int, layer: nn.Module) -> LayerPlan:
        key = tuple((name, tuple(tensor.shape)) for name, tensor in layer.state_dict().items())
        if key not in self.plans:
            vocabulary = self.skeleton.model.get_input_embeddings().num_embeddings
            probe_BT = torch.arange(_PROBE_TOKENS).mul(7919).remainder(vocabulary).unsqueeze(0)
            hidden_BTH = self.skeleton.embed(probe_BT)
            args, kwargs = self.skeleton.arguments(index, hidden_BTH)
            self.plans[key] = make_plan(layer, hidden_BTH, args, kwargs)
        return self.plans[key]

    def _entry(
        self, index: int, plan: LayerPlan, result: LayerResult, reasons: dict[str, str], seconds: float
    ) -> dict[str, Any]:
        prefix = self.skeleton.layer_prefix(index)
        quantized = {report.name for report in result.linears}
        left = {
            prefix + name: reasons.get(name, "not a linear layer") for name in plan.matrices if name not in quantized
        }
        self.skipped |= left
        linears = [report.as_json() for report in result.linears]
        return {"layer": index, "seconds": round(seconds, 3), "linears": linears, "skipped": left}

    def _report(self, entries: list[dict[str, Any]], elapsed_s: float, cpu_s: float) -> dict[str, Any]:
        peak_device = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0
        return {
            "options": json.loads(self.options.model_dump_json()),
            "layers": entries,
            "skipped": self.skipped | {"lm_head": "left alone: output embeddings lose the most"},
            "calibration_tokens": self.calibration_tokens,
            "elapsed_s": round(elapsed_s, 1),
            "phases_s": self.phases.since({}),
            "cpu_s": round(cpu_s, 1),
            "peak_host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "peak_device_bytes": peak_device,
            "device": str(self.device) if self.ranks.size == 1 else f"{self.ranks.size} x {self.device.type}",
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }


def resolve_device(name: str) -> torch.device:
    """`auto` is a CUDA device, or the CPU. Which one, where it is not said: the first, or this process's of several.

    Raises BadDevice.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(f"cuda:{local_rank()}" if name == "cuda" else name)
    except RuntimeError as error:
        raise BadDevice(f"{name!r} is no device: give auto, cpu, cuda, or a number too, as in cuda:1") from error
    devices = torch.cuda.device_count()
    if device.type == "cuda" and device.index >= devices:
        raise BadDevice(f"there is no {device}: torch sees {devices} CUDA devices. Give another --device, or cpu")
    return device


def shard_name(index: int) -> str:
    """The shard of a layer; the one after the last layer's holds everything else."""
    return f"model-{index + 1:05d}.safetensors"


def _commit(workspace: Workspace, source: Checkpoint, options: QuantOptions, report: dict[str, Any]) -> None:
    config = quantization_config(options.format, options.grid, sorted(report["skipped"]))
    manifest = {
        "kind": "checkpoint",
        "manifest_version": 1,
        "method": options.method,
        "format": options.format,
        "grid": options.grid.model_dump(),
        "source": {"name": options.model.name, "fingerprint": _source_fingerprint(source)},
    }
    workspace.commit(options.model, source.config | {"quantization_config": config}, manifest, report)


def _source_fingerprint(source: Checkpoint) -> str:
    """Identifies a checkpoint by its tensors' names, shapes and files' sizes and times, without reading the weights."""
    files = sorted({entry.file for entry in source.entries.values()})
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    shapes = sorted((name, entry.dtype, entry.shape) for name, entry in source.entries.items())
    return hashlib.sha256(json.dumps([source.config, stats, shapes]).encode()).hexdigest()[:16]
