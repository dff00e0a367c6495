"""Other load generators' command lines, so that all can be run on one stream source and their CPU time compared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec


class Job(msgspec.Struct, frozen=True):
    """The same work for every tool: so many streams of so many tokens, so many at a time."""

    url: str
    model: str
    requests: int
    concurrency: int
    output_tokens: int
    input_tokens: int = 16
    tokenizer: str = ""


def bench(program: str, job: Job) -> list[str]:
    """This bench, run by a Python interpreter."""
    return [
        program, "-m", "bench", "run", "--url", job.url, "--model", job.model, "--quiet", "--repeats", "1",
        "--warmup", "0",
        "--requests", str(job.requests), "--concurrency", str(job.concurrency), "--duration", "600",
        "--workload", f"random:{job.input_tokens}/{job.output_tokens}", "--name", "selftest", "--workers", "1",
    ]  # fmt: skip


def _vllm(program: str, job: Job) -> list[str]:
    return [
        program, "bench", "serve", "--backend", "openai-chat", "--endpoint", "/v1/chat/completions",
        "--base-url", job.url, "--model", job.model,
        "--tokenizer", job.tokenizer, "--dataset-name", "random", "--ignore-eos",
        "--random-input-len", str(job.input_tokens), "--random-output-len", str(job.output_tokens),
        "--num-prompts", str(job.requests), "--max-concurrency", str(job.concurrency), "--disable-tqdm",
    ]  # fmt: skip


def _guidellm(program: str, job: Job) -> list[str]:
    return [
        program, "run", "--backend", f"kind=openai_http,target={job.url},model={job.model}",
        "--profile", f"kind=concurrent,streams={job.concurrency}",
        "--constraint", f"kind=max_requests,count={job.requests}",
        "--tokenizer", f"kind=hf_auto,model={job.tokenizer}",
        "--data", f"kind=synthetic_text,prompt_tokens={job.input_tokens},output_tokens={job.output_tokens}",
        "--output", "kind=json,path=guidellm.json", "--disable-console",
    ]  # fmt: skip


def _aiperf(program: str, job: Job) -> list[str]:
    return [
        program, "profile", "--model", job.model, "--url", job.url, "--endpoint-type", "chat", "--streaming",
        "--tokenizer", job.tokenizer, "--concurrency", str(job.concurrency), "--request-count", str(job.requests),
        "--synthetic-input-tokens-mean", str(job.input_tokens), "--output-tokens-mean", str(job.output_tokens),
        "--extra-inputs", "ignore_eos:true", "--ui", "none", "--use-server-token-count",
    ]  # fmt: skip


# a tool is known by how its program's file is called
COMMANDS: dict[str, Callable[[str, Job], list[str]]] = {"vllm": _vllm, "guidellm": _guidellm, "aiperf": _aiperf}


def command_of(program: Path, job: Job) -> list[str]:
    """The command line for a tool. Raises ValueError for one that is not known."""
    if program.name not in COMMANDS:
        raise ValueError(f"unknown load generator {program.name!r}; known: {', '.join(COMMANDS)}")
    return COMMANDS[program.name](str(program), job)
