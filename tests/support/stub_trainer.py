"""Stands in for `python -m trainer`: the same command line, files and exit statuses, without torch.

It makes a step every few milliseconds. Words in its training data make it misbehave: `worse` (than the base on held-out
data), `broken` (it fails), `murdered` (it is killed at each start), `stabbed` (killed once, half way). One that samples
answers (`grpo`) fails unless its key opens what it needs at the gateway, and nothing else.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import httpx2
import yaml

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.support.engines import adapter

PAUSED = 75
_STEP_S = 0.01


def launcher(directory: Path) -> Path:
    """A file for --trainer-python that runs this."""
    file = directory / "python-with-stub"
    file.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{__file__}" "$@"\n')
    file.chmod(0o755)
    return file


def main(arguments: list[str]) -> int:
    if arguments[0] == "-c":
        return 0  # asked whether torch is here
    command = arguments[2]
    moved = {"gateway_url": arguments[-1]} if "--gateway-url" in arguments else {}
    if command == "check-data":
        os.execv(sys.executable, [sys.executable, *arguments])
    if command == "resume":
        run = Path(arguments[3])
        config = yaml.safe_load((run / "config.yaml").read_text()) | moved
    else:
        config = yaml.safe_load(Path(arguments[4]).read_text()) | moved
        run = Path(config["output_dir"])
        run.mkdir(parents=True)
        (run / "config.yaml").write_text(yaml.safe_dump(config))
    return Run(run, config).train()


class Run:
    def __init__(self, directory: Path, config: dict[str, Any]) -> None:
        self.directory, self.config = directory, config
        self.text = Path(config["dataset"][0]).read_text()
        rows = len(self.text.splitlines())
        self.total = config["epochs"] * -(-rows // config["batch_size"])
        self.asked = False

    def train(self) -> int:
        signal.signal(signal.SIGTERM, self._on_signal)
        (self.directory / "pause").unlink(missing_ok=True)
        first = max((int(path.name[5:]) for path in self.directory.glob("checkpoints/step-*")), default=0)
        self.write("resumed" if first else "started", step=first, total_steps=self.total)
        (self.directory / "run.json").write_text("{}")
        if self.config["method"] == "grpo" and (answers := self.ask_gateway()) != [200, 200, 403]:
            self.write("failed", message=f"the gateway answers {answers}")
            return 1
        self.evaluate(0, 2.0)
        for step in range(first + 1, self.total + 1):
            if self.asked or (self.directory / "pause").exists():
                self.save(step - 1)
                self.write("paused", step=step - 1, reason="asked")
                return PAUSED
            time.sleep(_STEP_S)
            if "broken" in self.text:
                self.write("failed", message="the loss is not finite")
                return 1
            if "murdered" in self.text or ("stabbed" in self.text and not first and step == self.total // 2):
                os.kill(os.getpid(), signal.SIGKILL)
            more = {"reward": step / self.total} if self.config["method"] == "grpo" else {}
            self.write("step", step=step, loss=1 / step, token_accuracy=0.5, tokens=10, tokens_per_s=1e3, **more)
            if step % self.config["save_every"] == 0 and step < self.total:
                self.save(step)
                self.write("checkpoint", step=step, path=f"step-{step:08d}")
        self.evaluate(self.total, 3.0 if "worse" in self.text else 1.0)
        self.finish()
        return 0

    def ask_gateway(self) -> list[int]:
        """The statuses of what a trainer's key opens, and of what it does not."""
        key = {"authorization": f"Bearer {os.environ['TUNEGATE_API_KEY']}"}
        urls = [f"{self.config['gateway_url']}/v1/{path}" for path in ("models", "adapters", "files")]
        return [httpx2.get(url, headers=key, trust_env=False).status_code for url in urls]

    def evaluate(self, step: int, loss: float) -> None:
        if self.config.get("eval_dataset"):
            self.write("eval", step=step, loss=loss, token_accuracy=0.5)

    def save(self, step: int) -> None:
        final = self.directory / "checkpoints" / f"step-{step:08d}"
        if not final.exists():
            adapter(final, seed=step).joinpath("optimizer.safetensors").write_bytes(b"")

    def finish(self) -> None:
        made = adapter(self.directory / "adapter.partial", seed=self.config["seed"], rank=self.config["lora_rank"])
        losses = {"eval": {"loss": 3.0 if "worse" in self.text else 1.0}, "base_eval": {"loss": 2.0}}
        metrics = {"step": self.total, "tokens": 10 * self.total} | (losses if self.config.get("eval_dataset") else {})
        (made / "manifest.json").write_text(json.dumps({"metrics": metrics}))
        made.rename(self.directory / "adapter")
        self.write("finished", step=self.total)

    def write(self, type: str, **fields: Any) -> None:
        with (self.directory / "events.jsonl").open("a") as log:
            log.write(json.dumps({"time": time.time(), "type": type, **fields}) + "\n")

    def _on_signal(self, *_: object) -> None:
        self.asked = True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
