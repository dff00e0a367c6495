from __future__ import annotations

import gzip
import json
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from tests.trainer.models import chat_rows, make_tokenizer, write_jsonl
from trainer import cli, config, data
from trainer.errors import DataError, RowError
from trainer.formats import parse_conversation, parse_preference

USER = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "yo"}


@pytest.mark.parametrize(
    ("row", "roles", "weights"),
    [
        ({"messages": [USER, ANSWER]}, "ua", [0, 1]),
        ({"messages": [{"role": "system", "content": "s"}, USER, ANSWER, USER, ANSWER]}, "suaua", [0, 0, 1, 0, 1]),
        ({"messages": [USER, {**ANSWER, "weight": 0}, USER, {**ANSWER, "loss": True}]}, "uaua", [0, 0, 0, 1]),
        ({"messages": [USER, {**ANSWER, "weight": 0.5}]}, "ua", [0, 0.5]),
        ({"instruction": "i", "input": "x", "output": "o"}, "ua", [0, 1]),
        ({"instruction": "i", "output": "o", "system": "s", "history": [["q", "a"]]}, "suaua", [0, 0, 1, 0, 1]),
        ({"conversations": [{"from": "human", "value": "h"}, {"from": "gpt", "value": "g"}]}, "ua", [0, 1]),
        ({"query": "q", "response": "r"}, "ua", [0, 1]),
    ],
)
def test_every_conversation_format_is_read(row: Any, roles: str, weights: list[float]) -> None:
    conversation = parse_conversation(row)
    assert "".join(message["role"][0] for message in conversation.messages) == roles
    assert conversation.weights == weights


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "p", "chosen": "c", "rejected": "r"},
        {"prompt": [{"role": "user", "content": "p"}], "chosen": [ANSWER | {"content": "c"}], "rejected": "r"},
        {
            "chosen": [{"role": "user", "content": "p"}, ANSWER | {"content": "c"}],
            "rejected": [{"role": "user", "content": "p"}, ANSWER | {"content": "r"}],
        },
        {"messages": [{"role": "user", "content": "p"}, ANSWER | {"content": "c"}], "rejected_response": "r"},
        {
            "input": {"messages": [{"role": "user", "content": "p"}]},
            "preferred_output": [ANSWER | {"content": "c"}],
            "non_preferred_output": [ANSWER | {"content": "r"}],
        },
    ],
)
def test_every_preference_format_is_read(row: Any) -> None:
    pair = parse_preference(row)
    assert [m["content"] for m in pair.chosen.messages] == ["p", "c"]
    assert [m["content"] for m in pair.rejected.messages] == ["p", "r"]
    assert pair.chosen.weights == pair.rejected.weights == [0, 1]


def test_tool_calls_become_what_templates_take() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    row = {
        "messages": [USER, {"role": "assistant", "content": None, "tool_calls": [call]}],
        "tools": json.dumps([{"type": "function", "function": {"name": "f"}}]),
    }
    conversation = parse_conversation(row)
    assert conversation.messages[1]["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    assert conversation.messages[1]["content"] == ""
    assert conversation.tools == [{"type": "function", "function": {"name": "f"}}]


def test_content_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert (
        parse_conversation({"messages": [{"role": "user", "content": parts}, ANSWER]}).messages[0]["content"] == "a\nb"
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "no known format"),
        ({"messages": []}, "must be a list of messages"),
        ({"messages": [USER]}, "last message must be the assistant's, it is the user's"),
        ({"messages": [USER, {"role": "bot", "content": "x"}]}, r"messages\[1\].role must be one of"),
        ({"messages": [USER, {**ANSWER, "weight": 0}]}, "every assistant message has weight 0"),
        ({"messages": [USER, {**ANSWER, "weight": float("nan")}]}, "must be a number from 0 up"),
        ({"messages": [USER, {**ANSWER, "weight": 1, "loss": True}]}, "not both"),
        ({"messages": [USER, {"role": "assistant", "content": ""}]}, "is empty"),
        ({"messages": [USER, {"role": "assistant", "content": 5}]}, "must be text"),
        ({"messages": [{**USER, "weight": 1}, ANSWER]}, "only an assistant message can be learnt"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [{"function": {}}]}]}, r"tool_calls\[0\] must be"),
        ({"instruction": "i"}, "`output` is missing"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "must be one of system, human"),
        ({"messages": [USER, ANSWER], "tools": "{"}, "tools is not JSON"),
    ],
)
def test_a_bad_row_is_told_what_is_wrong(row: Any, message: str) -> None:
    with pytest.raises(RowError, match=message):
        parse_conversation(row)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "chosen": "c"}, "`rejected` is missing"),
        ({"prompt": "p", "chosen": "c", "rejected": "c"}, "both answers are the same"),
        ({"chosen": "c", "rejected": "r"}, "no prompt"),
        ({"prompt": "p", "chosen": [USER], "rejected": "r"}, "must be one assistant message"),
    ],
)
def test_a_bad_preference_is_told_what_is_wrong(row: Any, message: str) -> None:
    with pytest.raises(RowError, match=message):
        parse_preference(row)


def test_every_bad_line_is_named_by_number(tmp_path: Path) -> None:
    good = json.dumps({"messages": [USER, ANSWER]})
    lone = '{"messages": [{"role": "user", "content": "\\ud800"}, {"role": "assistant", "content": "x"}]}'
    lines = [good, "{", "", "[1]", good, "\xff", lone, "[" * 100_000]
    (tmp_path / "d.jsonl").write_bytes("\n".join(lines).encode("latin-1"))
    with pytest.raises(DataError) as caught:
        data.validate([tmp_path / "d.jsonl"], parse_conversation)
    assert [line.split(":")[0] for line in str(caught.value).splitlines()[1:]] == [
        f"d.jsonl line {number}" for number in (2, 4, 6, 7, 8)
    ]


def test_a_thousand_bad_lines_make_a_short_message(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text("{\n" * 1000)
    with pytest.raises(DataError, match="and 980 more bad lines") as caught:
        data.validate([tmp_path / "d.jsonl"], parse_conversation)
    assert len(str(caught.value).splitlines()) == 22


def test_a_gzipped_file_reads_the_same(tmp_path: Path) -> None:
    plain = write_jsonl(tmp_path / "d.jsonl", chat_rows(5))
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    assert data.validate([plain], parse_conversation) == data.validate([tmp_path / "d.jsonl.gz"], parse_conversation)


@pytest.mark.parametrize("content", [b"", b"\n\n"])
def test_an_empty_file_is_an_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "d.jsonl").write_bytes(content)
    with pytest.raises(DataError, match="no examples"):
        data.validate([tmp_path / "d.jsonl"], parse_conversation)


@pytest.mark.parametrize("name", ["missing.jsonl", "broken.jsonl.gz"])
def test_an_unreadable_file_is_an_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "broken.jsonl.gz").write_bytes(gzip.compress(b"{}" * 100)[:-9])
    with pytest.raises(DataError, match=f"cannot read .*{name}"):
        data.validate([tmp_path / name], parse_conversation)


def test_validation_keeps_no_lines(tmp_path: Path) -> None:
    row = json.dumps({"messages": [USER, ANSWER | {"content": "y" * 400}]}) + "\n"
    (tmp_path / "d.jsonl").write_text(row * 20_000)  # 9 MB
    tracemalloc.start()
    try:
        assert data.validate([tmp_path / "d.jsonl"], parse_conversation).examples == 20_000
        assert tracemalloc.get_traced_memory()[1] < 500_000
    finally:
        tracemalloc.stop()


def test_check_data_from_the_command_line(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "d.jsonl", [{"prompt": "p", "chosen": "c", "rejected": "r"}])
    assert "1 good examples" in CliRunner().invoke(cli.train, ["check-data", str(file), "--method", "dpo"]).output
    refused = CliRunner().invoke(cli.train, ["check-data", str(file)])
    assert refused.exit_code == 1 and "d.jsonl line 1: no known format" in refused.output


def test_check_data_gives_a_grader_what_a_run_gives_it(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "d.jsonl", [{"prompt": "p", "answer": "a"}])
    grader = {"type": "string_check", "name": "g", "input": "{{sample.output_text}}", "operation": "eq"}
    command = ["check-data", str(file), "--method", "grpo", "--grader", str(tmp_path / "grader.json")]
    for key, code, words in (("answer", 0, "1 good examples"), ("prompt", 1, "`prompt` is missing")):
        (tmp_path / "grader.json").write_text(json.dumps(grader | {"reference": f"{{{{item.{key}}}}}"}))
        done = CliRunner().invoke(cli.train, command)
        assert done.exit_code == code and words in done.output


@pytest.mark.parametrize(
    ("method", "row"),
    [
        ("sft", {"messages": [USER, ANSWER]}),
        ("dpo", {"prompt": "hi", "chosen": "yo", "rejected": "no"}),
        ("kto", {"prompt": "hi", "completion": "yo", "label": True}),
    ],
)
def test_a_system_message_is_given_to_the_rows_that_have_none(method: str, row: Any) -> None:
    pytest.importorskip("transformers", reason="needs transformers")
    from trainer.examples import tokeniser

    base: Any = SimpleNamespace(tokenizer=make_tokenizer(), stop_ids=[])
    needed = {"model": "m", "dataset": ["d"], "output_dir": "o", "system": "be brief"}
    tokenise = tokeniser(config.load(method, None, needed), base)
    first = tokenise(row)[0]
    assert base.tokenizer.decode(first.token_ids).startswith("<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user")
    assert not any(first.weights[: -first.trained_tokens])
    own = {"messages": [{"role": "system", "content": "be long"}, USER, ANSWER]}
    if method == "sft":
        assert "be brief" not in base.tokenizer.decode(tokenise(own)[0].token_ids)
