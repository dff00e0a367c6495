"""Control's web application: every route that is not inference."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fastapi import FastAPI

from gateway.api import adapters, admin, errors, metrics, models
from gateway.control.service import Service


def create(service: Service, adapter_roots: Sequence[Path]) -> FastAPI:
    """adapter_roots: the directories that /v1/load_lora_adapter may read."""
    # No automatic pages: what they load comes from elsewhere, and a redirect would lose a streamed body.
    app = FastAPI(title="Tunegate", openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    errors.install(app)
    app.include_router(models.routes(service))
    app.include_router(adapters.routes(service, adapter_roots))
    app.include_router(admin.routes(service.core))
    app.include_router(metrics.routes(service.core))
    return app
