"""`/v1/fine_tuning/jobs` as OpenAI has it."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Query, Request

from gateway.api.versions import Who
from gateway.errors import InvalidRequest
from gateway.tuning import views
from gateway.tuning.jobs import Jobs

Limit = Annotated[int, Query(ge=1, le=100)]


def routes(jobs: Jobs) -> APIRouter:
    """Create, list, show; cancel, pause, resume; events and checkpoints."""
    router = APIRouter()

    @router.post("/v1/fine_tuning/jobs")
    async def create_job(request: Request, who: Who = "") -> dict[str, Any]:
        return views.job(await jobs.create(await read_json(request), who))

    @router.get("/v1/fine_tuning/jobs")
    async def list_jobs(request: Request, after: str | None = None, limit: Limit = 20) -> dict[str, Any]:
        found, more = await jobs.page(after, limit, _metadata(request))
        return views.page([views.job(job) for job in found], more)

    @router.get("/v1/fine_tuning/jobs/{id}")
    async def retrieve_job(id: str) -> dict[str, Any]:
        return views.job(await jobs.get(id))

    @router.post("/v1/fine_tuning/jobs/{id}/cancel")
    async def cancel_job(id: str) -> dict[str, Any]:
        return views.job(await jobs.cancel(id))

    @router.post("/v1/fine_tuning/jobs/{id}/pause")
    async def pause_job(id: str) -> dict[str, Any]:
        return views.job(await jobs.pause(id))

    @router.post("/v1/fine_tuning/jobs/{id}/resume")
    async def resume_job(id: str) -> dict[str, Any]:
        return views.job(await jobs.resume(id))

    @router.get("/v1/fine_tuning/jobs/{id}/events")
    async def list_events(id: str, after: str | None = None, limit: Limit = 20) -> dict[str, Any]:
        found, more = await jobs.events(id, after, limit)
        return views.page([views.event(event) for event in found], more)

    @router.get("/v1/fine_tuning/jobs/{id}/checkpoints")
    async def list_checkpoints(id: str, after: str | None = None, limit: Limit = 10) -> dict[str, Any]:
        found, more = await jobs.checkpoints(id, after, limit)
        return views.page([views.checkpoint(id, checkpoint) for checkpoint in found], more)

    return router


async def read_json(request: Request) -> Any:
    """The decoded body. Raises InvalidRequest."""
    try:
        return msgspec.json.decode(await request.body())
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from error


def _metadata(request: Request) -> dict[str, str]:
    """`metadata[key]=value` of the query."""
    return {
        name.removeprefix("metadata[").removesuffix("]"): value
        for name, value in request.query_params.items()
        if name.startswith("metadata[") and name.endswith("]")
    }
