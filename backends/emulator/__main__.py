"""python -m backends.emulator --as vllm|sglang|lmdeploy ENGINE-ARGUMENTS..."""

from __future__ import annotations

import sys

from backends.emulator.engines import ENGINES
from backends.emulator.script import ScriptError
from backends.emulator.server import serve


def main() -> None:
    """Read which engine to be; everything after that is the engine's own command line."""
    argv = sys.argv[1:]
    if argv[:1] != ["--as"] or argv[1:2] == [] or argv[1] not in ENGINES:
        sys.exit(f"usage: python -m backends.emulator --as {{{','.join(ENGINES)}}} ENGINE-ARGUMENTS...")
    try:
        serve(argv[1], argv[2:])
    except ScriptError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
