"""`gateway adapters load`, `unload` and `residency`: which adapters replicas hold."""

from __future__ import annotations

from urllib.parse import quote

import click

from gateway.cli.adapters import adapters
from gateway.cli.client import GatewayClient, connection_options


@adapters.command()
@connection_options
@click.argument("name", metavar="NAME[@vN]")
@click.option("--replicas", type=int, help="On how many replicas. Default: on all.")
def load(name: str, replicas: int | None, url: str, api_key: str | None) -> None:
    """Load an adapter now, and keep it loaded."""
    path = f"/v1/adapters/{quote(name, safe='')}/load"
    adapter = GatewayClient(url, api_key).call("POST", path, json={"replicas": replicas})
    where = [replica["id"] for replica in adapter["replicas"] if replica["state"] == "ready"]
    if not where:
        raise click.ClickException(f"{name} is {adapter['state']}: {adapter['reason'] or 'no replica yet'}")
    click.echo(f"{name} is kept loaded, on {', '.join(where)}")


@adapters.command()
@connection_options
@click.argument("name", metavar="NAME[@vN]")
def unload(name: str, url: str, api_key: str | None) -> None:
    """Keep an adapter loaded no more. Where all fit it stays loaded; else it goes, until a request asks for it."""
    GatewayClient(url, api_key).call("POST", f"/v1/adapters/{quote(name, safe='')}/unload", json={})
    click.echo(f"{name} is not kept loaded any more")


@adapters.command()
@connection_options
def residency(url: str, api_key: str | None) -> None:
    """Show which replica holds what, and what loads cost so far."""
    shown = GatewayClient(url, api_key).call("GET", "/admin/residency")
    click.echo(shown["summary"])
    for replica in shown["replicas"]:
        mean_s = replica["load_seconds"] / replica["loads"] if replica["loads"] else 0.0
        click.echo(
            f"{replica['id']}: {len(replica['resident'])} of {replica['room']} held, {replica['loads']} loads "
            f"({mean_s:.2f} s each), {replica['evictions']} evictions"
        )
