"""The runner of ablations: which runs it makes, what it records, what its tables show. Nothing is
trained."""

import json
import math
import re

import pytest

from lib.args import UserError
from tools import ablate


@pytest.fixture
def place(tmp_path, monkeypatch):
    """-> Args, and the list of the measured jobs; "beta0" with seed 1 crashes."""
    (tmp_path / "toy" / "data").mkdir(parents=True)
    (tmp_path / "toy" / "data" / "cues.json").write_text("{}")
    jobs = []

    def measure(row, seed, args):
        jobs.append((row.name, seed))
        if (row.name, seed) == ("beta0", 1):
            raise RuntimeError("out of patience")
        return {
            "seconds": 5,
            "war/toy_dfew": {"paper": 80.0, "agreement": 82.0, "beta0": 70.0}[row.name] + seed,
        }

    monkeypatch.setattr(ablate, "measure", measure)
    args = ablate.Args(
        toy=str(tmp_path / "toy"),
        csv=str(tmp_path / "a.csv"),
        seeds=[0, 1],
        only=["paper", "beta0"],
        jobs=2,
    )
    return args, jobs


def test_what_is_done_is_skipped_and_what_crashed_is_repeated(place, capsys, tmp_path):
    """Stops hours that are repeated because of one crash, a crash that ends the other runs, and a
    csv without commit, machine and flags."""
    args, jobs = place
    ablate.main(args)
    assert sorted(jobs) == [("beta0", 0), ("beta0", 1), ("paper", 0), ("paper", 1)]
    lines = ablate.read_lines(tmp_path / "a.csv")
    assert [(x["name"], x["seed"], x["status"]) for x in lines] == [
        ("paper", "0", "ok"),
        ("paper", "1", "ok"),
        ("beta0", "0", "ok"),
        ("beta0", "1", "crashed: out of patience"),
    ]
    assert (
        all(x["commit"] and "cores" in x["machine"] for x in lines)
        and lines[2]["flags"] == "--beta 0"
    )
    printed = capsys.readouterr().out
    assert "beta0, seed 1: crashed: out of patience" in printed and "| paper | 2 | 80.5" in printed
    jobs.clear()
    args.only = ["paper", "beta0", "agreement"]
    ablate.main(args)
    assert sorted(jobs) == [("agreement", 0), ("agreement", 1), ("beta0", 1)]
    assert [x["name"] for x in ablate.read_lines(tmp_path / "a.csv")] == ["paper"] * 2 + [
        "agreement"
    ] * 2 + ["beta0"] * 2


def test_the_tables_have_means_spreads_and_paired_differences():
    """Stops a difference of means over different seeds, the standard deviation of a population, a
    crashed run that counts, and a value in the cell of another set."""
    values = {"paper": {0: 80.0, 1: 84.0, 2: 90.0}, "agreement": {0: 81.0, 1: 87.0}}
    lines = [
        {"name": n, "seed": str(s), "status": "ok", "war/toy_dfew": str(v), "war/toy_mafw": "50.25"}
        for n, seeds in values.items()
        for s, v in seeds.items()
    ]
    lines += [{"name": "agreement", "seed": "2", "status": "crashed: x", "war/toy_dfew": "0"}]
    tables = ablate.tables([dict.fromkeys(ablate.HEAD, "") | line for line in lines])
    text = "\n".join("\n".join([head, *made.values()]) for head, made in tables.values())
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines()]
    assert rows[0][:4] == ["", "seeds", "WAR", "EPC"]
    mean, sd = (80 + 84 + 90) / 3, math.sqrt(sum((v - 254 / 3) ** 2 for v in (80, 84, 90)) / 2)
    assert rows[2][:4] == ["paper", "3", f"{mean:.1f} ± {sd:.1f} / 50.2 ± 0.0 / -", "- / - / -"]
    assert rows[3][:3] == ["agreement", "2", "84.0 ± 4.2 / 50.2 ± 0.0 / -"]
    # (1, 3): sd sqrt 2, standard error 1
    assert rows[-1][:3] == ["agreement", "2", "+2.0 ± 1.0 / +0.0 ± 0.0 / -"]
    assert [row[0] for row in rows[8:]] == ["difference from paper", "---", "agreement"]


def test_the_page_shows_what_the_csv_holds():
    """Stops a table of docs/ablations.md that is older than the csv or was edited by hand."""
    lines = ablate.read_lines(ablate.ROOT / "results" / "ablations.csv")
    page = (ablate.ROOT / "docs" / "ablations.md").read_text()
    assert ablate.fill(page, lines) == page
    made = ablate.tables(lines)["main"][1].values()
    assert [row for row in made if row not in page.splitlines()] == [], (
        "a row of the csv is not on the page"
    )


def test_runs_stop_where_a_word_is_lost():
    """Stops a page that says that runs end at four levels (no, one, two or three of seven labels
    missing) although some end between them."""
    rows = [
        row
        for row in ablate.read_lines(ablate.ROOT / "results" / "ablations.csv")
        if row["status"] == "ok" and row["name"] not in ("bare words", "no cold start")
    ]
    text = (ablate.ROOT / "docs" / "ablations.md").read_text()
    numbers = re.findall(r"^\| (\d+) \| (\d+) to (\d+) \| (\d+) to (\d+) \|", text, re.MULTILINE)
    levels = [list(map(int, level)) for level in numbers]
    found = [0] * len(levels)
    for row in rows:
        war, uar = round(float(row["war/toy_dfew"])), round(float(row["uar/toy_dfew"]))
        [i] = [i for i, (_, low, high, *_) in enumerate(levels) if low <= war <= high]
        assert levels[i][3] <= uar <= levels[i][4], (row["name"], row["seed"])
        found[i] += 1
    assert len(levels) == 4 and found == [level[0] for level in levels]
    assert f"Of {len(rows)} runs" in text


def test_a_page_is_filled_below_its_marks(tmp_path):
    """Stops text that is lost beside a table, a row that was not requested, and an old row that
    stays."""
    lines = [
        dict.fromkeys(ablate.HEAD, "")
        | {"name": name, "seed": "0", "status": "ok", "war/mute": "50"}
        for name in ("paper", "beta0")
    ]
    page = "before\n\n<!-- more: beta0; none yet -->\n| old |\n|---|\n\n3 of 9 runs\n"
    head, rows = ablate.tables(lines)["more"]
    assert ablate.fill(page, lines) == (
        f"before\n\n<!-- more: beta0; none yet -->\n{head}\n{rows['beta0']}\n\n"
        f"2 of {4 * len(ablate.ROWS)} runs\n"
    )
    assert "50.0 / -" in rows["beta0"] and rows["paper"] in ablate.fill("<!-- more: * -->\n", lines)
    ablate.write_lines(tmp_path / "a.csv", lines)  # the flag does the same and runs nothing
    (tmp_path / "page.md").write_text(page)
    ablate.main(ablate.Args(csv=str(tmp_path / "a.csv"), page=str(tmp_path / "page.md")))
    assert (tmp_path / "page.md").read_text() == ablate.fill(page, lines)


def test_numbers_are_those_of_the_result_files(tmp_path):
    """Stops a column with the rate of another set, and the muted clips' score under the name of the
    blanked ones."""
    for k, name in enumerate((*ablate.SETS, "mute", "blank")):
        result = {rate: 10 * k + i for i, rate in enumerate(ablate.RATES)}
        (tmp_path / f"{name}.json").write_text(
            json.dumps(result | {"cues_heard_claimed": k, "cues_seen_claimed": -k})
        )
    (tmp_path / "run").mkdir()
    rows = [
        {"step": i, "reward": 1, "completions/mean_length": i, "rewards/accuracy/mean": 0.5}
        for i in range(1, 41)
    ]
    (tmp_path / "run" / "metrics.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    got = ablate.numbers(tmp_path)
    assert set(got) == set(ablate.COLUMNS)
    assert [got[f"war/{s}"] for s in ablate.SETS] == [0, 10, 20] and got["epc/toy_ravdess"] == 22
    assert (got["war/mute"], got["war/blank"], got["heard_when_mute"], got["seen_when_blank"]) == (
        30,
        40,
        3,
        -4,
    )
    assert got["length"] == 30.5 and got["accuracy_train"] == 0.5  # of the last twenty steps


def test_a_wrong_flag_is_an_error(place, tmp_path):
    """Stops a misspelt --only that silently runs nothing, and a traceback for missing clips."""
    args, _ = place
    args.only = ["papr"]
    with pytest.raises(UserError, match="--only papr: no such row"):
        ablate.main(args)
    args.only, args.toy = [], str(tmp_path)
    with pytest.raises(UserError, match="holds no toy clips"):
        ablate.main(args)


def test_every_row_is_a_command_that_parses():
    """Stops a row whose flags are refused only when its turn comes, after hours."""
    import grpo
    import sft
    from lib.args import parse_args

    for row in ablate.ROWS:
        module = {"grpo.py": grpo, "sft.py": sft}[row.script]
        words = [
            "--model",
            "m",
            "--data",
            "d",
            "--out",
            "o",
            *ablate.COMMON[row.script].split(),
            *row.flags.split(),
        ]
        args = parse_args(module.Args, words)
        if module is grpo:
            grpo.check_objective(args)
            grpo.load_rewards(tuple(args.rewards), args.prompt)
            assert grpo.idle_flags(args) == [], row.name
    assert len({row.name for row in ablate.ROWS}) == len(ablate.ROWS)
