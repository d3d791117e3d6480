"""The first look: what it prints agrees with its result files."""

import json
import re

from test_toy import SCALE, forked

from toy import look
from toy.__main__ import SETS, Pipeline


def test_the_summary_is_that_of_the_result_files(tmp_path):
    """Stops the rate of another run, a mean over one set only, and rates in the wrong column."""
    (tmp_path / "eval").mkdir()
    # war x 2, epc x 2
    rates = {"start": (70, 74, 80, 90), "r1": (86, 82, 61, 59), "r1_conclusion": (69, 71, 97, 95)}
    for name, (a, b, c, d) in rates.items():
        for test_set, war, epc in (("toy_dfew_test", a, c), ("toy_mafw_test", b, d)):
            file = tmp_path / "eval" / f"{name}.{test_set}.json"
            file.write_text(json.dumps({"war": war, "epc": epc, "n": 100}))
    head, *rows, chance = look.summary(
        Pipeline(look.Args(out=str(tmp_path), steps=56), SETS[:2])
    ).split("\n")
    assert head.split() == ["accuracy", *"reasoning agrees with the answer".split()]
    assert [re.split("  +", row) for row in rows] == [
        ["before the two runs", "72 %", "85 %"],
        ["the paper's reward", "84 %", "60 %"],
        ["and rewards for the reasoning", "70 %", "96 %"],
    ]
    assert chance.startswith("56 steps each") and "200 test clips" in chance
    assert "Differences below 10 points may be chance" in chance


def test_it_runs_from_the_shipped_start(tmp_path):
    """Stops a first look that another part of the project has broken, and runs that differ in more
    than their rewards."""
    printed = forked(lambda: look.main(look.Args(out=str(tmp_path / "out"), scale=SCALE, steps=2)))
    configs = [
        json.loads((tmp_path / "out" / name / "config.json").read_text())
        for name in ("r1", "r1_conclusion")
    ]
    assert {k for k in configs[0] if configs[0][k] != configs[1][k]} == {"rewards", "out", "argv"}
    assert configs[1]["rewards"] == ["accuracy", "format", "conclusion", "agreement=0.2"]
    page = tmp_path / "out" / "report.html"
    assert f"open {page} in a browser" in printed and "r1_conclusion" in page.read_text()
