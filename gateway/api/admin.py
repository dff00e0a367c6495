"""`/admin`: what the operator sees of the replicas, and taking one out of traffic."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import APIRouter

from gateway.control import views
from gateway.control.core import Core
from gateway.control.estate import Estate
from gateway.control.replica import OPERATOR, Replica
from gateway.errors import NotFound

_log = logging.getLogger(__name__)


def routes(estate: Estate) -> APIRouter:
    """List replicas; drain and resume one, which holds for as long as there is this replica."""
    router, core = APIRouter(), estate.core

    @router.get("/admin/replicas")
    async def list_replicas() -> dict[str, Any]:
        return {"object": "list", "data": [views.replica(replica) for replica in core.replicas]}

    @router.post("/admin/replicas/{id}/drain")
    async def drain_replica(id: str) -> dict[str, Any]:
        replica = _find(core, id)
        _log.info("%s is drained by the operator", replica.id)
        replica.drain(OPERATOR)
        estate.note_drained()
        await core.published()
        return views.replica(replica)

    @router.post("/admin/replicas/{id}/resume")
    async def resume_replica(id: str) -> dict[str, Any]:
        replica = _find(core, id)
        _log.info("%s is put back by the operator", replica.id)
        replica.resume(OPERATOR)
        estate.note_drained()
        await core.published()
        return views.replica(replica)

    return router


def _find(core: Core, id: str) -> Replica:
    for replica in core.replicas:
        if replica.id == id:
            return replica
    known = ", ".join(replica.id for replica in core.replicas)
    raise NotFound(f"no replica {id[:50]!r}; there are {known}", param="id")
