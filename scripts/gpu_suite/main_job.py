"""The main job on one engine: chat, adapters, a swap under load, the engine's death, a drain."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import openai

from backends import registry
from backends.spec import AdapterLoading
from scripts.gpu_suite.report import Report
from scripts.gpu_suite.serving import ANSWER_TOKENS, Engine, Served, Traffic, chat, greedy, serving, upload
from tests.conformance.target import TOOL_PARSERS
from tests.support.gateway import command_line, descendants
from tests.support.wait import eventually

CONTEXT_TOKENS = 8192
_CONFORMANCE = ("chat", "completions", "errors", "models", "responses", "streams", "tools_and_schemas")
# What tests of the suite ask of an emulator's model and a model of 135 million parameters need not do.
_OF_THE_MODEL = ("test_continuing_goes_on_as_it_would_have", "test_required_tool")
_SLACK_S = 240.0
_ROOT = Path(__file__).parents[2]

Expected = dict[str, dict[str, dict[str, Any]]]  # "base" or adapter -> prompt -> answer, see torch_side.py


def main_job(report: Report, engine: Engine, model: Path, oracle: Path, work: Path) -> None:
    """All checks on one engine with the demo model; the gateway is stopped by the drain at the end."""
    expected: Expected = json.loads((oracle / "expected.json").read_text())
    flags = ["--max-model-len", str(CONTEXT_TOKENS), "--max-adapter-rank", "16", "--dtype", "bfloat16"]
    flags += ["--tool-call-parser", TOOL_PARSERS[engine.name]]
    with serving(engine, model, work / "state", *flags, name="demo") as served, served.client() as client:
        report.figures |= {"ready_s": served.ready_s, "version": served.version(), "kernels": served.kernels()}
        report.figures["replicas"] = len(served.gateway.replicas())
        print(f"{report.stage}: ready after {served.ready_s} s", flush=True)
        with report.check("chat through the gateway equals the engine's own, token for token"):
            _equal_direct(served, client, expected)
        with report.check("the base answers as transformers does"):
            report.figures["base_sure_tokens"] = as_reference(client, "demo", expected["base"])
        with report.check("adapters uploaded under load"):
            _upload_under_load(report, served, oracle)
        for name in ("pirate", "robot"):
            with report.check(f"adapter {name} answers as peft does"):
                report.figures[f"{name}_sure_tokens"] = as_reference(client, name, expected[name])
        with report.check("base and adapters in one batch keep apart"):
            _mixed(client, expected)
        with report.check("another version of an adapter under load, no request failed"):
            _swap(report, served, client, oracle, expected)
        with report.check("a killed engine comes back with its adapters"):
            _kill(report, served, client, expected)
        with report.check("conformance suite"):
            found = report.figures["conformance"] = _conformance(served, work)
            assert not found["unexplained"], found
        with report.check("a client that goes away frees the engine"):
            _hang_up(served)
        with report.check("a stop lets a stream end and leaves nothing behind"):
            _drain(report, served)


def as_reference(client: openai.OpenAI, model: str, answers: dict[str, dict[str, Any]]) -> int:
    """Every answer begins with what the reference is sure of; how many tokens that is in all."""
    wrong = []
    for prompt, answer in answers.items():
        got = greedy(client, model, prompt)
        if not (got == answer["text"] if answer["all_sure"] else got.startswith(answer["sure"])):
            wrong.append(f"{prompt!r}: {got!r}, the reference is sure of {answer['sure']!r}")
    assert not wrong, "; ".join(wrong)
    return sum(answer["sure_tokens"] for answer in answers.values())


def _equal_direct(served: Served, client: openai.OpenAI, expected: Expected) -> None:
    with served.direct() as direct:
        for prompt in expected["base"]:
            body = {"model": "demo", "messages": chat(prompt), "max_tokens": ANSWER_TOKENS, "temperature": 0,
                    "logprobs": True}  # fmt: skip
            direct.post("/v1/chat/completions", json=body).raise_for_status()  # so that both find a warm prefix cache
            straight = direct.post("/v1/chat/completions", json=body).raise_for_status().json()["choices"][0]
            through = client.chat.completions.create(**body).choices[0]  # type: ignore[call-overload]
            tokens = [token["token"] for token in straight["logprobs"]["content"]]
            assert [token.token for token in through.logprobs.content] == tokens
            stream = client.chat.completions.create(**body | {"stream": True})  # type: ignore[call-overload]
            streamed = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
            assert streamed == straight["message"]["content"] == through.message.content


def _conformance(served: Served, work: Path) -> dict[str, Any]:
    files = [str(_ROOT / "tests" / "conformance" / f"test_{name}.py") for name in _CONFORMANCE]
    environment = os.environ | {
        "TUNEGATE_CONFORMANCE_ENGINE": served.engine.name,
        "TUNEGATE_CONFORMANCE_URL": served.gateway.url,
        "TUNEGATE_CONFORMANCE_MODEL": served.gateway.model,
        "TUNEGATE_CONFORMANCE_CONTEXT_TOKENS": str(CONTEXT_TOKENS),
        "TUNEGATE_CONFORMANCE_KEY": str(served.gateway.api_key),
    }
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "--tb=short", "-p", "no:cacheprovider", *files]
    done = subprocess.run(
        command, cwd=_ROOT, env=environment, capture_output=True, text=True, timeout=_SLACK_S, check=False
    )
    (work / "conformance.txt").write_text(done.stdout + done.stderr)
    found: dict[str, Any] = {
        kind: int(n) for n, kind in re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout)
    }
    found["failing"] = re.findall(r"^(?:FAILED|ERROR) (?:\S*/)?(\S+)", done.stdout, re.MULTILINE)
    unexplained = [name for name in found["failing"] if not any(known in name for known in _OF_THE_MODEL)]
    assert done.returncode in (0, 1) and found.get("passed"), done.stdout[-500:] + done.stderr[-500:]
    return found | {"unexplained": unexplained}


def _upload_under_load(report: Report, served: Served, oracle: Path) -> None:
    with Traffic(served, ("demo",)) as traffic:
        eventually(lambda: len(traffic.first_token_s) >= 40 or len(traffic.failures) > 20, 60)
        report.figures["load_before"] = traffic.figures()
        began = time.monotonic()
        report.figures["upload_ready_s"] = [upload(served, name, oracle / name) for name in ("pirate", "robot")]
        report.figures["load_during_uploads"] = traffic.figures(began)
    if registry.get(served.engine.name).capabilities.adapter_loading is not AdapterLoading.RUNTIME:
        return  # one replica that must start anew for each: requests fail meanwhile, as is announced
    assert not traffic.failures, f"{len(traffic.failures)} failed: {traffic.failures[:3]}"


def _mixed(client: openai.OpenAI, expected: Expected) -> None:
    rows = [("demo" if name == "base" else name, prompt, answer)
            for _ in range(4) for name, answers in expected.items() for prompt, answer in answers.items()]  # fmt: skip
    with ThreadPoolExecutor(len(rows)) as pool:
        got = list(pool.map(lambda row: greedy(client, row[0], row[1]), rows))
    wrong = [f"{model} {prompt!r}: {text!r}" for text, (model, prompt, answer) in zip(got, rows, strict=True)
             if not text.startswith(answer["sure"])]  # fmt: skip
    assert not wrong, f"{len(wrong)} of {len(rows)}: {'; '.join(wrong[:4])}"


def _swap(report: Report, served: Served, client: openai.OpenAI, oracle: Path, expected: Expected) -> None:
    """A name that is asked all the time becomes another adapter."""
    first_s = upload(served, "turncoat", oracle / "pirate")
    as_reference(client, "turncoat", expected["pirate"])
    with Traffic(served, ("demo", "turncoat")) as traffic:
        eventually(lambda: len(traffic.first_token_s) >= 60 or len(traffic.failures) > 20, 60)
        before = traffic.figures()
        began = time.monotonic()
        second_s = upload(served, "turncoat", oracle / "robot")
        during = traffic.figures(began)
    report.figures["swap"] = {"ready_s": [first_s, second_s], "before": before, "during": during}
    as_reference(client, "turncoat", expected["robot"])
    assert not traffic.failures, f"{len(traffic.failures)} failed: {traffic.failures[:3]}"


def _kill(report: Report, served: Served, client: openai.OpenAI, expected: Expected) -> None:
    prompt = next(iter(expected["pirate"]))
    sure = expected["pirate"][prompt]["sure"]
    pid = served.state()["engine_pid"]
    os.kill(pid, signal.SIGKILL)
    killed = time.monotonic()
    eventually(lambda: served.gateway.replicas()[0]["state"] != "ready", 30)

    def back() -> bool:
        try:
            ready = served.gateway.replicas()[0]["state"] == "ready" and served.state()["engine_pid"] != pid
            return ready and greedy(client, "pirate", prompt).startswith(sure)
        except openai.APIStatusError:
            return False

    eventually(back, _SLACK_S, every_s=0.5)
    report.figures["back_after_kill_s"] = round(time.monotonic() - killed, 1)


def _hang_up(served: Served) -> None:
    body = {
        "model": "demo",
        "messages": chat("Tell a long story."),
        "max_tokens": 3000,
        "stream": True,
        "ignore_eos": True,
    }
    with served.http() as http, http.stream("POST", "/v1/chat/completions", json=body) as answer:
        next(answer.iter_lines())

    def idle() -> bool:
        with served.http() as http:
            text = http.get("/metrics").text
        rows = [line for line in text.splitlines() if "in_flight" in line and not line.startswith("#")]
        return bool(rows) and all(float(row.rsplit(" ", 1)[1]) == 0 for row in rows)

    eventually(idle, 10)


def _drain(report: Report, served: Served) -> None:
    body = {
        "model": "demo",
        "messages": chat("Tell a long story."),
        "max_tokens": 1000,
        "stream": True,
        "ignore_eos": True,
    }
    lines: list[str] = []
    began = threading.Event()

    def read() -> None:
        with served.http() as http, http.stream("POST", "/v1/chat/completions", json=body) as answer:
            for line in answer.iter_lines():
                if line:
                    lines.append(line)
                    began.set()

    reader = threading.Thread(target=read)
    reader.start()
    assert began.wait(60)
    below = descendants(served.gateway.process.pid)
    asked, seen = time.monotonic(), len(lines)
    served.gateway.process.send_signal(signal.SIGTERM)
    try:
        status = served.gateway.process.wait(120)
    finally:
        reader.join(60)
    report.figures["stop_s"] = round(time.monotonic() - asked, 1)
    report.figures["stream_events_after_stop"] = len(lines) - seen
    assert lines[-1] == "data: [DONE]", lines[-1][:200]
    assert status == 0, status
    left = [command_line(pid) for pid in below if command_line(pid)]
    assert not left, left
    try:
        httpx2.get(f"{served.gateway.url}/health", trust_env=False)
    except httpx2.ConnectError:
        return
    raise AssertionError("the port still answers")
