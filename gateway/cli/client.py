"""HTTP from the command line to a running gateway, with its errors shown as one line."""

from __future__ import annotations

import json
import ssl
from typing import Any

import click
import httpx2


class GatewayClient:
    """Calls the gateway's API; every failure becomes a click error with the server's own message."""

    def __init__(self, url: str, api_key: str | None) -> None:
        headers = {"authorization": f"Bearer {api_key}".encode()} if api_key else {}  # it need not be ASCII
        self._url = url.rstrip("/")
        timeout = httpx2.Timeout(10, read=660, write=660)  # uploads wait until the adapter answers
        # The system's certificates, or those of $SSL_CERT_FILE: for a gateway with a certificate of one's own.
        verify = ssl.create_default_context()
        self._options: dict[str, Any] = {
            "base_url": self._url, "headers": headers, "timeout": timeout, "trust_env": False, "verify": verify,
        }  # fmt: skip

    def call(self, method: str, path: str, **kwargs: Any) -> Any:
        """The decoded JSON answer of one request. Raises click.ClickException."""
        try:
            with httpx2.Client(**self._options) as http:
                response = http.request(method, path, **kwargs)
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise click.ClickException(
                f"no answer from {self._url} ({error}); start it with `gateway serve`, or name it by --url"
            ) from error
        if response.is_error:
            raise click.ClickException(_message(response))
        try:
            return response.json()
        except ValueError as error:
            raise click.ClickException(f"{response.request.url} answered no JSON: --url names no gateway") from error


def print_json(answer: Any) -> None:
    """The API's own answer, for scripts."""
    click.echo(json.dumps(answer, indent=2))


def _message(response: httpx2.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"{response.request.url} answered {response.status_code}: {response.text[:200]}"


def connection_options(command: Any) -> Any:
    """Add --url and --api-key (or $TUNEGATE_URL, $TUNEGATE_API_KEY) of the gateway to call."""
    command = click.option("--api-key", envvar="TUNEGATE_API_KEY", help="Key of the gateway [$TUNEGATE_API_KEY].")(
        command
    )
    return click.option(
        "--url",
        envvar="TUNEGATE_URL",
        default="http://127.0.0.1:8000",
        show_default=True,
        help="The running gateway [$TUNEGATE_URL].",
    )(command)
