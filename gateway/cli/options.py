"""Flags from a pydantic model: one option a field, help and groups from the field itself."""

from __future__ import annotations

import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
from pydantic import BaseModel
from pydantic.fields import FieldInfo

Command = TypeVar("Command", bound=Callable[..., Any])


def options_from(model: type[BaseModel]) -> Callable[[Command], Command]:
    """Decorate a click command with one flag per field of `model`; flags not given arrive as None or ()."""

    def decorate(command: Command) -> Command:
        for name, field in reversed(list(model.model_fields.items())):
            command = _option(name, field)(command)
        return command

    return decorate


def given(flags: dict[str, Any]) -> dict[str, Any]:
    """Only the flags that were really on the command line."""
    return {name: value for name, value in flags.items() if value not in (None, ())}


def _option(name: str, field: FieldInfo) -> Callable[[Command], Command]:
    extra = typing.cast(dict[str, Any], field.json_schema_extra or {})
    kind, multiple = _click_type(field.annotation)
    default = "" if field.default in (None, (), "") else field.default
    return click.option(
        "--" + name.replace("_", "-"),
        name,
        type=kind,
        multiple=multiple,
        envvar=extra.get("envvar"),
        help=(field.description or "") + (f" [{default}]" if default != "" else ""),
        cls=GroupedOption,
        group=extra.get("group", "Options"),
    )


def _click_type(annotation: Any) -> tuple[Any, bool]:
    """(click type, repeatable) of a field's annotation; Optional is looked through."""
    arguments = [argument for argument in typing.get_args(annotation) if argument is not type(None)]
    origin = typing.get_origin(annotation)
    if origin is tuple:
        return _click_type(arguments[0])[0], True
    if origin is typing.Literal:
        return click.Choice(arguments), False
    if arguments:
        return _click_type(arguments[0])
    if annotation is Path:
        return click.Path(path_type=Path), False
    return annotation, False


class GroupedOption(click.Option):
    """An option that knows the heading it is listed under."""

    def __init__(self, *args: Any, group: str = "Options", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.group = group


class GroupedCommand(click.Command):
    """A command whose --help lists its options under their groups' headings."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                groups.setdefault(getattr(parameter, "group", "Other"), []).append(record)
        for heading, records in groups.items():
            with formatter.section(heading):
                formatter.write_dl(records, col_max=28)
