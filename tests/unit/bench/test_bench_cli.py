"""The commands, end to end, against a source whose timeline is known."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner, Result

from bench.cli import bench
from bench.measure.record import read_record
from bench.selftest.check import source


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with source(gap_ms=10.0, ttft_ms=20.0) as running:
        yield running


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(bench, arguments, catch_exceptions=False)


def run(url: str, out: Path, name: str, *more: str, duration: str = "2") -> Result:
    return invoke(
        "run", "--url", url, "--workload", "random:32/20", "--duration", duration, "--repeats", "3", "--warmup", "2",
        "--quiet", "--out", str(out), "--name", name, *more,
    )  # fmt: skip


def test_run_reads_the_timeline_and_replay_agrees(url: str, tmp_path: Path) -> None:
    result = run(url, tmp_path, "a", "--rate", "10", "--slo", "ttft_p99=500,tpot_p99=100")
    assert result.exit_code in (0, 3), result.output
    plain = msgspec.json.decode((tmp_path / "a" / "result.json").read_bytes())
    steady = plain["summary"]["targets"]["server"]["steady"]
    assert steady["metrics"]["tpot_ms"]["p50"]["value"] == pytest.approx(10, abs=0.5)
    assert steady["metrics"]["ttft_from_send_ms"]["p50"]["value"] == pytest.approx(20, abs=5)
    assert (steady["failures"], steady["output_tokens_mean"], steady["input_tokens_mean"]) == ({}, 20, 32)
    assert plain["summary"]["targets"]["server"]["counted_by"].keys() == {"usage per chunk"}
    assert "<svg" in (tmp_path / "a" / "report.html").read_text()
    again = invoke("replay", str(tmp_path / "a" / "record.jsonl.gz"), "--out", str(tmp_path / "b"))
    assert again.exit_code == result.exit_code
    replayed = msgspec.json.decode((tmp_path / "b" / "result.json").read_bytes())
    assert replayed["summary"] == plain["summary"]


def test_closed_loop_never_has_more_in_flight_than_users(url: str, tmp_path: Path) -> None:
    result = run(url, tmp_path, "c", "--concurrency", "5", "--workers", "2", "--requests", "30")
    assert result.exit_code in (0, 3), result.output
    record = read_record(tmp_path / "c" / "record.jsonl.gz")
    load = [r for r in record.requests if record.header.segments[r.segment].label == "load"]
    assert len(load) == 3 * 30
    changes = sorted([(r.sent_ns, 1) for r in load] + [(r.end_ns, -1) for r in load])
    level = peak = 0
    for _, change in changes:
        level += change
        peak = max(peak, level)
    assert peak == 5


def test_targets_take_turns_and_are_paired(url: str, tmp_path: Path) -> None:
    result = invoke(
        "run", "--target", f"direct={url}", "--target", f"gateway={url}", "--rate", "20", "--duration", "2",
        "--block", "1", "--repeats", "2", "--warmup", "0", "--workload", "random:16/5", "--quiet",
        "--out", str(tmp_path), "--name", "ab",
    )  # fmt: skip
    assert result.exit_code in (0, 3), result.output
    plain = msgspec.json.decode((tmp_path / "ab" / "result.json").read_bytes())
    ttft = next(row for row in plain["paired"] if row["metric"] == "ttft_ms")
    assert (ttft["base"], ttft["other"], ttft["blocks"]) == ("direct", "gateway", 4)
    assert abs(ttft["difference"]["p50"]["value"]) < 2


def test_churn_probe_and_adapters_are_in_the_record(url: str, tmp_path: Path) -> None:
    script = tmp_path / "churn.yaml"
    script.write_text(
        "- {at: 0.5, name: look, method: GET, path: /v1/models}\n- {at: 0.6, name: miss, path: /v1/none}\n"
    )
    result = run(
        url,
        tmp_path,
        "d",
        "--rate",
        "20",
        "--adapters",
        "x,y,z",
        "--mix",
        "zipf:1",
        "--probe",
        "5",
        "--churn",
        str(script),
    )
    assert result.exit_code in (0, 3), result.output
    record = read_record(tmp_path / "d" / "record.jsonl.gz")
    assert [(mark.name, mark.ok) for mark in record.marks] == [("look", True), ("miss", False)]
    assert {r.model for r in record.requests if r.phase == "load"} == {"x", "y", "z"}
    assert {r.model for r in record.requests if r.phase == "probe"} == {"source"}


def test_compare_gates_and_refuses(url: str, tmp_path: Path) -> None:
    for name in ("one", "two"):
        run(url, tmp_path, name, "--rate", "20", duration="1")
    files = [str(tmp_path / name / "record.jsonl.gz") for name in ("one", "two")]
    alike = invoke("compare", *files, "--gate", "tpot_p50:+50%")
    assert alike.exit_code == 0, alike.output
    with source(gap_ms=20.0, ttft_ms=20.0) as slow:
        run(slow, tmp_path, "slow", "--rate", "20", duration="1")
    worse = invoke("compare", files[0], str(tmp_path / "slow" / "record.jsonl.gz"), "--gate", "tpot_p50:+50%")
    assert worse.exit_code == 4 and "gate broken" in worse.output
    run(url, tmp_path, "other", "--rate", "22", duration="1")
    refused = invoke("compare", files[0], str(tmp_path / "other" / "record.jsonl.gz"))
    assert refused.exit_code == 1 and "config.rate: 20.0 and 22.0" in refused.output


def test_sweep_and_capacity(url: str, tmp_path: Path) -> None:
    common = ["--url", url, "--workload", "random:16/5", "--warmup", "0", "--quiet", "--out", str(tmp_path)]
    swept = invoke("sweep", "--rates", "5,20", "--duration", "1", "--repeats", "1", "--name", "s", *common)
    assert swept.exit_code == 0 and "20/s" in swept.output, swept.output
    assert "<svg" in (tmp_path / "s" / "report.html").read_text()
    # no rate can keep a limit below the source's own time to first token
    never = invoke("capacity", "--slo", "ttft_p50=5", "--duration", "0.5", "--start-rate", "40", "--name", "k", *common)
    assert never.exit_code == 3 and "no rate kept" in never.output, never.output


def test_a_server_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    result = run("http://127.0.0.1:9", tmp_path, "x", "--rate", "1")
    assert result.exit_code == 1 and "refused" in result.output and "Traceback" not in result.output


def test_cold_import_brings_neither_torch_nor_our_own_server() -> None:
    code = "import sys, bench.cli, bench.run, bench.search; print([m for m in sys.modules if m.split('.')[0] in"
    code += " ('torch', 'transformers', 'gateway', 'backends', 'trainer', 'quant')])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
