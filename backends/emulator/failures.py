"""Starts that fail, with the real engine's last words on standard error and its exit code."""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from backends.emulator.recordings import Book
from backends.emulator.settings import Settings

# SGLang's own words, from its argument checks.
_SGLANG_NEEDS = (
    "AssertionError: When no initial --lora-paths is provided, you need to specify both --max-lora-rank and "
    "--lora-target-modules for LoRA initialization."
)


def fail(book: Book, kind: str, replace: Mapping[str, Any] | None = None) -> NoReturn:
    """Print the recorded log of this kind of failed start, and exit as the engine did, or hang where it hung."""
    if kind == "exit":
        sys.exit(1)
    recorded = book.documents[f"start_{kind}"]
    text = "\n".join(recorded["log_tail"])
    for old, new in (replace or {}).items():
        text = text.replace(old, str(new))
    _say(text)
    if recorded["exit_code"] is None:
        _say(f"(as recorded of {book.engine} {book.version}: it never exits)")
        while True:
            time.sleep(3600)
    sys.exit(recorded["exit_code"])


def fail_on_adapter(book: Book, name: str, path: str, fault: str) -> NoReturn:
    """An adapter of the command line cannot be loaded."""
    kind = {"missing_path": "adapter_missing", "wrong_base": "adapter_wrong_base"}.get(fault, "adapter_missing")
    if f"start_{kind}" in book.documents:
        fail(book, kind, {"{adapters}/nowhere": path, "{adapters}/smaller": path})
    _say(f"ValueError: cannot load adapter {name} from {path}: {fault}")
    sys.exit(1)


def check_adapter_flags(engine: str, settings: Settings, argv: Sequence[str]) -> None:
    """SGLang refuses to start with adapters on and neither adapters nor their limits given."""
    words = {word.partition("=")[0] for word in argv}
    if (
        engine == "sglang"
        and settings.lora
        and not settings.static_adapters
        and not {"--max-lora-rank", "--lora-target-modules"} <= words
    ):
        _say(_SGLANG_NEEDS)
        sys.exit(1)


def is_directory(path: str) -> bool:
    """Whether a model path can be read."""
    return Path(path).is_dir()


def port_is_taken(host: str, port: int) -> bool:
    """Whether someone else listens there."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return True
    return False


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
