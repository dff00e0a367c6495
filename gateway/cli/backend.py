"""`gateway backend …` and `gateway reload`: change a running gateway without a restart."""

from __future__ import annotations

import time
from typing import Any, get_args

import click

from backends.spec import BackendName
from gateway.cli.client import GatewayClient, connection_options, print_json

_POLL_S = 0.5


@click.group()
def backend() -> None:
    """Show or switch the engine of a running gateway. Needs a key with the scope `admin`."""


@backend.command()
@connection_options
def show(url: str, api_key: str | None) -> None:
    """Show the engine that serves, and how the last switch went."""
    print_json(GatewayClient(url, api_key).call("GET", "/admin/backend"))


@backend.command()
@connection_options
@click.argument("engine", type=click.Choice(get_args(BackendName)))
@click.option("--engine-version", help="An installed version. Default: the pinned one.")
@click.option("--engine-arg", multiple=True, help="Passed to the engine as it is; repeatable.")
@click.option("--tool-call-parser", help="The engine's parser for tool calls.")
@click.option("--reasoning-parser", help="The engine's parser for reasoning.")
@click.option("--memory-fraction", type=float, help="Share of device memory an engine may take.")
@click.option(
    "--replace",
    "mode",
    flag_value="replace",
    default="beside",
    help="Stop the old engine first: for a device that does not hold both. Answers 503 meanwhile.",
)
def switch(engine: str, url: str, api_key: str | None, **options: Any) -> None:
    """Start another engine, shift traffic to it once it has the adapters, then stop the old one.

    If it does not come up, the old one serves on. Lasts until the gateway stops: write it into the configuration too.
    """
    client = GatewayClient(url, api_key)
    given = {name: value for name, value in options.items() if value not in (None, ())}
    answer = client.call("POST", "/admin/backend", json=given | {"backend": engine})
    said = ""
    while (phase := _phase(answer)) not in ("done", "failed"):
        if phase != said:
            click.echo(f"{phase} …", err=True)
            said = phase
        time.sleep(_POLL_S)
        answer = client.call("GET", "/admin/backend")
    if phase == "failed":
        raise click.ClickException(f"not switched to {engine}: {answer['switch']['reason']}")
    click.echo(f"{engine} serves, after {answer['switch']['seconds']:g} s")


def _phase(answer: Any) -> str:
    """How far the switch is. Raises ClickException where the gateway knows of none any more."""
    if answer["switch"] is None:
        raise click.ClickException(
            f"the gateway's control process was started again meanwhile, and goes on with {answer['backend']}; see "
            "`gateway backend show`, and switch again if that is not the one"
        )
    return str(answer["switch"]["phase"])


@click.command("reload")
@connection_options
def reload_config(url: str, api_key: str | None) -> None:
    """Read --config again: replicas, keys, limits, the certificate. A fault in it changes nothing."""
    answer = GatewayClient(url, api_key).call("POST", "/admin/reload")
    changes = ", ".join(f"{name} {value}" for name, value in answer["changed"].items())
    click.echo(f"reloaded: {changes or 'nothing differs'}")
