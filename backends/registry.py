"""The engines by name, and which one answers at an address."""

from __future__ import annotations

import httpx2

from backends import upstream
from backends.base import Backend, EngineUnreachable
from backends.lmdeploy import Lmdeploy
from backends.sglang import Sglang
from backends.spec import BackendName
from backends.vllm import Vllm

_BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (Vllm(), Sglang(), Lmdeploy())}


def get(name: BackendName) -> Backend:
    """The backend of this name."""
    return _BACKENDS[name]


async def recognise(client: httpx2.AsyncClient) -> Backend:
    """Which of the three engines answers here. Raises EngineUnreachable when none of them does.

    Each signs its model list with its name.
    """
    models = await upstream.list_models(client)
    owners = sorted({model.owned_by for model in models})
    for owner in owners:
        if owner in _BACKENDS:
            return _BACKENDS[owner]
    raise EngineUnreachable(
        f"{client.base_url} is no vLLM, SGLang or LMDeploy: its model list is signed {', '.join(owners) or 'by nobody'}"
    )
