"""`/v1/models` as OpenAI has it: the base, and each adapter by its name."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from gateway.control.service import Service


def routes(service: Service) -> APIRouter:
    """List, retrieve, delete. Ids may hold slashes."""
    router = APIRouter()

    @router.get("/v1/models")
    async def list_models() -> Response:
        return Response(service.models_json(), media_type="application/json")

    @router.get("/v1/models/{id:path}")
    async def retrieve_model(id: str) -> dict[str, Any]:
        return service.model(id)

    @router.delete("/v1/models/{id:path}")
    async def delete_model(id: str) -> dict[str, Any]:
        await service.delete(id)
        return {"id": id, "object": "model", "deleted": True}

    return router
