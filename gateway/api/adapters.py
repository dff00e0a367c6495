"""`/v1/adapters`: upload, list, show, delete; vLLM's two routes for scripts that know those. More in versions.py."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.responses import JSONResponse, PlainTextResponse, Response

from gateway.adapters.local import parts_of
from gateway.api import uploads
from gateway.api.versions import Who
from gateway.control.catalog import Cause
from gateway.control.service import Service
from gateway.errors import InvalidRequest, ModelNotFound

_DEFAULT_WAIT_S = 60.0
_LONGEST_WAIT_S = 600.0


class LoadLoraAdapter(BaseModel):
    """vLLM's body of /v1/load_lora_adapter."""

    lora_name: str
    lora_path: str
    load_inplace: bool = False


class UnloadLoraAdapter(BaseModel):
    """vLLM's body of /v1/unload_lora_adapter."""

    lora_name: str


def routes(service: Service, roots: Sequence[Path]) -> APIRouter:
    """roots: the directories that /v1/load_lora_adapter may read."""
    router = APIRouter()

    @router.post("/v1/adapters")
    async def upload_adapter(request: Request, who: Who = "") -> Response:
        with service.storage.staging() as work:
            form = await uploads.receive(request, work, service.policy.max_upload_bytes)
            name = form.fields.get("name", "")
            service.check_upload(name, form.fields.get("base"))
            wait_s = _wait_s(form.fields.get("wait_s"))
            cause = Cause(who, "uploaded") if _promote(form.fields.get("promote")) else None
            version, new = await service.take_in(name, form.files, work, cause)
        return JSONResponse(await service.settle(version, new, wait_s), 201 if new else 200)

    @router.get("/v1/adapters")
    async def list_adapters() -> Response:
        # Not by FastAPI's own encoder, which takes seconds for ten thousand.
        listed = {"object": "list", "data": service.list_adapters()}
        return Response(msgspec.json.encode(listed), media_type="application/json")

    @router.get("/v1/adapters/{name}")
    async def show_adapter(name: str) -> dict[str, Any]:
        return await service.show(name)

    @router.delete("/v1/adapters/{name}")
    async def delete_adapter(name: str) -> dict[str, Any]:
        await service.delete(name)
        return {"id": name, "object": "adapter", "deleted": True}

    @router.post("/v1/load_lora_adapter")
    async def load_lora_adapter(body: LoadLoraAdapter, who: Who = "") -> Response:
        name = body.lora_name
        if name in service.core.registry.adapters and not body.load_inplace:
            raise InvalidRequest(
                f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in place, set "
                "'load_inplace' to True: it becomes a new version.",
                param="lora_name",
            )
        service.check_upload(name, None)
        with service.storage.staging() as work:
            parts = parts_of(body.lora_path, roots)
            version, new = await service.take_in(name, parts, work, Cause(who, "uploaded"))
        await service.settle(version, new, _DEFAULT_WAIT_S)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    @router.post("/v1/unload_lora_adapter")
    async def unload_lora_adapter(body: UnloadLoraAdapter) -> Response:
        if body.lora_name not in service.core.registry.adapters:
            raise ModelNotFound(f"The lora adapter '{body.lora_name}' cannot be found.", param="lora_name")
        await service.delete(body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    return router


def _promote(given: str | None) -> bool:
    if given not in (None, "true", "false"):
        raise InvalidRequest(f"promote is {given[:50]!r}; give true or false", param="promote")
    return given != "false"


def _wait_s(given: str | None) -> float:
    if given is None:
        return _DEFAULT_WAIT_S
    try:
        wait_s = float(given)
    except ValueError:
        wait_s = -1.0
    if not 0 <= wait_s <= _LONGEST_WAIT_S:
        raise InvalidRequest(f"wait_s is {given[:50]!r}; give 0 to {_LONGEST_WAIT_S:g} seconds", param="wait_s")
    return wait_s
