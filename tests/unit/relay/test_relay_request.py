"""Reading a request's head, and changing its body without writing it anew."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import InvalidRequest
from gateway.relay.request import RESERVED, StreamOptions, decode, overridden, refuse_empty_prompt, with_usage


def joined(body: bytes, members: bytes) -> object:
    return json.loads(b"".join(overridden(body, members)))


def test_the_head_is_read() -> None:
    head = decode(
        b'{"messages":[{"model":"not me"}],"model":"demo","stream":true,"stream_options":{"include_usage":true,"x":1}}'
    )
    assert (head.model, head.stream) == ("demo", True)
    assert head.stream_options == StreamOptions(True)


@pytest.mark.parametrize(
    "body, param, words",
    [
        (b"", None, "no body"),
        (b"  \n", None, "no body"),
        (b"{", None, "not JSON"),
        (b'{"model":"a",}', None, "trailing comma"),
        (b'{"model":"a"} {}', None, "not JSON"),
        (b'{"model":"\xff"}', None, "not JSON"),
        (b"[1]", None, "must be a JSON object. Expected `object`, got `array`"),
        (b'"demo"', None, "must be a JSON object"),
        (b'{"messages":[]}', "model", "GET /v1/models"),
        (b'{"model":3}', "model", "`model` has the wrong type: expected `str`, got `int`"),
        (b'{"model":null}', "model", "wrong type"),
        (b'{"model":"a","stream":"yes"}', "stream", "wrong type"),
        (b'{"model":"a","stream_options":[]}', "stream_options", "wrong type"),
        (b'{"model":"a","stream_options":{"include_usage":3}}', "stream_options", "wrong type"),
        (b'{"model":"a","n":0}', "n", "at least 1"),
        (b'{"model":"a","n":-1,"stream":true}', "n", "at least 1"),
        (b'{"model":"a","n":"2"}', "n", "got `str`"),
        (b'{"model":"a","n":true}', "n", "got `bool`"),
    ],
)
def test_what_is_wrong_is_said(body: bytes, param: str | None, words: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        decode(body)
    assert caught.value.param == param
    assert words in caught.value.message


@pytest.mark.parametrize("n", ["null", "1", "128"])
def test_a_count_of_answers_passes(n: str) -> None:
    assert decode(b'{"model":"a","n":%b}' % n.encode()).model == "a"


@pytest.mark.parametrize("field", sorted(RESERVED))
def test_fields_that_reach_past_the_gateway_are_refused(field: str) -> None:
    for value in (b'"x"', b"1", b"{}", b"[null]", b"false"):
        with pytest.raises(InvalidRequest) as caught:
            decode(b'{"model":"demo","%b":%b}' % (field.encode(), value))
        assert caught.value.param == field
    hidden = field.replace("_", "\\u005f").encode()
    if b"\\" in hidden:
        with pytest.raises(InvalidRequest):
            decode(b'{"model":"demo","%b":"x"}' % hidden)
    assert decode(b'{"model":"demo","%b":null}' % field.encode()).model == "demo"


def test_a_reserved_name_inside_something_else_is_fine() -> None:
    assert decode(b'{"model":"demo","tools":[{"rid":1}],"metadata":{"lora_path":"x"}}').model == "demo"


def test_of_repeated_keys_the_last_counts_as_in_the_engines() -> None:
    body = b'{"model":"a","model":"b","mod\\u0065l":"c"}'
    assert decode(body).model == json.loads(body)["model"] == "c"


def test_overrides_are_last() -> None:
    assert joined(b'{"model":"x","a":{"b":"}"}} \n', b',"model":"y"') == {"model": "y", "a": {"b": "}"}}


def test_usage_keeps_the_clients_other_options() -> None:
    body = b'{"model":"x","stream":true,"stream_options":{"include_usage":false,"chunk":[1, 2]}}'
    head = decode(body)
    assert joined(body, with_usage(body, head.stream_options)) == {
        "model": "x",
        "stream": True,
        "stream_options": {"include_usage": True, "chunk": [1, 2]},
    }
    assert joined(b'{"model":"x"}', with_usage(b'{"model":"x"}', None)) == {
        "model": "x",
        "stream_options": {"include_usage": True},
    }


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(
    rest=st.dictionaries(
        st.text().filter(lambda key: key not in RESERVED | {"stream", "stream_options"}), _JSON, max_size=5
    )
)
def test_any_object_is_unchanged_but_for_the_override(rest: dict[str, object]) -> None:
    members = rest | {"model": "demo"}
    for text in (json.dumps(members), json.dumps(members, indent=1), json.dumps(members, ensure_ascii=False)):
        body = text.encode(errors="surrogatepass")
        try:
            assert decode(body).model == "demo"
        except InvalidRequest:
            assert not text.isprintable() or "\\ud" in text.lower()  # lone surrogates are not text
            continue
        assert joined(body, b',"model":"a-1"') == members | {"model": "a-1"}


@pytest.mark.parametrize("prompt", [b'""', b"[]", b'["a",""]', b"[[]]", b"[[1],[]]"])
def test_empty_prompts_are_refused(prompt: bytes) -> None:
    with pytest.raises(InvalidRequest) as raised:
        refuse_empty_prompt(b'{"model":"demo","prompt":%b}' % prompt)
    assert raised.value.param == "prompt"


@pytest.mark.parametrize("prompt", [b'" "', b"[1,2]", b'["a","\\"\\""]', b"[[1]]", b"null"])
def test_other_prompts_pass(prompt: bytes) -> None:
    refuse_empty_prompt(b'{"model":"demo","prompt":%b}' % prompt)


@pytest.mark.parametrize("prompt", [b"1e999", b'"\xff"', b"[" * 2000 + b"]" * 2000])
def test_a_prompt_that_cannot_be_read_is_the_clients_fault(prompt: bytes) -> None:
    with pytest.raises(InvalidRequest):
        refuse_empty_prompt(b'{"model":"demo","prompt":%b}' % prompt)


def test_what_is_nested_too_deep_is_the_clients_fault() -> None:
    with pytest.raises(InvalidRequest):
        decode(b'{"model":"demo","x":%b}' % (b"[" * 100_000 + b"]" * 100_000))


def test_stream_options_that_cannot_be_read_are_the_clients_fault() -> None:
    with pytest.raises(InvalidRequest):
        with_usage(b'{"stream_options":{"\xff":1}}', StreamOptions())
