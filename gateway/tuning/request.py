"""The body that makes a fine-tuning job: read, checked, and turned into what the trainer is told. Pure functions."""

from __future__ import annotations

import difflib
import re
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gateway.errors import InvalidRequest

ORGANIZATION = "tunegate"
Auto = Literal["auto"]
MethodName = Literal["supervised", "dpo", "reinforcement"]
_LEARNING_RATE = {"supervised": 2e-4, "dpo": 5e-6, "reinforcement": 2e-5}  # times learning_rate_multiplier
TRAINER_METHODS = {"supervised": "sft", "dpo": "dpo", "reinforcement": "grpo"}
_EPOCHS, _BETA = 3, 0.1  # for `auto`
_SMALL_DATA = 1000  # examples; below it a step has fewer of them
_BATCH_SIZE, _SMALL_BATCH_SIZE = 16, 8
_GROUP_SIZE = 8  # answers to a prompt, times compute_multiplier
_COMPLETION_TOKENS = 256
_KEPT_CHECKPOINTS = 3
_SEEDS = 2**31


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class Hyperparameters(_Body):
    """OpenAI's; `beta` is of dpo alone."""

    n_epochs: int | Auto = Field(default="auto", ge=1, le=50)
    batch_size: int | Auto = Field(default="auto", ge=1, le=1024)
    learning_rate_multiplier: float | Auto = Field(default="auto", gt=0, le=1000)


class DpoHyperparameters(Hyperparameters):
    beta: float | Auto = Field(default="auto", gt=0, le=2)


class ReinforcementHyperparameters(Hyperparameters):
    """eval_interval: steps between evaluations. compute_multiplier: of the answers that are sampled for a prompt."""

    batch_size: int | Auto = Field(default="auto", ge=1, le=256)
    compute_multiplier: float | Auto = Field(default="auto", ge=0.25, le=32)
    eval_interval: int | Auto = Field(default="auto", ge=1)
    eval_samples: Literal["auto", 1] = "auto"  # held-out prompts are answered once, greedily
    reasoning_effort: Literal["default"] = "default"


class Supervised(_Body):
    hyperparameters: Hyperparameters = Hyperparameters()


class Dpo(_Body):
    hyperparameters: DpoHyperparameters = DpoHyperparameters()


class Reinforcement(_Body):
    grader: dict[str, Any]  # the trainer reads it, and says what is wrong with it
    hyperparameters: ReinforcementHyperparameters = ReinforcementHyperparameters()


class Method(_Body):
    type: MethodName = "supervised"
    supervised: Supervised | None = None
    dpo: Dpo | None = None
    reinforcement: Reinforcement | None = None


class Gate(_Body):
    """What a result must pass before it is served. The check of its golden prompts is always made."""

    eval_loss: bool = True  # on the validation file, no worse than the base model's


class Settings(_Body):
    """What OpenAI's API has no field for: `extra_body={"tunegate": {...}}`."""

    lora_rank: int = Field(default=16, ge=1)
    lora_alpha: float | None = Field(default=None, gt=0)
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    lora_target: list[str] | None = Field(default=None, min_length=1)
    max_length: int = Field(default=2048, ge=8)
    learning_rate: float | None = Field(default=None, gt=0)
    schedule: Literal["cosine", "linear", "constant"] | None = None
    max_completion_tokens: int | None = Field(default=None, ge=1)  # of reinforcement
    gate: Gate = Gate()
    adapter: str | None = None  # the result becomes this adapter's next version
    canary_weight: float | None = None  # percent of that adapter's requests that it gets at first; None: all


class CreateJob(_Body):
    """The body of POST /v1/fine_tuning/jobs."""

    model: str
    training_file: str
    validation_file: str | None = None
    method: Method | None = None
    hyperparameters: Hyperparameters | None = None  # as it was before there were methods
    suffix: str | None = Field(default=None, max_length=64)
    seed: int | None = Field(default=None, ge=0, lt=_SEEDS)
    metadata: dict[str, str] | None = Field(default=None, max_length=16)
    integrations: list[Any] | None = Field(default=None, max_length=0)
    tunegate: Settings = Settings()


def parse(body: Any) -> CreateJob:
    """Raises InvalidRequest, which names the field, and for an unknown one the nearest."""
    if not isinstance(body, dict):
        raise InvalidRequest("the body must be a JSON object with at least `model` and `training_file`")
    try:
        asked = CreateJob.model_validate(body)
    except ValidationError as error:
        raise _explained(error) from error
    _check_together(asked)
    return asked


def hyperparameters(asked: CreateJob, examples: int) -> dict[str, Any]:
    """The hyperparameters in force. examples: in the training file. Raises InvalidRequest."""
    given = _given(asked)
    batch_size = _SMALL_BATCH_SIZE if examples < _SMALL_DATA else _BATCH_SIZE
    automatic = {
        "n_epochs": _EPOCHS,
        "batch_size": min(batch_size, examples),
        "learning_rate_multiplier": 1.0,
        "beta": _BETA,
        "compute_multiplier": 1.0,
        "eval_samples": 1,
    }
    values = given.model_dump()
    if values["batch_size"] == "auto":
        values["batch_size"] = automatic["batch_size"]
    automatic["eval_interval"] = -(-examples // values["batch_size"])
    return {name: automatic[name] if value == "auto" else value for name, value in values.items()}


def trainer_config(asked: CreateJob, values: dict[str, Any], examples: int) -> dict[str, Any]:
    """The keys of `gateway train … --config`, but for paths. values: the hyperparameters in force."""
    method, settings = method_of(asked), asked.tunegate
    steps_per_epoch = -(-examples // values["batch_size"])
    config: dict[str, Any] = {
        "method": TRAINER_METHODS[method],
        "epochs": values["n_epochs"],
        "batch_size": values["batch_size"],
        "learning_rate": settings.learning_rate or _LEARNING_RATE[method] * values["learning_rate_multiplier"],
        "lora_rank": settings.lora_rank,
        "lora_dropout": settings.lora_dropout,
        "max_length": settings.max_length,
        "save_every": steps_per_epoch,
        "keep_checkpoints": _KEPT_CHECKPOINTS,
    }
    optional = {
        "lora_alpha": settings.lora_alpha,
        "lora_target": settings.lora_target,
        "schedule": settings.schedule,
        "beta": values.get("beta"),
        "eval_every": values.get("eval_interval", steps_per_epoch) if asked.validation_file else None,
    }
    if method == "reinforcement":
        optional["group_size"] = max(2, round(_GROUP_SIZE * values["compute_multiplier"]))
        optional["max_completion_tokens"] = _completion_tokens(settings)
    return config | {name: value for name, value in optional.items() if value is not None}


def method_of(asked: CreateJob) -> MethodName:
    """The method; supervised where none is named."""
    return asked.method.type if asked.method else "supervised"


def model_name(base: str, suffix: str | None, job_id: str) -> str:
    """`ft:<base>:<organisation>:<suffix>:<id>`, with nothing in it that a path or a version could be mistaken for."""
    short = job_id.rpartition("-")[2][:8]
    return f"ft:{_slug(base)}:{ORGANIZATION}:{_slug(suffix or '')}:{short}"


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-")


def _given(asked: CreateJob) -> Hyperparameters:
    method = asked.method
    if method is None:
        return asked.hyperparameters or Hyperparameters()
    if asked.hyperparameters is not None:
        raise InvalidRequest(
            "hyperparameters are given beside `method`; put them into method." + method.type, param="hyperparameters"
        )
    own: dict[MethodName, Supervised | Dpo | Reinforcement | None] = {
        "supervised": method.supervised,
        "dpo": method.dpo,
        "reinforcement": method.reinforcement,
    }
    if any(settings is not None for name, settings in own.items() if name != method.type):
        raise InvalidRequest(f"method.type is {method.type!r}, but settings of another are given", param="method")
    settings = own[method.type]
    if settings is None:
        return Hyperparameters() if method.type == "supervised" else DpoHyperparameters()
    return settings.hyperparameters


def _check_together(asked: CreateJob) -> None:
    """What fits none of the fields alone. Raises InvalidRequest."""
    settings, reinforcement = asked.tunegate, method_of(asked) == "reinforcement"
    if reinforcement and (asked.method is None or asked.method.reinforcement is None):
        raise InvalidRequest(
            "method.type is 'reinforcement'; give method.reinforcement.grader", param="method.reinforcement"
        )
    if settings.max_completion_tokens is not None and not reinforcement:
        raise InvalidRequest(
            "tunegate.max_completion_tokens is of reinforcement; other methods sample no answers",
            param="tunegate.max_completion_tokens",
        )
    if reinforcement and _completion_tokens(settings) >= settings.max_length:
        raise InvalidRequest(
            f"tunegate.max_completion_tokens ({_completion_tokens(settings)}) leaves no room for a prompt in "
            f"tunegate.max_length ({settings.max_length})",
            param="tunegate.max_completion_tokens",
        )
    if settings.canary_weight is not None and settings.adapter is None:
        raise InvalidRequest(
            "tunegate.canary_weight is a share of an adapter's requests; name the adapter by tunegate.adapter",
            param="tunegate.canary_weight",
        )


def _completion_tokens(settings: Settings) -> int:
    return settings.max_completion_tokens or _COMPLETION_TOKENS


def _explained(error: ValidationError) -> InvalidRequest:
    fault = error.errors()[0]
    # Of a union, pydantic appends which member it tried; that is no part of the field's name.
    path = [str(part) for part in fault["loc"] if str(part) in _FIELDS or fault["type"] == "extra_forbidden"]
    param = ".".join(path)
    if fault["type"] == "extra_forbidden":
        schema = _schema_at(path[:-1])
        nearest = difflib.get_close_matches(path[-1], schema.model_fields, n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"known are {', '.join(schema.model_fields)}"
        return InvalidRequest(f"unknown field {param[:200]!r}; {hint}", param=param[:200])
    if path == ["integrations"]:
        return InvalidRequest("integrations are not offered here; leave the field out", param=param)
    return InvalidRequest(f"{param}: {fault['msg']}, given {str(fault['input'])[:100]!r}", param=param)


def _schema_at(path: list[str]) -> type[BaseModel]:
    """The model of a nested object of the body."""
    schema: type[BaseModel] = CreateJob
    for name in path:
        annotation = schema.model_fields[name].annotation
        members = [annotation, *get_args(annotation)]
        schema = next(member for member in members if isinstance(member, type) and issubclass(member, BaseModel))
    return schema


_FIELDS = {
    name
    for schema in (
        CreateJob, Method, Supervised, Dpo, DpoHyperparameters, Reinforcement, ReinforcementHyperparameters, Settings,
        Gate,
    )
    for name in schema.model_fields
}  # fmt: skip
