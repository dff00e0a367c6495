"""Load and answer: a checkpoint in a real engine, behind a gateway started for the purpose. Needs no torch.

A broken kernel or layout shows late: one short answer can still be right by luck, so a long text is asked for too.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from quant.errors import NotServed
from quant.headers import read_json

LONG_TOKENS = 512
_QUESTION = "What is the capital of France? Answer in one sentence."
_TASK = "Write a long letter to a friend about a journey through the mountains."
_SAME_IN_A_ROW = 24  # words; broken weights say one thing for ever
_LEAST_DISTINCT = 0.15  # share of different runs of four words: a small model's own loops stay above it
_LEAST_OF_ORIGINAL = 0.5  # of the original's share, where that is known
_ANSWER_S, _STOP_S = 900, 90


@dataclass(frozen=True, slots=True)
class Answers:
    """What an engine said with a checkpoint."""

    answer: str
    long_tokens: int
    distinct: float  # share of different runs of four words in the long text
    same_in_a_row: int  # longest run of one word
    undecodable: int  # replacement characters


def ask(directory: Path, engine: str, device: str | None) -> Answers:
    """Start an installed engine on the checkpoint and have it answer. Raises NotServed."""
    with serving(directory, engine, device) as url:
        answer, _ = _chat(url, _QUESTION, {"max_tokens": 48, "temperature": 0})
        text, tokens = _chat(url, _TASK, {"max_tokens": LONG_TOKENS, "temperature": 0.7, "seed": 7, "ignore_eos": True})
    words = text.split()
    return Answers(answer, tokens, distinct_runs(words), same_in_a_row(words), text.count("\ufffd"))


def faults(found: Answers, original: Answers | None = None) -> list[str]:
    """What is wrong with the answers, in words; empty when nothing is."""
    least = _LEAST_DISTINCT if original is None else _LEAST_OF_ORIGINAL * original.distinct
    wrong = []
    if not re.search(r"\w", found.answer):
        wrong.append(f"the short answer holds no word: {found.answer[:80]!r}")
    if found.long_tokens < LONG_TOKENS:
        wrong.append(f"the long text ended after {found.long_tokens} of {LONG_TOKENS} tokens")
    if found.same_in_a_row >= _SAME_IN_A_ROW:
        wrong.append(f"the long text says one word {found.same_in_a_row} times in a row")
    if found.distinct < least:
        wrong.append(f"of the long text's runs of four words {found.distinct:.0%} differ, at least {least:.0%} should")
    return wrong


def distinct_runs(words: list[str]) -> float:
    """Share of different runs of four words; 1 for a text with no such run."""
    runs = list(zip(*(words[start:] for start in range(4)), strict=False))
    return len(set(runs)) / len(runs) if runs else 1.0


def same_in_a_row(words: list[str]) -> int:
    """Length of the longest run of one word; a long word of one character counts as its length."""
    lengths = [sum(1 for _ in run) for _, run in groupby(words)]
    lengths += [len(word) for word in words if len(word) > 1 and len(set(word)) == 1]
    return max(lengths, default=0)


@contextlib.contextmanager
def serving(directory: Path, engine: str, device: str | None) -> Iterator[str]:
    """The URL of a gateway that serves the checkpoint by an installed engine. Raises NotServed, BadCheckpoint."""
    length_tokens = min(2048, read_json(directory / "config.json").get("max_position_embeddings", 2048))
    with tempfile.TemporaryDirectory(prefix="verify-") as state:
        argv = [sys.executable, "-m", "gateway", "serve", "--model", str(directory), "--model-name", "base"]
        argv += ["--backend", engine, "--adapter-slots", "0", "--port", "0", "--state", state]
        argv += ["--max-model-len", str(length_tokens), *(("--device", device) if device else ())]
        open_access = {name: value for name, value in os.environ.items() if name != "TUNEGATE_API_KEYS"}
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env=open_access)
        try:
            assert process.stdout is not None
            ready = process.stdout.readline().split()
            if ready[:1] != ["ready"]:
                raise NotServed(f"{engine} did not come up with {directory}: the reason stands above")
            yield ready[1]
        finally:
            process.terminate()
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _chat(url: str, content: str, options: dict[str, Any]) -> tuple[str, int]:
    body = {"model": "base", "messages": [{"role": "user", "content": content}], **options}
    request = urllib.request.Request(  # noqa: S310 - the address of the gateway just started
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=_ANSWER_S) as response:  # noqa: S310
            answer = json.load(response)
    except urllib.error.HTTPError as error:
        raise NotServed(f"the engine answered {error.code}: {error.read()[:300].decode(errors='replace')}") from error
    except OSError as error:
        raise NotServed(f"the engine did not answer: {error}") from error
    # null where a parser of the engine's took all of it for reasoning: as good as silent
    return answer["choices"][0]["message"]["content"] or "", int(answer["usage"]["completion_tokens"])
