"""`/admin/backend` and `/admin/reload`: another engine, and the configuration read again, while requests come."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from backends.spec import BackendName
from gateway.config import ServeConfig
from gateway.control.estate import Estate
from gateway.control.reload import Reload
from gateway.control.switch import Mode, Switch
from gateway.errors import InvalidRequest


class SwitchTo(BaseModel):
    """The engine to switch to. What belongs to one engine is not taken over: name it again."""

    model_config = ConfigDict(extra="forbid")

    backend: BackendName
    engine_version: str | None = None
    engine_arg: list[str] = []
    tool_call_parser: str | None = None
    reasoning_parser: str | None = None
    memory_fraction: float | None = None
    mode: Mode = "beside"
    wait_s: float = Field(default=0, ge=0, le=3600)


def routes(estate: Estate) -> APIRouter:
    """Show and switch the engine; reload."""
    router, switch, reload = APIRouter(), Switch(estate), Reload(estate)

    @router.get("/admin/backend")
    async def show_backend() -> dict[str, Any]:
        return switch.show()

    @router.post("/admin/backend", status_code=202)
    async def switch_backend(to: SwitchTo) -> dict[str, Any]:
        switch.begin(_wanted(estate.running.config, to), to.mode)
        await switch.wait(to.wait_s)
        return switch.show()

    @router.post("/admin/reload")
    async def reload_configuration() -> dict[str, Any]:
        return await reload.run()

    return router


def _wanted(config: ServeConfig, to: SwitchTo) -> ServeConfig:
    """The configuration with the other engine. Raises InvalidRequest."""
    try:
        return ServeConfig.model_validate(config.model_dump() | to.model_dump(exclude={"mode", "wait_s"}))
    except ValidationError as error:
        fault = error.errors()[0]
        name = str(fault["loc"][0])
        raise InvalidRequest(f"{name}: {fault['msg']}", param=name) from error
