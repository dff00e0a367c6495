"""`/admin/keys`: make, list, show, change, rotate and revoke API keys. A key itself is in one answer, ever."""

from __future__ import annotations

import time
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from gateway.control.core import Core
from gateway.control.keys import Terms
from gateway.scopes import INFER, Period

_LONGEST_GRACE_S = 30 * 86_400
_Limit = Annotated[int | None, Field(ge=1, le=10**15)]


class KeyChanges(BaseModel):
    """What to change; what is left out stays, null takes a limit away."""

    model_config = ConfigDict(extra="forbid")

    scopes: list[str] = [INFER]
    expires_in_s: int | None = Field(default=None, ge=1, le=10**10)
    requests_per_minute: _Limit = None
    tokens_per_minute: _Limit = None
    token_budget: _Limit = None
    budget_period: Period = "total"
    max_in_flight: int | None = Field(default=None, ge=1, le=10**6)
    priority: int = Field(default=0, ge=-100, le=100)


class NewKey(KeyChanges):
    """What to make. A limit that is left out is none."""

    name: str = Field(min_length=1, max_length=100)


class Rotation(BaseModel):
    """How long the key before stays good."""

    model_config = ConfigDict(extra="forbid")

    grace_s: int = Field(default=0, ge=0, le=_LONGEST_GRACE_S)


def routes(core: Core) -> APIRouter:
    """Keys are named by their id, living ones by their name too. What is answered holds at every relay."""
    router, keys = APIRouter(), core.keys

    @router.post("/admin/keys", status_code=201)
    async def create_key(new: NewKey) -> dict[str, Any]:
        terms = _terms(new.model_dump(exclude={"name"}))
        shown, secret = await keys.create(new.name, Terms(**terms))
        await core.published()
        return shown | {"key": secret}

    @router.get("/admin/keys")
    async def list_keys() -> dict[str, Any]:
        return {"object": "list", "data": keys.all()}

    @router.get("/admin/keys/{id}")
    async def show_key(id: str) -> dict[str, Any]:
        return keys.show(id)

    @router.patch("/admin/keys/{id}")
    async def change_key(id: str, changes: KeyChanges) -> dict[str, Any]:
        shown = await keys.change(id, _terms(changes.model_dump(exclude_unset=True)))
        await core.published()
        return shown

    @router.post("/admin/keys/{id}/rotate")
    async def rotate_key(id: str, rotation: Rotation | None = None) -> dict[str, Any]:
        shown, secret = await keys.rotate(id, rotation.grace_s if rotation else 0)
        await core.published()
        return shown | {"key": secret}

    @router.delete("/admin/keys/{id}")
    async def revoke_key(id: str) -> dict[str, Any]:
        shown = await keys.revoke(id)
        await core.published()
        return shown

    return router


def _terms(given: dict[str, Any]) -> dict[str, Any]:
    """Fields of Terms from those of a request."""
    if "expires_in_s" in given:
        expires_in_s = given.pop("expires_in_s")
        given["expires_at"] = None if expires_in_s is None else int(time.time()) + expires_in_s
    if "scopes" in given:
        given["scopes"] = tuple(dict.fromkeys(given["scopes"]))
    return given
