"""Limits of one key over one and several relays; time is the test's."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import msgspec
import pytest

from gateway.errors import QuotaExceeded, RateLimited
from gateway.observe import usage
from gateway.observe.usage import IN_FLIGHT, MAX_KEYS, REQUESTS, ROW_CELLS, TOKENS, Usage
from gateway.relay.limits import Account, Ledger, duration
from gateway.snapshot import Key

KEY = Key("key-1", frozenset({"infer"}), row=3)


def relays(folder: Path, count: int, key: Key) -> list[Account]:
    """The same key at so many relays that know each other."""
    files = [Usage(folder / f"relay-{index}.usage", count) for index in range(count)]
    for file in files:
        file.find()
    return [Account(key, file) for file in files]


def limited(**terms: int) -> Key:
    return msgspec.structs.replace(KEY, **terms)


def cell(account: Account, which: int) -> int:
    return int(account._cells[3 * ROW_CELLS + which])


def admitted(accounts: list[Account], at: list[float]) -> int:
    """Requests let in, sent to the relays in turn at these times."""
    count = 0
    for account, now_s in zip(itertools.cycle(accounts), at, strict=False):
        try:
            account.enter(now_s)
            count += 1
        except RateLimited:
            continue
    return count


def test_a_minute_of_requests_at_once_then_an_even_rate(tmp_path: Path) -> None:
    [account] = relays(tmp_path, 1, limited(requests_per_minute=60))
    assert admitted([account], [1000.0] * 100) == 60
    assert admitted([account], [1000.5] * 5) == 0
    assert admitted([account], [1001.0] * 5) == 1
    assert admitted([account], [1011.0] * 50) == 10
    assert admitted([account], [2000.0] * 100) == 60


def test_a_refusal_says_when_to_come_back_and_it_is_true(tmp_path: Path) -> None:
    [account] = relays(tmp_path, 1, limited(requests_per_minute=60))
    admitted([account], [1000.0] * 60)
    with pytest.raises(RateLimited) as refused:
        account.enter(1000.25)
    assert refused.value.retry_after_ms == 750
    assert (b"retry-after", b"1") in refused.value.headers()
    with pytest.raises(RateLimited):
        account.enter(1000.98)
    account.enter(1001.0)


def test_headers_are_those_of_openai(tmp_path: Path) -> None:
    [account] = relays(tmp_path, 1, limited(requests_per_minute=120, tokens_per_minute=1000))
    headers = account.enter(1000.0).decode()
    assert headers == (
        "x-ratelimit-limit-requests: 120\r\nx-ratelimit-remaining-requests: 119\r\n"
        "x-ratelimit-reset-requests: 500ms\r\n"
        "x-ratelimit-limit-tokens: 1000\r\nx-ratelimit-remaining-tokens: 1000\r\nx-ratelimit-reset-tokens: 0ms\r\n"
    )
    for _ in range(119):
        account.enter(1000.0)
    assert b"remaining-requests: 0\r\nx-ratelimit-reset-requests: 1m0s" in account.refused(1000.0)


@pytest.mark.parametrize(
    "seconds, text", [(0, b"0ms"), (0.25, b"250ms"), (1.5, b"1.5s"), (59.96, b"60s"), (361, b"6m1s")]
)
def test_durations(seconds: float, text: bytes) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize("count", [2, 4])
def test_relays_share_a_limit(tmp_path: Path, count: int) -> None:
    accounts = relays(tmp_path, count, limited(requests_per_minute=60))
    times = [1000.0 + 0.01 * number for number in range(600)]  # 6 s: 60 at once and 6 more
    total = admitted(accounts, times)
    assert 65 <= total <= 66 + count


def test_what_relays_admit_at_the_same_moment_is_paid_back(tmp_path: Path) -> None:
    """They cannot see each other within a few milliseconds; a longer time is exact."""
    accounts = relays(tmp_path, 2, limited(requests_per_minute=60))
    for account in accounts:
        account.enter(900.0)  # so that both have looked a moment ago
    burst = admitted(accounts, [900.001] * 300)
    assert 58 <= burst <= 2 * 60
    assert burst + admitted(accounts, [900.1 + 0.1 * number for number in range(1200)]) <= 60 + 120 + 2 * 2


def test_a_relay_that_was_idle_takes_over_what_the_other_charged(tmp_path: Path) -> None:
    busy, idle = relays(tmp_path, 2, limited(requests_per_minute=60))
    idle.enter(1000.0)
    for now_s in range(1001, 1601):  # ten minutes at the limit
        busy.enter(float(now_s))
    assert admitted([idle], [1601.0]) == 1, "what was charged long ago has drained"
    assert admitted([idle], [1601.0] * 100) >= 50
    assert admitted([busy], [1601.1] * 100) <= 5


def test_a_restarted_relay_goes_on_with_its_counts(tmp_path: Path) -> None:
    key = limited(requests_per_minute=60)
    [account] = relays(tmp_path, 1, key)
    assert admitted([account], [1000.0] * 60) == 60
    [again] = relays(tmp_path, 1, key)
    assert cell(again, REQUESTS) == 60
    assert cell(again, IN_FLIGHT) == 0
    assert admitted([again], [1000.5] * 10) == 0
    assert admitted([again], [1002.0] * 10) == 2


def test_tokens_are_charged_when_known_and_must_be_paid_back(tmp_path: Path) -> None:
    [account] = relays(tmp_path, 1, limited(tokens_per_minute=600))
    now_s = time.monotonic()
    account.enter(now_s)
    account.leave(900)  # more than a minute's worth: 30 s of debt
    with pytest.raises(RateLimited) as refused:
        account.enter(now_s + 20)
    assert 9_000 <= (refused.value.retry_after_ms or 0) <= 11_000
    account.enter(now_s + 32)
    assert cell(account, TOKENS) == 900


def test_tokens_count_at_every_relay(tmp_path: Path) -> None:
    one, other = relays(tmp_path, 2, limited(tokens_per_minute=600))
    now_s = time.monotonic()
    one.enter(now_s)
    one.leave(700)
    with pytest.raises(RateLimited, match="tokens per minute"):
        other.enter(now_s + 0.1)


def test_a_budget_ends_at_its_count_over_all_relays(tmp_path: Path) -> None:
    one, other = relays(tmp_path, 2, limited(tokens_until=100))
    for account in (one, other):
        account.enter(1000.0)
        account.leave(49)
    one.enter(1000.0)
    one.leave(2)
    for account in (one, other):
        with pytest.raises(QuotaExceeded) as refused:
            account.enter(1000.01)
        assert (refused.value.status, refused.value.code) == (429, "insufficient_quota")
        assert (b"x-should-retry", b"false") in refused.value.headers()


def test_requests_at_a_time_count_at_every_relay(tmp_path: Path) -> None:
    one, other = relays(tmp_path, 2, limited(max_in_flight=2))
    one.enter(1000.0)
    other.enter(1000.0)
    for account in (one, other):
        with pytest.raises(RateLimited, match="2 requests in flight"):
            account.enter(1000.01)
    other.leave(0)
    one.enter(1000.02)


def test_a_row_given_to_another_key_starts_empty_and_keeps_its_counts(tmp_path: Path) -> None:
    file = Usage(tmp_path / "relay-0.usage")
    first = Account(limited(requests_per_minute=60), file)
    admitted([first], [1000.0] * 60)
    second = Account(msgspec.structs.replace(first.key, id="key-2"), file)
    assert cell(second, REQUESTS) == 60, "control knows from where it counts"
    assert cell(second, IN_FLIGHT) == 0
    assert admitted([second], [1000.0] * 61) == 60


def test_control_adds_up_all_relays_those_that_no_longer_run_too(tmp_path: Path) -> None:
    accounts = relays(tmp_path, 3, KEY)
    for number, account in enumerate(accounts):
        account.enter(1000.0)
        account.leave(10 + number)
    assert usage.totals(tmp_path, [3, 4]) == {3: (3, 33), 4: (0, 0)}


def test_a_dead_relays_requests_in_flight_hold_no_place(tmp_path: Path) -> None:
    key = limited(max_in_flight=1)
    relays(tmp_path, 2, key)[1].enter(1000.0)
    [only] = relays(tmp_path, 1, key)
    only.enter(1000.0)


def test_a_file_of_another_layout_is_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "relay-0.usage"
    path.write_bytes(b"\xff" * 4096)
    assert not any(Usage(path).cells)


def test_the_last_row_is_in_the_file(tmp_path: Path) -> None:
    account = Account(limited(row=MAX_KEYS - 1, requests_per_minute=5), Usage(tmp_path / "relay-0.usage"))
    assert admitted([account], [1000.0] * 10) == 5


class TestLedger:
    def test_accounts_live_on_while_their_key_is_the_same(self, tmp_path: Path) -> None:
        ledger = Ledger(Usage(tmp_path / "relay-0.usage"))
        key = limited(requests_per_minute=60)
        ledger.apply({"a": key})
        before = ledger.entries["a"].account
        ledger.apply({"a": key, "b": Key("key-2", frozenset({"infer"}), row=4)})
        assert ledger.entries["a"].account is before
        ledger.apply({"a": limited(requests_per_minute=30)})
        assert ledger.entries["a"].account is not before

    def test_two_digests_of_one_key_are_one_account(self, tmp_path: Path) -> None:
        ledger = Ledger(Usage(tmp_path / "relay-0.usage"))
        key = limited(requests_per_minute=60)
        ledger.apply({"new": key, "old": msgspec.structs.replace(key, expires_at=5)})
        assert ledger.entries["new"].account is ledger.entries["old"].account
        assert ledger.entries["old"].expires_at == 5

    def test_keys_without_a_row_are_not_counted(self, tmp_path: Path) -> None:
        ledger = Ledger(Usage(tmp_path / "relay-0.usage"))
        ledger.apply({"a": Key("key-1", frozenset({"infer"}))})
        assert ledger.entries["a"].account is None


def test_due_times_of_another_boot_are_of_another_clock(tmp_path: Path) -> None:
    """A machine that started again with fewer relays: the file of one that no longer runs keeps the old clock's."""
    gone = Usage(tmp_path / "relay-1.usage")
    gone.cells[3 * ROW_CELLS + usage.REQUESTS_DUE_US] = int(1e15)
    with (tmp_path / "relay-1.usage").open("r+b") as file:
        file.seek(8 * usage._BOOT)
        file.write(b"\1" * 8)
    [account] = relays(tmp_path, 1, limited(requests_per_minute=60))
    assert account.enter(1000.0)
