"""`gateway adapters …`: the adapter API from the command line."""

from __future__ import annotations

import contextlib
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote

import click
from rich.console import Console
from rich.table import Table

from gateway.adapters.names import parse_reference
from gateway.cli import adapter_page
from gateway.cli.client import GatewayClient, connection_options, print_json
from gateway.cli.merge import merge_command

_ARCHIVES = (".zip", ".tar.gz", ".tgz")
_WAIT_S = 600  # the most the API waits; LMDeploy starts its engine again for an adapter


@click.group()
def adapters() -> None:
    """LoRA adapters of a running gateway: upload, versions, canaries, aliases."""


adapters.add_command(merge_command)


@adapters.command("list")
@connection_options
@click.option("--json", "as_json", is_flag=True, help="Print the API's own answer.")
def list_adapters(url: str, api_key: str | None, as_json: bool) -> None:
    """List adapters with their state."""
    answer = GatewayClient(url, api_key).call("GET", "/v1/adapters")
    if as_json:
        print_json(answer)
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
@click.option("--json", "as_json", is_flag=True, help="Print the API's own answer.")
def show(name: str, as_json: bool, url: str, api_key: str | None) -> None:
    """Show one adapter: its state and reason on each replica, versions, canary and history."""
    answer = GatewayClient(url, api_key).call("GET", f"/v1/adapters/{name}")
    if as_json:
        print_json(answer)
    else:
        adapter_page.show(answer)


@adapters.command()
@connection_options
@click.argument("source", type=click.Path(exists=True, path_type=Path))
@click.option("--name", required=True, help="Name to call it by.")
@click.option("--base", help="Base model it must fit. Default: the served one.")
@click.option("--no-promote", is_flag=True, help="Leave the name where it points, to try the version first.")
def upload(source: Path, name: str, base: str | None, no_promote: bool, url: str, api_key: str | None) -> None:
    """Upload a PEFT directory (or a .zip / .tar.gz of one) and wait until it can be called."""
    client = GatewayClient(url, api_key)
    started = time.monotonic()
    fields = {"name": name, "wait_s": str(_WAIT_S)} | ({"base": base} if base else {})
    fields |= {"promote": "false"} if no_promote else {}
    with _archive(source) as (filename, stream):
        adapter = client.call("POST", "/v1/adapters", data=fields, files={"file": (filename, stream)})
    if adapter["state"] != "ready":
        raise click.ClickException(f"{name} is stored but {adapter['state']}: {adapter['reason'] or 'no replica yet'}")
    click.echo(f"{name} v{adapter['version']} ready as {adapter['id']} in {time.monotonic() - started:.1f} s")


@adapters.command()
@connection_options
@click.argument("name")
def delete(name: str, url: str, api_key: str | None) -> None:
    """Delete an adapter, or one version by NAME@vN: requests in flight finish, new ones get a 404."""
    GatewayClient(url, api_key).call("DELETE", f"/v1/adapters/{name}")
    click.echo(f"{name} deleted")


def _expecting(command: Any) -> Any:
    """The option by which two operators cannot undo each other's moves unseen."""
    return click.option(
        "--expect", "expected_version", type=click.IntRange(1), help="Do nothing unless NAME points to this version."
    )(command)


@adapters.command()
@connection_options
@click.argument("reference", metavar="NAME[@vN]")
@click.option("--version", type=int, help="The version, if not given as NAME@vN.")
@_expecting
def promote(reference: str, version: int | None, expected_version: int | None, url: str, api_key: str | None) -> None:
    """Point NAME to a version, for all relays at once; without one to its canary, or the newest."""
    name, number = _version_of(reference, version)
    body = {"version": number, "expected_version": expected_version}
    answer = GatewayClient(url, api_key).call("POST", _path(name, "promote"), json=body)
    _say_where(name, answer)


@adapters.command()
@connection_options
@click.argument("name")
@_expecting
def rollback(name: str, expected_version: int | None, url: str, api_key: str | None) -> None:
    """End NAME's canary; where none runs, point NAME to where it pointed before."""
    body = {"expected_version": expected_version}
    _say_where(name, GatewayClient(url, api_key).call("POST", _path(name, "rollback"), json=body))


@adapters.command()
@connection_options
@click.argument("reference", metavar="NAME@vN")
@click.option("--version", type=int, help="The version, if not given as NAME@vN.")
@_expecting
@click.option("--weight", type=float, required=True, help="Percent of the requests, 0.1 to 99.")
@click.option("--manual", is_flag=True, help="Decide nothing: it runs until `promote` or `rollback`.")
@click.option("--min-requests", type=int, help="Requests of each version before it may be promoted.")
@click.option("--max-error-increase", type=float, help="By how much the share of failed requests may grow.")
@click.option("--max-slowdown", type=float, help="How many times the baseline's a mean time may be.")
def canary(
    reference: str, version: int | None, weight: float, manual: bool, url: str, api_key: str | None, **policy: Any
) -> None:
    """Try a version on a share of NAME's requests; it is promoted or rolled back by what they come to."""
    name, number = _version_of(reference, version)
    if number is None:
        raise click.ClickException(f"which version of {name}? Give {name}@vN")
    given = {field: value for field, value in policy.items() if value is not None}
    body = {"version": number, "weight": weight, "automatic": not manual, **given}
    GatewayClient(url, api_key).call("POST", _path(name, "canary"), json=body)
    click.echo(f"{name}@v{number} gets {weight:g} % of {name}; `gateway adapters show {name}` shows how it does")


@adapters.command()
@connection_options
@click.argument("alias")
@click.argument("reference", metavar="[NAME[@vN]]", required=False)
@click.option("--delete", "remove", is_flag=True, help="Forget the alias.")
def alias(alias: str, reference: str | None, remove: bool, url: str, api_key: str | None) -> None:
    """Make ALIAS another name of an adapter, or of one of its versions."""
    client = GatewayClient(url, api_key)
    if remove == (reference is not None):
        raise click.ClickException("give either the name that ALIAS stands for, or --delete")
    if reference is None:
        name = client.call("GET", f"/v1/adapters/{quote(alias, safe='')}")["name"]
        client.call("DELETE", f"{_path(name, 'aliases')}/{quote(alias, safe='')}")
        click.echo(f"{alias} deleted")
        return
    name, number = parse_reference(reference)
    client.call("POST", _path(name, "aliases"), json={"alias": alias, "version": number})
    click.echo(f"{alias} stands for {reference}")


def _version_of(reference: str, version: int | None) -> tuple[str, int | None]:
    """Name and version of `NAME@vN`, or of NAME and --version."""
    name, number = parse_reference(reference)
    if None not in (number, version) and number != version:
        raise click.ClickException(f"{reference} and --version {version} contradict each other")
    return name, version if number is None else number


def _path(name: str, action: str) -> str:
    return f"/v1/adapters/{quote(name, safe='')}/{action}"


def _say_where(name: str, adapter: dict[str, Any]) -> None:
    current, coming = adapter["current_version"], adapter["coming"]
    later = f"; v{coming} follows when every replica has it" if coming is not None else ""
    click.echo(f"{name} points to v{current}{later}")


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
