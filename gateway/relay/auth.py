"""Who asks: an API key from the Authorization header against the digests that control published."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from gateway.errors import Unauthenticated


def authenticate(header: bytes | None, key_digests: Mapping[str, str]) -> str | None:
    """The id of the key that was sent; None where access is open. Raises Unauthenticated.

    key_digests: SHA-256 hex of a key -> its id. Only digests are compared, so timing says nothing about a key.
    """
    if not key_digests:
        return None
    if not header:
        raise Unauthenticated("No API key given. Send it as `Authorization: Bearer KEY`.")
    scheme, _, key = header.partition(b" ")
    if scheme.lower() != b"bearer":
        raise Unauthenticated("The Authorization header must be `Bearer KEY`.")
    key_id = key_digests.get(hashlib.sha256(key.strip()).hexdigest())
    if key_id is None:
        raise Unauthenticated("Incorrect API key. Check it, or ask the operator of this gateway for one.")
    return key_id
