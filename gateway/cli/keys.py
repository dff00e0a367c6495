"""`gateway keys …`: API keys of a running gateway, from the command line."""

from __future__ import annotations

import re
import time
from typing import Any, get_args

import click
from rich.console import Console
from rich.table import Table

from gateway.cli.client import GatewayClient, connection_options, print_json
from gateway.scopes import INFER, SCOPES, Period

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


class Span(click.ParamType[int]):
    """A span of time such as 90s, 30m, 12h or 30d, in seconds."""

    name = "span"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        match = re.fullmatch(r"(\d+)([smhd])", str(value))
        if match is None:
            self.fail(f"{value!r} is no span of time; give a number with s, m, h or d, e.g. 30d", param, ctx)
        return int(match[1]) * _SECONDS[match[2]]


@click.group()
def keys() -> None:
    """Make, list, rotate and revoke API keys of a running gateway. Needs a key with the scope `admin`."""


def _terms(command: Any) -> Any:
    """The options that say what a key may do."""
    for option in reversed(
        (
            click.option(
                "--scope",
                "scopes",
                type=click.Choice(list(SCOPES)),
                multiple=True,
                help=f"What it opens; repeatable [{INFER}].",
            ),
            click.option("--expires-in", "expires_in_s", type=Span(), help="Refuse it after this, e.g. 30d."),
            click.option("--requests-per-minute", type=click.IntRange(1), help="Over all relays."),
            click.option("--tokens-per-minute", type=click.IntRange(1), help="Prompt and answer together."),
            click.option("--token-budget", type=click.IntRange(1), help="Tokens in all, or each --budget-period."),
            click.option("--budget-period", type=click.Choice(get_args(Period)), help="Calendar time, UTC [total]."),
            click.option("--max-in-flight", type=click.IntRange(1), help="Requests at a time."),
            click.option("--priority", type=int, help="Higher goes first where requests wait [0]."),
        )
    ):
        command = option(command)
    return command


@keys.command()
@connection_options
@click.argument("name")
@_terms
def create(name: str, url: str, api_key: str | None, **terms: Any) -> None:
    """Make a key. It is printed this once, and cannot be shown again."""
    _print_secret(GatewayClient(url, api_key).call("POST", "/admin/keys", json={"name": name} | _given(terms)))


@keys.command("list")
@connection_options
@click.option("--json", "as_json", is_flag=True, help="Print the API's own answer.")
def list_keys(url: str, api_key: str | None, as_json: bool) -> None:
    """List keys with what they used."""
    answer = GatewayClient(url, api_key).call("GET", "/admin/keys")
    if as_json:
        print_json(answer)
        return
    table = Table(
        "id", "name", "state", "scopes", "expires", "req/min", "tok/min", "budget", "requests", "tokens", box=None
    )
    for key in answer["data"]:
        budget = "" if key["token_budget"] is None else f"{key['used']['budget_tokens']}/{key['token_budget']}"
        period = "" if key["budget_period"] == "total" or not budget else f" a {key['budget_period']}"
        expires = "" if key["expires_at"] is None else time.strftime("%Y-%m-%d %H:%M", time.gmtime(key["expires_at"]))
        table.add_row(
            *(key["id"], key["name"], key["state"], ",".join(key["scopes"]), expires),
            *(str(key[limit] or "") for limit in ("requests_per_minute", "tokens_per_minute")),
            *(budget + period, str(key["used"]["requests"]), str(key["used"]["tokens"])),
        )
    Console().print(table)


@keys.command()
@connection_options
@click.argument("key")
def show(key: str, url: str, api_key: str | None) -> None:
    """Show one key, by id or name: what it opens, its limits, what it used."""
    print_json(GatewayClient(url, api_key).call("GET", f"/admin/keys/{key}"))


@keys.command()
@connection_options
@click.argument("key")
@_terms
def change(key: str, url: str, api_key: str | None, **terms: Any) -> None:
    """Give a key other terms, from the next request on; what is not named stays."""
    changed = GatewayClient(url, api_key).call("PATCH", f"/admin/keys/{key}", json=_given(terms))
    print_json(changed)


@keys.command()
@connection_options
@click.argument("key")
@click.option(
    "--grace", "grace_s", type=Span(), default="0s", show_default=True, help="The old one stays good so long."
)
def rotate(key: str, grace_s: int, url: str, api_key: str | None) -> None:
    """Replace a key by a new one with the same id, limits and use. It is printed this once."""
    body = {"grace_s": grace_s}
    _print_secret(GatewayClient(url, api_key).call("POST", f"/admin/keys/{key}/rotate", json=body))


@keys.command()
@connection_options
@click.argument("key")
def revoke(key: str, url: str, api_key: str | None) -> None:
    """Refuse a key from now on, for good. Requests in flight finish."""
    revoked = GatewayClient(url, api_key).call("DELETE", f"/admin/keys/{key}")
    click.echo(f"{revoked['id']} ({revoked['name']}) revoked")


def _given(terms: dict[str, Any]) -> dict[str, Any]:
    return {
        name: list(value) if name == "scopes" else value for name, value in terms.items() if value not in (None, ())
    }


def _print_secret(key: dict[str, Any]) -> None:
    """The key alone on standard output, so that a script can take it."""
    click.echo(
        f"{key['id']} ({key['name']}): {', '.join(key['scopes'])}. Keep the key, it is not shown again:", err=True
    )
    click.echo(key["key"])
