"""`gateway models …`: base models in the store."""

from __future__ import annotations

import sys

import click
from rich.console import Console
from rich.table import Table

from backends.base import BackendError
from backends.progress import PlainProgress
from gateway import models as store
from gateway.config import ConfigError


@click.group()
def models() -> None:
    """Bring and list base models."""


@models.command("list")
def list_models() -> None:
    """List the models in the store."""
    table = Table("model", "MB", "path", box=None)
    for model in store.list_models():
        table.add_row(model.name, f"{model.size_bytes / 1e6:.0f}", str(model.path))
    Console().print(table)


@models.command()
@click.argument("model", metavar="demo|HUB-ID")
def pull(model: str) -> None:
    """Bring a model into the store: `demo` (needs no hub), or a hub id like org/name[@revision]."""
    try:
        path = store.ensure(model, PlainProgress(sys.stderr))
    except (ConfigError, BackendError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(path)
