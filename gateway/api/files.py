"""`/v1/files` as OpenAI has it."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from starlette.responses import FileResponse, Response

from gateway.adapters.storage import AdapterStorage
from gateway.api import uploads
from gateway.api.versions import Who
from gateway.errors import InvalidRequest
from gateway.tuning import views
from gateway.tuning.files import PURPOSES, Files

_SECONDS = "expires_after[seconds]"


def routes(files: Files, storage: AdapterStorage, limit_bytes: int) -> APIRouter:
    """storage: where uploads are staged. limit_bytes: of one file."""
    router = APIRouter()

    @router.post("/v1/files")
    async def create_file(request: Request, who: Who = "") -> dict[str, Any]:
        request.state.unread_body = True
        await files.check_room(who, _declared_bytes(request))  # rather than after all of it has come
        with storage.staging() as work:
            form = await uploads.receive(request, work, limit_bytes, "--max-file-mb")
            purpose = form.fields.get("purpose", "")
            if purpose not in PURPOSES:
                raise InvalidRequest(f"purpose is {purpose[:50]!r}; give {', '.join(PURPOSES)}", param="purpose")
            if len(form.files) != 1:
                raise InvalidRequest(f"the body has {len(form.files)} files; send one as `file`", param="file")
            part = form.files[0]
            made = await files.upload(part.path, part.filename, purpose, who, _seconds(form.fields))
        return views.file(made)

    @router.get("/v1/files")
    async def list_files(
        purpose: str | None = None,
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
        order: Literal["asc", "desc"] = "desc",
    ) -> dict[str, Any]:
        found, more = await files.page(purpose, after, limit, order == "asc")
        return views.page([views.file(file) for file in found], more)

    @router.get("/v1/files/{id}")
    async def retrieve_file(id: str) -> dict[str, Any]:
        return views.file(await files.get(id))

    @router.get("/v1/files/{id}/content")
    async def file_content(id: str) -> Response:
        file = await files.get(id)
        return FileResponse(files.path(file.id), media_type="application/octet-stream")

    @router.delete("/v1/files/{id}")
    async def delete_file(id: str) -> dict[str, Any]:
        await files.delete(id)
        return {"id": id, "object": "file", "deleted": True}

    return router


def _declared_bytes(request: Request) -> int:
    """What the body says that it holds, less what is around a file in it; 0 where it does not say."""
    declared = request.headers.get("content-length", "")
    return max(0, int(declared) - uploads.OVERHEAD_BYTES) if re.fullmatch("[0-9]{1,18}", declared) else 0


def _seconds(fields: dict[str, str]) -> int | None:
    given = fields.get(_SECONDS)
    if given is None:
        return None
    anchor = fields.get("expires_after[anchor]", "created_at")
    if anchor != "created_at" or not re.fullmatch("[0-9]{1,18}", given):
        raise InvalidRequest("expires_after takes anchor='created_at' and seconds", param="expires_after")
    return int(given)
