"""The page about runs: what is filled in against the files it was read from,
and the page itself in a headless Chromium."""

import base64
import contextlib
import dataclasses
import json
import random
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import grpo
from lib.args import UserError
from lib.dist import Ranks
from lib.media import write_clip
from lib.run_folder import RunFolder, check_outputs
from tools import report
from tools.report import write_report

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync --hide-scrollbars "
    "--autoplay-policy=no-user-gesture-required"
).split()
EVIL = (
    '</script><script>window.pwned = 1</script><img src=x onerror="window.pwned = 1"> '
    "\u202eevil \u0000 \ud800"
)
STEPS = range(1, 13)


def completion(step, clip, label, k, text, right, A, **more):
    return {
        "step": step,
        "clip": clip,
        "prompt": "Which?",
        "answer": label,
        "completion": k,
        "text": text,
        "advantage": A,
        "rewards": {"accuracy": float(right), "format": 1.0},
        "length": 9,
        "finished": True,
    } | more


def text_of(think: str, answer: str) -> str:
    return (
        f"<think>The brows are raised, the pitch is low. It is {think}.</think>\n"
        f"<answer>{answer}</answer>"
    )


def make_run(folder: Path, rows: list[dict], metrics: list[dict], **config) -> Path:
    """A run folder whose logs end in a half-written line."""
    folder.mkdir(parents=True)
    plain = {
        "lr": 1e-3,
        "num_generations": 3,
        "out": f"runs/{folder.name}",
        "data": "runs/data/rl.json",
        "prompt": "think",
        "model": "runs/sft/latest",
        "rewards": ["accuracy", "format=0.5"],
        "max_new_tokens": 50,
        "max_steps": 20,
    }
    (folder / "config.json").write_text(json.dumps(plain | config))
    for name, logged in (("metrics", metrics), ("rollouts", rows)):
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in logged) + '{"step": 99, "rew'
        )
    return folder


def make_rollouts() -> list[dict]:
    draw, rows = random.Random(0), []
    for step in STEPS:
        for clip, label in (
            (f"c{step % 4}.mp4", "happy"),
            ("gone.mp4", "sad"),
            ("large.mp4", "fear"),
        ):
            right = [draw.random() < 0.6 for _ in range(3)]
            for k, good in enumerate(right):
                said = label if good else "angry"
                text = text_of(said if draw.random() < 0.7 else "happy", said)
                A = 0.0 if len(set(right)) == 1 else 1.25 if good else -0.5
                rows.append(
                    completion(step, clip, label, k, text, good, A, finished=draw.random() < 0.9)
                )
    return rows


def disagrees(row: dict) -> bool:
    think, said = re.search(r"It is (\w+)\..*<answer>(\w+)", row["text"], re.DOTALL).groups()
    return think != said


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """runs/data with a sample file and real clips, runs/sft and runs/r1, which began from it,
    and results of r1 and r10."""
    runs = tmp_path_factory.mktemp("look") / "runs"
    (runs / "data").mkdir(parents=True)
    frames = np.random.default_rng(0).integers(0, 255, (20, 64, 64, 3), dtype=np.uint8)
    tone = (np.sin(np.arange(32000) / 20) * np.linspace(0, 1, 32000)).astype(np.float32)
    for i in range(4):
        write_clip(runs / f"data/c{i}.mp4", frames, tone, fps=10)
    (runs / "data/large.mp4").write_bytes(
        (runs / "data/c0.mp4").read_bytes() + bytes(report.LARGEST_CLIP)
    )
    cues = {"seen": {"brows": "raised", "lips": "open"}, "heard": {"pitch": "high", "rate": "low"}}
    quiet = cues | {"heard": {"pitch": "high", "rate": "slow"}}
    turns = [{"from": "human", "value": "<video>\nWhich?"}, {"from": "gpt", "value": "happy"}]
    samples = [
        {"video": f"{name}.mp4", "conversations": turns, "cues": cues if name == "c0" else quiet}
        | {"transcript": "She said nothing."}
        for name in ("c0", "c1", "c2", "c3", "large", "gone")
    ]
    (runs / "data/rl.json").write_text(json.dumps(samples))
    metrics = [
        {
            "step": s,
            "reward": (s * 7 % 5) / 4,
            "kl": s / 100 if s != 3 else None,
            "time/train": 2.0,
            "time/load": 0.5,
        }
        for s in STEPS
    ]
    make_run(
        runs / "sft",
        [],
        [{"step": s, "loss": 1 / s, "time/train": 3.0} for s in (1, 2)],
        model="hub/start",
    )
    (runs / "sft/latest").mkdir()
    run = make_run(
        runs / "r1",
        make_rollouts(),
        [{"step": 0, "eval/val/war": 20.0}, *metrics[:-1], metrics[-1] | {"eval/val/war": 60.0}],
    )
    predictions = [
        {
            "id": f"c{i}.mp4",
            "answer": "happy",
            "predicted": word,
            "text": text_of("happy", word),
            "format": 1.0,
        }
        for i, word in enumerate(("happy", "sad", "happy", "sad"))
    ]
    result = dict.fromkeys(("war", "uar", "war_normalised", "uar_normalised"), 50.0) | {
        "n": 4,
        "data": "runs/data/rl.json",
        "war_ci": [10.0, 90.0],
        "predictions": predictions,
        "confusion": {"happy": {"happy": 2, "other": 2}},
    }
    (runs / "eval").mkdir()
    for name in ("r1", "r10"):
        (runs / f"eval/{name}.rl.json").write_text(json.dumps(result))
    settings = {"full": result, "mute": result | {"war": 25.0}, "blank": result | {"war": 30.0}}
    (run / "settings.json").write_text(
        json.dumps({"data": "runs/data/rl.json", "modalities": settings})
    )
    return runs


def filled(page: Path) -> dict:
    """What stands in the page."""
    return json.loads(re.search(r'id="data">(.*)</script>', page.read_text(encoding="utf-8"))[1])


def test_what_was_logged_is_what_stands_in_the_page(runs, tmp_path):
    """Stops columns that are shifted, a NaN or a half line that ends the writer,
    a chain of stages that breaks off."""
    content = filled(write_report([runs / "r1"], tmp_path / "p.html"))
    run, source = content["runs"][0], content["sources"][0]
    assert run["steps"] == [*STEPS] and run["every"] == 1
    assert run["metrics"] == {
        "reward": [(s * 7 % 5) / 4 for s in STEPS],
        "time/train": [2.0] * 12,
        "time/load": [0.5] * 12,
        "kl": [None if s == 3 else s / 100 for s in STEPS],
    }
    assert run["evals"] == {"eval/val/war": [[0, 20.0], [12, 60.0]]}
    assert [(s["name"], s["steps"], s["seconds"]) for s in run["stages"]] == [
        ("sft", 2, 6.0),
        ("r1", 12, 30.0),
    ]
    assert source["total"] == len(source["groups"]) == 36
    assert run["config"]["rewards"] == ["accuracy", "format=0.5"]
    got = [
        (
            g["step"],
            content["clips"][g["clip"]]["id"],
            c["text"],
            c["rewards"],
            c["advantage"],
            c["truncated"],
            c["disagrees"],
        )
        for g in source["groups"]
        for c in g["completions"]
    ]
    assert got == [
        (
            r["step"],
            r["clip"],
            r["text"],
            r["rewards"],
            r["advantage"],
            not r["finished"],
            disagrees(r),
        )
        for r in make_rollouts()
    ]


def test_long_curves_are_means_of_neighbours(tmp_path, monkeypatch):
    """Stops a long run whose points are picked, or lose the last step."""
    monkeypatch.setattr(report, "MAX_POINTS", 4)
    run = make_run(tmp_path / "r", [], [{"step": s, "reward": s} for s in range(1, 11)])
    got = filled(write_report([run], tmp_path / "p.html"))["runs"][0]
    assert (got["steps"], got["every"], got["metrics"]["reward"]) == (
        [3, 6, 9, 10],
        3,
        [2, 5, 8, 10],
    )


def test_clips_are_embedded_linked_or_gone(runs, tmp_path, monkeypatch):
    """Stops a large clip in the page, a link that leads nowhere,
    a run that was moved and loses its clips."""
    moved = tmp_path / "elsewhere/runs"
    shutil.copytree(runs, moved)
    monkeypatch.chdir(runs.parent)  # where runs/data is another run's
    clips = {
        clip["id"]: clip
        for clip in filled(write_report([moved / "r1"], tmp_path / "out/p.html"))["clips"]
    }
    assert base64.b64decode(clips["c1.mp4"]["file"]) == (runs / "data/c1.mp4").read_bytes()
    assert "file" not in clips["large.mp4"]
    assert (tmp_path / "out" / clips["large.mp4"]["href"]).samefile(moved / "data/large.mp4")
    assert not clips["gone.mp4"].keys() & {"file", "href", "strip"}
    assert base64.b64decode(clips["c1.mp4"]["strip"]).startswith(b"\xff\xd8")
    wave = clips["c1.mp4"]["wave"]
    # the tone grows from silence
    assert len(wave) == report.NUM_BARS and max(wave) == 100 and max(wave[:10]) < 15
    assert clips["c1.mp4"]["seen"] == ["open", "raised"] and clips["c1.mp4"]["heard"] == [
        "high",
        "slow",
    ]


def test_results_beside_the_run_and_given_ones(runs, tmp_path):
    """Stops the results of r10 beside r1, a setting that is lost,
    answers that are not side by side."""
    content = filled(write_report([runs / "r1"], tmp_path / "p.html"))
    results = content["results"]
    found = [(r["name"], r["setting"], r["run"], r["war"], *r["war_ci"]) for r in results]
    assert sorted(found) == [
        ("r1", "", 0, 50, 10, 90),
        ("r1", "blank", 0, 30, 10, 90),
        ("r1", "full", 0, 50, 10, 90),
        ("r1", "mute", 0, 25, 10, 90),
    ]
    answers = content["sources"][1]
    assert [c["by"] for c in answers["groups"][0]["completions"]] == [0, 1, 2, 3]
    assert sorted(g["completions"][0]["rewards"]["right"] for g in answers["groups"]) == [
        0,
        0,
        1,
        1,
    ]
    given = filled(write_report([runs / "r1"], tmp_path / "p.html", [runs / "eval/r10.rl.json"]))
    assert [(r["name"], r["run"]) for r in given["results"]] == [("r10", None)]


def test_the_page_is_in_the_folder_of_the_first_run(runs, tmp_path):
    """Stops a page that lands in the current folder, a report that makes a run folder look like
    somebody else's, and the report of a run that --overwrite has replaced."""
    shutil.copytree(runs, tmp_path / "runs")
    r1, sft = tmp_path / "runs/r1", tmp_path / "runs/sft"
    assert write_report([r1, sft]) == r1 / "report.html" and filled(r1 / "report.html")
    report.main(report.Args([str(sft)]))
    assert filled(sft / "report.html")["runs"][0]["name"] == "sft"
    assert filled(write_report([r1]))["results"]  # the page itself is no obstacle

    ranks = Ranks(0, 1, torch.device("cpu"))
    data, page = tmp_path / "runs/data/rl.json", tmp_path / "new/report.html"
    args = grpo.Args(model=str(tmp_path), data=str(data), out=str(tmp_path / "new"))
    RunFolder(args, ranks)
    page.write_text("")
    RunFolder(dataclasses.replace(args, resume=True), ranks)
    assert page.exists()
    RunFolder(dataclasses.replace(args, overwrite=True), ranks)
    assert not page.exists()
    page.write_text("")
    (tmp_path / "new/config.json").unlink()  # as if the run was killed at this moment
    check_outputs(args, ranks)


def test_fifty_thousand_rollouts_are_thinned_by_rule(tmp_path):
    """Stops a page that nobody can open, steps that are missing in it, and clips that cannot be
    followed over the steps."""
    name = lambda step, b: f"clip{(step * 10 + b) % 1000}.mp4"
    rows = [
        completion(s, name(s, b), "happy", k, text_of("happy", "happy") + " x" * 60, k % 2, 0.0)
        for s in range(1, 626)
        for b in range(10)
        for k in range(8)
    ]
    run = make_run(tmp_path / "r", rows, [{"step": s} for s in range(1, 626)])
    page = write_report([run], tmp_path / "p.html")
    content = filled(page)
    source, clips = content["sources"][0], content["clips"]
    assert len(rows) == 50_000 and source["total"] == 6250 and 1500 < len(source["groups"]) < 3500
    assert report.ROLLOUT_BYTES * 0.8 < page.stat().st_size < report.ROLLOUT_BYTES * 1.1
    kept = [(g["step"], clips[g["clip"]]["id"]) for g in source["groups"]]
    steps = [step for step, _ in kept]
    assert steps == sorted(steps) and len(set(steps)) > 600
    # The clips with the highest draws are there in all their steps. One clip may be cut.
    drawn = {name(100, b * 10 + c): None for b in range(100) for c in range(10)}
    ranked = sorted(drawn, key=lambda clip: -zlib.crc32(clip.encode()))
    places = Counter(clip for _, clip in kept)
    all_places = Counter(name(s, b) for s in range(1, 626) for b in range(10))
    whole = [clip for clip in ranked if places[clip] == all_places[clip]]
    assert whole == ranked[: len(whole)] and len(places) <= len(whole) + 1


def test_a_single_clip_keeps_steps_from_the_whole_run(tmp_path, monkeypatch):
    """Stops a page of a run on one clip that has only its last steps."""
    monkeypatch.setattr(report, "ROLLOUT_BYTES", 30_000)
    rows = [completion(s, "c.mp4", "happy", 0, text_of("happy", "happy"), 1, 0.0) for s in STEPS]
    rows = [row | {"step": i} for i, row in enumerate(rows * 50, 1)]
    run = make_run(tmp_path / "r", rows, [{"step": 600}])
    source = filled(write_report([run], tmp_path / "p.html"))["sources"][0]
    steps = [g["step"] for g in source["groups"]]
    assert 50 < len(steps) < 200 and 200 < np.mean(steps) < 400 and source["total"] == 600


def hostile(folder: Path) -> Path:
    nan, inf = float("nan"), float("inf")
    rows = [
        completion(
            s,
            "<b>../x.mp4",
            "<i>happy</i>",
            k,
            EVIL + "x" * 50_000 * (k == 1),
            nan if k else 1,
            inf,
            prompt=EVIL,
            tokens=[["<b>", -1, nan], 3] if k else "no",
        )
        for s in (1, 2)
        for k in (0, 1, 2)
    ]
    metrics = [
        {"step": 1, "<img src=x onerror=alert(1)>": 1, "reward": 1e99, "kl": "x"},
        {"step": 2, "reward": nan},
    ]
    return make_run(
        folder,
        rows,
        metrics,
        question=EVIL,
        rewards=["accuracy", "<b>=x", 3],
        media_root=7,
        model=EVIL,
    )


def test_hostile_texts_cannot_leave_the_data(tmp_path):
    """Stops a text that ends the script, NaN in JSON, a lone surrogate that cannot be written,
    a text of any length."""
    page = write_report([hostile(tmp_path / "a/r"), hostile(tmp_path / "b/r")], tmp_path / "p.html")
    assert page.read_text().count("<") == Path(report.__file__).with_suffix(
        ".html"
    ).read_text().count("<")
    content = filled(page)
    source = content["sources"][0]
    assert [run["name"] for run in content["runs"]] == ["a/r", "b/r"] and len(source["groups"]) == 2
    first, second, _ = source["groups"][0]["completions"]
    assert first["text"] == EVIL and first["advantage"] is None
    assert second["advantage"] is None and content["runs"][0]["metrics"]["reward"] == [1e99, None]
    assert (
        len(second["text"]) < report.MAX_CHARACTERS + 60
        and "characters are left out" in second["text"]
    )
    assert second["tokens"] == [["<b>", -1, None], 3] and "tokens" not in first


def test_errors_are_a_sentence(runs, tmp_path):
    """Stops a traceback for a wrong folder or file, and a command that does
    not say where its page is."""
    with pytest.raises(UserError, match="it holds no readable config"):
        write_report([runs / "data"], tmp_path / "p.html")
    with pytest.raises(UserError, match="no result file"):
        write_report([runs / "r1"], tmp_path / "p.html", [runs / "data/rl.json"])
    with pytest.raises(UserError, match="cannot write"):
        write_report([runs / "r1"], runs / "r1/config.json/p.html")
    told = subprocess.run(
        [sys.executable, "-m", "tools.report", runs / "sft", "--out", tmp_path / "sft.html"],
        text=True,
        capture_output=True,
        cwd=Path(report.__file__).parents[1],
    )
    assert (
        told.stdout.startswith(f"wrote {tmp_path / 'sft.html'} (0.0 MB)")
        and not told.stderr
        and filled(tmp_path / "sft.html")
    )


# ---- the page, in a browser ----------------------------------------------------------------------


class Browser:
    """Chromium by the WebDriver protocol of chromedriver: HTTP and JSON, nothing to install."""

    def __init__(self, folder: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.process = subprocess.Popen(
            [DRIVER, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self.base = f"http://127.0.0.1:{port}"
        options = {
            "goog:chromeOptions": {
                "binary": CHROMIUM,
                "args": [*FLAGS, f"--user-data-dir={folder}"],
            },
            "goog:loggingPrefs": {"browser": "ALL"},
        }
        self.wait(lambda: self.call("GET", "/status"))
        self.base += (
            "/session/"
            + self.call("POST", "/session", {"capabilities": {"alwaysMatch": options}})["sessionId"]
        )

    def call(self, method: str, path: str, body: dict | None = None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.base + path, data, {"Content-Type": "application/json"}, method=method
        )
        with urllib.request.urlopen(request, timeout=100) as answer:
            return json.load(answer)["value"]

    def wait(self, ready) -> None:
        for _ in range(300):
            with contextlib.suppress(OSError):  # not listening yet
                if ready():
                    return
            time.sleep(0.1)
        raise AssertionError("it did not come within 30 seconds")

    def open(self, page: Path, width: int = 1400, dark: bool = False) -> None:
        for cmd, params in (
            (
                "setDeviceMetricsOverride",
                {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False},
            ),
            (
                "setEmulatedMedia",
                {"features": [{"name": "prefers-color-scheme", "value": ("light", "dark")[dark]}]},
            ),
        ):
            self.call("POST", "/goog/cdp/execute", {"cmd": f"Emulation.{cmd}", "params": params})
        self.call("POST", "/url", {"url": page.resolve().as_uri()})

    def js(self, expression: str, *args):
        return self.call(
            "POST", "/execute/sync", {"script": f"return {expression}", "args": list(args)}
        )

    def texts(self, selector: str) -> list[str]:
        return self.js(
            "[...document.querySelectorAll(arguments[0])].map(e => e.textContent)", selector
        )

    def errors(self) -> list[str]:
        return [
            entry
            for entry in self.call("POST", "/se/log", {"type": "browser"})
            if entry["level"] == "SEVERE"
        ]

    def press(self, *keys: str) -> None:
        for key in keys:
            self.js(
                "document.activeElement.dispatchEvent(new KeyboardEvent('keydown', "
                "{key: arguments[0], bubbles: true}))",
                key,
            )

    def choose(self, **values: str) -> str:
        """Set controls, one after the other. -> how many groups are left, as the page says it"""
        for name, value in values.items():
            self.js(
                "(([id, value]) => { const e = document.getElementById(id); e.value = value; "
                "for (const kind of ['input', 'change']) e.dispatchEvent(new Event(kind)); "
                "})(arguments)",
                name,
                value,
            )
        return self.texts("#count")[0]


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    if not (CHROMIUM and DRIVER):
        pytest.skip(
            "the page is not tested: no chromium and chromedriver here (Debian: chromium, "
            "chromium-driver)"
        )
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    yield browser
    try:
        browser.call("DELETE", "")
    finally:
        browser.process.terminate()
        browser.process.wait()


@pytest.fixture
def browser(chromium):
    """With a look at the console afterwards."""
    yield chromium
    assert chromium.errors() == []


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory) -> Path:
    return write_report([runs / "r1", runs / "sft"], tmp_path_factory.mktemp("page") / "p.html")


def test_curves_go_through_the_logged_points(browser, page):
    """Stops a curve that is upside down, beside its axis, or not drawn;
    a value under the pointer that is another step's."""
    browser.open(page)
    drawn = browser.js(
        "[...document.querySelectorAll('[data-metric]')].map(f => [f.dataset.metric, "
        "f.querySelector('svg').dataset.domain, f.querySelector('path.raw').getAttribute('d')])"
    )
    curves = {name: (domain, path) for name, domain, path in drawn}
    for name, want in (
        ("reward", [(s, (s * 7 % 5) / 4) for s in STEPS]),
        ("eval/val/war", [(0, 20), (12, 60)]),
        ("kl", [(s, s / 100) for s in STEPS if s != 3]),
    ):
        first, last, low, high = map(float, curves[name][0].split())
        points = [map(float, point.split()) for point in curves[name][1][1:].split("L")]
        got = [
            (first + (x - 46) / 280 * (last - first), low + (150 - y) / 142 * (high - low))
            for x, y in points
        ]
        np.testing.assert_allclose(got, want, atol=2e-4 * max(high - low, last - first))
    browser.js("document.querySelector('[data-metric=reward] svg').focus()")
    browser.press("ArrowRight", "ArrowRight")
    assert browser.texts("#tip") == ["step 2r1: 1"]
    assert browser.js(
        "[...document.querySelectorAll('[data-phase]')].map(p => p.dataset.phase)"
    ) == ["time/train", "time/load", "time/train"]


def test_filters_leave_what_a_brute_force_count_leaves(browser, page):
    """Stops a filter that does nothing, or counts completions where it shows groups."""
    browser.open(page)
    groups = {}
    for row in make_rollouts():
        groups.setdefault((row["step"], row["clip"]), []).append(row)
    reward = lambda g: sum(r["rewards"]["accuracy"] + 0.5 for r in g) / 3
    alive = lambda g: any(r["advantage"] for r in g)
    cases = [
        ({"emotion": "sad"}, lambda g: g[0]["answer"] == "sad"),
        ({"kind": "zero"}, lambda g: not alive(g)),
        ({"kind": "differ"}, alive),
        ({"kind": "truncated"}, lambda g: not all(r["finished"] for r in g)),
        ({"kind": "stray"}, lambda g: g[0]["clip"] != "c0.mp4"),  # only c0 has a low voice
        ({"agreement": "disagree"}, lambda g: any(map(disagrees, g))),
        ({"agreement": "agree"}, lambda g: not any(map(disagrees, g))),
        ({"least": "0.8"}, lambda g: reward(g) >= 0.8),
        ({"most": "0.8"}, lambda g: reward(g) <= 0.8),
        ({"advantage": "1"}, lambda g: max(abs(r["advantage"]) for r in g) >= 1),
        ({"search": "IS SAD"}, lambda g: any("is sad" in r["text"] for r in g)),
        ({"search": "c1.mp4", "kind": "differ"}, lambda g: g[0]["clip"] == "c1.mp4" and alive(g)),
    ]
    open_ = dict.fromkeys(
        ("emotion", "kind", "agreement", "least", "most", "advantage", "search"), ""
    )
    for values, keep in cases:
        n = sum(map(keep, groups.values()))
        assert 0 < n < 36, values
        assert browser.choose(**open_ | values) == f"{n} group{'s' * (n != 1)} of 36", values
        assert browser.js("document.querySelectorAll('#map rect').length") == n
    assert browser.choose(**open_ | {"search": "no such text"}) == "0 groups of 36"


def test_a_clip_plays_beside_its_marked_texts(browser, page):
    """Stops a video that does not play, marks on the wrong words,
    the settings of an evaluation apart."""
    browser.open(page)
    browser.choose(search="c1.mp4")
    assert (browser.texts("#completions .seen"), browser.texts("#completions .absent")) == (
        ["raised"] * 3,
        ["low"] * 3,
    )
    torn = [row["step"] for row in make_rollouts() if row["clip"] == "c1.mp4" and disagrees(row)]
    browser.choose(agreement="disagree")
    assert len(browser.texts("#completions .against")) == 2 * torn.count(min(torn))
    browser.js("document.querySelector('#clip video').play() && 0")
    browser.wait(lambda: browser.js("document.querySelector('#clip video')?.currentTime > 0.3"))
    browser.choose(search="", agreement="", source="1")
    assert sorted(browser.texts("#completions strong")) == ["r1", "r1", "r1 (blank)", "r1 (mute)"]
    assert len(browser.texts("#heats table")) == 4
    rows = browser.js(
        "[...document.querySelectorAll('#results .main tbody tr')].map(tr => "
        "[...tr.cells].map(td => td.textContent))"
    )
    assert sorted((row[1], row[3], row[-1]) for row in rows) == [
        ("r1", "50.00 10.0\u201390.0", "\u2013"),
        ("r1", "50.00 10.0\u201390.0", "\u2013"),
        ("r1 (blank)", "30.00 10.0\u201390.0", "-20"),
        ("r1 (mute)", "25.00 10.0\u201390.0", "-25"),
    ]
    assert "She said nothing." in browser.texts("#clip")[0]


def test_keys_step_through_it(browser, page):
    """Stops keys that do nothing, move while one types, or lose the clip that was to stay."""
    browser.open(page)
    at = lambda: tuple(
        browser.js(
            "['step', 'name'].map(id => document.getElementById(id).selectedOptions[0].textContent)"
        )
    )
    assert at() == ("1", "c1.mp4")
    browser.press("ArrowRight", "j")
    assert at() == ("2", "gone.mp4")
    browser.press("k", "ArrowLeft", "c", "ArrowRight")
    assert at() == ("5", "c1.mp4")  # where c1 comes again
    browser.press("/", "ArrowLeft")
    assert browser.js("document.activeElement.id") == "search" and at() == ("5", "c1.mp4")
    browser.js("document.activeElement.blur()")
    ground = "getComputedStyle(document.body).backgroundColor"
    before = browser.js(ground)
    browser.press("t", "?")
    assert browser.js(ground) != before and browser.js("document.querySelector('dialog').open")


CONTRASTS = """(() => {
    const linear = v => v <= 10 ? v / 3295 : ((v / 255 + 0.055) / 1.055) ** 2.4;
    const light = c => { const [r, g, b] = c.map(linear);\
 return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
    const rgb = c => { const x = document.createElement("canvas").getContext("2d");\
 x.fillStyle = c; x.fillRect(0, 0, 1, 1);
                       return [...x.getImageData(0, 0, 1, 1).data]; };
    const over = (top, below) => top.slice(0, 3).map((v, i) => v * top[3] / 255 +\
 below[i] * (1 - top[3] / 255));
    const ground = e => e ? over(rgb(getComputedStyle(e).backgroundColor),\
 ground(e.parentElement)) : [255, 255, 255];
    return [...document.querySelectorAll("body *:not(script, option, svg *)")]\
.filter(e => e.checkVisibility() &&
      [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())).map(e => {
        const [a, b] = [light(ground(e)), light(rgb(getComputedStyle(e).color))]\
.sort((x, y) => y - x);
        return [(a + 0.05) / (b + 0.05), e.tagName, e.className]; }); })()"""


@pytest.mark.parametrize("dark", (False, True))
def test_it_fits_a_phone_and_can_be_read(browser, page, dark):
    """Stops a page that scrolls sideways, and text that is too pale for its ground (WCAG AA:
    4.5)."""
    for width in (1400, 390):
        browser.open(page, width, dark)
        assert browser.js("[innerWidth, document.documentElement.scrollWidth]") == [width, width]
    contrasts = browser.js(CONTRASTS)
    assert len(contrasts) > 100 and min(contrasts)[0] >= 4.5, min(contrasts)


def test_hostile_texts_stay_text(browser, tmp_path):
    """Stops a text, a name or a setting that is read as HTML,
    and a hidden character that turns what is read."""
    runs = [hostile(tmp_path / "<img src=x onerror=alert(1)>"), hostile(tmp_path / "b")]
    browser.open(write_report(runs, tmp_path / "p.html"))
    assert browser.js(
        "[window.pwned ?? 0, document.querySelectorAll('main :is(b, i, script, [src=x])').length]"
    ) == [0, 0]
    assert browser.texts("#completions .text")[0] == EVIL[:-9] + "⟨U+202E⟩evil ⟨U+0000⟩ ⟨U+D800⟩"
    browser.choose(colour="KL")
    assert browser.texts("#completions .text")[1] == "<b>"


def test_runs_that_have_only_begun_open_too(browser, tmp_path):
    """Stops a page that stays empty because a run has no step, one step, or no rollouts."""
    empty = make_run(tmp_path / "empty", [], [])
    row = completion(1, "x.mp4", "sad", 0, "", 0, 0.0, rewards={"mine": 2})
    one = make_run(tmp_path / "one", [row], [{"step": 1, "reward": 1}])
    for runs in ([empty], [one], [empty, one]):
        browser.open(write_report(runs, tmp_path / "p.html"))
        browser.press("ArrowRight", "j")
        assert browser.js("[...document.querySelectorAll('section')].map(s => s.id)") == [
            "findings",
            "curves",
            "time",
            "results",
            "rollouts",
            "configuration",
            "limits",
        ]
        assert len(browser.texts("#completions article")) == (one in runs)
