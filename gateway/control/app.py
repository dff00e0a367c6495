"""Control's web application: every route that is not inference."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fastapi import APIRouter, FastAPI

from gateway.api import adapters, admin, backend, bodies, errors, keys, metrics, models, residency, versions
from gateway.api.document import Application
from gateway.control.estate import Estate
from gateway.control.service import Service


def create(service: Service, adapter_roots: Sequence[Path], estate: Estate, more: Sequence[APIRouter] = ()) -> FastAPI:
    """adapter_roots: the directories that /v1/load_lora_adapter may read. more: routes of files, jobs and batches."""
    # No automatic pages: what they load comes from elsewhere, and a redirect would lose a streamed body.
    app = Application(title="Tunegate", docs_url=None, redoc_url=None, redirect_slashes=False)
    errors.install(app)
    app.add_middleware(bodies.LimitedBodies)
    app.include_router(models.routes(service))
    app.include_router(adapters.routes(service, adapter_roots))
    app.include_router(versions.routes(service))
    app.include_router(admin.routes(estate))
    app.include_router(backend.routes(estate))
    app.include_router(keys.routes(service.core))
    app.include_router(residency.routes(service))
    app.include_router(metrics.routes(service.core))
    for router in more:
        app.include_router(router)
    return app
