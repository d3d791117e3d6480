"""The page about runs: what is filled in against the files it was read from, and the page itself in a headless Chromium."""
import base64
import json
import random
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zlib
from pathlib import Path

import numpy as np
import pytest

from lib.common import UserError
from lib.media import write_clip
from tools import report
from tools.report import write_report

CHROMIUM, DRIVER = shutil.which("chromium") or shutil.which("chromium-browser"), shutil.which("chromedriver")
FLAGS = ("--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
         "--disable-component-update --disable-sync --autoplay-policy=no-user-gesture-required").split()
EVIL = '</script><script>window.pwned = 1</script><img src=x onerror="window.pwned = 1"> \u202eevil \u0000 \ud800'
CUES = {"seen": {"brows": "raised", "lips": "open"}, "heard": {"pitch": "high"}}


def rollout(step, clip, label, k, text, reward, advantage, **more):
    return {"step": step, "clip": clip, "prompt": "Which emotion?", "answer": label, "completion": k, "text": text,
            "rewards": {"accuracy": float(reward), "format": 1.0}, "advantage": advantage, "length": 9, "finished": True} | more


def text_of(think: str, answer: str) -> str:
    return f"<think>The brows are raised, the pitch is low. It is {think}.</think>\n<answer>{answer}</answer>"


def make_run(folder: Path, rows: list[dict], metrics: list[dict], **config) -> Path:
    folder.mkdir(parents=True)
    plain = {"lr": 1e-3, "num_generations": 3, "out": f"runs/{folder.name}", "data": "runs/data/rl.json", "prompt": "think",
             "model": "runs/sft/latest", "rewards": ["accuracy", "format=0.5"], "max_new_tokens": 50, "max_steps": 20}
    (folder / "config.json").write_text(json.dumps(plain | config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics) + '{"step": 99, "rew')
    (folder / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 99, "cl')
    return folder


def make_rollouts() -> list[dict]:
    draw, rows = random.Random(0), []
    for step in range(1, 13):
        for clip, label in ((f"c{step % 4}.mp4", "happy"), ("gone.mp4", "sad"), ("large.mp4", "fear")):
            good = [draw.random() < 0.4 for _ in range(3)]
            for k, right in enumerate(good):
                A = 0.0 if len(set(good)) == 1 else 1.25 if right else -0.5
                text = text_of(draw.choice(["happy", "sad"]), label if right else "angry")
                rows.append(rollout(step, clip, label, k, text, right, A, finished=draw.random() < 0.9))
    return rows


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """runs/data with a sample file and real clips, runs/sft and runs/r1, which began from it, and results of r1."""
    runs = tmp_path_factory.mktemp("look") / "runs"
    (runs / "data").mkdir(parents=True)
    frames = np.random.default_rng(0).integers(0, 255, (20, 64, 64, 3), dtype=np.uint8)
    sound = np.sin(np.arange(32000) / 20).astype(np.float32) * np.linspace(0, 1, 32000, dtype=np.float32)
    for i in range(4):
        write_clip(runs / "data" / f"c{i}.mp4", frames, sound, fps=10)
    shutil.copy(runs / "data/c0.mp4", runs / "data/large.mp4")
    with open(runs / "data/large.mp4", "ab") as file:
        file.write(bytes(report.SMALL))
    turns = lambda label: [{"from": "human", "value": "<video>\nWhich emotion?"}, {"from": "gpt", "value": label}]
    samples = [{"video": name, "conversations": turns("happy"), "cues": CUES} for name in
               ("c0.mp4", "c1.mp4", "c2.mp4", "c3.mp4", "large.mp4", "gone.mp4")]
    (runs / "data/rl.json").write_text(json.dumps(samples))
    metrics = [{"step": s, "reward": (s * 7 % 5) / 4, "kl": s / 100 if s != 3 else None, "lr": 1e-3, "time/train": 2.0,
                "time/load": 0.5} for s in range(1, 13)]
    evals = [{"step": 0, "eval/val/war": 20.0}]
    make_run(runs / "sft", [], [{"step": s, "loss": 1 / s, "time/train": 3.0} for s in (1, 2)], model="hub/start")
    (runs / "sft/latest").mkdir()
    run = make_run(runs / "r1", make_rollouts(), [*evals, *metrics[:-1], metrics[-1] | {"eval/val/war": 60.0}])
    predictions = [{"id": f"c{i}.mp4", "answer": "happy", "predicted": "sad" if i % 2 else "happy",
                    "text": text_of("happy", "sad" if i % 2 else "happy"), "format": 1.0} for i in range(4)]
    result = {rate: 50.0 for rate in ("war", "uar", "war_normalised", "uar_normalised", "epc")} | {
        "n": 4, "data": "runs/data/rl.json", "war_ci": [10.0, 90.0], "predictions": predictions,
        "confusion": {"happy": {"happy": 2, "other": 2}}}
    (runs / "eval").mkdir()
    (runs / "eval/r1.rl.json").write_text(json.dumps(result))
    (runs / "eval/r10.rl.json").write_text(json.dumps(result))
    settings = {"full": result, "mute": result | {"war": 25.0}, "blank": result | {"war": 30.0}}
    (run / "settings.json").write_text(json.dumps({"data": "runs/data/rl.json", "modalities": settings}))
    return runs


def filled(page: Path) -> dict:
    """What stands in the page."""
    return json.loads(re.search(r'id="data">(.*)</script>', page.read_text(encoding="utf-8"))[1])


def test_what_was_logged_is_what_stands_in_the_page(place, tmp_path):
    """Stops columns that are shifted, a NaN or a half line that ends the writer, a chain of stages that breaks off."""
    content = filled(write_report([place / "r1"], tmp_path / "p.html"))
    run, source = content["runs"][0], content["sources"][0]
    assert run["steps"] == list(range(1, 13)) and run["every"] == 1
    assert run["metrics"]["reward"] == [(s * 7 % 5) / 4 for s in range(1, 13)]
    assert run["metrics"]["kl"] == [None if s == 3 else s / 100 for s in range(1, 13)]
    assert run["evals"] == {"eval/val/war": [[0, 20.0], [12, 60.0]]}
    assert [(s["name"], s["steps"], s["seconds"]) for s in run["stages"]] == [("sft", 2, 6.0), ("r1", 12, 30.0)]
    rows = make_rollouts()
    assert source["seen"] == len(source["groups"]) == 36 and source["bad"] == 0
    assert source["weights"] == {"accuracy": 1.0, "format": 0.5} and source["rewards"] == ["accuracy", "format"]
    flat = [(g["step"], content["clips"][g["clip"]]["id"], c["text"], c["rewards"], c["advantage"], c["cut"], c["torn"])
            for g in source["groups"] for c in g["all"]]
    torn = lambda text: len(set(re.findall(r"is (\w+)\.<|<answer>(\w+)", text))) and \
        re.search(r"is (\w+)\.<", text)[1] != re.search(r"<answer>(\w+)", text)[1]
    assert flat == [(r["step"], r["clip"], r["text"], [*r["rewards"].values()], r["advantage"], not r["finished"],
                     torn(r["text"])) for r in rows]


def test_long_curves_are_means_of_neighbours(tmp_path, monkeypatch):
    """Stops a long run whose points are picked, or lose the last step."""
    monkeypatch.setattr(report, "POINTS", 4)
    run = make_run(tmp_path / "r", [], [{"step": s, "reward": s} for s in range(1, 11)])
    got = filled(write_report([run], tmp_path / "p.html"))["runs"][0]
    assert (got["steps"], got["every"], got["metrics"]["reward"]) == ([3, 6, 9, 10], 3, [2, 5, 8, 10])


def test_clips_are_embedded_linked_or_gone(place, tmp_path):
    """Stops a large clip in the page, a link that leads nowhere, a run that was moved and loses its clips."""
    moved = tmp_path / "elsewhere/runs"
    shutil.copytree(place, moved)
    content = filled(write_report([moved / "r1"], tmp_path / "out/p.html"))
    clips = {clip["id"]: clip for clip in content["clips"]}
    assert base64.b64decode(clips["c1.mp4"]["file"]) == (place / "data/c1.mp4").read_bytes()
    assert "file" not in clips["large.mp4"] and (tmp_path / "out" / clips["large.mp4"]["href"]).samefile(moved / "data/large.mp4")
    assert clips["gone.mp4"].keys() & {"file", "href", "strip"} == set()
    assert base64.b64decode(clips["c1.mp4"]["strip"]).startswith(b"\xff\xd8")
    wave = clips["c1.mp4"]["wave"]
    assert len(wave) == report.BARS and max(wave) == 100 and max(wave[:10]) < 15     # the tone grows from silence
    assert clips["c1.mp4"]["seen"] == ["open", "raised"] and clips["c1.mp4"]["heard"] == ["high"]


def test_results_beside_the_run_and_given_ones(place, tmp_path):
    """Stops the results of r10 beside r1, a setting that is lost, answers that are not side by side."""
    content = filled(write_report([place / "r1"], tmp_path / "p.html"))
    assert [(r["by"], r["run"], r["rates"]["war"]) for r in content["results"]] == [
        ("r1", 0, [50, 10, 90]), ("r1", 0, [50, 10, 90]), ("r1 (mute)", 0, [25, 10, 90]), ("r1 (blank)", 0, [30, 10, 90])]
    answers = content["sources"][1]
    assert [c["by"] for c in answers["groups"][0]["all"]] == [r["by"] for r in content["results"]]
    assert sorted(g["all"][0]["rewards"][0] for g in answers["groups"]) == [0, 0, 1, 1]
    given = filled(write_report([place / "r1"], tmp_path / "p.html", [place / "eval/r10.rl.json"]))
    assert [(r["by"], r["run"]) for r in given["results"]] == [("r10", None)]


def made_up(steps: int, prompts: int) -> list[dict]:
    return [rollout(s, f"clip{(s * prompts + b) % 1000}.mp4", "happy", k, text_of("happy", "happy") + " x" * 60, k % 2 and s % 3,
                    float(k % 2 and s % 3 > 0)) for s in range(1, steps + 1) for b in range(prompts) for k in range(8)]


def test_fifty_thousand_rollouts_are_thinned_by_rule(tmp_path):
    """Stops a page that nobody can open, steps that are missing in it, clips that cannot be followed over the steps."""
    run = make_run(tmp_path / "r", made_up(625, 10), [{"step": s, "reward": 1.0} for s in range(1, 626)])
    page = write_report([run], tmp_path / "p.html")
    content = filled(page)
    source, clips = content["sources"][0], content["clips"]
    size = len(json.dumps([g | {"clip": ""} for g in source["groups"]]))
    assert source["seen"] == 6250 and 1000 < len(source["groups"]) < 3500
    assert 0.8 * report.ROLLOUT_BYTES < size < report.ROLLOUT_BYTES and page.stat().st_size < 8e6
    stretch = lambda step: (step - 1) * 50 // 625
    drawn = lambda clip: zlib.crc32(clip.encode())
    kept = {(g["step"], clips[g["clip"]]["id"]) for g in source["groups"]}
    assert {stretch(step) for step, _ in kept} == set(range(50))
    for part in range(50):                   # of the clips that stay by name, those with the higher draw
        here = [(step, f"clip{(step * 10 + b) % 1000}.mp4") for step in range(1, 626) if stretch(step) == part for b in range(10)]
        by_name = [(drawn(c), (s, c) in kept) for s, c in here if drawn(c) % 2]
        assert min((d for d, stays in by_name if stays)) > max((d for d, stays in by_name if not stays), default=-1)
        dull = [(s, c) for s, c in here if not drawn(c) % 2 and s % 3 == 0 and (s, c) in kept]
        telling = [(s, c) in kept for s, c in here if not drawn(c) % 2 and s % 3]
        assert not dull or all(telling)      # dead groups stay only where every live one does


def hostile(folder: Path) -> Path:
    rows = [rollout(s, f"<b>{EVIL[:9]}.mp4", "<i>happy</i>", k, EVIL + "x" * 50_000 * (k == 1), float("nan") if k else 1, float("inf"),
                    prompt=EVIL, length=None, tokens=[["<b>", -1, float("nan"), 1.0], 3] if k else "no") for s in (1, 2) for k in (0, 1, 2)]
    rows += [{"step": "x"}, {"step": 1, "clip": 3}, {"rewards": []}]
    metrics = [{"step": 1, "<img src=x onerror=alert(1)>": 1, "reward": 1e99, "kl": "x"}, {"step": 2, "reward": float("nan"), "kl": 1e300}]
    return make_run(folder, rows, metrics, question=EVIL, rewards=["accuracy", "<b>=x", 3], media_root=7)


def test_hostile_texts_cannot_leave_the_data(tmp_path):
    """Stops a text that ends the script, NaN in JSON, a lone surrogate that cannot be written, a text of any length."""
    page = write_report([hostile(tmp_path / "a/r"), hostile(tmp_path / "b/r")], tmp_path / "p.html")
    template = Path(report.__file__).with_suffix(".html").read_text()
    assert page.read_text().count("<") == template.count("<")
    content = filled(page)
    assert [run["name"] for run in content["runs"]] == ["a/r", "b/r"]
    source = content["sources"][0]
    assert source["bad"] == 3 and len(source["groups"]) == 2
    first, second, _ = source["groups"][0]["all"]
    assert first["text"] == EVIL and first["advantage"] is None and second["rewards"][0] is None
    assert len(second["text"]) < report.LONGEST + 60 and "characters are left out" in second["text"]
    assert second["tokens"] == [["<b>", -1, None, 1]]


def test_errors_are_a_sentence(place, tmp_path):
    """Stops a traceback for a wrong folder or file, and a page that is half written over a good one."""
    run = lambda *words: subprocess.run([sys.executable, "-m", "tools.report", *words], cwd=Path(report.__file__).parents[1],
                                        capture_output=True, text=True)
    told = run(str(place / "data"))
    assert told.returncode == 1 and "it holds no config.json" in told.stderr and told.stderr.count("\n") == 1
    with pytest.raises(UserError, match="no result file"):
        write_report([place / "r1"], tmp_path / "p.html", [place / "data/rl.json"])
    with pytest.raises(UserError, match="cannot write"):
        write_report([place / "r1"], place / "r1/config.json/p.html")
    good = run(str(place / "sft"), "--out", str(tmp_path / "sft.html"))
    assert good.returncode == 0 and good.stdout.startswith(f"{tmp_path / 'sft.html'}: 0.0 MB") and not good.stderr
    assert filled(tmp_path / "sft.html")["sources"][0]["groups"] == []


# ---- the page, in a browser ----------------------------------------------------------------------

class Browser:
    """Chromium by the W3C WebDriver protocol of chromedriver: HTTP and JSON, nothing to install in Python."""

    def __init__(self, folder: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.process = subprocess.Popen([DRIVER, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.base = f"http://127.0.0.1:{port}"
        options = {"binary": CHROMIUM, "args": [*FLAGS, f"--user-data-dir={folder}"]}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        self.wait(lambda: self.call("GET", "/status"))
        self.base += "/session/" + self.call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]

    def call(self, method: str, path: str, body: dict | None = None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.base + path, data, {"Content-Type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=100) as answer:
            return json.load(answer)["value"]

    def wait(self, ready):
        for _ in range(300):
            try:
                if got := ready():
                    return got
            except (urllib.error.URLError, ConnectionError):
                pass
            time.sleep(0.1)
        raise AssertionError("it did not come")

    def open(self, page: Path, width: int = 1400, dark: bool = False):
        cdp = lambda cmd, **params: self.call("POST", "/goog/cdp/execute", {"cmd": cmd, "params": params})
        cdp("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        cdp("Emulation.setEmulatedMedia", features=[scheme])
        self.call("POST", "/url", {"url": page.resolve().as_uri()})
        return self

    def js(self, script: str, *args):
        return self.call("POST", "/execute/sync", {"script": script, "args": list(args)})

    def errors(self) -> list[str]:
        return [entry["message"] for entry in self.call("POST", "/se/log", {"type": "browser"}) if entry["level"] == "SEVERE"]

    def press(self, *keys: str) -> None:
        for key in keys:
            self.js("(document.activeElement ?? document.body).dispatchEvent(new KeyboardEvent('keydown', "
                    "{key: arguments[0], bubbles: true, cancelable: true}))", key)

    def choose(self, **values) -> str:
        for name, value in values.items():
            self.js("const e = document.getElementById(arguments[0]); e.value = arguments[1]; "
                    "e.dispatchEvent(new Event(e.tagName === 'INPUT' ? 'input' : 'change'))", name, value)
        return self.js("return document.getElementById('count').textContent")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not (CHROMIUM and DRIVER):
        pytest.skip("the page is not tested: Chromium and chromedriver are not installed (Debian: chromium, chromium-driver)")
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    yield browser
    try:
        browser.call("DELETE", "")
    finally:
        browser.process.terminate()
        browser.process.wait()


@pytest.fixture(scope="module")
def page(place, tmp_path_factory) -> Path:
    return write_report([place / "r1", place / "sft"], tmp_path_factory.mktemp("page") / "p.html")


def test_curves_go_through_the_logged_points(browser, page):
    """Stops a curve that is drawn upside down, beside its axis, or not at all; a value under the pointer of another step."""
    browser.open(page)
    drawn = browser.js("return [...document.querySelectorAll('[data-metric]')].map(f => [f.dataset.metric, "
                       "f.querySelector('svg').dataset.domain, f.querySelector('path.raw').getAttribute('d')])")
    curves = {name: (domain, path) for name, domain, path in drawn}
    for name, want in (("reward", [(s, (s * 7 % 5) / 4) for s in range(1, 13)]), ("eval/val/war", [(0, 20), (12, 60)]),
                       ("kl", [(s, s / 100) for s in range(1, 13) if s != 3])):
        first, last, low, high = map(float, curves[name][0].split())
        points = [tuple(map(float, p.split())) for p in curves[name][1][1:].split("L")]
        got = [(first + (x - 46) / (340 - 46 - 14) * (last - first), low + (150 - y) / 142 * (high - low)) for x, y in points]
        np.testing.assert_allclose(got, want, atol=2e-3 * (high - low) + 2e-3)
    browser.js("document.querySelector('[data-metric=reward] svg').focus()")
    browser.press("ArrowRight", "ArrowRight")
    assert browser.js("return document.getElementById('tip').textContent") == "step 2r1: 1"
    assert browser.js("return document.querySelectorAll('[data-phase]').length") == 3
    assert browser.errors() == []


def test_filters_leave_what_a_brute_force_count_leaves(browser, page):
    """Stops a filter that does nothing, or counts completions where it shows groups."""
    browser.open(page)
    groups = {}
    for row in make_rollouts():
        groups.setdefault((row["step"], row["clip"]), []).append(row)
    groups = list(groups.values())
    reward = lambda g: sum(r["rewards"]["accuracy"] + 0.5 for r in g) / 3
    torn = lambda g: any(("happy." in r["text"]) != ("<answer>happy" in r["text"]) or ("sad." in r["text"]) !=
                         ("<answer>sad" in r["text"]) for r in g)
    cases = [({"emotion": "sad"}, lambda g: g[0]["answer"] == "sad"), ({"kind": "dead"}, lambda g: not any(r["advantage"] for r in g)),
             ({"kind": "alive"}, lambda g: any(r["advantage"] for r in g)), ({"kind": "cut"}, lambda g: not all(r["finished"] for r in g)),
             ({"whole": "disagree"}, torn), ({"whole": "agree"}, lambda g: not torn(g)),
             ({"least": "0.8"}, lambda g: reward(g) >= 0.8), ({"most": "0.8"}, lambda g: reward(g) <= 0.8), ({"reach": "1"}, lambda g: max(
                 abs(r["advantage"]) for r in g) >= 1), ({"search": "IS SAD"}, lambda g: any("is sad" in r["text"] for r in g)),
             ({"emotion": "happy", "search": "c1.mp4", "kind": "alive"}, lambda g: g[0]["clip"] == "c1.mp4" and any(r["advantage"] for r in g))]
    nothing = dict.fromkeys(("emotion", "kind", "whole", "least", "most", "reach", "search"), "")
    for values, keep in cases:
        n = sum(map(keep, groups))
        assert 0 < n < 36
        assert browser.choose(**nothing | values) == f"{n} group{'s' * (n != 1)} of 36", values
        assert browser.js("return document.querySelectorAll('#map rect').length") == n
    assert browser.choose(**nothing | {"search": "no such text"}) == "0 groups of 36"
    assert browser.errors() == []


def test_a_clip_plays_beside_its_marked_texts(browser, page):
    """Stops a video that does not play, marks on the wrong words, the settings of an evaluation apart."""
    browser.open(page)
    browser.choose(search="c1.mp4")
    assert browser.js("return [...document.querySelectorAll('#completions article')].length") == 3
    assert browser.js("return [...document.querySelectorAll('#completions mark.seen, #completions mark.absent')].map(m => "
                      "m.textContent)").count("raised") == 3
    browser.js("const v = document.querySelector('#clip video'); v.muted = true; v.play()")
    browser.wait(lambda: browser.js("return document.querySelector('#clip video')?.currentTime > 0.2"))
    assert browser.js("return document.querySelector('#clip video').videoWidth") == 64
    browser.choose(search="", source="1")
    assert browser.js("return [...document.querySelectorAll('#completions strong')].map(s => s.textContent)") == \
        ["r1", "r1", "r1 (mute)", "r1 (blank)"]
    assert browser.js("return document.querySelectorAll('#heats table').length") == 4
    assert browser.errors() == []


def test_keys_step_through_it(browser, page):
    """Stops keys that do nothing, move in a text field, or lose the clip that was to stay."""
    browser.open(page)
    at = lambda: tuple(browser.js("const t = e => e.selectedOptions[0].textContent; "
                                  "return [t(document.getElementById('step')), t(document.getElementById('name'))]"))
    browser.choose(search="c")               # every clip but gone.mp4 and large.mp4 ... which have one in "large"? no
    browser.choose(search="")
    start = at()
    browser.press("ArrowRight", "j")
    assert (start, at()) == (("1", "c1.mp4"), ("2", "gone.mp4"))
    browser.press("k", "ArrowLeft", "c", "ArrowRight")
    assert at() == ("5", "c1.mp4")           # c1 comes again in step 5
    browser.press("/")
    browser.press("ArrowLeft")
    assert browser.js("return document.activeElement.id") == "search" and at() == ("5", "c1.mp4")
    browser.js("document.activeElement.blur()")
    before = browser.js("return getComputedStyle(document.body).backgroundColor")
    browser.press("t", "?")
    assert browser.js("return [getComputedStyle(document.body).backgroundColor, document.querySelector('dialog').open]") == \
        ["rgb(15, 17, 21)", True] and before == "rgb(245, 246, 248)"
    assert browser.errors() == []


@pytest.mark.parametrize("dark", (False, True))
def test_it_fits_a_phone_and_can_be_read(browser, page, dark):
    """Stops a page that scrolls sideways on a phone, and text that is too pale for its ground (WCAG AA: 4.5)."""
    for width in (390, 1400):
        browser.open(page, width, dark)
        assert browser.js("return document.documentElement.scrollWidth") == width
    contrasts = browser.js("""
        const lum = c => { const [r, g, b] = c.map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
                           return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
        const rgb = c => { const x = document.createElement("canvas").getContext("2d"); x.fillStyle = c; x.fillRect(0, 0, 1, 1);
                           return [...x.getImageData(0, 0, 1, 1).data]; };
        const over = (top, below) => top.slice(0, 3).map((v, i) => v * top[3] / 255 + below[i] * (1 - top[3] / 255));
        const ground = e => e ? over(rgb(getComputedStyle(e).backgroundColor), ground(e.parentElement)) : [255, 255, 255];
        const bad = [];
        for (const e of document.querySelectorAll("body *:not(script, option, svg *)")) {
          if (![...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()) || !e.checkVisibility()) continue;
          const a = lum(ground(e)), b = lum(rgb(getComputedStyle(e).color)), k = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
          if (k < 4.5) bad.push([e.tagName, e.className, e.textContent.slice(0, 20), k]);
        }
        return bad;""")
    assert contrasts == []
    assert browser.errors() == []


def test_hostile_texts_stay_text(browser, tmp_path):
    """Stops a sampled text, a name or a setting that is read as HTML, a hidden character that turns what is read."""
    browser.open(write_report([hostile(tmp_path / "<img src=x onerror=alert(1)>"), hostile(tmp_path / "b")], tmp_path / "p.html"))
    assert browser.js("return [window.pwned ?? null, document.querySelectorAll('main :is(script, b, i), img[src=x]').length]") == [None, 0]
    told = browser.js("return document.querySelector('#completions .text').textContent")
    assert told.startswith(EVIL[:40]) and "⟨U+202E⟩evil ⟨U+0000⟩" in told
    browser.choose(colour="KL")
    assert browser.js("return document.querySelectorAll('#completions article')[1].querySelector('.text').textContent") == "<b>"
    assert browser.errors() == []


def test_runs_that_have_only_begun_open_too(browser, tmp_path):
    """Stops a page that stays empty because a run has no step, one step, or no rollouts."""
    empty = make_run(tmp_path / "empty", [], [])
    one = make_run(tmp_path / "one", [rollout(1, "x.mp4", "sad", 0, "", 0, 0.0, rewards={"mine": 2})], [{"step": 1, "reward": 1}])
    for runs in ([empty], [one], [empty, one]):
        browser.open(write_report(runs, tmp_path / "p.html"))
        assert browser.js("return [...document.querySelectorAll('section')].map(s => s.id)") == [
            "findings", "curves", "time", "results", "rollouts", "configuration", "limits"]
        assert browser.js("return document.querySelectorAll('#completions article').length") == (one in runs)
        browser.press("ArrowRight", "j")
        assert browser.errors() == []
