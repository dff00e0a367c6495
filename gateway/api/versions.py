"""`/v1/adapters/{name}/…`: promote, rollback, canary, aliases."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Header
from pydantic import BaseModel, ConfigDict, Field

from gateway.control.canary import Policy
from gateway.control.service import Service

_DEFAULTS = Policy()
_DEFAULT_WAIT_S = 60.0
_LONGEST_WAIT_S = 600.0

Who = Annotated[str, Header(alias="x-tunegate-key-id")]  # set by the relay, never by the client


class Body(BaseModel):
    """A body whose unknown members are refused."""

    model_config = ConfigDict(extra="forbid")


class Moving(Body):
    """What moves a name. expected_version: what it points to as far as the caller knows; 409 where it does not."""

    expected_version: int | None = Field(default=None, ge=1)


class Promote(Moving):
    """Where to point the name; without a version to its canary, or the newest where none runs."""

    version: int | None = Field(default=None, ge=1)
    wait_s: float = Field(default=_DEFAULT_WAIT_S, ge=0, le=_LONGEST_WAIT_S)


class Rollback(Moving):
    """End the canary; where none runs, point the name to where it pointed before."""

    wait_s: float = Field(default=_DEFAULT_WAIT_S, ge=0, le=_LONGEST_WAIT_S)


class StartCanary(Moving):
    """Which version gets how many percent of the requests, and what decides over it."""

    version: int = Field(ge=1)
    weight: float
    automatic: bool = _DEFAULTS.automatic
    min_requests: int = Field(default=_DEFAULTS.min_requests, ge=20, le=10_000_000)
    max_error_increase: float = Field(default=_DEFAULTS.max_error_increase, gt=0, lt=1)
    max_slowdown: float = Field(default=_DEFAULTS.max_slowdown, ge=1, le=1000)


class Alias(Body):
    """Another name, of whatever the adapter's name points to, or of one version."""

    alias: str
    version: int | None = Field(default=None, ge=1)


def routes(service: Service) -> APIRouter:
    """Every answer is the adapter object after the change."""
    router = APIRouter()
    versions = service.versions

    @router.post("/v1/adapters/{name}/promote")
    async def promote(name: str, body: Promote | None = None, who: Who = "") -> dict[str, Any]:
        asked = body or Promote()
        await versions.promote(name, asked.version, who, asked.wait_s, asked.expected_version)
        return service.adapter(name)

    @router.post("/v1/adapters/{name}/rollback")
    async def roll_back(name: str, body: Rollback | None = None, who: Who = "") -> dict[str, Any]:
        asked = body or Rollback()
        await versions.roll_back(name, who, asked.wait_s, asked.expected_version)
        return service.adapter(name)

    @router.post("/v1/adapters/{name}/canary")
    async def start_canary(name: str, body: StartCanary, who: Who = "") -> dict[str, Any]:
        policy = Policy(body.automatic, body.min_requests, body.max_error_increase, body.max_slowdown)
        await versions.start_canary(name, body.version, body.weight, policy, who, body.expected_version)
        return service.adapter(name)

    @router.post("/v1/adapters/{name}/aliases")
    async def set_alias(name: str, body: Alias) -> dict[str, Any]:
        await versions.set_alias(body.alias, name, body.version)
        return service.adapter(name)

    @router.delete("/v1/adapters/{name}/aliases/{alias}")
    async def delete_alias(name: str, alias: str) -> dict[str, Any]:
        await versions.delete_alias(alias, name)
        return service.adapter(name)

    return router
