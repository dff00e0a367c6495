"""A batching engine as it matters for routing: finite KV cache, prefix cache, prefill before decode. Pure; no clock.

A step takes what a GPU would take for it: a fixed part, a part for each prompt token that is not cached, a part for
each running request. The constants are those of a 7-8B model on one large GPU, rounded; only their relations matter
here. What is not modelled: speculative decoding, preemption to host memory, the cost of sampling.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Hashable
from dataclasses import dataclass, field

BLOCK_TOKENS = 16


@dataclass(frozen=True)
class Speed:
    """What a step costs, and how much an engine holds."""

    step_s: float = 0.008
    prompt_token_s: float = 1 / 20_000
    running_s: float = 0.00015
    prompt_tokens_a_step: int = 4096  # chunked prefill
    blocks: int = 6_000  # of KV cache
    most_running: int = 128


@dataclass
class Ask:
    """One request. blocks: what identifies each block of its prompt, adapter and all that comes before included."""

    arrived_s: float
    tenant: str
    blocks: tuple[Hashable, ...]
    answer_tokens: int
    body: bytes
    adapter: str | None
    first_s: float = 0.0
    done_s: float = 0.0
    cached_blocks: int = 0
    # of a running request
    prompt_left: int = 0  # tokens yet to prefill
    said: int = 0
    replica: int = -1  # where it went


@dataclass
class Engine:
    """One replica."""

    speed: Speed = field(default_factory=Speed)
    now_s: float = 0.0
    waiting: deque[Ask] = field(default_factory=deque)
    running: list[Ask] = field(default_factory=list)
    cache: OrderedDict[Hashable, int] = field(default_factory=OrderedDict)  # block -> users; the oldest first
    private: int = 0  # blocks of answers, which nobody shares
    used: int = 0  # blocks of the cache with users

    @property
    def in_flight(self) -> int:
        return len(self.waiting) + len(self.running)

    @property
    def kv_used(self) -> float:
        """Share of the cache that running requests hold, as engines report it."""
        return (self.used + self.private) / self.speed.blocks

    def add(self, ask: Ask) -> None:
        """A request arrives; an idle engine begins then."""
        if not self.in_flight:
            self.now_s = max(self.now_s, ask.arrived_s)
        self.waiting.append(ask)

    def step(self) -> list[Ask]:
        """One step: admit, prefill a chunk, give each decoding request a token. Gives those that are done."""
        self._admit()
        budget = self.speed.prompt_tokens_a_step
        prefilled = 0
        decoding = []
        for ask in self.running:
            if ask.prompt_left:
                chunk = min(ask.prompt_left, budget - prefilled)
                ask.prompt_left -= chunk
                prefilled += chunk
            if not ask.prompt_left:
                decoding.append(ask)
        speed = self.speed
        self.now_s += speed.step_s + prefilled * speed.prompt_token_s + len(decoding) * speed.running_s
        done = []
        for ask in decoding:
            ask.said += 1
            if ask.said == 1:
                ask.first_s = self.now_s
            if ask.said >= ask.answer_tokens:
                ask.done_s = self.now_s
                done.append(ask)
        if done:
            gone = {id(ask) for ask in done}
            self.running = [ask for ask in self.running if id(ask) not in gone]
            for ask in done:
                self._release(ask)
        return done

    def _admit(self) -> None:
        """From the queue, in order, as long as there is memory for the whole of a request."""
        while self.waiting and len(self.running) < self.speed.most_running:
            ask = self.waiting[0]
            cached = 0
            for block in ask.blocks:
                if block not in self.cache:
                    break
                cached += 1
            # Blocks that nobody uses can be thrown out, but not those that this request is about to use.
            idle_reused = sum(1 for block in ask.blocks[:cached] if not self.cache[block])
            answer = _answer_blocks(ask)
            free = self.speed.blocks - self.used - self.private - idle_reused
            if len(ask.blocks) - cached + answer > free:
                return
            self.waiting.popleft()
            ask.cached_blocks = cached
            # The last token is always computed, however much is cached.
            ask.prompt_left = max(1, (len(ask.blocks) - cached) * BLOCK_TOKENS)
            for block in ask.blocks:
                users = self.cache.get(block, 0)
                self.used += users == 0
                self.cache[block] = users + 1
                self.cache.move_to_end(block)
            self.private += answer
            self._evict()
            self.running.append(ask)

    def _evict(self) -> None:
        """Throw out the blocks that were not used for longest, down to what the memory holds."""
        excess = len(self.cache) + self.private - self.speed.blocks
        if excess > 0:
            idle = [block for block, users in self.cache.items() if not users][:excess]
            for block in idle:
                del self.cache[block]

    def _release(self, ask: Ask) -> None:
        for block in reversed(ask.blocks):  # the end of a prompt is thrown out before its beginning
            users = self.cache[block] - 1
            self.used -= users == 0
            self.cache[block] = users
            self.cache.move_to_end(block)
        self.private -= _answer_blocks(ask)


def _answer_blocks(ask: Ask) -> int:
    return -(-ask.answer_tokens // BLOCK_TOKENS)
