"""Several processes for the tests of multi-process training: `python -m tests.trainer.in_processes COUNT FOLDER`.

Standard input holds jobs, a JSON object a line, which all processes do one after the other:

    config      file of a run to start, or
    resume      directory of a run to go on with
    signal_at   step in which the last process asks itself to pause
    poison      the last process's gradients are not finite
    full_disk   the first process cannot write its second file of tensors
    stray       the last process reads other golden answers out of the same numbers, which end at once
    weigh       only count the base's weights that the process holds

A process writes how its jobs ended to FOLDER/RANK.json, and what it says to FOLDER/RANK.log.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

from backends import lifeline
from trainer import checkpoint, config, golden, ranks, run, sharding
from trainer.errors import TrainError
from trainer.learner import Learner
from trainer.model import load_base

_optim_step, _save_tensors, _next_tokens = Learner.optim_step, checkpoint.save_tensors, golden._next_tokens


def interfere(job: dict[str, Any], first: bool, last: bool) -> None:
    """Bring about what the job asks for, in this process."""
    steps, files = itertools.count(1), itertools.count(1)

    def optim_step(self: Learner, *args: Any) -> Any:
        if next(steps) == job.get("signal_at") and last:
            os.kill(os.getpid(), signal.SIGUSR1)
        if job.get("poison") and last:
            next(parameter.grad for parameter in self.parameters.values() if parameter.grad is not None).fill_(math.nan)
        return _optim_step(self, *args)

    def save_tensors(*args: Any) -> None:
        if next(files) == 2 and job.get("full_disk") and first:
            raise OSError(28, "No space left on device")
        _save_tensors(*args)

    def next_tokens(learner: Learner, answers: Any) -> Any:
        found = _next_tokens(learner, answers)
        stop = learner.base.tokenizer.eos_token_id
        return [(stop, logprob) for _, logprob in found] if job.get("stray") and last else found

    Learner.optim_step = optim_step
    checkpoint.save_tensors = save_tensors
    golden._next_tokens = next_tokens


def meeting_port(file: Path, *, first: bool) -> int:
    """A free port of 127.0.0.1, chosen by the first process when the job begins: chosen earlier, it may be taken."""
    if first:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            file.with_suffix(".partial").write_text(str(listener.getsockname()[1]))
        file.with_suffix(".partial").rename(file)
    while not file.exists():
        time.sleep(0.01)
    return int(file.read_text())


def _done(job: dict[str, Any]) -> Any:
    if "resume" in job:
        return run.resume(Path(job["resume"]))
    resolved = config.reload(Path(job["config"]))
    if not job.get("weigh"):
        return run.start(resolved)
    with ranks.joined(resolved):
        return sum(sharding.local(parameter).numel() for parameter in load_base(resolved).model.parameters())


def work(rank: int, count: int, jobs: list[dict[str, Any]], folder: Path) -> None:
    """Do the jobs as one of the processes."""
    with (folder / f"{rank}.log").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
    endings = []
    for number, job in enumerate(jobs):
        os.environ["MASTER_PORT"] = str(meeting_port(folder / f"{number}.port", first=rank == 0))
        interfere(job, rank == 0, rank == count - 1)
        try:
            endings.append(_done(job))
        except TrainError as error:
            endings.append(str(error))
    (folder / f"{rank}.json").write_text(json.dumps(endings))


def main() -> None:
    count, folder = int(sys.argv[1]), Path(sys.argv[2])
    jobs = [json.loads(line) for line in sys.stdin]
    children, parent = [], os.getpid()
    for rank in range(count):  # forked after the imports, which take longer than all jobs
        if child := os.fork():
            children.append(child)
        else:
            lifeline.end_with_parent(signal.SIGKILL, parent)
            work(rank, count, jobs, folder)
            return
    # One that fails ends the others, as torchrun has it.
    while children:
        ended, status = os.wait()
        children.remove(ended)
        if status:
            for child in children:
                os.kill(child, signal.SIGKILL)
            sys.exit(1)


if __name__ == "__main__":
    main()
