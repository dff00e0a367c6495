"""What a data set is called, and rows of parquet files and folders read as lines of JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tests.trainer.models import chat_rows, write_jsonl
from trainer import cli, data, extras
from trainer.errors import ConfigError, DataError
from trainer.formats import parse_conversation
from trainer.origins import Origin, parse_origin


def read(*origins: str | Path) -> list[Any]:
    return [json.loads(line.text) for line in data.read_lines(origins)]


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    """22 conversations, in row groups of 5."""
    pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow")
    file = tmp_path / "chats.parquet"
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(chat_rows(22)), file, row_group_size=5)
    return file


@pytest.mark.parametrize(
    ("text", "origin"),
    [
        ("owner/name", Origin("owner/name", True)),
        ("owner/name:test", Origin("owner/name", True, split="test")),
        ("openai/gsm8k:main:train#500", Origin("openai/gsm8k", True, None, "main", "train", 500)),
        ("owner/name@v1.0:test", Origin("owner/name", True, "v1.0", split="test")),
        ("hub:owner/name.json", Origin("owner/name.json", True)),
        ("/data/train.jsonl", Origin("/data/train.jsonl")),
        ("/data/train.jsonl#7", Origin("/data/train.jsonl", rows=7)),
    ],
)
def test_a_name_is_read_and_written_back(text: str, origin: Origin) -> None:
    assert parse_origin(text) == origin
    assert parse_origin(str(origin)) == origin


def test_what_lies_there_wins_over_what_it_could_mean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    odd = write_jsonl(tmp_path / "a#1:b", chat_rows(2))
    assert parse_origin("owner/name") == Origin(str(tmp_path / "owner" / "name"))
    assert parse_origin("owner/name:sub:test") == Origin(str(tmp_path / "owner" / "name"), subset="sub", split="test")
    assert parse_origin("hub:owner/name").on_hub
    assert read(odd) == chat_rows(2)
    # A file that is not there is a missing file, not a data set of the hub.
    with pytest.raises(DataError, match=r"cannot read .*/data/train\.jsonl"):
        read("data/train.jsonl")


def test_only_the_first_rows_are_read(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "d.jsonl", chat_rows(9))
    assert read(f"{file}#4", f"{file}#2") == [*chat_rows(4), *chat_rows(2)]


def test_parquet_reads_as_the_same_rows_of_json(parquet: Path) -> None:
    assert read(parquet) == chat_rows(22)
    assert read(f"{parquet}#7") == chat_rows(7)


def test_a_bad_row_of_parquet_is_named_by_number(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow")
    from pyarrow import parquet

    rows = [{"instruction": "i", "output": "o"}, {"instruction": "i", "output": None}]
    parquet.write_table(pyarrow.Table.from_pylist(rows * 200), tmp_path / "d.parquet")
    with pytest.raises(DataError) as caught:
        data.validate([tmp_path / "d.parquet"], parse_conversation)
    shown = str(caught.value).splitlines()
    assert shown[0].startswith("200 bad line(s)") and shown[1] == "d.parquet row 2: `output` is missing"
    (tmp_path / "torn.parquet").write_bytes((tmp_path / "d.parquet").read_bytes()[:-9])
    with pytest.raises(DataError, match=r"cannot read .*torn\.parquet"):
        read(tmp_path / "torn.parquet")


def test_values_that_python_does_not_have_are_said_with_their_file(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow")
    from pyarrow import parquet

    torn = [None, pyarrow.py_buffer(b"\0\0\0\0\2\0\0\0"), pyarrow.py_buffer(b"\xff\xfe")]  # a text that is no UTF-8
    odd = [pyarrow.Array.from_buffers(pyarrow.string(), 1, torn), pyarrow.array([2**62], pyarrow.timestamp("us"))]
    for number, column in enumerate(odd):
        parquet.write_table(pyarrow.table({"query": column}), tmp_path / f"{number}.parquet")
        with pytest.raises(DataError, match=rf"cannot read .*{number}\.parquet"):
            read(tmp_path / f"{number}.parquet")


def test_keys_that_arrow_fills_in_are_not_there(tmp_path: Path) -> None:
    """Of two tool calls with different arguments, each would get the other's as null."""
    pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow")
    from pyarrow import parquet

    rows = [{"calls": [{"arguments": {"city": "Rome"}}]}, {"calls": [{"arguments": {"days": 3}}]}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    assert read(tmp_path / "d.parquet") == rows


def test_parquet_is_read_in_bounded_memory(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow")
    from pyarrow import parquet

    texts = [f"{i:09d}" * 100 for i in range(30_000)]  # one row group of 27 MB
    columns = {"query": texts, "response": texts}
    parquet.write_table(pyarrow.table(columns), tmp_path / "d.parquet", row_group_size=30_000, compression="none")
    before = pyarrow.total_allocated_bytes()
    most = max(pyarrow.total_allocated_bytes() - before for _ in data.read_lines([tmp_path / "d.parquet"]))
    assert most < 12 * 2**20


def test_a_folder_is_read_by_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets", reason="needs datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "chats"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", chat_rows(5))
    write_jsonl(folder / "test.jsonl", chat_rows(3))
    assert read(folder) == chat_rows(5)
    assert read(f"{folder}:test") == chat_rows(3)
    with pytest.raises(DataError, match=r"cannot read .*chats:other"):
        read(f"{folder}:other")


def test_a_data_set_of_the_hub_is_asked_for_by_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="needs datasets")
    asked: list[Any] = []

    def load_dataset(*names: Any, **options: Any) -> list[Any]:
        asked.append((names, options))
        return chat_rows(9)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read("owner/name@main:sub:test#4", "owner/name") == [*chat_rows(4), *chat_rows(9)]
    assert asked == [
        (("owner/name", "sub"), {"split": "test", "revision": "main", "streaming": True}),
        (("owner/name", None), {"split": "train", "revision": None, "streaming": True}),
    ]


def test_a_hub_that_fails_is_said_with_what_was_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="needs datasets")

    def load_dataset(*names: Any, **options: Any) -> Any:
        raise datasets.exceptions.DatasetNotFoundError("no such thing")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"cannot read hub:data/train \(there is no such file or folder either\)"):
        read("data/train")


def test_missing_packages_are_named_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"this needs pyarrow and wandb: pip install 'tunegate\[data,wandb\]'"):
        extras.require(["wandb", *extras.packages_of(["/d.parquet", "/d.jsonl"])])
    refused = CliRunner().invoke(cli.train, ["check-data", "owner/name"])
    assert refused.exit_code == 1 and "pip install 'tunegate[data]'" in refused.output
    extras.require(extras.packages_of([str(write_jsonl(tmp_path / "d.jsonl", chat_rows(1)))]))
