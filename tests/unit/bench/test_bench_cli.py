"""The commands, end to end, against a source whose timeline is known."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from itertools import accumulate
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


def run(url: str, out: Path, name: str, *more: str) -> Result:
    return invoke(
        "run", "--url", url, "--workload", "random:32/20", "--duration", "0.7", "--repeats", "3", "--warmup", "2",
        "--quiet", "--out", str(out), "--name", name, *more,
    )  # fmt: skip


def test_run_reads_the_timeline_and_replay_and_compare_agree(url: str, tmp_path: Path) -> None:
    result = run(url, tmp_path, "a", "--rate", "20", "--slo", "ttft_p99=500,tpot_p99=100")
    assert result.exit_code in (0, 3), result.output
    plain = msgspec.json.decode((tmp_path / "a" / "result.json").read_bytes())
    steady = plain["summary"]["targets"]["server"]["steady"]
    assert steady["metrics"]["tpot_ms"]["p50"]["value"] == pytest.approx(10, abs=2)
    assert steady["metrics"]["ttft_from_send_ms"]["p50"]["value"] == pytest.approx(20, abs=15)
    assert (steady["failures"], steady["output_tokens_mean"], steady["input_tokens_mean"]) == ({}, 20, 32)
    assert plain["summary"]["targets"]["server"]["counted_by"].keys() == {"usage per chunk"}
    assert "<svg" in (tmp_path / "a" / "report.html").read_text()
    record = str(tmp_path / "a" / "record.jsonl.gz")
    again = invoke("replay", record, "--out", str(tmp_path / "b"))
    assert again.exit_code == result.exit_code
    replayed = msgspec.json.decode((tmp_path / "b" / "result.json").read_bytes())
    assert replayed["summary"] == plain["summary"]
    alike = invoke("compare", record, record, "--gate", "tpot_p50:+5%")
    assert alike.exit_code == 0 and "slower" not in alike.output, alike.output
    with source(gap_ms=20.0, ttft_ms=20.0) as slow:
        run(slow, tmp_path, "slow", "--rate", "20", "--slo", "ttft_p99=500,tpot_p99=100")
    worse = invoke("compare", record, str(tmp_path / "slow" / "record.jsonl.gz"), "--gate", "tpot_p50:+50%")
    assert worse.exit_code == 4 and "gate broken" in worse.output


def test_closed_loop_never_has_more_in_flight_than_users(url: str, tmp_path: Path) -> None:
    users = ("--concurrency", "5", "--workers", "2", "--requests", "20", "--repeats", "1", "--duration", "30")
    result = run(url, tmp_path, "c", *users)
    assert result.exit_code in (0, 3), result.output
    record = read_record(tmp_path / "c" / "record.jsonl.gz")
    load = [r for r in record.requests if record.header.segments[r.segment].label == "load"]
    assert len(load) == 20
    changes = sorted([(r.sent_ns, 1) for r in load] + [(r.end_ns, -1) for r in load])
    assert max(accumulate(change for _, change in changes)) == 5


def test_targets_take_turns_and_are_paired(url: str, tmp_path: Path) -> None:
    result = invoke(
        "run", "--target", f"direct={url}", "--target", f"gateway={url}", "--rate", "40", "--duration", "1",
        "--block", "0.5", "--repeats", "1", "--warmup", "0", "--workload", "random:16/5", "--quiet",
        "--out", str(tmp_path), "--name", "ab",
    )  # fmt: skip
    assert result.exit_code in (0, 3), result.output
    assert "TTFT: gateway - direct" in result.output
    plain = msgspec.json.decode((tmp_path / "ab" / "result.json").read_bytes())
    ttft = next(row for row in plain["paired"] if row["metric"] == "ttft_ms")
    assert (ttft["base"], ttft["other"], ttft["blocks"]) == ("direct", "gateway", 2)
    assert abs(ttft["difference"]["p50"]["value"]) < 10


def test_targets_mix_their_own_names_for_the_same_adapters(url: str, tmp_path: Path) -> None:
    result = invoke(
        "run", "--target", f"direct={url},adapters=a-1+a-2", "--target", f"gateway={url},adapters=x+y",
        "--concurrency", "2", "--duration", "1", "--block", "0.5", "--repeats", "1", "--warmup", "0",
        "--workload", "random:16/5", "--quiet", "--out", str(tmp_path), "--name", "own",
    )  # fmt: skip
    assert result.exit_code in (0, 3), result.output
    record = read_record(tmp_path / "own" / "record.jsonl.gz")
    named: dict[str, dict[tuple[int, int | None], str]] = {"direct": {}, "gateway": {}}
    for request in record.requests:
        named[request.target][request.index, record.header.segments[request.segment].pair] = request.model
    twins = {(model, named["gateway"][key]) for key, model in named["direct"].items() if key in named["gateway"]}
    assert twins == {("a-1", "x"), ("a-2", "y")}


def test_sweep_finds_its_rates_and_capacity_its_limit(url: str, tmp_path: Path) -> None:
    common = ["--url", url, "--workload", "random:16/5", "--warmup", "0", "--quiet", "--out", str(tmp_path)]
    swept = invoke("sweep", "--duration", "0.4", "--repeats", "1", "--name", "s", *common)
    assert swept.exit_code == 0 and swept.output.count("/s ") >= 5, swept.output
    assert "<svg" in (tmp_path / "s" / "report.html").read_text()
    # no rate can keep a limit below the source's own time to first token
    never = invoke("capacity", "--slo", "ttft_p50=5", "--duration", "0.4", "--start-rate", "10", "--name", "k", *common)
    assert never.exit_code == 3 and "no rate kept" in never.output, never.output


def test_a_server_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    result = run("http://127.0.0.1:9", tmp_path, "x", "--rate", "1")
    assert result.exit_code == 1 and "refused" in result.output and "Traceback" not in result.output


def test_cold_import_brings_neither_torch_nor_our_own_server() -> None:
    code = "import sys, bench.cli, bench.run, bench.search; print([m for m in sys.modules if m.split('.')[0] in"
    code += " ('torch', 'transformers', 'gateway', 'backends', 'trainer', 'quant')])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
