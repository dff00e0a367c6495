"""Reading the configuration again: the file is judged whole first, and what cannot change while running is refused."""

from __future__ import annotations

import logging
from typing import Any

from gateway import config as configuration
from gateway.config import ConfigError, ServeConfig
from gateway.control.estate import CannotStart, Estate
from gateway.errors import InvalidRequest
from gateway.preflight import check_tls
from gateway.snapshot import Limits

_log = logging.getLogger(__name__)
_PURPOSE = "fewer replicas"
_SECRET = frozenset({"api_key"})

# What takes effect without a restart. The certificate's files are read again at every reload.
RELOADABLE = frozenset({"replicas", "api_key", "max_body_mb", "request_timeout_s"})


class Reload:
    """Applies the configuration file as it is now."""

    def __init__(self, estate: Estate) -> None:
        self._estate = estate

    async def run(self) -> dict[str, Any]:
        """Read, judge and apply; what changed.

        Raises Conflict, and InvalidRequest with every fault; then nothing has changed.
        """
        with self._estate.changing():
            running = self._estate.running
            declared = self._judged(running.file, running.flags)
            changes = changed(running.declared, declared)
            config = running.config.model_copy(update={name: getattr(declared, name) for name in changes})
            await self._apply(config)
            self._estate.note(
                running.model_copy(update={"config": config, "declared": declared}), self._staying(config)
            )
            shown = {name: _shown(name, config) for name in sorted(changes)}
            _log.info(
                "reloaded: %s", ", ".join(f"{name} {value}" for name, value in shown.items()) or "nothing differs"
            )
            return {"object": "reload", "changed": shown}

    def _judged(self, file: Any, flags: dict[str, Any]) -> ServeConfig:
        """The configuration as it is now, if all of it can be applied. Raises InvalidRequest."""
        running = self._estate.running
        try:
            declared = configuration.load(file, flags)
            check_tls(declared)
        except ConfigError as error:
            raise InvalidRequest(f"nothing was changed: {error}") from error
        names = changed(running.declared, declared)
        fixed = [
            name
            for name in sorted(names - RELOADABLE)
            if getattr(declared, name) != getattr(running.config, name)  # what was switched to may be written down
        ]
        if "replicas" in names and not self._estate.owned:
            fixed.append("replicas")
        if fixed:
            raise InvalidRequest(
                f"nothing was changed: {', '.join(fixed)} cannot change while the gateway runs; restart it, or put "
                f"back what was there. A reload changes {', '.join(sorted(RELOADABLE))}, and POST /admin/backend the "
                "engine",
                code="restart_needed",
            )
        if self._estate.core.keys.would_open(declared.api_key):
            raise InvalidRequest(
                "nothing was changed: without api_key, and with no stored key, access would be open to everybody; put "
                "a key back, make one with `gateway keys create`, or restart to open access",
                param="api_key",
            )
        return declared

    async def _apply(self, config: ServeConfig) -> None:
        core = self._estate.core
        more = config.replicas - len(self._estate.staying) if self._estate.owned else 0
        if more > 0:
            try:
                await self._estate.add(config, more)  # first: it is all that can fail
            except CannotStart as error:
                raise InvalidRequest(f"nothing was changed: {error}") from error
        core.configure(limits_of(config))
        core.keys.configure(config.api_key)
        if more < 0:
            self._estate.begin_to_retire(self._estate.staying[more:], _PURPOSE, config.drain_timeout_s)
        await core.published()

    def _staying(self, config: ServeConfig) -> list[Any]:
        return self._estate.staying[: config.replicas] if self._estate.owned else []


def changed(before: ServeConfig, after: ServeConfig) -> set[str]:
    """The names of the fields that differ."""
    return {name for name in ServeConfig.model_fields if getattr(before, name) != getattr(after, name)}


def limits_of(config: ServeConfig) -> Limits:
    """What relays are told."""
    return Limits(config.max_body_mb * 1_000_000, config.request_timeout_s)


def _shown(name: str, config: ServeConfig) -> Any:
    value = getattr(config, name)
    return f"{len(value)} keys" if name in _SECRET else value
