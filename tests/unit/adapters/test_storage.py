"""Contents are written once, read-only, under their digest; a full disk leaves nothing."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway.adapters import names
from gateway.adapters.storage import AdapterStorage
from gateway.errors import InternalError, InvalidRequest, StorageFull
from tests.support import disks
from tests.support.archives import files_of, zip_of
from tests.support.peft_files import TINY, Adapter, write_adapter
from tests.unit.adapters.conftest import Intake


@pytest.fixture
def upload(tmp_path: Path) -> bytes:
    return zip_of(files_of(write_adapter(tmp_path / "good")))


def test_contents_are_read_only_under_their_digest(intake: Intake, upload: bytes) -> None:
    stored = intake(("a.zip", upload)).stored
    assert stored.path == intake.state / "adapters" / f"a-{stored.sha256[:12]}"
    assert names.is_content_id(stored.path.name)
    assert stored.path.stat().st_mode & 0o777 == 0o555
    assert {path.stat().st_mode & 0o777 for path in stored.path.iterdir()} == {0o444}
    assert stored.size_bytes == sum(path.stat().st_size for path in stored.path.iterdir())
    assert list((intake.state / "staging").iterdir()) == []


def test_the_same_bytes_twice_are_one_directory(intake: Intake, upload: bytes) -> None:
    first = intake(("a.zip", upload)).stored
    inode = first.path.stat().st_ino
    assert intake(("b.zip", upload)).stored == first
    assert [path.stat().st_ino for path in (intake.state / "adapters").iterdir()] == [inode]


def test_other_contents_under_the_same_id_are_noticed(intake: Intake, upload: bytes) -> None:
    stored = intake(("a.zip", upload)).stored
    (stored.path / "adapter_config.json").chmod(0o644)
    (stored.path / "adapter_config.json").write_text("{}")
    with pytest.raises(InternalError, match="other contents"):
        intake(("a.zip", upload))


def test_remove(intake: Intake, upload: bytes) -> None:
    stored = intake(("a.zip", upload)).stored
    intake.storage.remove(stored.content_id)
    intake.storage.remove(stored.content_id)
    assert intake.left() == []


def test_start_sweeps_what_a_crash_left(intake: Intake, upload: bytes, tmp_path: Path) -> None:
    kept = intake(("a.zip", upload)).stored
    other = write_adapter(tmp_path / "other", TINY, Adapter(seed=1))
    orphan = intake(*files_of(other)).stored
    half = intake.state / "staging" / "upload-x" / "unpacked"
    half.mkdir(parents=True)
    (half / "adapter_config.json").write_text("{")
    half.chmod(0o555)
    foreign = intake.state / "adapters" / "lost+found"
    foreign.mkdir()

    assert AdapterStorage(intake.state).sweep(frozenset({kept.content_id})) == (orphan.content_id,)

    assert list((intake.state / "staging").iterdir()) == []
    assert sorted(path.name for path in (intake.state / "adapters").iterdir()) == [kept.content_id, "lost+found"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with disks.small_disk(tmp_path / "disk", "64k") as disk:
        yield disk


def test_full_disk(make_intake: Callable[..., Intake], small_disk: Path, upload: bytes, tmp_path: Path) -> None:
    intake = make_intake(state=small_disk)
    first = intake(("a.zip", upload)).stored
    big = write_adapter(tmp_path / "big", TINY, Adapter(rank=16, seed=1))
    (big / "manifest.json").write_text('{"pad": "' + os.urandom(40_000).hex() + '"}')
    before = intake.left()
    with pytest.raises(StorageFull, match="nothing was kept"):
        intake(*files_of(big))
    assert intake.left() == before
    assert intake(("a.zip", upload)).stored == first


@pytest.mark.parametrize("call", ["fsync", "write"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_no_space_wherever_it_shows(
    intake: Intake, upload: bytes, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    def full(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    if call == "fsync":
        monkeypatch.setattr(os, "fsync", full)
    else:
        monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(StorageFull):
        intake(("a.zip", upload))
    monkeypatch.undo()
    assert intake.left() == []


def test_other_faults_of_the_disk_are_not_called_full(
    intake: Intake, upload: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output error"):
        intake(("a.zip", upload))
    assert intake.left() == []


@pytest.mark.parametrize("name", ["a", "my-adapter", "v1.2_final", "A" * 96])
def test_good_names(name: str) -> None:
    assert names.check_name(name, frozenset({"base"})) == name


@pytest.mark.parametrize("name", ["", "a/b", "a:b", "a@v1", ".a", "-a", "a b", "é", "A" * 97, "a\n", "base"])
def test_bad_names(name: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        names.check_name(name, frozenset({"base"}))
    assert (caught.value.param, caught.value.code) == ("name", "invalid_name")


@pytest.mark.parametrize(
    ("reference", "parsed"),
    [
        ("a", ("a", None)),
        ("a@v3", ("a", 3)),
        ("a@v0", ("a@v0", None)),
        ("a@vx", ("a@vx", None)),
        ("@v1", ("@v1", None)),
    ],
)
def test_references(reference: str, parsed: tuple[str, int | None]) -> None:
    assert names.parse_reference(reference) == parsed
