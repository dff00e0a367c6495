"""The prompts of a GRPO run: rows with something to answer, and what the rewards need to judge the answers."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from trainer.config import GrpoConfig
from trainer.data import Faults, parse_line, read_lines
from trainer.dataset import DatasetMeta
from trainer.errors import DataError, RowError
from trainer.formats import Prompt, parse_prompt, with_system
from trainer.masks import ChatTemplate
from trainer.model import BaseModel


class PromptDataset:
    """Prompts by number, with their token ids. They are few and short beside the answers: kept in memory."""

    def __init__(self, prompts: Sequence[Prompt], token_ids: Sequence[np.ndarray], meta: DatasetMeta) -> None:
        self.prompts = prompts
        self.meta = meta
        self._token_ids = token_ids

    def __len__(self) -> int:
        return len(self.prompts)

    def prompt_ids(self, example: int) -> np.ndarray:
        """What the model sees before it answers."""
        return self._token_ids[example]


def read_prompts(config: GrpoConfig, base: BaseModel, origins: Sequence[str]) -> PromptDataset:
    """Read and tokenise the rows. Raises DataError that names every bad line."""
    template = ChatTemplate(base.tokenizer, stop_ids=base.stop_ids, template_kwargs=config.template_kwargs)
    room = config.max_length - config.max_completion_tokens
    digest, faults = hashlib.sha256(), Faults()
    prompts: list[Prompt] = []
    token_ids: list[np.ndarray] = []
    dropped = 0

    def read(row: dict[str, Any]) -> tuple[Prompt, list[int]]:
        prompt = parse_prompt(row, config.data_format)
        prompt = replace(prompt, messages=with_system(prompt.messages, config.system))
        return prompt, template.encode(template.render(prompt.messages, prompt.tools, prompt=True))

    for line in read_lines(origins, digest):
        try:
            prompt, ids = parse_line(line, read)
            if len(ids) <= room:
                prompts.append(prompt)
                token_ids.append(np.asarray(ids, np.int32))
            elif config.overlong == "error":
                raise RowError(f"{len(ids)} tokens; max_length less max_completion_tokens leaves {room}")
            else:
                dropped += 1
        except RowError as error:
            faults.add(line, str(error))
    faults.raise_if_any()
    if not prompts:
        given = ", ".join(map(str, origins))
        raise DataError(f"no prompt of {given} fits into {room} tokens" if dropped else f"no prompts in {given}")
    lengths = [len(ids) for ids in token_ids]
    meta = DatasetMeta(
        sha256=digest.hexdigest(),
        examples=len(prompts),
        tokens=sum(lengths),
        trained_tokens=0,
        dropped=dropped,
        truncated=0,
        longest_tokens=max(lengths) + config.max_completion_tokens,
    )
    return PromptDataset(prompts, token_ids, meta)
