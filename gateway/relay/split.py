"""A name whose requests two versions share while a canary runs: who gets which, without remembering anyone."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from gateway.relay.http import Request

if TYPE_CHECKING:
    from gateway.relay.route import Route

_HASHES = 1 << 64


_NOBODY = msgspec.Raw(b'""')


class _Asker(msgspec.Struct, gc=False):
    """The fields by which clients say for whom they ask, as sent: what is wrong with them is the engine's business."""

    user: msgspec.Raw = _NOBODY
    safety_identifier: msgspec.Raw = _NOBODY
    prompt_cache_key: msgspec.Raw = _NOBODY


_decode = msgspec.json.Decoder(_Asker).decode


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """The share of a name's requests that goes to another version."""

    canary: Route
    share: float  # 0 to 1

    def choose(self, stay: Route, body: bytes, request: Request) -> Route:
        """The route of one request, which is told to the client by `x-tunegate-model`.

        One user, or session, or else one key, stays with one version; who is not known is dealt at random. A higher
        share moves some from the baseline to the canary, and nobody back.
        """
        asker = sticky_key(body, request)
        part = draw(self.canary.label, asker) if asker is not None else random.random()  # noqa: S311 - no secret
        route = self.canary if part < self.share else stay
        request.limit_headers += b"x-tunegate-model: %b\r\n" % route.label.encode()
        return route


def sticky_key(body: bytes, request: Request) -> bytes | None:
    """For whom a request is made: the user it names, its session, the API key; None where nothing says it."""
    asker = _decode(body)
    for field in (asker.user, asker.safety_identifier, asker.prompt_cache_key):
        said = bytes(field)
        if said[:1] == b'"' and said != b'""':
            return said
    session = request.headers.get(b"x-session-id")
    if session:
        return session
    return request.key_id.encode() if request.key_id is not None else None


def draw(canary: str, asker: bytes) -> float:
    """A number of [0, 1) that is the same for the same asker, and dealt anew for another canary."""
    digest = hashlib.blake2b(b"%b\0%b" % (canary.encode(), asker), digest_size=8)
    return int.from_bytes(digest.digest()) / _HASHES
