"""The workloads: each makes the prompt of any index from seeds, alike in every worker."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import msgspec
import numpy as np

from bench.workload.spec import WorkloadSpec
from bench.workload.words import Tokenization, text

_LENGTHS, _CONTENT, _SHARED, _GROUP = 2, 4, 5, 6  # separate streams of one seed
WARM_POOL = 64  # distinct prompts of a warm-cache run
_HASH_BLOCK_TOKENS = 512  # what one hash id of a trace stands for
_CHARS_PER_TOKEN = 4

Message = dict[str, str]
NextTurn = Callable[[str], "tuple[float, Prompt]"]


class Prompt(msgspec.Struct):
    """What one request asks. `next_turn` gives (think time in seconds, next prompt) from the answer's text."""

    messages: list[Message]
    output_tokens: int
    prompt_tokens: int | None = None
    model: str = ""  # where a trace says which; else the mix decides
    next_turn: NextTurn | None = None


class Content(msgspec.Struct, frozen=True):
    """What makes two runs' prompts alike or different. The nonce is the run's own where the cache is to be cold."""

    seed: int
    nonce: int  # of what a prompt has for itself
    shared_nonce: int = 0  # of what prompts have in common
    warm: bool = False
    shared: float = 0.0  # share of every prompt that all prompts begin with


class Workload(Protocol):
    """Prompts by index."""

    def prompt(self, index: int, content: Content) -> Prompt:
        """The prompt of an index: the same for the same content, in any process."""


class RandomWords:
    """`random`: words without meaning, of exact lengths."""

    def __init__(self, spec: WorkloadSpec, tokens: Tokenization) -> None:
        self._spec, self._tokens = spec, tokens

    def prompt(self, index: int, content: Content) -> Prompt:
        spread = self._spec.option("spread")
        rng = np.random.default_rng([content.seed, _LENGTHS, index])
        low, high = 1 - spread, 1 + spread
        scale_in, scale_out = (rng.uniform(low, high), rng.uniform(low, high)) if spread else (1.0, 1.0)
        count = self._tokens.words_for(round(self._spec.input_tokens * scale_in))
        shared = min(count - 1, round(count * content.shared))
        key = index % WARM_POOL if content.warm else index
        words = self._tokens.words
        own = text(words, count - shared, content.seed, _CONTENT, content.nonce, key)
        common = text(words, shared, content.seed, _SHARED, content.shared_nonce) + " " if shared else ""
        return Prompt(
            [{"role": "user", "content": common + own}],
            max(1, round(self._spec.output_tokens * scale_out)),
            self._tokens.tokens_for(count),
        )


class SharedPrefix:
    """`prefix`: a long beginning shared within a group, then words of its own."""

    def __init__(self, spec: WorkloadSpec, tokens: Tokenization) -> None:
        self._spec, self._tokens = spec, tokens

    def prompt(self, index: int, content: Content) -> Prompt:
        groups, prefix_tokens = int(self._spec.option("groups")), int(self._spec.option("prefix"))
        group = int(np.random.default_rng([content.seed, _GROUP, index]).integers(groups))
        words = self._tokens.words
        prefix_words = round(prefix_tokens / self._tokens.tokens_per_word)
        own_words = self._tokens.words_for(self._spec.input_tokens)
        prefix = text(words, prefix_words, content.seed, _SHARED, content.shared_nonce, group)
        own = text(words, own_words, content.seed, _CONTENT, content.nonce, index)
        return Prompt(
            [{"role": "user", "content": f"{prefix} {own}"}],
            self._spec.output_tokens,
            self._tokens.tokens_for(prefix_words + own_words),
        )


class Turns:
    """`turns`: conversations, each turn sent when the answer before it is there, with the whole history."""

    def __init__(self, spec: WorkloadSpec, tokens: Tokenization) -> None:
        self._spec, self._tokens = spec, tokens

    def prompt(self, index: int, content: Content) -> Prompt:
        return self._turn(index, content, 0, [])

    def _turn(self, index: int, content: Content, turn: int, history: list[Message]) -> Prompt:
        spec, tokens = self._spec, self._tokens
        count = tokens.words_for(spec.input_tokens) if turn == 0 else max(1, int(spec.option("next")))
        asked = text(tokens.words, count, content.seed, _CONTENT, content.nonce, index, turn)
        messages = [*history, {"role": "user", "content": asked}]

        def next_turn(answer: str) -> tuple[float, Prompt]:
            spoken = [*messages, {"role": "assistant", "content": answer}]
            return spec.option("think"), self._turn(index, content, turn + 1, spoken)

        last = turn + 1 >= spec.option("turns")
        return Prompt(
            messages,
            spec.output_tokens,
            tokens.tokens_for(count) if turn == 0 else None,
            next_turn=None if last else next_turn,
        )


class ShareGpt:
    """`sharegpt`: the first question of each conversation of a file; the answer's length is the file's, estimated."""

    def __init__(self, spec: WorkloadSpec, tokens: Tokenization) -> None:
        longest_chars = spec.option("max") * _CHARS_PER_TOKEN
        self._fixed_out = int(spec.option("out"))
        self._pairs = [
            (question, answer)
            for question, answer in map(_first_pair, json.loads(Path(spec.path).read_text()))
            if 4 * _CHARS_PER_TOKEN <= len(question) <= longest_chars and answer
        ]
        if not self._pairs:
            raise ValueError(
                f"{spec.path} holds no conversation with a first question of 4 to max tokens and an answer"
            )

    def prompt(self, index: int, content: Content) -> Prompt:
        order = np.random.default_rng([content.seed, _GROUP, index // len(self._pairs)]).permutation(len(self._pairs))
        question, answer = self._pairs[int(order[index % len(self._pairs)])]
        asked = question if content.warm else f"[{content.nonce}-{index}]\n{question}"
        return Prompt([{"role": "user", "content": asked}], self._fixed_out or max(1, len(answer) // _CHARS_PER_TOKEN))


def _first_pair(item: dict[str, list[dict[str, str]]]) -> tuple[str, str]:
    turns = [turn.get("value", "") for turn in item.get("conversations", [])[:2]]
    return (turns[0], turns[1]) if len(turns) == 2 else ("", "")


class TraceLine(msgspec.Struct):
    """A request of a trace; hash ids name blocks of 512 tokens that equal ids share, `model` an adapter."""

    timestamp: float  # milliseconds after the trace's start
    input_length: int
    output_length: int
    hash_ids: list[int] = []
    model: str = ""


class Trace:
    """`trace`: recorded arrival times and lengths, with shared beginnings where the trace has block hashes."""

    def __init__(self, spec: WorkloadSpec, tokens: Tokenization) -> None:
        self._tokens = tokens
        self.lines = read_trace(spec)

    def prompt(self, index: int, content: Content) -> Prompt:
        line = self.lines[index % len(self.lines)]
        count = self._tokens.words_for(line.input_length)
        words, seed, nonce = self._tokens.words, content.seed, content.nonce
        block_words = round(_HASH_BLOCK_TOKENS / self._tokens.tokens_per_word)
        parts: list[str] = []
        left = count
        for hash_id in line.hash_ids:
            parts.append(text(words, min(left, block_words), seed, _SHARED, content.shared_nonce, hash_id))
            left -= min(left, block_words)
        if left:
            parts.append(text(words, left, seed, _CONTENT, nonce, index))
        asked = " ".join(part for part in parts if part)
        tokens = self._tokens.tokens_for(count)
        return Prompt([{"role": "user", "content": asked}], line.output_length, tokens, line.model)


def read_trace(spec: WorkloadSpec) -> list[TraceLine]:
    """The lines of a trace file in order of time, sped up as asked. Raises ValueError."""
    try:
        lines = msgspec.json.Decoder(TraceLine).decode_lines(Path(spec.path).read_bytes())
    except msgspec.DecodeError as error:
        raise ValueError(f"{spec.path} is no trace of JSON lines: {error}") from error
    if not lines:
        raise ValueError(f"{spec.path} is empty")
    for line in lines:
        line.timestamp /= spec.option("speed")
    return sorted(lines, key=lambda line: line.timestamp)


_KINDS: dict[str, Callable[[WorkloadSpec, Tokenization], Workload]] = {
    "random": RandomWords,
    "prefix": SharedPrefix,
    "turns": Turns,
    "sharegpt": ShareGpt,
    "trace": Trace,
}


def build_workload(spec: WorkloadSpec, tokens: Tokenization) -> Workload:
    """The workload of a spec. Raises ValueError or OSError for a file that does not hold one."""
    return _KINDS[spec.kind](spec, tokens)
