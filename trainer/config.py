"""The training configuration: one pydantic model a method; flags, YAML keys and the run's record come from it.

A flag wins over the file. An unknown key fails and names the nearest key. Nothing here imports torch.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from trainer.errors import ConfigError
from trainer.formats import FormatName
from trainer.origins import parse_origin

Method = Literal["sft", "dpo", "orpo", "simpo", "kto", "grpo"]
Schedule = Literal["cosine", "linear", "constant"]
DTypeName = Literal["auto", "bfloat16", "float32"]
ReporterName = Literal["tensorboard", "wandb"]


def _option(default: Any, group: str, help: str, **rules: Any) -> Any:
    """A field that is also a flag: its group and its help are the flag's."""
    return Field(default=default, description=help, json_schema_extra={"group": group}, **rules)


_MODEL, _LORA, _DATA, _OPTIM, _METHOD, _RUN = "Model", "LoRA", "Data", "Optimisation", "Method", "Run"
_ROLLOUT = "Rollouts"


class TrainConfig(BaseModel):
    """What every method takes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: Method

    model: str = _option(..., _MODEL, "Checkpoint directory, hub id, or `demo` (SmolLM2-135M-Instruct).")
    device: Literal["auto", "cpu", "cuda"] = _option("auto", _MODEL, "Where to train. auto: cuda where there is one.")
    dtype: DTypeName = _option("auto", _MODEL, "Weights and activations. auto: bfloat16 on cuda, float32 on cpu.")
    tuning: Literal["lora", "full"] = _option("lora", _MODEL, "Train an adapter, or every parameter (in float32).")
    gradient_checkpointing: bool = _option(False, _MODEL, "Less memory for about a third more time.")
    parallel: Literal["none", "ddp", "fsdp"] = _option(
        "none", _MODEL, "Several processes, a device each: ddp copies the model to each, fsdp shares its layers out."
    )
    compile: bool = _option(
        False, _MODEL, "torch.compile the layers: a slow first step, faster and smaller ones after."
    )

    lora_rank: int = _option(16, _LORA, "Rank of the adapter.", ge=1)
    lora_alpha: float | None = _option(None, _LORA, "Scale is alpha/rank. Default: twice the rank.", gt=0)
    lora_dropout: float = _option(0.0, _LORA, "Dropout on the adapter's input.", ge=0, lt=1)
    lora_rs: bool = _option(False, _LORA, "Rank-stabilised scale: alpha/sqrt(rank).")
    lora_target: tuple[str, ...] = _option(
        ("all-linear",),
        _LORA,
        "`all-linear`, module names such as q_proj, or one regular expression over full names; repeatable.",
    )
    lora_rank_pattern: dict[str, int] = _option({}, _LORA, "REGEX=RANK for modules that differ; repeatable.")
    lora_alpha_pattern: dict[str, float] = _option({}, _LORA, "REGEX=ALPHA for modules that differ; repeatable.")

    dataset: tuple[str, ...] = _option(
        ...,
        _DATA,
        "File of JSON lines (or .gz), .parquet, folder, or hub id OWNER/NAME[:[SUBSET:]SPLIT]; #N: the first N rows; "
        "repeatable.",
        min_length=1,
    )
    data_format: FormatName = _option("auto", _DATA, "Format of the rows. auto: told from each row's keys.")
    eval_dataset: tuple[str, ...] = _option((), _DATA, "Held-out data, named the same way; repeatable.")
    system: str | None = _option(None, _DATA, "System message for the rows that have none.")
    max_length: int = _option(2048, _DATA, "Longest sequence, in tokens.", ge=8)
    overlong: Literal["drop", "truncate", "error"] = _option("drop", _DATA, "What to do with longer examples.")
    shuffle: bool = _option(True, _DATA, "A new order every epoch, drawn from the seed.")
    train_on: Literal["assistant", "last"] = _option("assistant", _DATA, "Learn every assistant turn, or the last one.")
    train_on_thinking: bool = _option(True, _DATA, "Learn <think>…</think> too, not only the answer after it.")
    template_kwargs: dict[str, Any] = _option({}, _DATA, "KEY=VALUE for the chat template (enable_thinking=false).")

    epochs: float = _option(1.0, _OPTIM, "Passes over the data.", gt=0)
    max_steps: int | None = _option(None, _OPTIM, "Stop after this many optimizer steps.", ge=1)
    batch_size: int = _option(16, _OPTIM, "Examples per optimizer step.", ge=1)
    micro_batch_tokens: int | None = _option(
        None, _OPTIM, "Tokens packed into one forward pass; the memory knob. Default: max_length.", ge=8
    )
    oom_backoff: bool = _option(False, _OPTIM, "Out of device memory: go on with smaller rows instead of ending.")
    packing: bool = _option(True, _OPTIM, "Several examples in one forward pass (attention stays within each).")
    learning_rate: float = _option(2e-4, _OPTIM, "Peak learning rate.", gt=0)
    schedule: Schedule = _option("cosine", _OPTIM, "Shape of the learning rate after warm-up.")
    warmup_ratio: float = _option(0.03, _OPTIM, "Share of all steps spent warming up.", ge=0, lt=1)
    weight_decay: float = _option(0.0, _OPTIM, "AdamW weight decay.", ge=0)
    max_grad_norm: float = _option(1.0, _OPTIM, "Gradients are clipped to this norm.", gt=0)

    output_dir: Path = _option(..., _RUN, "The run directory: configuration, events, checkpoints, adapter.")
    seed: int = _option(0, _RUN, "Decides adapter initialisation, data order and dropout.", ge=0)
    eval_every: int | None = _option(None, _RUN, "Steps between evaluations. Default: at the end only.", ge=1)
    early_stopping: int | None = _option(None, _RUN, "Stop after this many evaluations without improvement.", ge=1)
    save_every: int | None = _option(None, _RUN, "Steps between checkpoints. Default: at the end and on pause.", ge=1)
    keep_checkpoints: int = _option(2, _RUN, "Newest checkpoints to keep, beside the best.", ge=1)
    report_to: tuple[ReporterName, ...] = _option((), _RUN, "Where else the numbers of the log go; repeatable.")
    golden_prompts: int = _option(4, _RUN, "Prompts whose greedy answers go into the manifest.", ge=0)

    @field_validator("dataset", "eval_dataset", mode="before")
    @classmethod
    def _resolved_origins(cls, given: Any) -> Any:
        """So that the run can be resumed from elsewhere."""
        return tuple(str(parse_origin(str(text))) for text in given) if isinstance(given, list | tuple) else given

    @field_validator("output_dir")
    @classmethod
    def _absolute_directory(cls, path: Path) -> Path:
        return path.expanduser().absolute()

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if self.early_stopping and not (self.eval_dataset and self.eval_every):
            raise ValueError("`early_stopping` needs `eval_dataset` and `eval_every`")
        if self.eval_every and not self.eval_dataset:
            raise ValueError("`eval_every` needs `eval_dataset`")
        if self.parallel == "fsdp" and (self.compile or self.oom_backoff):
            raise ValueError("`parallel: fsdp` works without `compile` and `oom_backoff`; `ddp` takes both")
        return self

    @property
    def alpha(self) -> float:
        """The LoRA alpha in force."""
        return self.lora_alpha if self.lora_alpha is not None else 2.0 * self.lora_rank

    @property
    def budget_tokens(self) -> int:
        """Tokens of one forward pass."""
        return self.micro_batch_tokens or self.max_length


class SftConfig(TrainConfig):
    """Supervised fine-tuning."""

    method: Literal["sft"] = "sft"


class PreferenceConfig(TrainConfig):
    """What the methods on pairs share: the adapter-off model is the reference, so only LoRA fits DPO."""

    learning_rate: float = _option(5e-6, _OPTIM, "Peak learning rate.", gt=0)
    train_on: Literal["assistant"] = "assistant"


class DpoConfig(PreferenceConfig):
    """Direct preference optimisation, against the base model with the adapter off."""

    method: Literal["dpo"] = "dpo"
    tuning: Literal["lora"] = "lora"
    beta: float = _option(0.1, _METHOD, "Strength of the pull towards the base model.", gt=0)
    label_smoothing: float = _option(0.0, _METHOD, "Share of pairs taken to be labelled wrongly.", ge=0, lt=0.5)


class OrpoConfig(PreferenceConfig):
    """Odds-ratio preference optimisation: no reference model."""

    method: Literal["orpo"] = "orpo"
    beta: float = _option(0.1, _METHOD, "Weight of the odds-ratio term beside the likelihood of the chosen.", gt=0)


class SimpoConfig(PreferenceConfig):
    """Simple preference optimisation: length-normalised, no reference model."""

    method: Literal["simpo"] = "simpo"
    beta: float = _option(2.0, _METHOD, "Scale of the length-normalised log-probability.", gt=0)
    gamma: float = _option(1.0, _METHOD, "Margin that the chosen must win by.", ge=0)


class KtoConfig(PreferenceConfig):
    """Kahneman-Tversky optimisation: single answers labelled good or bad, against the base with the adapter off."""

    method: Literal["kto"] = "kto"
    tuning: Literal["lora"] = "lora"
    beta: float = _option(0.1, _METHOD, "Strength of the pull towards the base model.", gt=0)
    desirable_weight: float = _option(1.0, _METHOD, "Weight of the good answers' loss.", gt=0)
    undesirable_weight: float = _option(1.0, _METHOD, "Weight of the bad answers' loss.", gt=0)
    batch_size: int = _option(16, _OPTIM, "Examples per optimizer step.", ge=2)  # the baseline pairs neighbours


class GrpoConfig(TrainConfig):
    """Group-relative policy optimisation: answers sampled from a live gateway, scored by rewards."""

    method: Literal["grpo"] = "grpo"
    tuning: Literal["lora"] = "lora"
    parallel: Literal["none"] = "none"
    train_on: Literal["assistant"] = "assistant"
    overlong: Literal["drop", "error"] = _option("drop", _DATA, "What to do with prompts that leave no room to answer.")
    batch_size: int = _option(8, _OPTIM, "Prompts per optimizer step.", ge=1)
    learning_rate: float = _option(2e-5, _OPTIM, "Peak learning rate.", gt=0)

    gateway_url: str = _option("http://127.0.0.1:8000", _ROLLOUT, "The gateway that samples; key: $TUNEGATE_API_KEY.")
    publish_as: str | None = _option(None, _ROLLOUT, "Adapter name there, while training. Default: grpo-RUN.")
    group_size: int = _option(8, _ROLLOUT, "Answers per prompt.", ge=2)
    max_completion_tokens: int = _option(256, _ROLLOUT, "Longest answer, in tokens.", ge=1)
    rollout_ahead: bool = _option(False, _ROLLOUT, "Sample the next step's answers while this step trains.")
    rollout_timeout_s: float = _option(600.0, _ROLLOUT, "Longest wait for one answer.", gt=0)
    reward: tuple[str, ...] = _option(
        ..., _ROLLOUT, "`accuracy`, `format`, FILE.json of a grader, or FILE.py:FUNCTION; repeatable.", min_length=1
    )
    reward_weight: tuple[float, ...] = _option((), _ROLLOUT, "A weight for each reward. Default: 1 each.")
    reward_timeout_s: float = _option(60.0, _ROLLOUT, "Time limit of one call of a reward plug-in.", gt=0)

    beta: float = _option(0.0, _METHOD, "Weight of the KL divergence from the base model.", ge=0)
    clip_low: float = _option(0.2, _METHOD, "The probability ratio is clipped at 1 minus this.", gt=0, lt=1)
    clip_high: float = _option(0.2, _METHOD, "The probability ratio is clipped at 1 plus this.", gt=0)
    scale_rewards: bool = _option(True, _METHOD, "Divide advantages by the group's standard deviation.")
    loss_type: Literal["dapo", "grpo", "dr_grpo"] = _option(
        "dapo", _METHOD, "Mean over all tokens; over answers of their means; or by a constant length."
    )

    @field_validator("reward")
    @classmethod
    def _absolute_plugins(cls, rewards: tuple[str, ...]) -> tuple[str, ...]:
        """So that the run can be resumed from elsewhere."""
        split = [(reward, "", "") if reward.endswith(".json") else reward.rpartition(":") for reward in rewards]
        return tuple(
            f"{Path(file).expanduser().absolute()}{colon}{function}" if file else function
            for file, colon, function in split
        )

    @model_validator(mode="after")
    def _rewards(self) -> GrpoConfig:
        if self.reward_weight and len(self.reward_weight) != len(self.reward):
            raise ValueError(
                f"`reward_weight` needs a number for each of {len(self.reward)} rewards, "
                f"{len(self.reward_weight)} given"
            )
        return self

    @model_validator(mode="after")
    def _room(self) -> GrpoConfig:
        if self.max_completion_tokens >= self.max_length:
            raise ValueError(
                f"`max_completion_tokens` ({self.max_completion_tokens}) leaves no room for a prompt in "
                f"`max_length` ({self.max_length})"
            )
        return self

    @property
    def weights(self) -> tuple[float, ...]:
        """A weight for each reward."""
        return self.reward_weight or (1.0,) * len(self.reward)

    @property
    def adapter_name(self) -> str:
        """What the gateway calls the adapter while it trains."""
        return self.publish_as or f"grpo-{self.output_dir.name}"


CONFIGS: dict[str, type[TrainConfig]] = {
    "sft": SftConfig,
    "dpo": DpoConfig,
    "orpo": OrpoConfig,
    "simpo": SimpoConfig,
    "kto": KtoConfig,
    "grpo": GrpoConfig,
}


def load(method: str, file: Path | None, flags: dict[str, Any]) -> TrainConfig:
    """Merge the YAML file (if any) under the flags. Raises ConfigError with every fault found."""
    values = {**(_read(file) if file else {}), **flags}
    if values.setdefault("method", method) != method:
        raise ConfigError(f"{file} is for `method: {values['method']}`; run `gateway train {values['method']}`")
    schema = CONFIGS[method]
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(fault, schema) for fault in error.errors())) from error


def load_together(file: Path) -> list[TrainConfig]:
    """Several runs of one file: its `runs`, each over the keys that they share. Raises ConfigError with every fault."""
    shared = _read(file)
    runs = shared.pop("runs", None)
    if not isinstance(runs, list) or not runs or not all(isinstance(run, dict) for run in runs):
        raise ConfigError(f"{file} must hold `runs:`, a list with the keys of each run")
    faults, found = [], []
    for i, run in enumerate(runs):
        values = shared | _normalised(run)
        method = values.get("method", "sft")
        try:
            if method not in CONFIGS:
                raise ConfigError(f"`method` must be one of {', '.join(CONFIGS)}, given {method!r}")
            found.append(load(method, None, values))
        except ConfigError as error:
            faults += [f"runs[{i}]: {line}" for line in str(error).splitlines()]
    if faults:
        raise ConfigError("\n".join(faults))
    _check_together(found)
    return found


def _check_together(runs: list[TrainConfig]) -> None:
    """Raises ConfigError for runs that cannot share one model."""
    first = runs[0]
    for i, run in enumerate(runs):
        for key in ("model", "device", "dtype", "gradient_checkpointing", "compile"):
            if getattr(run, key) != getattr(first, key):
                raise ConfigError(f"runs[{i}]: `{key}` must be the same for all runs: they share the model")
        if run.oom_backoff:
            raise ConfigError(f"runs[{i}]: `oom_backoff` does not work for runs that share rows; lower the row size")
        if run.parallel != "none":
            raise ConfigError(f"runs[{i}]: `parallel` does not work for runs that share rows; use one process")
        if run.tuning != "lora" or isinstance(run, GrpoConfig):
            raise ConfigError(f"runs[{i}]: only LoRA runs on a dataset can be trained together")
        if run.output_dir in [other.output_dir for other in runs[:i]]:
            raise ConfigError(f"runs[{i}]: `output_dir` is that of another run: {run.output_dir}")


def dump(config: TrainConfig) -> str:
    """The resolved configuration as YAML that `load` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def reload(file: Path) -> TrainConfig:
    """A configuration written by `dump`. Raises ConfigError."""
    method = _read(file).get("method")
    if method not in CONFIGS:
        raise ConfigError(f"{file}: `method` must be one of {', '.join(CONFIGS)}, given {method!r}")
    return load(method, file, {})


def _read(file: Path) -> dict[str, Any]:
    try:
        parsed = yaml.safe_load(file.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{file} is not YAML: {error}") from error
    if parsed is not None and not isinstance(parsed, dict):
        raise ConfigError(f"{file} must hold `key: value` lines, found a {type(parsed).__name__}")
    return _normalised(parsed or {})


def _normalised(given: dict[Any, Any]) -> dict[str, Any]:
    values = {str(key).replace("-", "_"): value for key, value in given.items()}
    # One file, pattern or name may be written without the list around it.
    for key in ("dataset", "eval_dataset", "lora_target", "reward", "report_to"):
        if isinstance(values.get(key), str):
            values[key] = [values[key]]
    return values


def _explain(fault: Any, schema: type[TrainConfig]) -> str:
    key = str(fault["loc"][0]) if fault["loc"] else ""
    if fault["type"] == "extra_forbidden":
        nearest = difflib.get_close_matches(key, schema.model_fields, n=1)
        hint = f", did you mean `{nearest[0]}`?" if nearest else f"; known: {', '.join(schema.model_fields)}"
        return f"unknown key `{key}`{hint}"
    if fault["type"] == "missing":
        return f"`{key}` is needed: {schema.model_fields[key].description}"
    if not key:
        return str(fault["msg"]).removeprefix("Value error, ")
    return f"`{key}`: {fault['msg']}, given {fault['input']!r}"
