from __future__ import annotations

import ast
from pathlib import Path

FORBIDDEN = {"gateway", "quant", "bench", "vllm", "sglang", "lmdeploy", "peft", "trl", "accelerate", "datasets"}
ALLOWED = {"tables.py": {"datasets"}}  # an extra, for what is no file of lines


def test_the_trainer_knows_no_server_no_engine_and_no_other_trainer() -> None:
    for file in (Path(__file__).parents[2] / "trainer").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            found = {name.split(".")[0] for name in names} & FORBIDDEN
            assert found <= ALLOWED.get(file.name, set()), file.name
