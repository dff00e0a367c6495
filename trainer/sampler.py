"""Answers from a live gateway: the adapter as it stands is published as a version, then called over the OpenAI API.

Only adapters travel, never a merged model; a version is immutable, so an answer's log-probabilities belong to exactly
the weights that were published.
"""

from __future__ import annotations

import io
import itertools
import os
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from trainer.errors import RolloutError
from trainer.formats import Message

_PUBLISH_WAIT_S = 600  # the most the gateway waits for its replicas
_LONGEST_PAUSE_S = 30.0  # before a request is sent again that the gateway could not take; it says when to come back
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True, slots=True)
class Sampled:
    """One answer: its text, its token ids where the engine gives them, and each token's log-probability."""

    text: str
    prompt_token_ids: list[int] | None
    token_ids: list[int] | None
    logprobs: list[float]
    finished: bool  # by a stop token, not by the limit


class Gateway:
    """A gateway, as a trainer uses it. Its methods may be called from several threads."""

    def __init__(self, url: str, timeout_s: float, sleep: Callable[[float], None]) -> None:
        """timeout_s: for room, and once there is room for the answer."""
        key = os.environ.get("TUNEGATE_API_KEY")
        # Users' requests go first; a rollout takes the room that nobody waits for.
        headers = {"x-priority": "batch"} | ({"authorization": f"Bearer {key}"} if key else {})
        own = httpx2.URL(url).host in _LOOPBACK
        self._client = httpx2.Client(
            base_url=url.rstrip("/").removesuffix("/v1"),
            timeout=httpx2.Timeout(timeout_s, connect=10),
            headers=headers,
            limits=httpx2.Limits(max_connections=None),
            # Over the loopback it can be no other, and its certificate is made out for its public name. A proxy of the
            # environment would look for it on the proxy's machine.
            verify=not own,
            trust_env=not own,
        )
        self._url = url
        self._timeout_s = timeout_s
        self._sleep = sleep

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def base_model(self) -> str:
        """The name of the served base model. Raises RolloutError."""
        models = self._call("GET", "/v1/models")["data"]
        names = [model["id"] for model in models if not model.get("parent")]
        if not names:
            raise RolloutError(f"{self._url} serves no base model")
        return str(names[0])

    def publish(self, name: str, write: Callable[[Path], None]) -> str:
        """Upload what `write` puts into a directory as the next version; the name of exactly that one.

        Raises RolloutError, OSError.
        """
        with tempfile.TemporaryDirectory(prefix="tunegate-publish-") as directory:
            write(Path(directory))
            return self.upload(name, _zip(Path(directory)))

    def upload(self, name: str, archive: bytes) -> str:
        """As `publish`, of an archive already made."""
        adapter = self._call(
            "POST",
            "/v1/adapters",
            data={"name": name, "wait_s": str(_PUBLISH_WAIT_S)},
            files={"file": ("adapter.zip", archive)},
        )
        pinned = f"{name}@v{adapter['version']}"
        if adapter["state"] != "ready":
            reason = adapter["reason"] or "no replica answers with it"
            raise RolloutError(f"{self._url} has {pinned} {adapter['state']}: {reason}")
        return pinned

    def forget(self, name: str) -> None:
        """Delete an adapter or one version; gone already is as good. Raises RolloutError."""
        self._call("DELETE", f"/v1/adapters/{name}", missing_is_fine=True)

    def sample(self, model: str, messages: list[Message], **settings: Any) -> Sampled:
        """One answer with log-probabilities. `settings`: more members of the request. Raises RolloutError."""
        body = {
            "model": model,
            "messages": messages,
            "logprobs": True,
            "return_token_ids": True,  # vLLM's; others pass over it
            **{key: value for key, value in settings.items() if value is not None},
        }
        answer = self._call("POST", "/v1/chat/completions", json=body)
        choice = answer["choices"][0]
        content = (choice.get("logprobs") or {}).get("content") or []
        return Sampled(
            text=choice["message"].get("content") or "",
            prompt_token_ids=answer.get("prompt_token_ids"),
            token_ids=choice.get("token_ids"),
            logprobs=[float(entry["logprob"]) for entry in content],
            finished=choice.get("finish_reason") == "stop",
        )

    def _call(self, method: str, path: str, *, missing_is_fine: bool = False, **content: Any) -> dict[str, Any]:
        deadline_s = time.monotonic() + self._timeout_s
        for attempt in itertools.count():
            try:
                response = self._client.request(method, path, **content)
            except httpx2.HTTPError as error:
                raise RolloutError(
                    f"the gateway at {self._url} did not answer {method} {path}: {error or type(error).__name__}"
                ) from error
            spent = response.headers.get("x-should-retry") == "false"
            if response.status_code not in (429, 503) or spent or time.monotonic() > deadline_s:
                break
            self._sleep(_pause_s(response.headers, attempt))
        if response.is_success or (missing_is_fine and response.status_code == 404):
            answer: dict[str, Any] = response.json()
            return answer
        raise RolloutError(f"the gateway refused {method} {path} with {response.status_code}: {_message(response)}")


def _pause_s(headers: Any, attempt: int) -> float:
    try:
        asked_s = float(headers.get("retry-after-ms", "")) / 1000
    except ValueError:
        asked_s = 2.0 ** min(attempt, 10)
    return min(asked_s, _LONGEST_PAUSE_S)


def _message(response: Any) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return response.text[:200] or "no reason given"


def _zip(directory: Path) -> bytes:
    stream = io.BytesIO()
    # The same files give the same bytes, which the gateway knows again.
    with zipfile.ZipFile(stream, "w") as archive:
        for file in sorted(directory.iterdir()):
            archive.writestr(zipfile.ZipInfo(file.name), file.read_bytes())
    return stream.getvalue()
