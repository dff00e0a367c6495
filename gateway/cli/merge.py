"""`gateway adapters merge`: a checkpoint with an adapter in its weights. Works on files; no gateway need run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from gateway import config, models
from gateway.adapters.merge import MergeError, merge
from gateway.adapters.names import content_id
from gateway.cli.client import GatewayClient, connection_options


@click.command("merge")
@connection_options
@click.argument("source", metavar="NAME|DIR")
@click.option("--model", "base", required=True, help="Base checkpoint: directory, hub id or `demo`.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="New directory for the merged checkpoint.")
@click.option(
    "--state", type=click.Path(path_type=Path), help="The gateway's --state, to find NAME in. Default: its default."
)
def merge_command(source: str, base: str, out: Path, state: Path | None, url: str, api_key: str | None) -> None:
    """Write a checkpoint whose weights hold an adapter: a PEFT directory, or one of a gateway on this machine."""
    adapter = Path(source)
    if not adapter.is_dir():
        shown = _answering(GatewayClient(url, api_key), source)
        adapter = (state or config.home() / "state") / "adapters" / content_id(shown["sha256"])
    try:
        merged = merge(adapter, models.resolve(base), out)
    except (MergeError, models.ModelError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"{merged.weights} weights changed: {merged.path}")


def _answering(client: GatewayClient, reference: str) -> dict[str, Any]:
    """The version that a name answers with, also while it is on its way to another."""
    shown: dict[str, Any] = client.call("GET", f"/v1/adapters/{reference}")
    name, current = shown["name"], shown["current_version"]
    follows = reference == name or (reference in shown["aliases"] and shown["aliases"][reference] is None)
    if follows and current not in (None, shown["version"]):
        shown = client.call("GET", f"/v1/adapters/{name}@v{current}")
    return shown
