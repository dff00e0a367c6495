"""What uv is told of pip's configuration, and what is read from uv's output."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from backends import uv
from backends.progress import PlainProgress, Silent
from tests.support.wait import eventually

ROOT = Path(__file__).parents[2]


@pytest.fixture
def home(tmp_path: Path) -> dict[str, str]:
    """An environment in which pip has no configuration at all."""
    return {"HOME": str(tmp_path), "XDG_CONFIG_DIRS": str(tmp_path / "xdg")}


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_pip_settings_override_one_another_as_pips_do(home: dict[str, str], tmp_path: Path) -> None:
    write(tmp_path / "xdg/pip/pip.conf", "[global]\nindex-url = http://shared/\nfind-links = /shared\nformat = x\n")
    write(tmp_path / ".config/pip/pip.conf", "[install]\nindex-url = http://user/\n[global]\nindex-url = http://no/\n")
    environ = home | {"PIP_FIND_LINKS": "/from-env"}
    settings = uv.pip_settings(environ)
    assert {key: settings[key] for key in ("index-url", "find-links")} == {
        "index-url": "http://user/",
        "find-links": "/from-env",
    }
    assert "format" not in settings


def test_named_pip_configuration_file(home: dict[str, str], tmp_path: Path) -> None:
    write(tmp_path / "mine.conf", "[global]\ntrusted-host = a\n b\n")
    environ = home | {"PIP_CONFIG_FILE": str(tmp_path / "mine.conf")}
    assert uv.environment(environ)["UV_INSECURE_HOST"] == "a b"


def test_pip_configuration_can_be_switched_off(home: dict[str, str], tmp_path: Path) -> None:
    write(tmp_path / ".config/pip/pip.conf", "[global]\nindex-url = http://user/\n")
    assert uv.pip_settings(home | {"PIP_CONFIG_FILE": os.devnull}) == {}


def test_uv_gets_pips_sources(home: dict[str, str]) -> None:
    environ = uv.environment(
        home
        | {
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_INDEX_URL": "http://index/",
            "PIP_EXTRA_INDEX_URL": "http://one/ http://two/",
            "PIP_FIND_LINKS": "/a /b",
            "PIP_CERT": "/cert.pem",
            "PIP_DEFAULT_TIMEOUT": "180",
        }
    )
    assert environ["UV_DEFAULT_INDEX"] == "http://index/"
    assert environ["UV_INDEX"] == "http://one/ http://two/"
    assert environ["UV_FIND_LINKS"] == "/a,/b"
    assert environ["SSL_CERT_FILE"] == "/cert.pem"
    assert environ["UV_HTTP_TIMEOUT"] == "180"


def test_what_uv_was_told_itself_wins(home: dict[str, str]) -> None:
    told = {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": "http://pip/", "PIP_FIND_LINKS": "/pip"}
    environ = uv.environment(home | told | {"UV_DEFAULT_INDEX": "http://uv/", "UV_FIND_LINKS": "/uv"})
    assert (environ["UV_DEFAULT_INDEX"], environ["UV_FIND_LINKS"]) == ("http://uv/", "/uv")
    assert "UV_INDEX" not in environ


@pytest.mark.parametrize(("value", "flags"), [("1", ["--no-index"]), ("true", ["--no-index"]), ("0", []), ("", [])])
def test_pip_that_asks_no_index_means_uv_too(home: dict[str, str], value: str, flags: list[str]) -> None:
    assert uv.index_flags(home | {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": value}) == flags


def test_nothing_configured_tells_uv_nothing(home: dict[str, str]) -> None:
    added = uv.environment(home | {"PIP_CONFIG_FILE": os.devnull}).keys() - home.keys()
    assert added == {"UV_INDEX_STRATEGY", "UV_COMPILE_BYTECODE_TIMEOUT", "PIP_CONFIG_FILE"}


def test_steps_are_told_with_what_and_how_much() -> None:
    steps = uv._Steps()
    seen = [str(steps)]
    for line in (
        "Resolved 150 packages in 1.2s",
        "Downloading torch (190.0MiB)",
        "Downloading triton (10.0MiB)",
        " Downloaded triton",
        " Downloaded torch",
        "Prepared 150 packages in 9s",
        "Installed 150 packages in 1s",
        "Bytecode compiled 9000 files in 30s",
    ):
        steps.read(line)
        seen.append(str(steps))
    assert seen[0] == "looking for packages"
    assert seen[3] == "fetching 150 packages: 0 of 200 MiB, waiting for torch, triton"
    assert seen[4] == "fetching 150 packages: 10 of 200 MiB, waiting for torch"
    assert seen[5:] == [
        "fetching 150 packages",
        "laying 150 packages in place",
        "compiling 150 packages to bytecode",
        "9000 files compiled to bytecode",
    ]


def test_failure_carries_uvs_own_words(tmp_path: Path) -> None:
    with pytest.raises(uv.UvFailed, match="no-such-requirements"):
        arguments = ["pip", "install", "--target", str(tmp_path / "out"), "-r", "no-such-requirements.txt"]
        uv.run(arguments, Silent(), environ=os.environ)


def test_plain_progress_is_sparse_in_a_log() -> None:
    stream = io.StringIO()
    progress = PlainProgress(stream)
    progress.phase("installing")
    for _ in range(50):
        progress.update("fetching")
    progress.finish("done")
    assert [line.partition("] ")[2] for line in stream.getvalue().splitlines()] == ["installing", "done"]


def test_plain_progress_overwrites_itself_on_a_terminal() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    progress = PlainProgress(stream)
    progress.phase("installing")
    progress.update("fetching")
    progress.finish("done")
    assert stream.getvalue().count("\n") == 2
    assert "\r\x1b[K[   0 s] fetching" in stream.getvalue()


_RUN_UV_IN_A_PROCESS = """
import os, sys
from backends import uv
from backends.progress import Silent
uv.find_uv_bin = lambda: sys.argv[1]
uv.run([], Silent(), environ=os.environ)
"""


def test_uv_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    fake = tmp_path / "uv"
    fake.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid.new; mv {tmp_path}/pid.new {tmp_path}/pid; exec sleep 600\n")
    fake.chmod(0o755)
    with subprocess.Popen([sys.executable, "-c", _RUN_UV_IN_A_PROCESS, str(fake)], cwd=ROOT) as parent:
        pid = int(eventually(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text(), timeout_s=30))
        parent.kill()
    eventually(lambda: not Path(f"/proc/{pid}").exists() or Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z")
