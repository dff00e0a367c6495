"""`gateway adapters …`: the adapter API from the command line."""

from __future__ import annotations

import contextlib
import json
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import click
from rich.console import Console
from rich.table import Table

from gateway.cli.client import GatewayClient, connection_options

_ARCHIVES = (".zip", ".tar.gz", ".tgz")
_WAIT_S = 600  # the most the API waits; LMDeploy starts its engine again for an adapter


@click.group()
def adapters() -> None:
    """Upload, list and delete LoRA adapters of a running gateway."""


@adapters.command("list")
@connection_options
@click.option("--json", "as_json", is_flag=True, help="Print the API's own answer.")
def list_adapters(url: str, api_key: str | None, as_json: bool) -> None:
    """List adapters with their state."""
    answer = GatewayClient(url, api_key).call("GET", "/v1/adapters")
    if as_json:
        click.echo(json.dumps(answer, indent=2))
        return
    table = Table("name", "version", "state", "rank", "MB", "id", "reason", box=None)
    for adapter in answer["data"]:
        size_mb = f"{adapter['bytes'] / 1e6:.1f}"
        row = (adapter["name"], f"v{adapter['version']}", adapter["state"], str(adapter["rank"]), size_mb)
        table.add_row(*row, adapter["id"], adapter["reason"] or "")
    Console().print(table)


@adapters.command()
@connection_options
@click.argument("name")
def show(name: str, url: str, api_key: str | None) -> None:
    """Show one adapter, with its state and reason on each replica."""
    click.echo(json.dumps(GatewayClient(url, api_key).call("GET", f"/v1/adapters/{name}"), indent=2))


@adapters.command()
@connection_options
@click.argument("source", type=click.Path(exists=True, path_type=Path))
@click.option("--name", required=True, help="Name to call it by.")
@click.option("--base", help="Base model it must fit. Default: the served one.")
def upload(source: Path, name: str, base: str | None, url: str, api_key: str | None) -> None:
    """Upload a PEFT directory (or a .zip / .tar.gz of one) and wait until it can be called."""
    client = GatewayClient(url, api_key)
    started = time.monotonic()
    fields = {"name": name, "wait_s": str(_WAIT_S)} | ({"base": base} if base else {})
    with _archive(source) as (filename, stream):
        adapter = client.call("POST", "/v1/adapters", data=fields, files={"file": (filename, stream)})
    if adapter["state"] != "ready":
        raise click.ClickException(f"{name} is stored but {adapter['state']}: {adapter['reason'] or 'no replica yet'}")
    click.echo(f"{name} v{adapter['version']} ready as {adapter['id']} in {time.monotonic() - started:.1f} s")


@adapters.command()
@connection_options
@click.argument("name")
def delete(name: str, url: str, api_key: str | None) -> None:
    """Delete an adapter: requests in flight finish, new ones get a 404."""
    GatewayClient(url, api_key).call("DELETE", f"/v1/adapters/{name}")
    click.echo(f"{name} deleted")


@contextlib.contextmanager
def _archive(source: Path) -> Iterator[tuple[str, BinaryIO]]:
    """The upload as (file name, stream): an archive as it is, a directory packed beside the temp files."""
    if source.is_file():
        if not source.name.endswith(_ARCHIVES):
            raise click.ClickException(f"{source} is neither a directory nor one of {', '.join(_ARCHIVES)}")
        with source.open("rb") as stream:
            yield source.name, stream
        return
    if not (source / "adapter_config.json").is_file():
        raise click.ClickException(f"{source} has no adapter_config.json: not a PEFT adapter directory")
    with tempfile.TemporaryFile() as packed:
        with tarfile.open(fileobj=packed, mode="w:gz", compresslevel=1, dereference=True) as tar:
            for file in _files_of(source):
                tar.add(file, arcname=file.name, recursive=False)
        packed.seek(0)
        yield f"{source.name}.tar.gz", packed


def _files_of(directory: Path) -> list[Any]:
    return sorted(path for path in directory.iterdir() if path.is_file())
