"""What to do next on one replica: a pure function from what should be loaded and what is."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from gateway.adapters.names import is_content_id


@dataclass(frozen=True, slots=True)
class Unload:
    """It is loaded and nobody wants it."""

    content_id: str


@dataclass(frozen=True, slots=True)
class Verify:
    """It is loaded and has not answered a request since."""

    content_id: str


@dataclass(frozen=True, slots=True)
class Load:
    """It is wanted and not loaded."""

    content_id: str


Action = Unload | Verify | Load


def plan(
    desired: Sequence[str], observed: Collection[str], verified: Collection[str], held_back: Collection[str]
) -> list[Action]:
    """The actions that bring a replica from `observed` to `desired`, in order.

    desired: content ids, most wanted first. observed: what the engine itself lists; names that are not ours are left
    alone. verified: those that answered. held_back: wanted, but not to be touched on this replica now.
    Unloads come first, so that there is room; then what takes no loading.
    """
    ours = sorted(name for name in observed if is_content_id(name))
    wanted = [name for name in desired if name not in held_back]
    return [
        *(Unload(name) for name in ours if name not in desired),
        *(Verify(name) for name in wanted if name in observed and name not in verified),
        *(Load(name) for name in wanted if name not in observed),
    ]
