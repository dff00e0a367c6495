"""Read an engine's own argument parser, in the engine's own Python, as data.

The emulator accepts and rejects exactly these flags.
"""

from __future__ import annotations

import json
import subprocess
from typing import Any

_DUMP = """
import argparse, json
def describe(action):
    if isinstance(action, argparse._HelpAction) or not action.option_strings:
        return None
    takes = 0 if action.nargs == 0 else 1 if action.nargs is None else action.nargs
    choices = None if action.choices is None else [c for c in action.choices]
    kind = getattr(action.type, "__name__", None) if action.type in (int, float) else None
    return {"names": [n for n in action.option_strings], "takes": takes,
            "choices": choices if choices and all(isinstance(c, (str, int, type(None))) for c in choices) else None,
            "kind": kind, "required": bool(action.required)}
flags = [d for d in map(describe, parser._actions) if d]
print("FLAGS " + json.dumps(flags))
"""
_PARSER = {
    "vllm": """
try:
    from vllm.entrypoints.common.cli_args import make_arg_parser
except ImportError:  # before 0.33
    try:
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
    except ImportError:  # before 0.30
        from vllm.entrypoints.openai.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = make_arg_parser(FlexibleArgumentParser())
""",
    "sglang": """
import argparse
from sglang.srt.server_args import ServerArgs
parser = argparse.ArgumentParser()
ServerArgs.add_cli_args(parser)
""",
    "lmdeploy": """
from lmdeploy.cli.serve import SubCliServe
SubCliServe.add_parsers()
parser = SubCliServe.subparsers.choices["api_server"]
""",
}


def read_flags(engine: str, python: tuple[str, ...], env: dict[str, str]) -> list[dict[str, Any]]:
    """Every option of the engine's serve command: names, how many values it takes, choices, int or float.

    Raises CalledProcessError, StopIteration where the engine's parser is not where it was looked for.
    """
    command = [*python, "-c", _PARSER[engine] + _DUMP]
    output = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
    line = next(line for line in output.splitlines() if line.startswith("FLAGS "))
    flags: list[dict[str, Any]] = json.loads(line.removeprefix("FLAGS "))
    return flags
