"""Each hostile or broken upload is refused with its own code, and leaves nothing on the disk."""

from __future__ import annotations

import io
import json
import random
import stat
import struct
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from gateway.errors import GatewayError, InvalidRequest, PayloadTooLarge
from tests.support.archives import Files, files_of, tar_of, zip_of
from tests.support.peft_files import write_adapter
from tests.unit.adapters.conftest import Intake


@pytest.fixture
def good(tmp_path: Path) -> Files:
    return files_of(write_adapter(tmp_path / "good"))


def refused(intake: Intake, *parts: tuple[str, bytes]) -> GatewayError:
    """The refusal of this upload; nothing may be left behind."""
    with pytest.raises(GatewayError) as caught:
        intake(*parts)
    assert intake.left() == []
    return caught.value


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("../evil", "path_traversal"),
        ("a/../../evil", "path_traversal"),
        ("..", "path_traversal"),
        ("/etc/evil", "absolute_name"),
        ("C:evil", "absolute_name"),
        ("..\\evil", "unsafe_name"),
        ("a" * 2000, "unsafe_name"),
    ],
)
@pytest.mark.parametrize("pack", [zip_of, tar_of])
def test_names_that_lead_out(intake: Intake, good: Files, pack: Callable[..., bytes], name: str, code: str) -> None:
    assert refused(intake, ("a.bin", pack([*good, (name, b"x")]))).code == code


@pytest.mark.parametrize("name", ["../adapter_config.json", "/adapter_config.json"])
def test_plain_files_with_names_that_lead_out(intake: Intake, good: Files, name: str) -> None:
    assert refused(intake, (name, good[0][1]), good[1]).code in ("path_traversal", "absolute_name")


@pytest.mark.parametrize(
    "member",
    [
        special("adapter_config.json", tarfile.SYMTYPE, "/etc/passwd"),
        special("adapter_config.json", tarfile.LNKTYPE, "adapter_model.safetensors"),
        special("pipe", tarfile.FIFOTYPE),
        special("null", tarfile.CHRTYPE),
        special("disk", tarfile.BLKTYPE),
    ],
    ids=["symlink", "hardlink", "fifo", "character device", "block device"],
)
def test_tar_links_and_devices(intake: Intake, good: Files, member: tarfile.TarInfo) -> None:
    assert refused(intake, ("a.tar.gz", tar_of(good[1:], extra=[member]))).code == "link_or_device"


def test_tar_sparse_file(intake: Intake, good: Files) -> None:
    sparse = tarfile.TarInfo("adapter_config.json")
    sparse.pax_headers = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.map": "0,1,1000000000,1"}
    assert refused(intake, ("a.tar", tar_of(good[1:], "w", extra=[sparse]))).code == "link_or_device"


def test_zip_symlink(intake: Intake, good: Files) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        link = zipfile.ZipInfo("adapter_config.json")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
        archive.writestr(*good[1])
    assert refused(intake, ("a.zip", buffer.getvalue())).code == "link_or_device"


@pytest.mark.parametrize("pack", [zip_of, tar_of])
def test_the_same_member_twice(intake: Intake, good: Files, pack: Callable[..., bytes]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # zipfile's own, about what is tested here
        upload = pack([*good, ("./adapter_config.json", b"{}"), ("adapter_config.json", b"{}")])
    assert refused(intake, ("a.zip", upload)).code == "duplicate_member"


@pytest.mark.parametrize("pack", [zip_of, tar_of])
def test_too_many_members(intake: Intake, good: Files, pack: Callable[..., bytes]) -> None:
    upload = pack([*good, *((f"file-{index}", b"") for index in range(60))])
    assert refused(intake, ("a.zip", upload)).code == "too_many_files"


def test_zip_directory_that_claims_few_entries(intake: Intake) -> None:
    end = struct.pack("<4sHHHHLLH", b"PK\x05\x06", 0, 0, 1, 1, 1 << 30, 0, 0)
    assert refused(intake, ("a.zip", b"PK\x03\x04" + b"\0" * 100 + end)).code == "too_many_files"


def test_zip64_directory(intake: Intake, good: Files) -> None:
    upload = zip_of(good)
    at = upload.rfind(b"PK\x05\x06")
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, 0, 1)
    assert refused(intake, ("a.zip", upload[:at] + locator + upload[at:])).code == "too_many_files"


@pytest.mark.parametrize("pack", [zip_of, tar_of])
def test_more_bytes_than_the_limit(make_intake: Callable[..., Intake], pack: Callable[..., bytes]) -> None:
    intake = make_intake(total_bytes=100_000)
    error = refused(intake, ("a.zip", pack([("adapter_model.safetensors", bytes(200_000))])))
    assert isinstance(error, PayloadTooLarge)
    assert "--max-adapter-mb" in error.message


@pytest.mark.parametrize("pack", [zip_of, tar_of])
def test_decompression_bomb(make_intake: Callable[..., Intake], pack: Callable[..., bytes]) -> None:
    intake = make_intake(total_bytes=10**9)
    upload = pack([("adapter_model.safetensors", bytes(64 << 20))])
    assert len(upload) < 100_000
    assert refused(intake, ("a.zip", upload)).code == "decompression_bomb"


def test_a_bomb_beside_the_adapter_is_not_even_unpacked(intake: Intake, good: Files) -> None:
    """A zip member that is not kept is never decompressed."""
    accepted = intake(("a.zip", zip_of([*good, ("optimizer.pt", bytes(64 << 20))])))
    assert accepted.metadata["skipped_files"] == ["optimizer.pt"]


def test_tar_header_that_would_fill_the_memory(intake: Intake) -> None:
    header = tarfile.TarInfo("pax")
    header.type, header.size = tarfile.XHDTYPE, 3_000_000
    upload = header.tobuf() + bytes(3_000_320)
    assert refused(intake, ("a.tar", upload)).code == "bad_archive"


def test_encrypted_zip(intake: Intake, good: Files) -> None:
    upload = bytearray(zip_of(good))
    for signature, flags_at in ((b"PK\x01\x02", 8), (b"PK\x03\x04", 6)):
        upload[upload.find(signature) + flags_at] |= 1
    assert refused(intake, ("a.zip", bytes(upload))).code == "encrypted_archive"


def test_rare_compression(intake: Intake, good: Files) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_LZMA) as archive:
        for name, contents in good:
            archive.writestr(name, contents)
    assert refused(intake, ("a.zip", buffer.getvalue())).code == "bad_archive"


@pytest.mark.parametrize("pack", [zip_of, tar_of])
@pytest.mark.parametrize("keep", [0.3, 0.9, 0.99])
def test_truncated_archive(intake: Intake, good: Files, pack: Callable[..., bytes], keep: float) -> None:
    upload = pack(good)
    assert refused(intake, ("a.zip", upload[: int(len(upload) * keep)])).code == "bad_archive"


@pytest.mark.parametrize("pack", [zip_of, tar_of, lambda files: tar_of(files, "w")], ids=["zip", "tar.gz", "tar"])
def test_damaged_archives_are_never_a_defect_of_ours(intake: Intake, good: Files, pack: Callable[..., bytes]) -> None:
    """Any flipped bytes end in a refusal or in an intact adapter, never in another exception."""
    whole = pack(good)
    source = random.Random(7)
    for _ in range(300):
        upload = bytearray(whole)
        for _ in range(source.choice((1, 4, 32))):
            upload[source.randrange(len(upload))] = source.randrange(256)
        try:
            intake(("a.zip", bytes(upload)))
        except GatewayError:
            continue


@pytest.mark.parametrize("weights", ["adapter_model.bin", "adapter_model.pt"])
def test_pickles(intake: Intake, good: Files, weights: str) -> None:
    error = refused(intake, ("a.zip", zip_of([good[0], (weights, b"\x80\x04.")])))
    assert error.code == "pickle_refused"
    assert "safe_serialization=True" in error.message


def test_no_config(intake: Intake, good: Files) -> None:
    error = refused(intake, good[1])
    assert error.code == "no_config"
    assert "adapter_model.safetensors" in error.message


def test_no_weights(intake: Intake, good: Files) -> None:
    assert refused(intake, good[0]).code == "no_weights"


def test_no_file(intake: Intake) -> None:
    assert refused(intake).code == "no_file"


def test_something_else_entirely(intake: Intake) -> None:
    assert refused(intake, ("photo.jpg", b"\xff\xd8\xff" + bytes(1000))).code == "no_config"


def test_archive_among_files(intake: Intake, good: Files) -> None:
    assert refused(intake, good[0], ("a.zip", zip_of(good))).code == "mixed_upload"


def test_several_adapters_in_one_upload(intake: Intake, good: Files) -> None:
    both = [(f"{folder}/{name}", contents) for folder in ("one", "two") for name, contents in good]
    error = refused(intake, ("a.zip", zip_of(both)))
    assert (error.code, "one, two" in error.message) == ("many_adapters", True)


@pytest.mark.parametrize(
    "config",
    [b"", b"[]", b"{", b"\xff\xfe", b'{"peft_type": "LORA", "r": NaN}', b"[" * 100_000, b'{"r": ' + b"[" * 100_000],
)
def test_config_that_is_not_json(intake: Intake, good: Files, config: bytes) -> None:
    assert refused(intake, ("adapter_config.json", config), good[1]).code in ("bad_config", "unsupported_adapter")


def test_huge_config(intake: Intake, good: Files) -> None:
    config = json.dumps({"peft_type": "LORA", "pad": "x" * 2_000_000}).encode()
    assert refused(intake, ("adapter_config.json", config), good[1]).code == "bad_config"


def test_manifest_that_is_not_an_object(intake: Intake, good: Files) -> None:
    error = refused(intake, *good, ("manifest.json", b"[1]"))
    assert isinstance(error, InvalidRequest)
    assert "manifest.json" in error.message
