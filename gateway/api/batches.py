"""`/v1/batches` as OpenAI has it."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request

from gateway.api.fine_tuning import read_json
from gateway.api.versions import Who
from gateway.tuning import views
from gateway.tuning.batches import Batches, view


def routes(batches: Batches) -> APIRouter:
    """Create, list, show, cancel."""
    router = APIRouter()

    @router.post("/v1/batches")
    async def create_batch(request: Request, who: Who = "") -> dict[str, Any]:
        return view(await batches.create(await read_json(request), who))

    @router.get("/v1/batches")
    async def list_batches(after: str | None = None, limit: Annotated[int, Query(ge=1, le=100)] = 20) -> dict[str, Any]:
        found, more = await batches.page(after, limit)
        return views.page([view(batch) for batch in found], more)

    @router.get("/v1/batches/{id}")
    async def retrieve_batch(id: str) -> dict[str, Any]:
        return view(await batches.get(id))

    @router.post("/v1/batches/{id}/cancel")
    async def cancel_batch(id: str) -> dict[str, Any]:
        return view(await batches.cancel(id))

    return router
