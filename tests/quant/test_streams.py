"""What runs beside the computing: order, bounds on memory, and whose error ends the job."""

from __future__ import annotations

import threading
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from quant.streams import ReadAhead, WriteBehind  # noqa: E402

CPU = torch.device("cpu")


def test_the_next_layer_is_read_while_one_is_worked_on() -> None:
    began = {index: threading.Event() for index in (0, 2, 3)}

    def read(index: int) -> dict[str, Any]:
        began[index].set()
        return {"w": torch.full((2,), float(index))}

    with ReadAhead(read, [0, 2, 3], CPU) as reader:
        assert began[0].wait(30)
        assert reader.take()["w"].tolist() == [0, 0]
        assert began[2].wait(30)
        assert not began[3].is_set()  # two layers are in memory, not three
        assert [reader.take()["w"][0] for _ in range(2)] == [2, 3]


def test_an_error_of_reading_is_told_where_the_layer_is_needed() -> None:
    def read(index: int) -> dict[str, Any]:
        if index:
            raise OSError("the shard is gone")
        return {}

    with ReadAhead(read, [0, 1], CPU) as reader:
        reader.take()
        with pytest.raises(OSError, match="the shard is gone"):
            reader.take()


def test_shards_are_written_in_order_and_only_so_many_wait() -> None:
    may_write, written, third_given = threading.Semaphore(0), [], threading.Event()

    def put(shard: str, tensors: dict[str, Any], notes: Any) -> None:
        assert may_write.acquire(timeout=30)
        written.append((shard, notes))

    def give() -> None:
        with WriteBehind(put) as writer:
            for number in range(3):
                writer.put(f"shard-{number}", {}, number)
            third_given.set()

    thread = threading.Thread(target=give)
    thread.start()
    assert not third_given.wait(0.2)
    for _ in range(3):
        may_write.release()
    thread.join(30)
    assert written == [("shard-0", 0), ("shard-1", 1), ("shard-2", 2)]


@pytest.mark.parametrize("more", [0, 2], ids=["noticed at the end", "noticed by the next"])
def test_an_error_of_writing_ends_the_block(more: int) -> None:
    def put(shard: str, tensors: dict[str, Any], notes: Any) -> None:
        if shard == "first":
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"), WriteBehind(put) as writer:
        writer.put("first", {}, None)
        for number in range(more):
            writer.put(f"later-{number}", {}, None)


def test_what_is_finished_is_written_though_the_job_fails() -> None:
    written = []
    with pytest.raises(KeyError), WriteBehind(lambda shard, tensors, notes: written.append(shard)) as writer:
        writer.put("a", {}, None)
        writer.put("b", {}, None)
        raise KeyError
    assert written == ["a", "b"]
