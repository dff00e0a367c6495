"""Which stage may start now, and on which GPUs. Pure: no process, no clock, no disk.

Stages start in the order of the table. Where the first that is ready finds its GPUs taken, those that will be free
soonest are kept for it, and so are whole GPUs for each that only waits for stages that run, or for what is expected on
the machine: later ones use them if they are expected to be through by then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from scripts.gpu_suite.stages import StageSpec

_EPSILON = 1e-6  # shares are sums of decimal fractions


@dataclass(frozen=True)
class Running:
    """A stage that holds GPUs."""

    stage: StageSpec
    gpus: tuple[int, ...]
    ends_at: float  # by its estimate, never in the past


@dataclass(frozen=True)
class Standing:
    """Whether a stage that has not begun can begin, and why not."""

    kind: Literal["ready", "waits", "never"]
    why: str = ""


def standing(stage: StageSpec, passed: Mapping[str, bool], lacks: str, gpus: int, left_s: float) -> Standing:
    """Judge a stage by all but free GPUs.

    passed: of the stages that are through; lacks: what it waits for outside, in words; gpus: of the machine; left_s:
    until --until.
    """
    if stage.gpus > gpus:
        return Standing("never", f"needs {stage.gpus} GPUs, the machine has {gpus}")
    if failed := [name for name in stage.after if passed.get(name) is False]:
        return Standing("never", f"needs {' and '.join(failed)}, which did not pass")
    waiting = [name for name in stage.after if name not in passed]
    why = f"after {' and '.join(waiting)}" if waiting else lacks
    if stage.estimate_s > left_s:
        late = f"its {stage.estimate_s:g} s would end past --until, {max(0.0, left_s):.0f} s from now"
        return Standing("never", f"{late}; it waited: {why}" if why else late)
    return Standing("waits", why) if why else Standing("ready")


def soon(
    stage: StageSpec,
    passed: Mapping[str, bool],
    lacks: str,
    ends_at: Mapping[str, float],
    brought_at: float | None = None,
) -> float | None:
    """When a stage that waits can begin, as far as one can tell; None where one cannot.

    ends_at: of running stages, by their estimates; brought_at: when what is lacking outside is expected, if ever.
    """
    waiting = [name for name in stage.after if name not in passed]
    if (lacks and brought_at is None) or not set(waiting) <= ends_at.keys():
        return None
    times = [ends_at[name] for name in waiting]
    if lacks and brought_at is not None:
        times.append(brought_at)
    return max(times, default=None)


def choose(wanted: Sequence[tuple[StageSpec, float]], running: Sequence[Running], gpus: int,
           now: float) -> list[tuple[StageSpec, tuple[int, ...]]]:  # fmt: skip
    """What starts at `now`, in the order of `wanted`, each with its GPUs. wanted: with the time each is ready at."""
    held = list(running)
    started: list[tuple[StageSpec, tuple[int, ...]]] = []
    kept: dict[int, float] = {}  # GPU -> from when it is kept for an earlier stage
    blocked = False
    for stage, ready_at in wanted:
        free = _free(held, gpus)
        fits = [
            gpu
            for gpu in range(gpus)
            if free[gpu] + _EPSILON >= stage.share and now + stage.estimate_s <= kept.get(gpu, float("inf"))
        ]
        if ready_at <= now and len(fits) >= stage.gpus:
            fullest_first = sorted(fits, key=lambda gpu: (free[gpu], gpu))  # so that whole ones stay whole
            chosen = tuple(sorted(fullest_first[: stage.gpus]))
            started.append((stage, chosen))
            held.append(Running(stage, chosen, now + stage.estimate_s))
        elif stage.share >= 1.0 if ready_at > now else not blocked:
            times = sorted((_free_at(gpu, stage.share, held, now), gpu) for gpu in range(gpus) if gpu not in kept)
            if len(times) >= stage.gpus:
                soonest = times[: stage.gpus]
                kept |= dict.fromkeys((gpu for _, gpu in soonest), max(ready_at, soonest[-1][0]))
            blocked = blocked or ready_at <= now
    return started


def _free(held: Sequence[Running], gpus: int) -> list[float]:
    free = [1.0] * gpus
    for row in held:
        for gpu in row.gpus:
            free[gpu] -= row.stage.share
    return free


def _free_at(gpu: int, share: float, held: Sequence[Running], now: float) -> float:
    """When this GPU is expected to have the share free."""
    here = sorted((row for row in held if gpu in row.gpus), key=lambda row: row.ends_at)
    free, when = 1.0 - sum(row.stage.share for row in here), now
    for row in here:
        if free + _EPSILON >= share:
            break
        free, when = free + row.stage.share, row.ends_at
    return when
