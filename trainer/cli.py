"""`gateway train …`. Flags come from the configuration models; torch is imported only when a run begins."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import yaml
from pydantic.fields import FieldInfo

from trainer import config as configs
from trainer import extras, graders
from trainer.control import PauseRequest
from trainer.data import validate
from trainer.errors import TOLD, ConfigError, TrainError
from trainer.formats import FormatName, Prompt, parse_conversation, parse_labelled, parse_preference, parse_prompt
from trainer.launch import EXIT_PAUSED, launch
from trainer.swift import import_command

_PARSERS: dict[str, Callable[[dict[str, Any], FormatName], object]] = {
    "sft": parse_conversation,
    "kto": parse_labelled,
    "grpo": parse_prompt,
}
_GOLDEN_PROMPTS = ("What can you do for me?", "Write one sentence about cats.", "What is 17 + 25?")
_PROCESSES = click.IntRange(min=1)
_PROCESSES_HELP = "Start so many processes on this machine, a device each; needs --parallel."


@click.group()
def train() -> None:
    """Fine-tune a model into an adapter that the gateway serves."""


def _method_command(method: str, schema: type[configs.TrainConfig]) -> click.Command:
    def run(config_file: Path | None, print_config: bool, processes: int | None = None, **flags: Any) -> None:
        with _shown_as_click_error():
            config = configs.load(method, config_file, _given(flags, schema))
            if print_config:
                click.echo(configs.dump(config), nl=False)
                return
            if processes and config.parallel == "none":
                raise click.UsageError("--processes needs --parallel ddp or fsdp")
            _launch(processes)
            _exit(_runs().start(config), config.output_dir)

    can_share = bool(schema.model_fields["parallel"].json_schema_extra)
    run.__doc__ = f"{schema.__doc__} A flag wins over the file."
    command = click.command(method, cls=_GroupedCommand)(run)
    command.params = [
        click.Option(
            ["--config", "config_file"], type=click.Path(path_type=Path), help="YAML file with the keys below."
        ),
        click.Option(["--print-config"], is_flag=True, help="Print the resolved configuration and stop."),
        *([click.Option(["--processes"], type=_PROCESSES, help=_PROCESSES_HELP)] if can_share else []),
        *(_option(name, info) for name, info in schema.model_fields.items() if info.json_schema_extra),
    ]
    return command


@train.command()
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.option("--processes", type=_PROCESSES, help=_PROCESSES_HELP)
@click.option("--gateway-url", help="Of a grpo run: where the gateway that samples is now. Default: where it was.")
def resume(run_dir: Path, processes: int | None, gateway_url: str | None) -> None:
    """Go on with a paused, killed or failed run, exactly where its last checkpoint stands."""
    with _shown_as_click_error():
        _launch(processes)
        _exit(_runs().resume(run_dir, gateway_url), run_dir)


@train.command()
@click.option("--config", "config_file", type=click.Path(path_type=Path), required=True, help="YAML file with `runs:`.")
def together(config_file: Path) -> None:
    """Train several adapters at once on one base model; the same command again goes on where they stand."""
    with _shown_as_click_error():
        runs = configs.load_together(config_file)
        outcomes = _runs().start_together(runs)
    for run, outcome in zip(runs, outcomes, strict=True):
        click.echo(f"{'failed: ' if isinstance(outcome, TrainError) else ''}{outcome}: {run.output_dir}")
    if any(isinstance(outcome, TrainError) for outcome in outcomes):
        sys.exit(1)
    if "paused" in outcomes:
        sys.exit(EXIT_PAUSED)


@train.command()
@click.argument("run_dir", type=click.Path(path_type=Path, exists=True, file_okay=False))
def pause(run_dir: Path) -> None:
    """Ask a run to stop after its step, with a checkpoint. Same as SIGUSR1, SIGTERM or Ctrl-C to its process."""
    PauseRequest(run_dir).ask()
    click.echo(f"asked; go on later with `gateway train resume {run_dir}`")


@train.command()
@click.option("--model", required=True, help="The base: checkpoint directory, hub id, or `demo`.")
@click.option("--adapter", required=True, type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--prompt", "prompts", multiple=True, default=_GOLDEN_PROMPTS, show_default=True, help="Repeatable.")
def golden(model: str, adapter: Path, prompts: tuple[str, ...]) -> None:
    """Give a PEFT directory from elsewhere golden prompts, by which the gateway checks what engines serve."""
    with _shown_as_click_error():
        count = _module("trainer.reference").write_goldens(model, adapter, prompts)
    click.echo(f"{count} golden prompts in {adapter / 'manifest.json'}")


@train.command("check-data")
@click.argument("data", nargs=-1, required=True)
@click.option("--method", type=click.Choice(list(configs.CONFIGS)), default="sft", show_default=True)
@click.option("--data-format", type=click.Choice(typing.get_args(FormatName)), default="auto", show_default=True)
@click.option("--grader", type=click.Path(path_type=Path), help="Of prompts: a grader's JSON file, which reads them.")
def check_data(data: tuple[str, ...], method: str, data_format: FormatName, grader: Path | None) -> None:
    """Check data row by row, without a model: every bad row is named. DATA is what --dataset takes."""
    parse = _PARSERS.get(method, parse_preference)
    with _shown_as_click_error():
        judge = graders.read(grader) if grader else None

        def check(row: dict[str, Any]) -> None:
            parsed = parse(row, data_format)
            if judge is not None and isinstance(parsed, Prompt):
                graders.check_item(judge, parsed.columns)  # what it is given of the row

        extras.require(extras.packages_of(data))
        summary = validate(data, check)
    click.echo(f"{summary.examples} good examples, sha256 {summary.sha256}")


@train.command("import-swift", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def import_swift(command: tuple[str, ...]) -> None:
    """Print a command line of ms-swift (COMMAND: swift sft --model ...) as a YAML file for --config.

    Comments in it name what could not be taken over, and what means something else here.
    """
    with _shown_as_click_error():
        click.echo(import_command(command), nl=False)


def _runs() -> ModuleType:
    return _module("trainer.run")


def _module(name: str) -> ModuleType:
    """A module of ours that imports torch. Raises ClickException where there is none."""
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        raise click.ClickException(
            f"training needs {' and '.join(missing)}: pip install 'tunegate[train]' "
            "(for a machine without GPU, take torch from its CPU index)"
        )
    # Beside a busy server on the same cores, threads that spin while they wait make a step several times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return importlib.import_module(name)


def _launch(processes: int | None) -> None:
    """Where it is asked for, have this very command done by so many processes and end as they do; they come by here."""
    if processes is not None and os.environ.get("WORLD_SIZE") != str(processes):
        by_gateway = sys.argv[1] == train.name
        sys.exit(launch(processes, sys.argv[2:] if by_gateway else sys.argv[1:]))


def _exit(ending: str, directory: Path) -> None:
    if os.environ.get("RANK", "0") == "0":  # of torchrun's processes one speaks
        if ending == "paused":
            count = os.environ.get("WORLD_SIZE")
            again = f"gateway train resume {directory}{f' --processes {count}' if count else ''}"
            click.echo(f"paused; go on with `{again}`", err=True)
        else:
            click.echo(f"{ending}: {directory}")
    if ending == "paused":
        sys.exit(EXIT_PAUSED)


class _shown_as_click_error:  # reads as a function where it is used
    """Every failure of the trainer becomes one message and exit status 1."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, TrainError | OSError):
            rank = os.environ.get("RANK", "0")
            # All processes have the same configuration; what one of several met alone, it tells.
            if rank != "0" and (isinstance(error, ConfigError) or TOLD in getattr(error, "__notes__", ())):
                sys.exit(1)
            raise click.ClickException(str(error) if rank == "0" else f"process {rank}: {error}") from error


class _Option(click.Option):
    """An option that knows its heading in --help."""

    group = "Options"


class _GroupedCommand(click.Command):
    """Lists options under their groups' headings."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                groups.setdefault(getattr(parameter, "group", "Options"), []).append(record)
        for heading, records in groups.items():
            with formatter.section(heading):
                formatter.write_dl(records, col_max=30)


def _option(name: str, info: FieldInfo) -> click.Option:
    extra = typing.cast(dict[str, Any], info.json_schema_extra)
    kind, multiple = _click_type(info.annotation)
    flag = "--" + name.replace("_", "-")
    shown = "" if info.default in (None, (), {}) or info.is_required() else _shown_default(info.default)
    option = _Option(
        [f"{flag}/--no-{flag[2:]}" if kind is bool else flag, name],
        type=kind,
        multiple=multiple,
        default=None,
        help=f"{info.description}{shown}",
    )
    option.group = str(extra["group"])
    return option


def _shown_default(value: Any) -> str:
    if isinstance(value, tuple):
        value = " ".join(map(str, value))
    return f" [{str(value).lower() if isinstance(value, bool) else value}]"


def _click_type(annotation: Any) -> tuple[Any, bool]:
    """(click type, repeatable) of a field's annotation; Optional is looked through."""
    arguments = [argument for argument in typing.get_args(annotation) if argument is not type(None)]
    origin = typing.get_origin(annotation)
    if origin is dict:
        return str, True
    if origin is tuple:
        return _click_type(arguments[0])[0], True
    if origin is typing.Literal:
        return click.Choice(arguments), False
    if arguments:
        return _click_type(arguments[0])
    return (click.Path(path_type=Path), False) if annotation is Path else (annotation, False)


def _given(flags: dict[str, Any], schema: type[configs.TrainConfig]) -> dict[str, Any]:
    """Only the flags that were really on the command line; KEY=VALUE ones as a mapping."""
    values = {name: value for name, value in flags.items() if value not in (None, ())}
    for name, value in values.items():
        if typing.get_origin(schema.model_fields[name].annotation) is dict:
            values[name] = _mapping(name, value)
    return values


def _mapping(name: str, items: Sequence[str]) -> dict[str, Any]:
    pairs = [item.rpartition("=") for item in items]
    for item, (key, _, _) in zip(items, pairs, strict=True):
        if not key:
            raise click.BadParameter(f"give KEY=VALUE, not {item!r}", param_hint=f"--{name.replace('_', '-')}")
    return {key: yaml.safe_load(value) for key, _, value in pairs}


for _name, _schema in configs.CONFIGS.items():
    train.add_command(_method_command(_name, _schema))
