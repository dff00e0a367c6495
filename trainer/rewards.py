"""Rewards of sampled answers: two of ours, and plug-ins that run in a child process with a time limit.

A plug-in is a function in a Python file, called as TRL calls its reward functions:

    def reward(prompts, completions, **columns) -> list[float]

`prompts` and `completions` are lists of message lists; `columns` holds the other keys of the rows, one value an answer.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import selectors
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from trainer import graders
from trainer.errors import ConfigError, RewardError
from trainer.formats import Message

_FORMAT = re.compile(r"\s*<think>.*?</think>\s*<answer>.*?</answer>\s*", re.DOTALL)
_WITHHELD = ("TUNEGATE_API_KEY", "TUNEGATE_API_KEYS")  # a plug-in has no business with the gateway
_MAX_ANSWER_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class Answer:
    """One sampled answer beside its prompt."""

    prompt: list[Message]
    completion: str
    columns: dict[str, Any]


class Reward(Protocol):
    """Judges answers."""

    name: str

    def score(self, answers: Sequence[Answer]) -> list[float]:
        """One number an answer. Raises RewardError."""

    def close(self) -> None:
        """Let go of processes."""


def make_reward(spec: str, timeout_s: float) -> Reward:
    """The reward of `accuracy`, `format`, `FILE.py:FUNCTION` or a grader's `FILE.json`. Raises ConfigError."""
    if spec == "format":
        return FormatReward()
    if spec.endswith(".json"):
        return Plugin(graders.read(Path(spec)).name, Path(spec).absolute(), "graded", timeout_s)
    if spec == "accuracy":
        if importlib.util.find_spec("math_verify") is None:
            raise ConfigError("the reward `accuracy` needs math-verify: pip install 'tunegate[rewards]'")
        return Plugin("accuracy", Path(__file__).with_name("accuracy.py"), "accuracy", timeout_s)
    file, colon, function = spec.rpartition(":")
    if not colon or not function.isidentifier() or not Path(file).is_file():
        raise ConfigError(
            f"reward `{spec}`: give `accuracy`, `format`, FILE.json of a grader, or FILE.py:FUNCTION, files that exist"
        )
    return Plugin(function, Path(file).absolute(), function, timeout_s)


class FormatReward:
    """1 for <think>…</think><answer>…</answer>, else 0."""

    name = "format"

    def score(self, answers: Sequence[Answer]) -> list[float]:
        """One number an answer."""
        return [float(_FORMAT.fullmatch(answer.completion) is not None) for answer in answers]

    def close(self) -> None:
        """Nothing is held."""


class Plugin:
    """A function of the user's in a child process, so that neither its end nor its length is the trainer's."""

    def __init__(self, name: str, file: Path, function: str, timeout_s: float) -> None:
        self.name = name
        self._command = [sys.executable, "-m", "trainer.reward_worker", str(file), function]
        self._timeout_s = timeout_s
        self._one_call = threading.Lock()  # answers sampled ahead and an evaluation may be scored at the same time
        self._process: subprocess.Popen[bytes] | None = None

    def score(self, answers: Sequence[Answer]) -> list[float]:
        """One number an answer. Raises RewardError when the function fails, answers nonsense or takes too long."""
        keys = {key for answer in answers for key in answer.columns}
        columns = {key: [answer.columns.get(key) for answer in answers] for key in sorted(keys)}
        call = {
            "prompts": [answer.prompt for answer in answers],
            "completions": [[{"role": "assistant", "content": answer.completion}] for answer in answers],
            "columns": columns,
        }
        with self._one_call:
            reply = self._call(json.dumps(call).encode() + b"\n")
        if "error" in reply:
            raise RewardError(f"reward `{self.name}` failed: {reply['error']}")
        return _checked(self.name, reply.get("scores"), len(answers))

    def close(self) -> None:
        """End the child."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    stream.close()

    def _call(self, line: bytes) -> dict[str, Any]:
        process = self._process or self._start()
        assert process.stdin is not None and process.stdout is not None
        deadline_s = time.monotonic() + self._timeout_s
        received = bytearray()
        unsent = memoryview(line)
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdin, selectors.EVENT_WRITE)
            selector.register(process.stdout, selectors.EVENT_READ)
            while not received.endswith(b"\n"):
                ready = selector.select(max(0.0, deadline_s - time.monotonic()))
                if not ready or len(received) > _MAX_ANSWER_BYTES:
                    self.close()
                    fault = f"gave no answer within {self._timeout_s:g} s" if not ready else "answered far too much"
                    raise RewardError(f"reward `{self.name}` {fault}; it was ended")
                for key, _ in ready:
                    if key.fileobj is process.stdout:
                        data = os.read(process.stdout.fileno(), 1 << 16)
                        if not data:
                            self.close()
                            raise RewardError(f"reward `{self.name}` ended; its last words are above")
                        received += data
                    elif unsent:
                        try:
                            unsent = unsent[os.write(process.stdin.fileno(), unsent) :]
                        except BrokenPipeError:
                            unsent = unsent[:0]  # what it printed before says why
                    else:
                        selector.unregister(process.stdin)
        reply = json.loads(received)
        assert isinstance(reply, dict), "our own worker answers objects"
        return reply

    def _start(self) -> subprocess.Popen[bytes]:
        environment = {key: value for key, value in os.environ.items() if key not in _WITHHELD}
        process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, bufsize=0
        )
        assert process.stdin is not None
        os.set_blocking(process.stdin.fileno(), False)
        self._process = process
        return process


def _checked(name: str, scores: Any, count: int) -> list[float]:
    if not isinstance(scores, list) or len(scores) != count:
        given = f"{len(scores)} values" if isinstance(scores, list) else type(scores).__name__
        raise RewardError(f"reward `{name}` must return a list of {count} numbers, one an answer; it returned {given}")
    for score in scores:
        if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
            raise RewardError(f"reward `{name}` returned {score!r}; each value must be a finite number")
    return [float(score) for score in scores]
