"""Flags from the configuration struct: one option a field, its help and group from the field itself."""

from __future__ import annotations

import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
import msgspec

from bench.config import RunConfig
from bench.workload.spec import FORMS

Command = TypeVar("Command", bound=Callable[..., Any])
_ENVIRONMENT = {"api_key": "OPENAI_API_KEY"}


class _Option(click.Option):
    """An option that knows the heading it is listed under."""

    def __init__(self, *args: Any, group: str = "Options", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.group = group


class GroupedCommand(click.Command):
    """A command whose --help lists its options under headings, and the workloads' forms below."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                groups.setdefault(getattr(parameter, "group", "Options"), []).append(record)
        for heading, records in groups.items():
            with formatter.section(heading):
                formatter.write_dl(records, col_max=28)
        with formatter.section("Workloads"):
            formatter.write_dl([tuple(line.split(None, 1)) for line in FORMS.splitlines()])  # type: ignore[misc]  # pairs


def run_options(command: Command) -> Command:
    """Add one flag a field of RunConfig; flags not given arrive as None or ()."""
    hints = typing.get_type_hints(RunConfig, include_extras=True)
    for field in reversed(msgspec.structs.fields(RunConfig)):
        annotated = hints[field.name]
        kind, *metadata = typing.get_args(annotated)
        meta: msgspec.Meta = metadata[0]
        click_type, multiple = _click_type(kind)
        default = "" if field.default is None or field.default is False or field.default in ((), "") else field.default
        names = [f"--{field.name.replace('_', '-')}"]
        command = click.option(
            *names,
            field.name,
            cls=_Option,
            group=(meta.extra or {}).get("group", "Options"),
            type=None if click_type is bool else click_type,
            is_flag=click_type is bool,
            default=None,
            multiple=multiple,
            envvar=_ENVIRONMENT.get(field.name),
            help=(meta.description or "") + (f" [{default}]" if default != "" else ""),
        )(command)
    return command


def given(flags: dict[str, Any]) -> dict[str, Any]:
    """Only the flags that were really on the command line."""
    # compared one by one: a flag of 0 was given, and 0 == False
    return {name: value for name, value in flags.items() if value is not None and value is not False and value != ()}


def _click_type(kind: Any) -> tuple[Any, bool]:
    """(click type, repeatable) of a field's annotation; Optional is looked through."""
    origin, arguments = typing.get_origin(kind), [a for a in typing.get_args(kind) if a is not type(None)]
    if origin is tuple:
        return _click_type(arguments[0])[0], True
    if origin is typing.Literal:
        return click.Choice(arguments), False
    if origin in (typing.Union, types.UnionType):
        return _click_type(arguments[0])
    return (click.Path(path_type=Path), False) if kind is Path else (kind, False)
