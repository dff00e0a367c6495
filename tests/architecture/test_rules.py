"""Rules of the architecture that a reader may rely on."""

from __future__ import annotations

import subprocess
import sys

from gateway.cli import docs

_COLD_IMPORT = """
import sys
import {modules}
heavy = {{"torch", "transformers", "vllm", "sglang", "lmdeploy"}} & set(sys.modules)
assert not heavy, heavy
"""


def test_server_and_bench_import_no_torch() -> None:
    modules = "gateway.cli.serve, gateway.relay.app, gateway.control.app, bench.cli"
    subprocess.run([sys.executable, "-c", _COLD_IMPORT.format(modules=modules)], check=True, timeout=60)


def test_command_line_page_is_fresh() -> None:
    """A new or changed flag shows up as a diff of docs/cli.md: run `make docs`.

    In a process of its own: click keeps the help option of a command that another test has called.
    """
    render = "from gateway.cli import docs; print(docs.render(), end='')"
    page = subprocess.run([sys.executable, "-c", render], check=True, timeout=60, capture_output=True, text=True).stdout
    assert docs.PAGE.read_text() == page
