"""How likely an engine finds a given answer to a prompt, token by token, by each engine's own route."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import httpx2

from backends import upstream
from backends.base import AdapterRejected

_FORCED_TOKENS = 4  # from where an engine's own answer leaves the given one
Found = TypeVar("Found")


async def vllm(
    client: httpx2.AsyncClient, model: str, prompt: Sequence[int], answer: Sequence[int], timeout_s: float
) -> list[float]:
    """By generating greedily; where vLLM would say something else, some tokens are forced, and the rest left out.

    Not by `prompt_logprobs`: they take memory by prompt and vocabulary, and can end an engine that has none to spare.
    Each forced token costs a pass over what stands before it, which on a CPU takes a second.
    """
    chosen = await _generated(client, model, list(prompt), len(answer), timeout_s)
    same = list(itertools.takewhile(lambda pair: pair[0][0] == pair[1], zip(chosen, answer, strict=True)))
    found = [logprob for (_, logprob), _ in same]
    for at in range(len(same), min(len(same) + _FORCED_TOKENS, len(answer))):
        [(_, logprob)] = await _generated(client, model, [*prompt, *answer[:at]], 1, timeout_s, [answer[at]])
        found.append(logprob)
    return found


async def _generated(
    client: httpx2.AsyncClient,
    model: str,
    prompt: list[int],
    tokens: int,
    timeout_s: float,
    allowed: list[int] | None = None,
) -> list[tuple[int, float]]:
    """The likeliest tokens after a prompt, or of the allowed ones, with their logprobs among all tokens."""
    body: dict[str, Any] = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0}
    body |= {"ignore_eos": True, "logprobs": 1, "return_token_ids": True}
    if allowed is not None:
        body["allowed_token_ids"] = allowed

    def read(reply: Any) -> list[tuple[int, float]]:
        choice = reply["choices"][0]
        found = [
            (int(token_id), float(logprob))
            for token_id, logprob in zip(choice["token_ids"], choice["logprobs"]["token_logprobs"], strict=True)
        ]
        if len(found) != tokens:
            raise ValueError(f"{len(found)} tokens came where {tokens} were asked for")
        return found

    return await _ask(client, "/v1/completions", body, read, timeout_s)


async def sglang(
    client: httpx2.AsyncClient, adapter: str | None, prompt: Sequence[int], answer: Sequence[int], timeout_s: float
) -> list[float]:
    """By the native route; SGLang's OpenAI routes give the logprobs of a prompt by its text alone."""
    token_ids = [*prompt, *answer]
    body: dict[str, Any] = {
        "input_ids": token_ids,
        "sampling_params": {"max_new_tokens": 1, "temperature": 0},
        "return_logprob": True,
        "logprob_start_len": 0,
    }
    if adapter is not None:
        body["lora_path"] = adapter

    def read(reply: Any) -> list[float]:
        scored = reply["meta_info"]["input_token_logprobs"][1:]
        if [token_id for _, token_id, *_ in scored] != token_ids[1:]:
            raise ValueError("other tokens were scored than were sent")
        return [float(logprob) for logprob, *_ in scored[-len(answer) :]]

    return await _ask(client, "/generate", body, read, timeout_s)


async def _ask(
    client: httpx2.AsyncClient, path: str, body: dict[str, Any], read: Callable[[Any], Found], timeout_s: float
) -> Found:
    response = await upstream.try_adapter(client, path, body, timeout_s, "a request to score tokens with it")
    try:
        return read(response.json())
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise AdapterRejected(
            f"the engine's {path} gave no logprobs of the golden tokens: {response.text[:200]}"
        ) from error
