"""Public names of adapters, and the content-addressed ids by which engines know them."""

from __future__ import annotations

import re

from gateway.errors import InvalidRequest

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_CONTENT_ID = re.compile(r"a-[0-9a-f]{12}")
_PINNED = re.compile(r"(?P<name>.+)@v(?P<version>[1-9][0-9]{0,8})")


def check_name(name: str, base_names: frozenset[str]) -> str:
    """The name as it is, when an adapter may be called by it. Raises InvalidRequest."""
    if not _NAME.fullmatch(name):
        raise InvalidRequest(
            f"name {name[:100]!r} cannot name an adapter: use 1 to 96 letters, digits, '.', '_' and '-', "
            "starting with a letter or a digit",
            param="name",
            code="invalid_name",
        )
    if name in base_names:
        raise InvalidRequest(
            f"name {name!r} is the base model's; choose another for the adapter", param="name", code="invalid_name"
        )
    return name


def parse_reference(reference: str) -> tuple[str, int | None]:
    """`name@v3` -> ("name", 3); `name` -> ("name", None)."""
    match = _PINNED.fullmatch(reference)
    return (match["name"], int(match["version"])) if match else (reference, None)


def pinned(name: str, version: int) -> str:
    """The name by which exactly this version is called."""
    return f"{name}@v{version}"


def content_id(sha256: str) -> str:
    """The id under which engines know contents with this digest (hex)."""
    return f"a-{sha256[:12]}"


def is_content_id(name: str) -> bool:
    """Whether an adapter that an engine lists is one of ours."""
    return _CONTENT_ID.fullmatch(name) is not None
