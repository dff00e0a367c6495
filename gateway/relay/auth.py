"""Who asks, and whether they may: the API key of a request against the digests that control published."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping

from gateway.errors import Forbidden, Unauthenticated
from gateway.relay.limits import Entry
from gateway.scopes import SCOPES


def authenticate(header: bytes | None, entries: Mapping[str, Entry], scope: str) -> Entry | None:
    """What the key that was sent opens; None where access is open. Raises Unauthenticated, Forbidden.

    entries: SHA-256 hex of a key -> what it opens. A digest is looked up, no key is ever compared: how long that takes
    tells at most about the digest of what was sent, from which nobody can step towards a key.
    """
    if not entries:
        return None
    if not header:
        raise Unauthenticated("No API key given. Send it as `Authorization: Bearer KEY`.")
    scheme, _, key = header.partition(b" ")
    if scheme.lower() != b"bearer":
        raise Unauthenticated("The Authorization header must be `Bearer KEY`.")
    entry = entries.get(hashlib.sha256(key.strip()).hexdigest())
    if entry is None:
        raise Unauthenticated("Incorrect API key. Check it, or ask the operator of this gateway for one.")
    if entry.expires_at is not None and time.time() >= entry.expires_at:
        raise Unauthenticated(
            f"The API key {entry.id} is no longer valid. Ask the operator of this gateway for another."
        )
    if scope not in entry.scopes:
        raise Forbidden(
            f"The API key {entry.id} lacks the scope `{scope}` ({SCOPES[scope]}); "
            f"it has {', '.join(sorted(entry.scopes))}. Use another key, or have one made with that scope."
        )
    return entry
