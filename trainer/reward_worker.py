"""The child process of a reward plug-in: `python -m trainer.reward_worker FILE.py FUNCTION`, or of a grader's file.

One call a line on standard input, one answer a line on standard output. What the plug-in prints goes to standard error.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer import graders


def main(file: str, function: str) -> None:
    """Serve calls until standard input ends."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    try:
        reward = _load(Path(file), function)
    except Exception as error:  # noqa: BLE001 - whatever a user's file raises is the answer to the first call
        problem = f"{file} cannot be imported: {type(error).__name__}: {error}"
        for _ in sys.stdin:
            _say(answers, {"error": problem})
        return
    for line in sys.stdin:
        call = json.loads(line)
        try:
            scores = reward(prompts=call["prompts"], completions=call["completions"], **call["columns"])
            _say(answers, {"scores": [None if score is None else float(score) for score in scores]})
        except Exception as error:  # noqa: BLE001 - likewise of his function
            _say(answers, {"error": f"{type(error).__name__}: {error}"})


def _load(file: Path, function: str) -> Callable[..., Any]:
    if file.suffix == ".json":
        return graders.reward(file)
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None, "a .py file has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(file.parent))  # as if the file were run
    spec.loader.exec_module(module)
    reward: Callable[..., Any] = getattr(module, function)
    return reward


def _say(stream: Any, answer: dict[str, Any]) -> None:
    stream.write(json.dumps(answer) + "\n")
    stream.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
