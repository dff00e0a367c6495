"""Runs in vLLM's environment: loads checkpoints one after the other, and has each score token ids and answer.

    python vllm_scores.py EXPECTED.json OUT.json CHECKPOINT...

One process: the engine's imports take longer than a small model. OUT.json gets {name: {"perplexity", "answer"}}.
"""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from vllm import LLM, SamplingParams
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

QUESTION = "What is the capital of France?"


def main(expected: Path, out: Path, checkpoints: list[Path]) -> None:
    sequences = json.loads(expected.read_text())["sequences"]
    out.write_text(json.dumps({path.name: ask(path, sequences) for path in checkpoints}))


def ask(checkpoint: Path, sequences: list[list[int]]) -> dict[str, Any]:
    llm = LLM(
        model=str(checkpoint),
        dtype="bfloat16",
        max_model_len=512,
        enforce_eager=True,
        kv_cache_memory_bytes=1 << 28,
        disable_log_stats=True,
    )
    silent = SamplingParams(max_tokens=1, prompt_logprobs=0)
    scored = llm.generate([{"prompt_token_ids": ids} for ids in sequences], silent, use_tqdm=False)
    losses = [
        -at[token].logprob
        for ids, one in zip(sequences, scored, strict=True)
        for token, at in zip(ids[1:], one.prompt_logprobs[1:], strict=True)
    ]
    greedy = SamplingParams(max_tokens=24, temperature=0)
    (said,) = llm.chat([{"role": "user", "content": QUESTION}], greedy, use_tqdm=False)
    del llm
    cleanup_dist_env_and_memory()
    return {"perplexity": math.exp(sum(losses) / len(losses)), "answer": said.outputs[0].text}


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), [Path(name) for name in sys.argv[3:]])
