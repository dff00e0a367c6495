"""The golden gate: a replica has an adapter only when it finds the trainer's own answers as likely as the trainer did.

An engine may say 200 to a load and ignore the adapter, apply half of it or at a wrong scale, or be broken by a
quantized base; a single token answered proves none of that. The reference log-probabilities of golden prompts do.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import httpx2

from backends.base import AdapterRejected, Backend, EngineBusy
from backends.spec import FLOAT32_DTYPES
from gateway.adapters.golden import Golden, Reference, read_reference
from gateway.errors import InvalidRequest

Precision = Literal["float32", "16-bit", "quantized"]
# Nats by which one token's logprob may differ from the reference, by the coarser of engine and trainer.
TOLERANCES: dict[Precision, float] = {"float32": 0.1, "16-bit": 0.5, "quantized": 1.5}
_MEAN_SHARE = 0.25  # of the tolerance: the most that all tokens may differ on average


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the comparison came to, in words with figures."""

    passed: bool
    text: str


@dataclass(frozen=True, slots=True)
class Asked:
    """The replica that is asked."""

    client: httpx2.AsyncClient
    served_name: str  # the base's, at the engine
    context_tokens: int | None  # the longest prompt with its answer; None: not known
    timeout_s: float

    def fits(self, golden: Golden) -> bool:
        """Whether the engine takes a prompt so long, and the one token that it must then generate."""
        tokens = len(golden.prompt_token_ids) + len(golden.token_ids) + 1
        return self.context_tokens is None or tokens <= self.context_tokens


class Gate:
    """Holds replicas against golden prompts. One for all of them; it keeps no state."""

    def __init__(self, served: Precision | None = None, given: float | None = None) -> None:
        """served: the precision that engines compute in; None: they compute nothing (emulators), and none is checked.

        given: the operator's tolerance in nats, in place of the one that follows from the precision.
        """
        self._served = served
        self._given = given

    def tolerance(self, reference: Reference) -> float | None:
        """The tolerance in nats for an adapter's golden prompts; None: they are not asked."""
        if self._given is not None or self._served is None:
            return self._given
        trained: Precision = "float32" if reference.dtype == "float32" else "16-bit"
        return max(TOLERANCES[self._served], TOLERANCES[trained])

    async def check(self, backend: Backend, replica: Asked, adapter: str, directory: Path) -> str:
        """Ask a replica for the golden prompts of an adapter that it has loaded; what was seen, in words.

        adapter: its name at the engine. Empty when there is nothing to hold it against.
        Raises AdapterRejected with the figures, EngineBusy, EngineUnreachable.
        """
        try:
            reference = await asyncio.to_thread(read_reference, directory)
        except InvalidRequest as error:
            raise AdapterRejected(str(error)) from error
        except OSError as error:  # says nothing of the adapter; to be tried again
            raise EngineBusy(f"its golden prompts cannot be read: {error}") from error
        tolerance = self.tolerance(reference)
        goldens = [golden for golden in reference.goldens if replica.fits(golden)]
        if not goldens or tolerance is None:
            return ""
        names = (replica.served_name, adapter)
        scores = await asyncio.gather(
            *(
                backend.score(replica.client, names, golden.prompt_token_ids, golden.token_ids, replica.timeout_s)
                for golden in goldens
            )
        )
        answers = [score for score in scores if score is not None]
        if not answers:
            return f"golden prompts not asked: {backend.name} scores no given tokens with an adapter"
        verdict = judge(goldens, answers, tolerance)
        if not verdict.passed:
            raise AdapterRejected(verdict.text)
        return verdict.text


def precision(dtype: str, quantized: bool) -> Precision:
    """What an engine computes in, by `--dtype` and its checkpoint. `auto` is 16 bits wide on every engine."""
    if quantized:
        return "quantized"
    return "float32" if dtype in FLOAT32_DTYPES else "16-bit"


def judge(goldens: Sequence[Golden], answers: Sequence[Sequence[float]], tolerance: float) -> Verdict:
    """Compare the logprobs that a replica gives the golden answers' first tokens, or all, with the reference. Pure."""
    pairs = [
        (abs(found - wanted), prompt, token, found, wanted)
        for prompt, (golden, answer) in enumerate(zip(goldens, answers, strict=True), 1)
        for token, (found, wanted) in enumerate(zip(answer, golden.logprobs, strict=False), 1)
    ]
    worst, prompt, token, found, wanted = max(pairs)
    mean = sum(pair[0] for pair in pairs) / len(pairs)
    count = f"{len(goldens)} golden prompt{'s' if len(goldens) > 1 else ''}, {len(pairs)} tokens"
    if worst <= tolerance and mean <= tolerance * _MEAN_SHARE:
        return Verdict(True, f"{count}: logprobs differ by {worst:.4f} at most, tolerance {tolerance:g}")
    off = sum(pair[0] > tolerance for pair in pairs)
    text = (
        f"golden prompt {prompt}: logprob of token {token} is {found:.2f}, reference {wanted:.2f}, tolerance "
        f"{tolerance:g}; of {count}, {off} differ by more, and all by {mean:.2f} on average"
    )
    if _as_base(goldens, answers, tolerance):
        text += "; these are the base model's own logprobs: the adapter is ignored, or holds nothing"
    return Verdict(False, text)


def _as_base(goldens: Sequence[Golden], answers: Sequence[Sequence[float]], tolerance: float) -> bool:
    """Whether the replica answered as the base model alone does."""
    known = [(answer, golden.base_logprobs) for golden, answer in zip(goldens, answers, strict=True)]
    return all(
        base is not None and all(abs(found - own) <= tolerance for found, own in zip(answer, base, strict=False))
        for answer, base in known
    )
