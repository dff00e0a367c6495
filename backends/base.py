"""The contract that each engine's file fulfils. Pure where it can be; HTTP only in the adapter operations.

A `Backend` knows how one engine is started and spoken to; it holds no state of a running replica. What a caller
may not assume:

- that a load which answered 200 took effect: ask `list_adapters`, then send a real request;
- that an unload revokes (SGLang reloads an unloaded adapter on the next request for it);
- that two operations on one replica may overlap: the caller serialises them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx2

from backends.spec import BackendName, Capabilities, EngineSpec


class BackendError(Exception):
    """Base of what this package raises for a caller to show. The message is for a person."""


class UnsupportedSpec(BackendError):
    """The spec asks for what this engine cannot do; says what and what to do instead."""


class AdapterRejected(BackendError):
    """The engine refused an adapter; the message is the engine's own."""


class EngineBusy(BackendError):
    """The engine has no time for a request of ours; it is asked again later."""


class EngineUnreachable(BackendError):
    """The engine did not answer, or not with what it should."""


@dataclass(frozen=True, slots=True)
class Launch:
    """A process to start: `argv[0]` is absolute; `env` is added to the caller's cleaned environment.

    defaults: variables that the caller's environment may say otherwise.
    """

    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a running engine listens, and the key it wants ("" for none)."""

    host: str
    port: int
    api_key: str

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"


class Backend(ABC):
    """One engine: argv, readiness, adapter operations, names."""

    name: BackendName
    capabilities: Capabilities

    @abstractmethod
    def check(self, spec: EngineSpec) -> None:
        """Refuse what this engine cannot serve, before anything starts. Raises UnsupportedSpec."""

    @abstractmethod
    def launch(
        self,
        spec: EngineSpec,
        executable: tuple[str, ...],
        endpoint: Endpoint,
        static_adapters: Mapping[str, Path],
    ) -> Launch:
        """The command that serves `spec` at `endpoint`.

        executable: what starts this engine's command line, e.g. (`<env>/bin/vllm`,) or the emulator's.
        static_adapters: adapter id -> directory, for engines that load at start; empty otherwise.
        """

    @abstractmethod
    def engine_model(self, served_name: str, adapter_id: str | None) -> str:
        """The `model` value with which this engine answers for the base (None) or for an adapter."""

    @abstractmethod
    async def is_ready(self, client: httpx2.AsyncClient) -> bool:
        """True once the engine answers requests. False while it starts; raises EngineUnreachable never."""

    async def warm_up(self, client: httpx2.AsyncClient, spec: EngineSpec) -> None:  # noqa: B027 - most need none
        """Make a just started engine do what it would first do, slowly, for a client. It may take minutes.

        Raises EngineUnreachable when the engine is gone; one that has no time for it is left as it is.
        """

    @abstractmethod
    async def load_adapter(self, client: httpx2.AsyncClient, adapter_id: str, path: Path) -> None:
        """Ask for a load. Raises AdapterRejected, EngineUnreachable, UnsupportedSpec (no runtime load)."""

    @abstractmethod
    async def unload_adapter(self, client: httpx2.AsyncClient, adapter_id: str) -> None:
        """Ask for an unload; unknown ids are fine. Raises EngineUnreachable, UnsupportedSpec."""

    @abstractmethod
    async def list_adapters(self, client: httpx2.AsyncClient) -> frozenset[str]:
        """The adapter ids the engine itself lists. Raises EngineUnreachable."""

    @abstractmethod
    async def score(
        self,
        client: httpx2.AsyncClient,
        names: tuple[str, str | None],
        prompt: Sequence[int],
        answer: Sequence[int],
        timeout_s: float,
    ) -> list[float] | None:
        """The natural log-probability of each token of an answer, given the prompt and the tokens before it.

        names: the base's at the engine, and the adapter's (None: the base alone). None: this engine cannot say. It may
        be asked of the first tokens alone: at least as far as it would answer so itself, and one token more.
        Raises AdapterRejected, EngineBusy, EngineUnreachable.
        """

    @abstractmethod
    def start_failure(self, log_tail: str) -> str | None:
        """The cause of a failed start, in words with advice, found in the engine's own log; None if unknown."""
