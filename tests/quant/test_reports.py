"""The page of a job, and the judgement of what an engine said: pure parts, no torch."""

from __future__ import annotations

from dataclasses import replace
from xml.etree import ElementTree

from quant.report import chart, render
from quant.served import LONG_TOKENS, Answers, distinct_runs, faults, same_in_a_row


def linear(name: str, error: float, note: str = "") -> dict[str, object]:
    return {"name": name, "method": "rtn", "error": error, "tokens": 9, "note": note}


REPORT = {
    "options": {"method": "gptq", "format": "awq", "grid": {"bits": 4, "group_size": 64, "symmetric": False}},
    "layers": [
        {"layer": 0, "linears": [linear("q_proj", 0.01), linear("mlp.experts.0.up_proj", 0.02)]},
        {"layer": 1, "linears": [linear("q_proj", 0.03), linear("mlp.experts.7.up_proj", 0.05, "fell <back>")]},
    ],
    "skipped": {"lm_head": "left alone"},
    "calibration_tokens": 65536,
    "elapsed_s": 12.0,
    "peak_host_bytes": 10**9,
    "peak_device_bytes": 0,
    "device": "cpu",
    "versions": {"torch": "2"},
}
GOOD = Answers("Paris.", LONG_TOKENS, 0.9, 2, 0)


def test_the_page_shows_every_layer_and_refers_to_nothing() -> None:
    page = render(REPORT, "tiny & small")
    assert "tiny &amp; small" in page
    assert "fell &lt;back&gt;" in page
    assert "1.mlp.experts.7.up_proj" in page
    assert not {"http://", "https://", "src=", "<script"} & set(page.split('"'))
    drawing = ElementTree.fromstring(page[page.index("<svg") : page.index("</svg>") + 6])
    assert len(drawing.findall("polyline")) == 2  # q_proj, and the experts of one kind together
    titles = [title.text for title in drawing.iter("title")]
    assert titles[0] == "layer 0, q_proj: 1.000%"
    assert titles[-1] == "layer 1, mlp.experts.up_proj: 5.000%"


def test_errors_of_nothing_are_not_drawn() -> None:
    assert "<svg" not in chart({"q_proj": {0: 0.0}})
    assert "<svg" not in chart({})


def test_a_broken_long_text_is_told_from_a_dull_one() -> None:
    assert faults(GOOD) == []
    assert faults(replace(GOOD, distinct=0.3), replace(GOOD, distinct=0.4)) == []
    assert "holds no word" in faults(replace(GOOD, answer="!!!!"))[0]
    assert "ended after 3 of" in faults(replace(GOOD, long_tokens=3))[0]
    assert "says one word 400 times" in faults(replace(GOOD, same_in_a_row=400))[0]
    assert "at least 15% should" in faults(replace(GOOD, distinct=0.01))[0]
    assert "at least 45% should" in faults(replace(GOOD, distinct=0.4), replace(GOOD, distinct=0.9))[0]


def test_measures_of_a_text() -> None:
    assert same_in_a_row(["a", "b", "b", "b", "c"]) == 3
    assert same_in_a_row(["!" * 500]) == 500
    assert distinct_runs(["a", "b", "c", "d", "a", "b", "c", "d"]) == 4 / 5
    assert distinct_runs(["few"]) == 1
