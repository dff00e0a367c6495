"""The emulator's pure parts: the made-up language, writers, schemas, the batch, scripts, command lines."""

from __future__ import annotations

import asyncio
import json
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.emulator import script as scripts
from backends.emulator.batch import Batch
from backends.emulator.language import EOS_ID, count_tokens, detokenize, generate, spell, tokenize
from backends.emulator.recordings import Book
from backends.emulator.schema import SchemaError, minimal
from backends.emulator.settings import Settings, parse
from backends.emulator.writer import Piece, Writer
from tests.support.emulator import ENGINES


def said(weights: str, prompt: str, count: int, variant: str = "") -> str:
    return "".join(token.text for token in islice(generate(weights, prompt, variant), count))


# ---- language


def test_text_depends_on_weights_prompt_and_variant() -> None:
    texts = {said("", "a", 8), said("adapter", "a", 8), said("", "b", 8), said("", "a", 8, "seed")}
    assert len(texts) == 4
    assert said("", "a", 8) == said("", "a", 8)


@given(st.text(), st.integers(0, 20), st.integers(0, 20))
def test_continuing_is_going_on(prompt: str, first: int, then: int) -> None:
    begun = said("w", prompt, first)
    rest = generate("w", prompt + begun, may_end_at_once=True)
    text = "".join(token.text for token in islice((token for token in rest if token.id != EOS_ID), then))
    whole = "".join(token.text for token in islice((t for t in generate("w", prompt) if t.id != EOS_ID), 40))
    assert whole.startswith(begun + text)


def test_it_ends_after_a_full_stop() -> None:
    tokens = list(takewhile(lambda token: token.id != EOS_ID, generate("", "how long?")))
    assert tokens[-1].text == "."
    assert "." not in "".join(token.text for token in tokens[:-1])


@given(st.text())
def test_tokens_there_and_back(text: str) -> None:
    text = text.encode("utf-8", "ignore").decode()
    ids = tokenize(text)
    assert detokenize(ids) == text
    assert len(ids) == count_tokens(text)


@given(st.text())
def test_spelling_never_cuts_a_character(text: str) -> None:
    text = text.encode("utf-8", "ignore").decode()
    assert "".join(token.text for token in spell(text)) == text


# ---- writers


def pieces(text: str, limit: int = 100, **options: Any) -> tuple[list[Piece], Writer]:
    writer = Writer(0, spell(text), limit, **options)
    return list(writer.pieces()), writer


def test_a_writer_ends_by_itself() -> None:
    written, writer = pieces("abcdefgh")
    assert [piece.text for piece in written] == ["abc", "def", "gh", ""]
    assert (writer.reason, writer.stop, writer.tokens) == ("stop", EOS_ID, 3)


def test_a_writer_ends_at_its_limit() -> None:
    written, writer = pieces("abcdefgh", limit=2)
    assert [(piece.text, piece.last) for piece in written] == [("abc", False), ("def", True)]
    assert (writer.reason, writer.tokens) == ("length", 2)


@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_a_writer_ends_at_a_stop_string_that_spans_tokens(chunk: int) -> None:
    written, writer = pieces("one two three", stops=["o thr", "never"], chunk=chunk)
    assert "".join(piece.text for piece in written) == "one tw"
    assert (writer.reason, writer.stop) == ("stop", "o thr")


def test_what_only_looks_like_a_stop_string_is_written() -> None:
    written, _ = pieces("one two three", stops=["two threes"])
    assert "".join(piece.text for piece in written) == "one two three"


# ---- schemas


def test_smallest_value_of_a_schema() -> None:
    schema = {
        "type": "object",
        "properties": {
            "a": {"type": "string", "minLength": 7},
            "b": {"$ref": "#/$defs/B"},
            "c": {"anyOf": [{"type": "null"}, {"type": "string"}]},
            "d": {"enum": ["x", "y"]},
            "e": {"type": "array", "items": {"type": "integer", "minimum": 3}, "minItems": 2},
            "f": {"type": ["boolean", "null"]},
        },
        "$defs": {"B": {"type": "number"}},
    }
    assert minimal(schema) == {"a": "Parisss", "b": 1, "c": None, "d": "x", "e": [3, 3], "f": True}
    with pytest.raises(SchemaError):
        minimal({"type": "nonsense"})


# ---- the batch


def settings(**fields: Any) -> Settings:
    defaults: dict[str, Any] = {
        "model_path": "m", "served_name": "base", "host": "127.0.0.1", "port": 1, "api_keys": (), "context_tokens": 512,
        "max_running": 2, "hidden_size": None, "lora": True, "runtime_lora": True, "max_rank": 16,
        "batch_adapters": 1, "host_adapters": None,
    }  # fmt: skip
    return Settings(**(defaults | fields))


async def test_batch_places_and_slots() -> None:
    batch = Batch(settings(max_running=3, batch_adapters=1))
    await batch.enter("a")
    waits = asyncio.create_task(batch.enter("b"))  # one slot for adapters, and it is taken
    await asyncio.sleep(0)
    assert (batch.running, batch.waiting) == (1, 1)
    passes = asyncio.create_task(batch.enter("a"))
    await asyncio.sleep(0)
    await passes
    assert (batch.running, batch.waiting, dict(batch.waiting_adapters)) == (2, 1, {"b": 1})
    batch.leave("a")
    batch.leave("a")
    await waits
    assert (batch.running, dict(batch.running_adapters)) == (1, {"b": 1})


async def test_giving_up_a_wait_frees_it() -> None:
    batch = Batch(settings(max_running=1))
    await batch.enter(None)
    waits = asyncio.create_task(batch.enter(None))
    await asyncio.sleep(0)
    waits.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waits
    batch.leave(None)
    assert (batch.running, batch.waiting) == (0, 0)


# ---- scripts


def test_faults_are_counted_down() -> None:
    script = scripts.decode(b'{"faults": [{"kind": "status", "skip": 1, "times": 2, "model": "x"}]}')
    assert scripts.hit(script, "inference", "y") is None
    assert scripts.hit(script, "load", "x") is None
    hits = [scripts.hit(script, "inference", "x") is not None for _ in range(5)]
    assert hits == [False, True, True, False, False]


@pytest.mark.parametrize("data", [b"{", b'{"no_such": 1}', b'{"ttft_ms": "x"}', b'{"faults": [{"kind": "nonsense"}]}'])
def test_wrong_scripts_are_refused(data: bytes) -> None:
    with pytest.raises(scripts.ScriptError):
        scripts.decode(data)


# ---- command lines


@pytest.fixture(scope="module", params=ENGINES)
def book(request: pytest.FixtureRequest) -> Book:
    return Book.load(request.param)


def test_unknown_flags_are_rejected_as_the_engine_does(book: Book, capsys: pytest.CaptureFixture[str]) -> None:
    argv = {"vllm": ["serve", "m"], "sglang": ["--model-path", "m"], "lmdeploy": ["serve", "api_server", "m"]}
    with pytest.raises(SystemExit) as raised:
        parse(book.engine, book, [*argv[book.engine], "--no-such-flag"])
    assert raised.value.code == book.documents["start_unknown_flag"]["exit_code"] == 2
    recorded = [line for line in book.documents["start_unknown_flag"]["log_tail"] if "error:" in line][-1]
    assert recorded.partition("error:")[2] in capsys.readouterr().err


def test_vllm_command_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "True")
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 64, "max_position_embeddings": 4096}))
    argv = f"serve {tmp_path} --port 1234 --served-model-name base --enable-lora --max-loras 2 --max_lora_rank=32 -tp 2"
    found = parse("vllm", Book.load("vllm"), argv.split())
    assert (found.port, found.served_name, found.api_keys) == (1234, "base", ("secret",))
    assert (found.context_tokens, found.hidden_size) == (4096, 64)
    assert (found.lora, found.runtime_lora, found.batch_adapters, found.host_adapters, found.max_rank) == (
        True, True, 2, 2, 32,
    )  # fmt: skip
    with pytest.raises(SystemExit):
        parse("vllm", Book.load("vllm"), [*argv.split()[:-2], "--max-lora-rank", "7"])


def test_sglang_command_line() -> None:
    argv = "--model-path m --port 1 --enable-lora --max-loras-per-batch 4 --max-lora-rank 24 --lora-target-modules all"
    found = parse("sglang", Book.load("sglang"), ["-m", "sglang.launch_server", *argv.split()])
    assert (found.served_name, found.batch_adapters, found.max_rank, found.metrics) == ("m", 3, 24, False)


def test_lmdeploy_command_line() -> None:
    argv = ["serve", "api_server", "m", "--backend", "pytorch", "--adapters", "a=/x", "b=/y"]
    argv += ["--api-keys", "k", "--session-len", "99"]
    found = parse("lmdeploy", Book.load("lmdeploy"), argv)
    assert (found.static_adapters, found.api_keys, found.context_tokens) == ({"a": "/x", "b": "/y"}, ("k",), 99)
    turbomind = [word if word != "pytorch" else "turbomind" for word in argv]
    assert parse("lmdeploy", Book.load("lmdeploy"), turbomind).static_adapters == {}  # dropped, without a word


def test_every_answer_names_its_engine_version_and_date(book: Book) -> None:
    for name, document in book.documents.items():
        assert document["engine"] == book.engine, name
        assert document["version"] and document["date"] and document["device"], name
