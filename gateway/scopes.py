"""What an API key may open, and which of it each path needs. Relay, control and command line share it."""

from __future__ import annotations

from typing import Literal
from urllib.parse import unquote

INFER, ADAPTERS, TRAIN, ADMIN, METRICS = "infer", "adapters", "train", "admin", "metrics"

SCOPES = {
    INFER: "inference, the list of models, tokenize",
    ADAPTERS: "upload, list and delete adapters",
    TRAIN: "files, batches and fine-tuning jobs",
    METRICS: "/metrics",
    ADMIN: "replicas, keys, reload, switching engines",
}

Period = Literal["total", "day", "month"]  # how often a key's token budget begins anew

# The longest prefix that fits decides; a path that none fits needs the highest scope.
_PREFIXES = {
    "/v1/": INFER,
    "/tokenize": INFER,
    "/detokenize": INFER,
    "/openapi.json": INFER,
    "/v1/adapters": ADAPTERS,
    "/v1/load_lora_adapter": ADAPTERS,
    "/v1/unload_lora_adapter": ADAPTERS,
    "/v1/fine_tuning": TRAIN,
    "/v1/files": TRAIN,
    "/v1/uploads": TRAIN,
    "/v1/batches": TRAIN,
    "/metrics": METRICS,
}
_LONGEST_FIRST = sorted(_PREFIXES.items(), key=lambda item: -len(item[0]))


def needed(method: bytes, path: bytes) -> str:
    """The scope of a request to control. path: as sent, percent-encoded.

    Decoded as control's server decodes it, so that no spelling of a path gets past its scope.
    """
    decoded = unquote(path.decode("latin-1"))
    if decoded.startswith("/v1/models/") and method not in (b"GET", b"HEAD"):
        return ADAPTERS
    return next((scope for prefix, scope in _LONGEST_FIRST if decoded.startswith(prefix)), ADMIN)
