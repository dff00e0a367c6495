"""`gateway engines …`: the engine environments of this machine."""

from __future__ import annotations

import sys
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from backends import doctor as checks
from backends import envs, install, registry
from backends.base import BackendError
from backends.progress import PlainProgress
from backends.spec import BACKEND_NAMES, Device


@click.group()
def engines() -> None:
    """Install and inspect engines: one environment each, because their dependencies exclude each other."""


@engines.command("list")
def list_engines() -> None:
    """List engines on offer, which are installed, and what each can do."""
    table = Table("engine", "version", "device", "state", "", box=None)
    for env in envs.CATALOGUE:
        table.add_row(env.name, env.version, env.device, env.state(), env.note)
    Console().print(table)
    for name in BACKEND_NAMES:
        able = registry.get(name).capabilities
        click.echo(f"\n{name}")
        click.echo(f"  adapters    loaded {able.adapter_loading}")
        click.echo(f"  quantized   {' '.join(able.quantizations)}")
        click.echo(f"  serves      chat, completions{', embeddings' if able.embeddings else ''}")
        for note in able.notes:
            click.echo(f"  note        {note}")


@engines.command("install")
@click.argument("engine", metavar="NAME[==VERSION]")
@click.option("--device", type=click.Choice(["cuda", "cpu"]), help="Default: cuda where there is one.")
@click.option(
    "--find-links",
    multiple=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Install from this folder of wheels and nothing else; repeatable.",
)
def install_engine(engine: str, device: Device | None, find_links: tuple[Path, ...]) -> None:
    """Make the environment of an engine (vllm, sglang or lmdeploy). One that is there already is left alone."""
    name, _, version = engine.partition("==")
    try:
        install.install(name, version or None, device, find_links, PlainProgress(sys.stderr))
    except BackendError as error:
        raise click.ClickException(str(error)) from error


@engines.command()
def doctor() -> None:
    """Say in plain words what this machine has, what is missing, and what to do."""
    for finding in checks.doctor():
        click.echo(f"{finding.verdict:8} {finding.subject}: {finding.found}")
        if finding.advice:
            click.echo(f"{'':8} {finding.advice}")
