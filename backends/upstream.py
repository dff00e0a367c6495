"""HTTP from control to one engine: a client, the engine's model list, and its errors in words.

Not the token path: that is the relay's own client.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import httpx2

from backends.base import AdapterRejected, Endpoint, EngineBusy, EngineUnreachable

ASK_TIMEOUT_S = 10.0
LOAD_TIMEOUT_S = 300.0  # a large adapter from a slow disk
UNLOAD_TIMEOUT_S = 60.0  # SGLang waits for the adapter's requests in flight, and may wait for ever

_BUSY = (429, 503)
_ERROR_LIMIT_CHARS = 500


@dataclass(frozen=True, slots=True)
class ModelCard:
    """One entry of an engine's `/v1/models`."""

    id: str
    parent: str | None
    owned_by: str
    max_model_len: int | None  # tokens


def connect(endpoint: Endpoint) -> httpx2.AsyncClient:
    """A client of one engine, with its key. The caller closes it."""
    headers = {"authorization": f"Bearer {endpoint.api_key}"} if endpoint.api_key else {}
    # trust_env off: a proxy of the environment is not for the loopback, and ~/.netrc would replace the key.
    return httpx2.AsyncClient(base_url=endpoint.url, headers=headers, timeout=ASK_TIMEOUT_S, trust_env=False)


async def get(client: httpx2.AsyncClient, path: str) -> httpx2.Response:
    """GET, any status. Raises EngineUnreachable when there is no answer, or the key is refused."""
    return await _send(client, "GET", path, None, ASK_TIMEOUT_S)


async def post(client: httpx2.AsyncClient, path: str, body: dict[str, Any], timeout_s: float) -> httpx2.Response:
    """POST JSON, any status. Raises EngineUnreachable when there is no answer, or the key is refused."""
    return await _send(client, "POST", path, body, timeout_s)


async def try_adapter(
    client: httpx2.AsyncClient, path: str, body: dict[str, Any], timeout_s: float, what: str
) -> httpx2.Response:
    """POST what shows whether an engine takes an adapter; the answer, of status 200. what: the request, in words.

    Raises EngineBusy where that shows nothing yet, AdapterRejected, EngineUnreachable.
    """
    try:
        response = await post(client, path, body, timeout_s)
    except EngineUnreachable as error:
        if isinstance(error.__cause__, httpx2.TimeoutException):
            raise EngineBusy(f"the engine had no time for {what}: {error}") from error
        raise
    if response.status_code in _BUSY:
        raise EngineBusy(f"the engine had no time for {what}: {error_text(response)}")
    if response.status_code != 200:
        raise AdapterRejected(f"the engine answered {what} by {response.status_code}: {error_text(response)}")
    return response


async def answers(client: httpx2.AsyncClient, path: str) -> httpx2.Response | None:
    """GET for a probe: the answer, or None when there is none."""
    try:
        return await client.get(path, timeout=ASK_TIMEOUT_S)
    except httpx2.HTTPError:
        return None


async def list_models(client: httpx2.AsyncClient) -> tuple[ModelCard, ...]:
    """What the engine says it serves, the base model first. Raises EngineUnreachable."""
    response = await get(client, "/v1/models")
    if response.status_code != 200:
        raise EngineUnreachable(f"{client.base_url}v1/models answered {response.status_code}: {error_text(response)}")
    try:
        return tuple(
            ModelCard(str(card["id"]), card.get("parent"), str(card.get("owned_by", "")), card.get("max_model_len"))
            for card in response.json()["data"]
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise EngineUnreachable(f"{client.base_url}v1/models answered no model list: {response.text[:200]}") from error


def error_text(response: httpx2.Response) -> str:
    """The message of an engine's error body, whichever of their shapes it has."""
    try:
        body = response.json()
    except ValueError:
        return response.text.strip()[:_ERROR_LIMIT_CHARS]
    if isinstance(body, dict):
        error = body.get("error")
        nested = error.get("message") if isinstance(error, dict) else error
        for message in (nested, body.get("error_message"), body.get("message"), body.get("detail")):
            if isinstance(message, str) and message:
                return message[:_ERROR_LIMIT_CHARS]
    return response.text.strip()[:_ERROR_LIMIT_CHARS]


async def _send(
    client: httpx2.AsyncClient, method: str, path: str, body: dict[str, Any] | None, timeout_s: float
) -> httpx2.Response:
    try:
        response = await client.request(method, path, json=body, timeout=timeout_s)
    except httpx2.TimeoutException as error:
        raise EngineUnreachable(f"the engine at {client.base_url} did not answer {path} in {timeout_s:g} s") from error
    except httpx2.HTTPError as error:
        raise EngineUnreachable(f"the engine at {client.base_url} cannot be reached: {error}") from error
    if response.status_code in (401, 403):
        raise EngineUnreachable(f"the engine at {client.base_url} refuses our API key; give the right one")
    return response
