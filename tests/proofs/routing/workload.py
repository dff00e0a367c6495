"""Who asks what: conversations of several turns, of tenants that share a system prompt and may have an adapter."""

from __future__ import annotations

import json
import random
from collections.abc import Hashable, Iterator
from dataclasses import dataclass

from tests.proofs.routing.engine import BLOCK_TOKENS, Ask

_CHARS_A_TOKEN = 4


@dataclass(frozen=True)
class Workload:
    """rate: conversations that begin a second."""

    name: str
    title: str
    rate: float
    tenants: int
    system_tokens: tuple[int, int]
    question_tokens: tuple[int, int]
    answer_tokens: tuple[int, int]
    turns: tuple[int, int]
    adapters: bool = False
    long: float = 0.0  # share of the questions that have 8,000 to 16,000 tokens
    flood: float = 0.0  # share of the conversations that come from the first tenant, beyond its own


WORKLOADS = (
    Workload("chat", "conversations of 1-8 turns, 40 tenants", 9.0, 40, (100, 600), (20, 400), (50, 400), (1, 8)),
    Workload(
        "documents", "questions on 200 documents of 2-6k tokens", 14.0, 200, (2000, 6000), (10, 60), (30, 150), (1, 1)
    ),
    Workload(
        "adapters", "conversations, 100 adapters", 9.0, 100, (100, 600), (20, 400), (50, 400), (1, 8), adapters=True
    ),
    Workload("alone", "single questions, nothing in common", 40.0, 100_000, (10, 30), (50, 800), (50, 400), (1, 1)),
    Workload(
        "mixed", "single questions, 1 in 20 of them 8-16k tokens long", 15.0, 100_000, (10, 30), (50, 800), (50, 400),
        (1, 1), long=0.05,
    ),
    Workload(
        "flood", "documents, half of all questions on one of them", 20.0, 200, (2000, 6000), (10, 60), (30, 150),
        (1, 1), flood=0.5,
    ),
)  # fmt: skip


def asks(workload: Workload, seconds: float, seed: int) -> list[Ask]:
    """Every request of a run in the order of its arrival. A turn comes a while after the one before began."""
    rng = random.Random(seed)
    found: list[Ask] = []
    now_s = 0.0
    number = 0
    while now_s < seconds:
        now_s += rng.expovariate(workload.rate)
        number += 1
        found += _conversation(workload, rng, now_s, number)
    return sorted((ask for ask in found if ask.arrived_s < seconds), key=lambda ask: ask.arrived_s)


def _conversation(workload: Workload, rng: random.Random, began_s: float, number: int) -> Iterator[Ask]:
    # Tenants are not alike: the first ones ask most (Zipf).
    tenant = min(workload.tenants - 1, int(workload.tenants ** rng.random()) - 1)
    if rng.random() < workload.flood:
        tenant = 0
    name = f"tenant-{tenant}"
    adapter = f"a-{tenant:012x}" if workload.adapters else None
    system = random.Random(tenant).randint(*workload.system_tokens)
    messages = [{"role": "system", "content": _text(f"You are the assistant of {name}.", system)}]
    blocks: list[Hashable] = [(adapter, name, i) for i in range(system // BLOCK_TOKENS)]
    at_s = began_s
    for turn in range(rng.randint(*workload.turns)):
        question, answer = rng.randint(*workload.question_tokens), rng.randint(*workload.answer_tokens)
        if rng.random() < workload.long:
            question = rng.randint(8_000, 16_000)
        messages.append({"role": "user", "content": _text(f"Question {number}.{turn}", question)})
        blocks += [(adapter, number, len(blocks) + i) for i in range(max(1, question // BLOCK_TOKENS))]
        body = json.dumps({"messages": messages, "model": name}).encode()
        yield Ask(at_s, name, tuple(blocks), answer, body, adapter)
        # The answer becomes part of the next prompt. Engines cache it too; here its blocks are new, for simplicity.
        messages.append({"role": "assistant", "content": _text("Answer", answer)})
        blocks += [(adapter, number, len(blocks) + i) for i in range(answer // BLOCK_TOKENS)]
        at_s += answer * 0.02 + rng.uniform(2, 20)


def _text(start: str, tokens: int) -> str:
    """Something of about that many tokens."""
    return (start + " word" * tokens)[: max(len(start), tokens * _CHARS_A_TOKEN)]
