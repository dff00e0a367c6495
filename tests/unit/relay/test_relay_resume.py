"""Continuing a stream, without a relay: what the next engine is asked, and how its answer is made to fit."""

from __future__ import annotations

import json
from typing import Any

import pytest
from scripted_upstream import DONE, event, token, usage

from gateway.relay.resume import FOLD_AT, ResumedStream, Transcript, Unfit, continuation, counting

QUESTION = {"role": "user", "content": "hi"}


def told(*pieces: bytes) -> Transcript:
    transcript = Transcript()
    transcript.pieces += pieces
    return transcript


def asked(body: dict[str, Any], *pieces: bytes, chat: bool = True) -> dict[str, Any] | None:
    try:
        return dict(json.loads(continuation(json.dumps(body).encode(), told(*pieces), chat).body))
    except Unfit as why:
        assert str(why)
        return None


def chat(**members: Any) -> dict[str, Any]:
    return {"model": "demo", "messages": [QUESTION], "stream": True, **members}


def test_chat_goes_on_from_the_assistants_text() -> None:
    body = asked(chat(max_tokens=10, temperature=0, seed=7), token("Hel"), token("lo"))
    assert body == chat(max_tokens=8, temperature=0, seed=7) | {
        "messages": [QUESTION, {"role": "assistant", "content": "Hello"}],
        "continue_final_message": True,
        "add_generation_prompt": False,
    }


def test_white_space_at_the_end_is_left_to_the_engine() -> None:
    body = asked(chat(max_tokens=10), token("One."), token("\n"), token("\n"))
    assert body is not None
    assert (body["messages"][-1]["content"], body["max_tokens"]) == ("One.", 9)


def test_a_message_that_the_client_began_is_gone_on_with() -> None:
    began = chat(messages=[QUESTION, {"role": "assistant", "content": "It is"}], continue_final_message=True)
    body = asked(began, token(" so"))
    assert body is not None
    assert body["messages"] == [QUESTION, {"role": "assistant", "content": "It is so"}]


def test_nothing_said_yet_is_asked_again() -> None:
    opening = event(id="c", created=1, choices=[{"index": 0, "delta": {"role": "assistant", "content": ""}}])
    assert asked(chat(max_tokens=5), opening) == chat(max_tokens=5)


def test_completion_goes_on_from_prompt_and_text() -> None:
    piece = event(id="c", created=1, choices=[{"index": 0, "text": " and so on", "finish_reason": None}])
    body = {"model": "demo", "prompt": "Once", "max_tokens": 5, "min_tokens": 3}
    assert asked(body, piece, chat=False) == body | {"prompt": "Once and so on", "max_tokens": 4, "min_tokens": 2}
    assert asked(body | {"prompt": ["Once"]}, piece, chat=False) == asked(body, piece, chat=False)


@pytest.mark.parametrize(
    "members",
    [
        {"n": 2},
        {"tools": [{"type": "function"}]},
        {"response_format": {"type": "json_object"}},
        {"logprobs": True},
        {"structured_outputs": {"regex": "a"}},
        {"regex": "a*"},
        {"max_tokens": 2},
        {"add_generation_prompt": False},
        {"messages": [{"role": "user", "content": "x"}], "continue_final_message": True},
        {"return_token_ids": True},
    ],
    ids=lambda members: next(iter(members)),
)
def test_what_cannot_be_continued(members: dict[str, Any]) -> None:
    assert asked(chat(**members), token("a"), token("b")) is None


@pytest.mark.parametrize(
    "members",
    [{"n": 1}, {"n": None}, {"tools": []}, {"response_format": {"type": "text"}}, {"logprobs": False}],
    ids=str,
)
def test_values_that_do_not_matter(members: dict[str, Any]) -> None:
    assert asked(chat(**members), token("a")) is not None


@pytest.mark.parametrize("body", [{"prompt": [1, 2, 3], "max_tokens": 9}, {"prompt": "x"}, {"prompt": ["a", "b"]}])
def test_completions_that_cannot(body: dict[str, Any]) -> None:
    piece = event(id="c", created=1, choices=[{"index": 0, "text": "t", "finish_reason": None}])
    assert asked({"model": "demo"} | body, piece, chat=False) is None


@pytest.mark.parametrize(
    "piece",
    [
        event(id="c", created=1, choices=[{"index": 0, "delta": {"reasoning_content": "hm"}}]),
        event(id="c", created=1, choices=[{"index": 0, "delta": {"tool_calls": [{}]}}]),
        event(id="c", created=1, choices=[{"index": 0, "delta": {}, "finish_reason": "stop"}]),
        b"data: {not JSON\n\n",
    ],
    ids=["reasoning", "tool call", "finished", "nonsense"],
)
def test_answers_that_cannot(piece: bytes) -> None:
    assert asked(chat(), token("a"), piece) is None


def test_what_is_kept_is_the_text_and_it_is_bounded() -> None:
    transcript = Transcript()
    for _ in range(20):
        transcript.pieces += [token("word ")] * FOLD_AT
        transcript.fold()
    assert (len(transcript.pieces), transcript.tokens) == (0, 20 * FOLD_AT)
    assert transcript.text == "word " * (20 * FOLD_AT)
    transcript.pieces += [token("x" * 1_100_000)]
    transcript.fold()
    assert "1000000 bytes" in transcript.unfit
    assert transcript.text == ""


def rest_of(*sent: bytes, keep_usage: bool = False, **members: Any) -> ResumedStream:
    transcript = told(*sent)
    rest = continuation(json.dumps(chat(temperature=0) | members).encode(), transcript, True)
    return ResumedStream(keep_usage, None, transcript, rest, len(sent))


def decoded(data: bytes) -> list[Any]:
    return [json.loads(part[6:]) for part in data.split(b"\n\n")[:-1] if part != b"data: [DONE]"]


def other(**delta: Any) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": None}
    return event(id="another", object="chat.completion.chunk", created=99, model="demo", choices=[choice])


def test_the_rest_has_the_first_id_and_no_second_opening() -> None:
    stream = rest_of(token("Hel"))
    out = stream.feed(other(role="assistant", content="")) + stream.feed(other(content="lo"))
    [chunk] = decoded(out)
    assert (chunk["id"], chunk["created"], chunk["choices"][0]["delta"]) == ("chatcmpl-1", 1, {"content": "lo"})


def test_white_space_that_is_said_again_is_dropped_once() -> None:
    stream = rest_of(token("One."), token("\n\n"))
    out = stream.feed(other(content="\n")) + stream.feed(other(content="\n")) + stream.feed(other(content="\nTwo"))
    assert [chunk["choices"][0]["delta"]["content"] for chunk in decoded(out)] == ["\nTwo"]


def test_a_token_that_ends_in_white_space_is_said_again_whole() -> None:
    """Of `.\\n` the engine would be given `.`, which is another token: it would go on otherwise, with one more."""
    sent = token("One"), token(".\n"), token("\n")
    body = asked(chat(max_tokens=10, temperature=0), *sent)
    assert body is not None
    assert (body["messages"][-1]["content"], body["max_tokens"]) == ("One", 9)
    stream = rest_of(*sent, max_tokens=10)
    out = b"".join(stream.feed(other(content=content)) for content in (".\n", "\nT", "wo"))
    assert [chunk["choices"][0]["delta"]["content"] for chunk in decoded(out)] == ["T", "wo"]


@pytest.mark.parametrize("unlike", ["Two", " Two"])
def test_greedy_text_that_is_not_said_again_ends_the_stream(unlike: str) -> None:
    stream = rest_of(token("One."), token("\n"))
    assert stream.feed(other(content=unlike) + DONE) == b""
    assert (stream.strayed, stream.done) == (True, False)
    assert stream.error is not None


def test_sampled_text_has_no_one_right_continuation() -> None:
    stream = rest_of(token("One. "), temperature=0.7)
    [chunk] = decoded(stream.feed(other(content="Two")))
    assert chunk["choices"][0]["delta"]["content"] == "Two"


def test_white_space_at_the_beginning_is_not_left_to_a_template() -> None:
    """Greedy text is said again from its beginning; sampled text cannot be gone on with."""
    greedy = asked(chat(max_tokens=10, temperature=0), token(" One"), token(" two"))
    assert greedy == chat(max_tokens=10, temperature=0)
    stream = rest_of(token(" One"), token(" two"))
    out = b"".join(stream.feed(other(content=content)) for content in (" One", " two", " three"))
    assert [chunk["choices"][0]["delta"]["content"] for chunk in decoded(out)] == [" three"]
    assert asked(chat(max_tokens=10, temperature=1), token(" One"), token(" two")) is None


def test_the_prompts_tokens_are_asked_for() -> None:
    asks = chat(max_completion_tokens=9, min_tokens=3, stream_options={"include_usage": True}, seed=1)
    assert json.loads(counting(json.dumps(asks).encode())) == {
        "model": "demo", "messages": [QUESTION], "max_completion_tokens": 1, "seed": 1,
    }  # fmt: skip
    assert json.loads(counting(b'{"prompt":"x","max_tokens":null}')) == {"prompt": "x", "max_tokens": 1}


def test_usage_is_that_of_the_whole() -> None:
    stream = rest_of(token("a"), token("b"), keep_usage=True)
    out = stream.feed(other(content="c") + usage(7, 3) + DONE)
    assert stream.done
    assert decoded(out)[-1]["usage"] == {"prompt_tokens": 5, "completion_tokens": 5, "total_tokens": 10}
    assert stream.usage is not None
    assert (stream.usage.prompt, stream.usage.completion) == (5, 5)
    assert out.endswith(DONE)


def test_the_prompts_tokens_are_those_that_were_counted() -> None:
    """The engine that goes on may cut the text into other tokens than the one that wrote it."""
    sent = told(token("a"), token("b"))
    rest = continuation(json.dumps(chat()).encode(), sent, True)
    sent.prompt_tokens = 6
    out = ResumedStream(True, None, sent, rest, 2).feed(usage(7, 3) + DONE)
    assert decoded(out)[-1]["usage"] == {"prompt_tokens": 6, "completion_tokens": 5, "total_tokens": 11}
