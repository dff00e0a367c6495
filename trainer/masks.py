"""From a conversation to token ids and the weight of each token in the loss, by the tokenizer's own chat template.

What the served model sees before it answers turn i is `render(messages before i, generation prompt)`; what it should
then produce is the rest of `render(messages up to i)`. Both come from the template itself, so a trained turn starts
from exactly the ids that serving feeds. A template that rewrites history (drops old <think> blocks) yields texts of
which one is no prefix of the next; the conversation then becomes several sequences, each as served.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jinja2

from trainer.errors import ModelError, RowError
from trainer.formats import Conversation, Message

_THINKING = re.compile(r"<think>.*?</think>\s*", re.DOTALL)


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """Token ids and, for each, its weight as a target. The first token is never a target."""

    token_ids: list[int]
    weights: list[float]
    good: bool = True  # an answer to move towards, or away from (KTO)

    @property
    def trained_tokens(self) -> int:
        """Tokens with a weight."""
        return sum(weight > 0 for weight in self.weights)


@dataclass(frozen=True, slots=True)
class _Turn:
    """An assistant turn inside a rendered text: characters [start, end)."""

    start: int
    end: int
    weight: float


class ChatTemplate:
    """A tokenizer's chat template, and which of its tokens are learnt."""

    def __init__(
        self,
        tokenizer: Any,
        *,
        stop_ids: Iterable[int] = (),
        template_kwargs: dict[str, Any] | None = None,
        train_on_thinking: bool = True,
    ) -> None:
        if not tokenizer.chat_template:
            raise ModelError(
                "the model's tokenizer has no chat template; use an instruct model, or add chat_template.jinja"
            )
        self._tokenizer = tokenizer
        self._stop_ids = {*stop_ids, tokenizer.eos_token_id} - {None}
        self._kwargs = template_kwargs or {}
        self._train_on_thinking = train_on_thinking

    def render(self, messages: list[Message], tools: list[dict[str, Any]] | None, *, prompt: bool = False) -> str:
        """The text of these messages; `prompt` adds what invites the assistant's answer. Raises RowError."""
        try:
            text: str = self._tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=prompt, **self._kwargs
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise RowError(f"the model's chat template refuses it: {error}") from error
        return text

    def encode(self, text: str) -> list[int]:
        """Token ids of rendered text (the template has written the special tokens already)."""
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def sequences(self, conversation: Conversation) -> list[TokenSequence]:
        """As it is served: one sequence, or one per turn where the template rewrites history. Raises RowError."""
        grouped: list[tuple[str, list[_Turn]]] = []
        for i, weight in enumerate(conversation.weights):
            if not weight:
                continue
            text, turn = self._turn(conversation, i, weight)
            if grouped and text.startswith(grouped[-1][0]) and turn.start >= len(grouped[-1][0]):
                grouped[-1] = (text, [*grouped[-1][1], turn])
            else:
                grouped.append((text, [turn]))
        return [self._tokenise(text, turns) for text, turns in grouped]

    def _turn(self, conversation: Conversation, i: int, weight: float) -> tuple[str, _Turn]:
        """The text up to and with message i, and where its answer lies in it."""
        context = self.render(conversation.messages[:i], conversation.tools, prompt=True)
        text = self.render(conversation.messages[: i + 1], conversation.tools)
        if not text.startswith(context):
            raise RowError(
                f"the model's chat template opens an answer with {context[-40:]!r}, but renders message {i} otherwise: "
                "the model would be trained on what it never meets when served. Where the template always opens a "
                "<think> block, give `reasoning_content` or set template_kwargs (such as enable_thinking=false)"
            )
        return text, _Turn(len(context), len(text), weight)

    def _tokenise(self, text: str, turns: list[_Turn]) -> TokenSequence:
        """Ids of the text in which each trained turn begins at a token, exactly after its prompt's own ids."""
        ids = self.encode(text)
        starts = [len(self.encode(text[: turn.start])) for turn in turns]
        apart = any(self.encode(text[: turn.start]) != ids[:n] for turn, n in zip(turns, starts, strict=True))
        if apart:
            # A token would straddle prompt and answer, which never happens when the prompt is fed alone.
            ids, starts = self._encode_apart(text, [turn.start for turn in turns])
        weights = [0.0] * len(ids)
        for turn, start in zip(turns, starts, strict=True):
            # Characters are counted from where the ids were encoded in one piece.
            origin = (turn.start, start) if apart else (0, 0)
            stop = self._after_stop(ids, start, self._position(ids, text, turn.end, origin))
            weights[start:stop] = [turn.weight] * (stop - start)
            if not self._train_on_thinking:
                for match in _THINKING.finditer(text, turn.start, turn.end):
                    first = max(start, self._position(ids, text, match.start(), origin))
                    last = self._position(ids, text, match.end(), origin)
                    weights[first:last] = [0.0] * (last - first)
        # What follows the last target influences nothing.
        used = max((k + 1 for k, weight in enumerate(weights) if weight), default=0)
        return TokenSequence(ids[:used], weights[:used])

    def _encode_apart(self, text: str, cuts: list[int]) -> tuple[list[int], list[int]]:
        """Ids of the pieces between the cuts, one after the other, and where each cut falls."""
        ids: list[int] = []
        starts: list[int] = []
        for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
            ids += self.encode(text[begin:end])
            starts.append(len(ids))
        return ids, starts[:-1]

    def _position(self, ids: list[int], text: str, at: int, origin: tuple[int, int]) -> int:
        """The first token that does not lie wholly before character `at`."""
        first_character, first_token = origin
        before = self.encode(text[first_character:at])
        for k, (left, right) in enumerate(zip(ids[first_token:], before, strict=False)):
            if left != right:
                return first_token + k
        return min(len(ids), first_token + len(before))

    def _after_stop(self, ids: list[int], start: int, end: int) -> int:
        """Just after the turn's stop token; what the template writes behind it is not the model's to learn."""
        for k in range(end - 1, start - 1, -1):
            if ids[k] in self._stop_ids:
                return k + 1
        return end
