"""A command line of ms-swift as a configuration of ours: `gateway train import-swift swift sft --model …`.

`swift.toml` says what becomes of each argument; here is what takes more than a name.
"""

from __future__ import annotations

import difflib
import math
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from trainer.config import CONFIGS, load
from trainer.errors import ConfigError
from trainer.origins import parse_origin

Given = dict[str, list[str]]  # argument -> the words behind it

TABLES: dict[str, dict[str, Any]] = tomllib.loads(Path(__file__).with_name("swift.toml").read_text())
_ENVIRONMENT = re.compile(r"(?P<name>[A-Z][A-Z0-9_]*)=(?P<value>.*)", re.DOTALL)
_OFF = ("false", "none", "null", "[]", "0")
_DTYPES = {"bfloat16": "bfloat16", "float32": "float32"}
_SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant", "constant_with_warmup": "constant"}
_OVERLONG = {"delete": "drop", "right": "truncate"}
_TRAIN_ON = {"default": "assistant", "last_round": "last"}
_SCALE_REWARDS = {"group": True, "true": True, "none": False, "false": False}
_REWARDS, _REPORTERS = ("accuracy", "format"), ("tensorboard", "wandb")
_DEFAULT_MAX_LENGTH = 2048


@dataclass
class _Import:
    """One command on its way."""

    method: str
    processes: int
    given: Given
    values: dict[str, Any] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)  # argument -> why it was not taken over
    unneeded: dict[str, str] = field(default_factory=dict)
    differs: dict[str, str] = field(default_factory=dict)  # our key -> how

    def take(self, name: str) -> list[str] | None:
        """The words of an argument, or of its default there; None: neither."""
        default = TABLES["defaults"].get(name)
        return self.given.get(name) or (None if default is None else [str(default)])

    def one(self, name: str) -> Any:
        """As `take`, a single value."""
        words = self.take(name)
        return True if name in self.given and not self.given[name] else words and _value(" ".join(words))

    def number(self, name: str) -> Any:
        """As `one`, a number. Raises ConfigError."""
        value = self.one(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ConfigError(f"--{name} must be a number, given {value!r}")
        return value

    def choose(self, name: str, key: str, choices: dict[str, Any]) -> None:
        """Set our key by a table of the values that have a counterpart."""
        if (words := self.take(name)) is not None:
            if words[0].lower() in choices:
                self.values[key] = choices[words[0].lower()]
            else:
                self.missing[name] = f"{words[0]}: only {', '.join(choices)} have a counterpart"


def import_command(words: Sequence[str]) -> str:
    """The configuration as YAML, with what became of every argument in comments. Raises ConfigError."""
    method, processes, given = _parse(words)
    _check_names(given)
    command = _Import(method, processes, given)
    for step in (_names, _model, _data, _batch, _processes, _schedule, _preference, _grpo, _rest):
        step(command)
    fields = CONFIGS[method].model_fields
    for name, key in TABLES["same"].items():
        if name in given and key not in fields:
            command.unneeded[name] = f"not used by {method}"
    values = {"method": method} | {key: command.values[key] for key in fields if key in command.values}
    load(method, None, values)
    return _render(command, values)


# --- the command line ------------------------------------------------------------------------------------------------


def _parse(words: Sequence[str]) -> tuple[str, int, Given]:
    rest, environment = list(words), {}
    while rest and (match := _ENVIRONMENT.fullmatch(rest[0])):
        environment[match["name"]] = match["value"]
        rest.pop(0)
    processes = environment.get("NPROC_PER_NODE", "1")
    if not processes.isdecimal() or not int(processes):
        raise ConfigError(f"NPROC_PER_NODE must be a number from 1, given {processes!r}")
    if rest[:1] == ["swift"]:
        rest.pop(0)
    verb = rest.pop(0) if rest and not rest[0].startswith("--") else "sft"
    if verb not in ("sft", "rlhf"):
        raise ConfigError(f"only `swift sft` and `swift rlhf` train what is trained here, given {verb!r}")
    given = _file(Path(rest.pop(0))) if rest and not rest[0].startswith("--") else {}
    if rest and not rest[0].startswith("--"):
        raise ConfigError(f"{rest[0]!r} stands behind no argument")
    for word in rest:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            latest = given[name.replace("-", "_")] = [value] if equals else []
        else:
            latest.append(word)
    if "train_type" in given:
        given["tuner_type"] = given.pop("train_type")
    tuner, task = _word(given, "tuner_type", "lora"), _word(given, "task_type", "causal_lm")
    if tuner not in ("lora", "full") or task != "causal_lm":
        raise ConfigError(f"only LoRA and full training of causal language models, given {tuner} of {task}")
    method = "sft" if verb == "sft" else _word(given, "rlhf_type", "dpo")
    if method not in CONFIGS:
        raise ConfigError(f"--rlhf_type {method} has no counterpart; there are {', '.join(CONFIGS)}")
    return method, int(processes), given


def _word(given: Given, name: str, default: str) -> str:
    return (given.get(name) or [default])[0]


def _file(path: Path) -> Given:
    """The arguments in a YAML or JSON file."""
    try:
        found = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path} must hold `argument: value` lines")
    return {
        name: [str(item) for item in value] if isinstance(value, list) else [str(value)]
        for name, value in found.items()
        if name != "ENV"
    }


def _check_names(given: Given) -> None:
    known = {name for table in ("same", "computed", "unneeded", "missing") for name in TABLES[table]}
    faults = []
    for name in given:
        if name not in known and not name.startswith(tuple(TABLES["unneeded_prefix"])):
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean `--{near[0]}`?" if near else "leave it out"
            faults.append(f"`--{name}` is no argument of ms-swift's training that is known here; {hint}")
    if faults:
        raise ConfigError("\n".join(faults))


# --- what takes more than a name -------------------------------------------------------------------------------------


def _names(command: _Import) -> None:
    for name, key in TABLES["same"].items():
        value = command.one(name)
        if value is not None and key in CONFIGS[command.method].model_fields:
            command.values[key] = value


def _model(command: _Import) -> None:
    values = command.values
    if "model" in values:
        values.setdefault("output_dir", f"output/{str(values['model']).rstrip('/').rpartition('/')[2]}")
    if _word(command.given, "tuner_type", "lora") == "full":
        for key in [key for key in values if key.startswith("lora_")]:
            del values[key]
        values["tuning"] = "full"
        values.setdefault("learning_rate", 1e-5)
    else:
        values["lora_target"] = command.take("target_regex") or command.take("target_modules") or ["all-linear"]
        values.setdefault("learning_rate", 1e-4)
        if "lora_dropout" not in command.given:
            command.differs["lora_dropout"] = "ms-swift's default; 0 is faster here"
    if "gradient_checkpointing" not in command.given:
        command.differs["gradient_checkpointing"] = "ms-swift's default; where memory allows, false is a third faster"
    command.choose("torch_dtype", "dtype", _DTYPES)
    if values.get("tuning") == "full" and values.get("dtype") == "bfloat16":
        values["dtype"] = "float32"
        command.differs["dtype"] = "all parameters are trained in float32"


def _data(command: _Import) -> None:
    for name, key in (("dataset", "dataset"), ("val_dataset", "eval_dataset")):
        if origins := command.take(name):
            command.values[key] = [_origin(command, key, text) for text in origins]
    if (system := command.one("system")) is not None:
        is_file = str(system).endswith(".txt") and Path(system).is_file()
        command.values["system"] = Path(system).read_text() if is_file else str(system)
    length = command.number("max_length")
    if command.method == "grpo":
        # There it is the prompt's alone.
        command.values["max_completion_tokens"] = command.number("max_completion_length") or 512
        length = (length or _DEFAULT_MAX_LENGTH) + command.values["max_completion_tokens"]
    elif length is None:
        length = _DEFAULT_MAX_LENGTH
        command.differs["max_length"] = "ms-swift's default is the model's longest"
    command.values["max_length"] = length
    command.choose("truncation_strategy", "overlong", _OVERLONG)
    command.choose("loss_scale", "train_on", _TRAIN_ON if command.method == "sft" else {"last_round": "assistant"})


def _origin(command: _Import, key: str, text: str) -> str:
    """A data set as we name it."""
    text = text.removeprefix("HF::").removeprefix("MS::")
    name, _, rows = text.partition("#")
    if Path(name).suffix in (".json", ".csv", ".txt"):
        command.differs[key] = f"{name}: make JSON lines of it, a row each"
    if Path(text).exists():
        return text
    place, _, subset = name.partition(":")
    if subset == "all" or "/" in subset:
        raise ConfigError(f"--dataset {text}: name each subset as a data set of its own")
    if parse_origin(place).on_hub and _word(command.given, "use_hf", "false").lower() != "true":
        command.differs[key] = "the id is looked up in the Hugging Face hub, ms-swift's in ModelScope's"
    if rows:
        command.differs[f"{key} #{rows}"] = "the first rows; ms-swift draws them at random"
    split = f":{subset}:train" if subset not in ("", "default") else ""
    return f"{place}{split}" + (f"#{rows}" if rows else "")


def _batch(command: _Import) -> None:
    values, packed = command.values, bool(command.one("packing"))
    a_device, accumulated = command.number("per_device_train_batch_size"), command.number("gradient_accumulation_steps")
    grpo = command.method == "grpo"
    if grpo and a_device is None and accumulated is None:
        return
    at_once = (a_device or 1) * command.processes
    batch = at_once * (accumulated or (1 if grpo else math.ceil(16 / at_once)))
    if grpo:
        values["group_size"] = group = command.number("num_generations") or 8
        if batch % group:
            command.differs["batch_size"] = f"counts prompts, {group} answers each; there {batch} answers are a step"
        batch = math.ceil(batch / group)
    values["batch_size"] = batch
    if packed:
        command.differs["batch_size"] = "counts examples; with packing ms-swift counts rows of several: raise it"
    elif a_device and a_device > 1:
        values["micro_batch_tokens"] = a_device * values["max_length"]


def _processes(command: _Import) -> None:
    if command.processes == 1:
        return
    if command.method == "grpo":
        command.missing["NPROC_PER_NODE"] = "GRPO trains in one process"
        return
    sharded = "fsdp" in command.given or _word(command.given, "deepspeed", "").startswith("zero3")
    command.values["parallel"] = "fsdp" if sharded else "ddp"
    command.differs["parallel"] = f"start it with --processes {command.processes}"


def _schedule(command: _Import) -> None:
    values = command.values
    command.choose("lr_scheduler_type", "schedule", _SCHEDULES)
    if (steps := command.number("max_steps")) is not None and steps > 0:
        values["max_steps"] = steps
    if (kept := command.one("save_total_limit")) is not None:
        values["keep_checkpoints"] = kept
    save_steps, eval_steps = command.number("save_steps"), command.number("eval_steps")
    patience = command.one("early_stop_interval")
    for name in ("save_strategy", "eval_strategy"):
        if _word(command.given, name, "steps") not in ("steps", "no"):
            command.missing[name] = "checkpoints and evaluations come after so many steps"
    if _word(command.given, "save_strategy", "steps") == "steps":
        _every(command, "save_every", "save_steps", save_steps)
    if "eval_dataset" not in values:
        for name in ("eval_steps", "early_stop_interval"):
            if name in command.given:
                command.unneeded[name] = "there is no val_dataset"
    elif _word(command.given, "eval_strategy", "steps") == "steps":
        _every(command, "eval_every", "eval_steps", eval_steps or save_steps)
        if patience:
            values["early_stopping"] = patience


def _every(command: _Import, key: str, name: str, steps: Any) -> None:
    if isinstance(steps, int):
        command.values[key] = steps
    else:
        command.missing[name] = f"{steps} of all steps; give `{key}` as a number of steps"


def _preference(command: _Import) -> None:
    if command.method in TABLES["default_beta"]:
        command.values.setdefault("beta", TABLES["default_beta"][command.method])
    if command.method == "simpo" and "cpo_alpha" not in command.given:
        command.differs["beta"] = "ms-swift's SimPO adds a likelihood term by default (cpo_alpha 1), which is not here"
    if command.method != "grpo" and (loss := command.one("loss_type")) not in (None, "sigmoid"):
        command.missing["loss_type"] = f"{loss}: the method's own loss"


def _grpo(command: _Import) -> None:
    if command.method != "grpo":
        for name in ("scale_rewards", "epsilon", "epsilon_high", "reward_funcs", "reward_weights"):
            if name in command.given:
                command.unneeded[name] = f"not used by {command.method}"
        return
    values = command.values
    if "temperature" not in command.given:
        command.differs["temperature"] = "answers are sampled at 1; ms-swift's default is 0.9"
    values["loss_type"] = "grpo"
    command.choose("loss_type", "loss_type", {name: name for name in ("grpo", "dapo", "dr_grpo")})
    command.choose("scale_rewards", "scale_rewards", _SCALE_REWARDS)
    if (epsilon := command.one("epsilon")) is not None:
        values |= {"clip_low": epsilon, "clip_high": epsilon}
    if (high := command.one("epsilon_high")) is not None:
        values["clip_high"] = high
    weights = [_value(word) for word in command.take("reward_weights") or ()]
    rewards = command.take("reward_funcs") or []
    if other := [name for name in rewards if name not in _REWARDS]:
        command.missing["reward_funcs"] = f"{', '.join(other)}: write each as a function, `reward: [FILE.py:FUNCTION]`"
    elif weights:
        values["reward_weight"] = weights
    if known := [name for name in rewards if name in _REWARDS]:
        values["reward"] = known


def _rest(command: _Import) -> None:
    """Reporters, and every argument that is only said something about."""
    wanted = command.take("report_to") or []
    if known := [name for name in wanted if name in _REPORTERS]:
        command.values["report_to"] = known
    if other := [name for name in wanted if name not in (*_REPORTERS, "none")]:
        command.missing["report_to"] = f"{', '.join(other)}: only {' and '.join(_REPORTERS)}"
    for name, words in command.given.items():
        if name in TABLES["missing"] and not _changes_nothing(name, words):
            command.missing[name] = TABLES["missing"][name]
        elif name in TABLES["unneeded"]:
            command.unneeded[name] = TABLES["unneeded"][name]
        else:
            for prefix, why in TABLES["unneeded_prefix"].items():
                if name.startswith(prefix):
                    command.unneeded[name] = why


def _changes_nothing(name: str, words: list[str]) -> bool:
    given = _value(" ".join(words).lower())
    return any(given == _value(off) for off in (*_OFF, TABLES["harmless"].get(name, "false")))


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(text.lower(), text)


def _render(command: _Import, values: dict[str, Any]) -> str:
    lines = ["# From a command of ms-swift, by the names of its version 4.6.", "# Run it: gateway train"]
    lines[-1] += f" {command.method} --config FILE"
    for heading, found in (
        ("Not taken over", command.missing),
        ("Not the same", command.differs),
        ("Not needed", command.unneeded),
    ):
        if found:
            lines += [f"# {heading}:", *(f"#   {name}: {why}" for name, why in found.items())]
    return "\n".join(lines) + "\n" + yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
