"""From a row of data to the token sequences of one example, as the configuration's method wants them."""

from __future__ import annotations

from dataclasses import replace

from trainer.config import KtoConfig, PreferenceConfig, TrainConfig
from trainer.dataset import Tokenise
from trainer.errors import RowError
from trainer.formats import Conversation, Row, parse_conversation, parse_labelled, parse_preference, with_system
from trainer.masks import ChatTemplate, TokenSequence
from trainer.model import BaseModel


def tokeniser(config: TrainConfig, base: BaseModel) -> Tokenise:
    """The function that tokenises one row. It raises RowError for a bad one."""
    template = ChatTemplate(
        base.tokenizer,
        stop_ids=base.stop_ids,
        template_kwargs=config.template_kwargs,
        train_on_thinking=config.train_on_thinking,
    )

    def sequences(parsed: Conversation) -> list[TokenSequence]:
        messages = with_system(parsed.messages, config.system)
        weights = [0.0] * (len(messages) - len(parsed.messages)) + parsed.weights
        return template.sequences(Conversation(messages, weights, parsed.tools))

    def conversation(row: Row) -> list[TokenSequence]:
        parsed = parse_conversation(row, config.data_format)
        return sequences(_last_turn_only(parsed) if config.train_on == "last" else parsed)

    def preference(row: Row) -> list[TokenSequence]:
        parsed = parse_preference(row, config.data_format)
        return sequences(parsed.chosen) + sequences(parsed.rejected)

    def labelled(row: Row) -> list[TokenSequence]:
        parsed = parse_labelled(row, config.data_format)
        return [replace(sequence, good=parsed.good) for sequence in sequences(parsed.conversation)]

    if isinstance(config, KtoConfig):
        return labelled
    return preference if isinstance(config, PreferenceConfig) else conversation


def _last_turn_only(conversation: Conversation) -> Conversation:
    weights = [0.0] * (len(conversation.weights) - 1) + conversation.weights[-1:]
    if not weights[-1]:
        raise RowError("nothing to learn: the last assistant message has weight 0")
    return Conversation(conversation.messages, weights, conversation.tools)
