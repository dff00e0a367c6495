"""`/v1/adapters/{name}/load` and `/unload`, and `/admin/residency`: which adapters replicas hold."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel

from gateway.control import residency_service
from gateway.control.service import Service

_WAIT_S = 60.0


class Load(BaseModel):
    """On how many replicas an adapter is kept loaded; null: on all."""

    replicas: int | None = None


def routes(service: Service) -> APIRouter:
    """Keep loaded, let go, show."""
    router = APIRouter()
    core = service.core

    @router.post("/v1/adapters/{name}/load")
    async def load_adapter(name: str, body: Load) -> dict[str, Any]:
        await residency_service.load(core, name, body.replicas, _WAIT_S)
        return service.answering(name)

    @router.post("/v1/adapters/{name}/unload")
    async def unload_adapter(name: str) -> dict[str, Any]:
        await residency_service.unload(core, name)
        return service.answering(name)

    @router.get("/admin/residency")
    async def show_residency() -> dict[str, Any]:
        return residency_service.show(core)

    return router
