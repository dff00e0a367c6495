"""A run's configuration: one struct whose fields are the flags, the keys of a YAML file and part of every result."""

from __future__ import annotations

import difflib
import hashlib
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import yaml

from bench.measure.slo import parse_slo
from bench.workload.adapters import shares
from bench.workload.spec import WorkloadSpec, parse_spec


def _flag(group: str, description: str) -> msgspec.Meta:
    return msgspec.Meta(description=description, extra={"group": group})


SERVER, LOAD, WORK, ADAPTERS, JUDGE, OUT = "Server", "Load", "Workload", "Adapters", "Judging", "Output"


class RunConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that a run is told."""

    url: Annotated[str, _flag(SERVER, "Server under test.")] = "http://127.0.0.1:8000"
    target: Annotated[
        tuple[str, ...],
        _flag(
            SERVER,
            "NAME=URL[,model=M][,key=K][,adapters=A+B]; repeat to compare servers in interleaved blocks.",
        ),
    ] = ()
    model: Annotated[str, _flag(SERVER, "Model to ask for (default: the first the server lists).")] = ""
    api: Annotated[Literal["chat", "completions"], _flag(SERVER, "Which API.")] = "chat"
    api_key: Annotated[str, _flag(SERVER, "Key sent as a bearer token [$OPENAI_API_KEY].")] = ""
    metrics_url: Annotated[
        tuple[str, ...], _flag(SERVER, "NAME=URL of a Prometheus page (default: /metrics of each target).")
    ] = ()
    rate: Annotated[float | None, _flag(LOAD, "Requests per second, whatever the server does (open loop).")] = None
    concurrency: Annotated[int | None, _flag(LOAD, "Users who each wait for their answer (closed loop).")] = None
    duration: Annotated[float, _flag(LOAD, "Seconds of load in each repeat.")] = 60.0
    requests: Annotated[int | None, _flag(LOAD, "Stop a repeat after so many requests.")] = None
    arrivals: Annotated[str, _flag(LOAD, "poisson, constant or gamma:SHAPE.")] = "poisson"
    max_concurrency: Annotated[int | None, _flag(LOAD, "Cap on requests in flight; reaching it is reported.")] = None
    ramp: Annotated[float, _flag(LOAD, "Seconds over which users start.")] = 0.0
    repeats: Annotated[int, _flag(LOAD, "Repeats; three or more give intervals over repeats.")] = 3
    block: Annotated[float, _flag(LOAD, "Seconds of a block when targets are interleaved.")] = 10.0
    drain: Annotated[float, _flag(LOAD, "Seconds to wait for answers after the load.")] = 30.0
    timeout: Annotated[float, _flag(LOAD, "Seconds after which a request has failed.")] = 600.0
    workers: Annotated[int | None, _flag(LOAD, "Client processes (default: one for each 2 cores).")] = None
    workload: Annotated[str, _flag(WORK, "What is asked, such as random:512/128; see --help below.")] = "random:512/128"
    seed: Annotated[int, _flag(WORK, "Seed of arrivals, lengths, texts and mix.")] = 0
    cache: Annotated[str, _flag(WORK, "Prefix cache: cold, warm, or the shared part of each prompt (0.5).")] = "cold"
    warmup: Annotated[int, _flag(WORK, "Requests before the load that are not counted.")] = 8
    temperature: Annotated[float | None, _flag(WORK, "Sampling temperature sent.")] = 0.0
    extra_body: Annotated[str, _flag(WORK, "JSON object merged into every request.")] = "{}"
    adapters: Annotated[tuple[str, ...], _flag(ADAPTERS, "Models to mix; repeat, or name many with commas.")] = ()
    mix: Annotated[str, _flag(ADAPTERS, "uniform, weights:3,1,1 or zipf:S.")] = "uniform"
    churn: Annotated[
        Path | None, _flag(ADAPTERS, "YAML list of {at, name, method, path, json}: requests made while under load.")
    ] = None
    probe: Annotated[float, _flag(ADAPTERS, "Short base-model requests per second beside the load.")] = 0.0
    slo: Annotated[str, _flag(JUDGE, "ttft_p99=200,tpot_p99=50 (ms), or mlperf:llama3.1-8b:interactive.")] = ""
    gpus: Annotated[int | None, _flag(JUDGE, "GPUs behind the server, for tokens/s per GPU.")] = None
    gpu_hour_price: Annotated[float | None, _flag(JUDGE, "Price of a GPU hour, for cost per million tokens.")] = None
    out: Annotated[Path, _flag(OUT, "Folder for record, JSON and HTML.")] = Path("bench-results")
    name: Annotated[str, _flag(OUT, "Name of the run's folder (default: date and time).")] = ""
    quiet: Annotated[bool, _flag(OUT, "No live view.")] = False

    @property
    def spec(self) -> WorkloadSpec:
        """The workload, parsed."""
        return parse_spec(self.workload)

    @property
    def models(self) -> tuple[str, ...]:
        """The adapters named, commas taken apart."""
        return tuple(name for item in self.adapters for name in item.split(",") if name)


class TargetSpec(msgspec.Struct, frozen=True):
    """One server of a run, as it was named. `adapters`: the models to mix there; none: `model` alone."""

    name: str
    url: str
    model: str
    key: str
    adapters: tuple[str, ...] = ()


def load_config(path: Path | None, flags: dict[str, Any]) -> RunConfig:
    """The file's keys with the flags over them. Raises ValueError that names what is wrong and what is allowed."""
    given: dict[str, Any] = {}
    if path is not None:
        loaded = yaml.safe_load(path.read_text()) or {}
        if not isinstance(loaded, dict):
            raise ValueError(f"{path}: keys and values expected, such as `rate: 8`")
        given = {str(key).replace("-", "_"): value for key, value in loaded.items()}
    if ("rate" in flags) != ("concurrency" in flags):  # a flag for one kind of load replaces the file's other kind
        given.pop("concurrency" if "rate" in flags else "rate", None)
    given |= flags
    known = [field.name for field in msgspec.structs.fields(RunConfig)]
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"allowed: {', '.join(known)}"
            raise ValueError(f"unknown key {key!r}; {hint}")
    try:
        config = msgspec.convert(given, RunConfig, strict=False, dec_hook=lambda kind, value: kind(value))
    except msgspec.ValidationError as error:
        raise ValueError(str(error)) from error
    check(config)
    return config


def check(config: RunConfig) -> None:
    """Refuse what cannot be run. Raises ValueError."""
    if config.rate is not None and config.concurrency is not None:
        raise ValueError("--rate and --concurrency exclude each other: --max-concurrency caps a rate")
    if config.rate is None and config.concurrency is None and config.spec.kind != "trace":
        raise ValueError("say how much load: --rate REQUESTS_PER_SECOND or --concurrency USERS")
    for key in ("duration", "block", "timeout", "repeats", "rate", "concurrency", "requests", "max_concurrency"):
        value = getattr(config, key)
        if value is not None and value <= 0:
            raise ValueError(f"{key} must be above 0, got {value}")
    cache_of(config)
    extra_body(config)
    parse_slo(config.slo)
    shares(config.mix, max(1, len(targets_of(config)[0].adapters)))


def cache_of(config: RunConfig) -> tuple[bool, float]:
    """(warm, shared part of every prompt). Raises ValueError."""
    if config.cache in ("cold", "warm"):
        return config.cache == "warm", 0.0
    try:
        share = float(config.cache)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 0.99:
        raise ValueError(f"cache is cold, warm or a share from 0 to 0.99, got {config.cache!r}")
    return False, share


def extra_body(config: RunConfig) -> dict[str, Any]:
    """The JSON merged into every request. Raises ValueError."""
    try:
        return msgspec.json.decode(config.extra_body, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise ValueError(f"extra_body is a JSON object, got {config.extra_body!r}: {error}") from error


def targets_of(config: RunConfig) -> list[TargetSpec]:
    """The servers of a run: the targets named, or the one URL. Raises ValueError."""
    if not config.target:
        return [TargetSpec("server", config.url, config.model, config.api_key, config.models)]
    targets = []
    for text in config.target:
        name, separator, rest = text.partition("=")
        url, *options = rest.split(",")
        pairs = dict(option.partition("=")[::2] for option in options)
        if not separator or not url or set(pairs) - {"model", "key", "adapters"}:
            raise ValueError(f"target {text!r}: NAME=URL[,model=M][,key=K][,adapters=A+B] expected")
        adapters = tuple(part for part in pairs.get("adapters", "").split("+") if part) or config.models
        model, key = pairs.get("model", config.model), pairs.get("key", config.api_key)
        targets.append(TargetSpec(name, url, model, key, adapters))
    if len({target.name for target in targets}) < len(targets):
        raise ValueError("targets need different names")
    if len({len(target.adapters) for target in targets}) > 1:  # or the same request would go to another share of them
        raise ValueError("targets mix the same number of adapters, each under its own server's names")
    return targets


def resolved(config: RunConfig) -> dict[str, Any]:
    """The configuration as plain data, secrets taken out: for results and --print-config."""
    plain: dict[str, Any] = msgspec.to_builtins(config, enc_hook=str)
    plain["api_key"] = "***" if config.api_key else ""
    plain["target"] = [text.partition(",key=")[0] + (",key=***" if ",key=" in text else "") for text in config.target]
    return plain


def workload_hash(config: RunConfig) -> str:
    """What two runs must share to be comparable: the work offered, not the server, the time or the place."""
    spec, adapters = config.spec, targets_of(config)[0].adapters
    files = [hashlib.sha256(Path(spec.path).read_bytes()).hexdigest()] if spec.path else []
    parts = [
        config.api, spec.kind, spec.input_tokens, spec.output_tokens, sorted(spec.options.items()), files,
        config.seed, config.cache, config.rate, config.concurrency, config.duration, config.requests, config.arrivals,
        config.max_concurrency, len(adapters), config.mix, config.temperature, extra_body(config), config.probe,
        config.ramp,
    ]  # fmt: skip
    return hashlib.sha256(msgspec.json.encode(parts)).hexdigest()[:16]
