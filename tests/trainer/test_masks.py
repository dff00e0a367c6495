from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("transformers", reason="needs transformers")

from tests.trainer.models import CHATML, THINK_STRIPPING, make_tokenizer
from trainer.errors import ModelError, RowError
from trainer.formats import Conversation, Message, parse_conversation
from trainer.masks import ChatTemplate, TokenSequence

TOKENIZER = make_tokenizer()


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def answer(text: str, **more: Any) -> Message:
    return {"role": "assistant", "content": text, **more}


def conversation(*messages: Message) -> Conversation:
    return parse_conversation({"messages": list(messages)})


def trained(sequence: TokenSequence) -> list[str]:
    """The trained stretches as text."""
    runs: list[list[int]] = []
    for k, (token, weight) in enumerate(zip(sequence.token_ids, sequence.weights, strict=True)):
        if weight:
            if not (k and sequence.weights[k - 1]):
                runs.append([])
            runs[-1].append(token)
    return [TOKENIZER.decode(run) for run in runs]


def test_only_the_answers_and_their_stop_token_are_learnt() -> None:
    [sequence] = ChatTemplate(TOKENIZER).sequences(conversation(user("hi"), answer("yo"), user("x"), answer("A B")))
    assert trained(sequence) == ["yo<|im_end|>", "A B<|im_end|>"]
    assert TOKENIZER.decode(sequence.token_ids).endswith("A B<|im_end|>")


@pytest.mark.parametrize(
    "reply", ["hello", "\n\nhello", " ", "hello world, what is", "\n", "é日本", "<think>yes</think> 1"]
)
@pytest.mark.parametrize(
    "template",
    [
        CHATML,
        THINK_STRIPPING,
        CHATML.replace("\n' + message", "\n\n' + message").replace("assistant\n", "assistant\n\n"),
    ],
)
def test_each_trained_turn_follows_exactly_the_ids_that_serving_feeds(reply: str, template: str) -> None:
    tokenizer = make_tokenizer(template)
    given = conversation(user("hi"), answer(reply + "1"), user("x\n"), answer(reply))
    sequences = ChatTemplate(tokenizer).sequences(given)
    starts = []
    for sequence in sequences:
        edges = [k for k, w in enumerate(sequence.weights) if w and not sequence.weights[k - 1]]
        starts += [sequence.token_ids[:k] for k in edges]
    served = [
        tokenizer(
            tokenizer.apply_chat_template(given.messages[:i], tokenize=False, add_generation_prompt=True),
            add_special_tokens=False,
        )["input_ids"]
        for i in (1, 3)
    ]
    assert starts == served


def test_a_template_that_drops_old_thinking_gives_a_sequence_a_turn() -> None:
    given = conversation(user("a"), answer("<think>yes</think>\nb"), user("c"), answer("<think>yes</think>\nd"))
    first, second = ChatTemplate(make_tokenizer(THINK_STRIPPING)).sequences(given)
    assert trained(first) == ["<think>yes</think>\nb<|im_end|>"]
    assert trained(second) == ["<think>yes</think>\nd<|im_end|>"]
    assert TOKENIZER.decode(second.token_ids).count("<think>") == 1


def test_thinking_can_be_left_out_of_the_loss() -> None:
    template = ChatTemplate(TOKENIZER, train_on_thinking=False)
    [sequence] = template.sequences(conversation(user("a"), answer("<think>yes</think>\nb")))
    assert trained(sequence) == ["b<|im_end|>"]


def test_weights_go_to_their_own_turn() -> None:
    given = conversation(user("a"), answer("b", weight=0.5), user("c"), answer("d", weight=0), user("e"), answer("f"))
    [sequence] = ChatTemplate(TOKENIZER).sequences(given)
    assert trained(sequence) == ["b<|im_end|>", "f<|im_end|>"]
    assert sorted(set(sequence.weights)) == [0, 0.5, 1]


def test_a_tool_call_is_learnt() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    [sequence] = ChatTemplate(TOKENIZER).sequences(conversation(user("a"), answer("", tool_calls=[call])))
    assert trained(sequence) == ['<tool_call>f {"a": 1}</tool_call><|im_end|>']


def test_a_template_that_opens_answers_otherwise_than_it_renders_them_is_refused() -> None:
    template = CHATML.replace("assistant\n' }}", "assistant\n<think>\n' }}")
    assert template != CHATML
    with pytest.raises(RowError, match="never meets when served"):
        ChatTemplate(make_tokenizer(template)).sequences(conversation(user("a"), answer("b")))


def test_what_the_template_refuses_is_told() -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(RowError, match="roles must alternate"):
        ChatTemplate(make_tokenizer(template)).sequences(conversation(user("a"), answer("b")))


def test_a_tokenizer_without_template_is_refused() -> None:
    with pytest.raises(ModelError, match="no chat template"):
        ChatTemplate(make_tokenizer(""))
