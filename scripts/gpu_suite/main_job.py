"""The main job on one engine: chat, adapters, a swap under load, the engine's death, a drain."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import httpx2
import openai

from backends import registry
from backends.spec import AdapterLoading
from scripts.gpu_suite import machine
from scripts.gpu_suite.conformance import conformance
from scripts.gpu_suite.probes import Repeated, first_top_k, jit_files, repeatable, request
from scripts.gpu_suite.reference import Expected, as_reference
from scripts.gpu_suite.report import Report
from scripts.gpu_suite.serving import Engine, Served, Traffic, chat, greedy, nudged, serving, upload
from tests.conformance.target import TOOL_PARSERS
from tests.support.gateway import command_line, descendants
from tests.support.wait import eventually

_CONTEXT_TOKENS = 8192
_SLACK_S = 240.0
_WINDOW_S = 8.0  # of load before a swap, and from its start


def main_job(report: Report, engine: Engine, model: Path, oracle: Path, work: Path) -> None:
    """All checks on one engine with the demo model; the gateway is stopped by the drain at the end."""
    expected: Expected = json.loads((oracle / "expected.json").read_text())
    flags = ["--max-model-len", str(_CONTEXT_TOKENS), "--max-adapter-rank", "16", "--dtype", "bfloat16"]
    flags += ["--tool-call-parser", TOOL_PARSERS[engine.name]]
    env, compiled = {}, jit_files()
    if registry.get(engine.name).capabilities.adapter_loading is AdapterLoading.AT_START:
        # A change of adapters starts it anew: only a second replica lets requests go on, and it shares the GPU.
        engine = replace(engine, share=engine.share / 2)
        env = {"CUDA_VISIBLE_DEVICES": ",".join([machine.first_visible()] * 2)}
        flags += ["--replicas", "2"]
    with (
        serving(engine, model, work / "state", *flags, name="demo", env=env) as served,
        served.client() as client,
    ):
        if engine.name == "sglang":
            with report.check("the first request with top_k is answered"):
                first_top_k(report, served, "demo", compiled)
        _checks(report, served, client, oracle, expected, work)


def _checks(report: Report, served: Served, client: openai.OpenAI, oracle: Path, expected: Expected,
            work: Path) -> None:  # fmt: skip
    eventually(lambda: all(row["state"] == "ready" for row in served.gateway.replicas()), _SLACK_S, every_s=0.5)
    report.figures |= {"ready_s": served.ready_s, "version": served.version(), "kernels": served.kernels()}
    report.figures["replicas"] = len(served.gateway.replicas())
    print(f"{report.stage}: ready after {served.ready_s} s", flush=True)
    repeated = repeatable(report, served, "demo", list(expected["base"]))
    with report.check("chat through the gateway equals the engine's own, token for token"):
        _equal_direct(served, client, repeated)
    with report.check("the base answers as transformers does"):
        report.figures["base_sure_tokens"] = as_reference(client, "demo", expected["base"])
    with report.check("adapters uploaded under load, no request failed"):
        _upload_under_load(report, served, oracle)
    for name in ("pirate", "robot"):
        with report.check(f"adapter {name} answers as peft does"):
            report.figures[f"{name}_sure_tokens"] = as_reference(client, name, expected[name])
    with report.check("base and adapters in one batch keep apart"):
        _mixed(client, expected)
    with report.check("another version of an adapter under load, no request failed"):
        _swap(report, served, client, oracle, expected, work)
    with report.check("a killed engine comes back with its adapters"):
        _kill(report, served, client, expected)
    with report.check("conformance suite"):
        found = report.figures["conformance"] = conformance(served, _CONTEXT_TOKENS, work)
        print(f"{report.stage}: conformance: {found}", flush=True)
        assert not found["unexplained"], found
    with report.check("a client that goes away frees the engine"):
        _hang_up(served)
    with report.check("a stop lets a stream end and leaves nothing behind"):
        _drain(report, served)


def _equal_direct(served: Served, client: openai.OpenAI, repeated: dict[str, Repeated]) -> None:
    """Token for token, as far as the engine agrees with itself."""
    assert repeated, "the engine gave nothing to compare with"
    for prompt, own in repeated.items():
        body = request("demo", prompt)
        through = client.chat.completions.create(**body).choices[0]
        tokens = [token.token for token in through.logprobs.content]
        assert own.allows(tokens, through.message.content), (prompt, tokens, own)
        stream = client.chat.completions.create(**body | {"stream": True})
        streamed = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
        assert own.distinct > 1 or streamed == own.text, (prompt, streamed, own)


def _upload_under_load(report: Report, served: Served, oracle: Path) -> None:
    """Both at once: an engine that takes adapters only when it starts is then started again once, not twice."""
    with Traffic(served, ("demo",)) as traffic:
        eventually(lambda: len(traffic.first_token_s) >= 40 or len(traffic.failures) > 20, 60)
        report.figures["load_before"] = traffic.figures()
        began = time.monotonic()
        with ThreadPoolExecutor() as pool:
            both = list(pool.map(lambda name: upload(served, name, oracle / name), ("pirate", "robot")))
        report.figures |= {"upload_ready_s": both, "load_during_uploads": traffic.figures(began)}
    assert not traffic.failures, f"{len(traffic.failures)} failed: {traffic.failures[:3]}"


def _mixed(client: openai.OpenAI, expected: Expected) -> None:
    rows = [("demo" if name == "base" else name, prompt, answer)
            for _ in range(4) for name, answers in expected.items() for prompt, answer in answers.items()]  # fmt: skip
    with ThreadPoolExecutor(len(rows)) as pool:
        got = list(pool.map(lambda row: greedy(client, row[0], row[1]), rows))
    wrong = [f"{model} {prompt!r}: {text!r}" for text, (model, prompt, answer) in zip(got, rows, strict=True)
             if not text.startswith(answer["sure"])]  # fmt: skip
    assert not wrong, f"{len(wrong)} of {len(rows)}: {'; '.join(wrong[:4])}"


def _swap(report: Report, served: Served, client: openai.OpenAI, oracle: Path, expected: Expected,
          work: Path) -> None:  # fmt: skip
    """A name that is asked all the time becomes another adapter, of contents that the engine has never held."""
    first_s = upload(served, "turncoat", oracle / "pirate")
    fresh = nudged(oracle / "robot", work / "robot-nudged", 1)
    with Traffic(served, ("demo", "turncoat")) as traffic:
        time.sleep(_WINDOW_S)
        before = traffic.figures()
        began = time.monotonic()
        second_s = upload(served, "turncoat", fresh)
        time.sleep(max(0.0, _WINDOW_S - (time.monotonic() - began)))
        during = traffic.figures(began)
    report.figures["swap"] = {"ready_s": [first_s, second_s], "before": before, "during": during}
    print(f"{report.stage}: swap: {report.figures['swap']}", flush=True)
    as_reference(client, "turncoat", expected["robot"])
    with served.http() as http:
        held = {
            name: http.get(f"/v1/adapters/{name}").raise_for_status().json()["sha256"] for name in ("turncoat", "robot")
        }
    assert held["turncoat"] != held["robot"], "the nudged adapter is the same to the gateway"
    assert not traffic.failures, f"{len(traffic.failures)} failed: {traffic.failures[:3]}"


def _kill(report: Report, served: Served, client: openai.OpenAI, expected: Expected) -> None:
    prompt = next(iter(expected["pirate"]))
    sure = expected["pirate"][prompt]["sure"]
    pid = served.state()["engine_pid"]
    os.kill(pid, signal.SIGKILL)
    killed = time.monotonic()
    eventually(lambda: served.gateway.replicas()[0]["state"] != "ready", 30)

    said = ""

    def back() -> bool:
        nonlocal said
        try:
            said = greedy(client, "pirate", prompt)
        except openai.APIStatusError:
            return False
        return served.gateway.replicas()[0]["state"] == "ready" and served.state()["engine_pid"] != pid

    eventually(back, _SLACK_S, every_s=0.5)
    report.figures["back_after_kill_s"] = round(time.monotonic() - killed, 1)
    assert said.startswith(sure), said


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

    eventually(lambda: served.in_flight() == 0, 10)


def _drain(report: Report, served: Served) -> None:
    body = {
        "model": "demo",
        "messages": chat("Tell a long story."),
        "max_tokens": 1000 if served.engine.device == "cuda" else 100,  # within the patience of a stop
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
