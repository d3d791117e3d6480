"""Every arm of the benchmark does the same work, and the floors are correct.

No test depends on wall time.
"""

import dataclasses
import json
import math
import re
import subprocess
import sys

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lib.dist import Ranks
from lib.metrics import Timer
from model import PARTS, HumanOmni, encode_media
from tools import bench
from tools.bench import ROOT, SIZES, Size, build_model, layers, whisper
from toy.humanomni import tiny_humanomni
from training import MasterAdamW

CPU = torch.device("cpu")
B, G, T, V = 2, 3, 9, 400
TINY = Size(  # test_rehearsal uses it too, with the tokenizers of tests/golden
    layers(64, 2, 4, 96, num_key_value_heads=2, vocab_size=V, rope_theta=1e4),
    layers(32, 3, 2, 48, image_size=32),
    whisper(32, 1, 2, 48, 20, 50),
    layers(16, 1, 2, 24, vocab_size=40),
    text=30,
    B=B,
    G=G,
    T=T,
    gate=G,
    repeats=2,
    slow=1,
    rows=(6, 12),
)


@pytest.fixture
def tiny() -> bench.Bench:
    """Arms A and D on a model of 0.3 M parameters: two prompts, three completions of at most nine
    tokens."""
    return bench.set_up(TINY, "AD", Ranks(0, 1, CPU), torch.float32)


def test_arm_a_is_ours(tiny):
    """Stops a faithful loop whose speed comes from computing something else, and a KL of zero in
    every arm."""
    logps, ref_logps, *_ = bench.step(tiny, "A", Timer(), torch.randint(V, (B, G, T)))
    assert float((logps - ref_logps)[tiny.mask].abs().max()) > 1e-2
    tiny.optimizer.zero_grads()
    gates = bench.check(tiny, ["A", "D"])
    assert set(gates) == {"D"} and bench.gates_hold(gates, torch.float32)
    assert all(gates["D"][name] < 1e-5 for name in bench.MOST)
    assert float(tiny.optimizer.flat.abs().max()) == 0


def test_the_whole_step_has_one_gradient(tiny, monkeypatch):
    """Stops a step with another loss: another denominator, mask or KL, or a lost micro-batch."""
    seen, completions = [], torch.randint(V, (B, G, T), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(
        bench,
        "sample",
        lambda b, arm, embeds, *a, **k: (
            completions[[left.pop()]] if arm == "A" else completions,
            torch.zeros(B, G, T),
        ),
    )
    monkeypatch.setattr(
        MasterAdamW, "step", lambda self, *a: (seen.append(self.flat.clone()), self.zero_grads())
    )
    grpo_loss = bench.grpo_loss

    def compared(logps, old_logps, ref_logps, A, mask, **flags):
        loss, metrics = grpo_loss(logps, old_logps, ref_logps, A, mask, **flags)
        x = (ref_logps - logps).detach()
        by_hand = -(A[..., None] - 0.04 * (x.exp() - x - 1)) * mask  # the ratio is 1
        by_hand = (by_hand.sum(-1) / mask.sum(-1)).sum() / (B * G)
        assert float(loss.detach()) == pytest.approx(float(by_hand), rel=1e-4, abs=1e-6)
        return loss, metrics

    monkeypatch.setattr(bench, "grpo_loss", compared)
    left = [1, 0]
    for arm, rows in (("A", 4), ("D", 1), ("D", 4)):
        monkeypatch.setattr(bench, "MICRO_BATCH", rows)
        bench.step(tiny, arm, Timer())
    theirs, *others = seen
    assert theirs.norm() > 1e-3 and len(others) == 2
    assert all(float((ours - theirs).norm() / theirs.norm()) < 1e-5 for ours in others)


def test_gates_see_a_wrong_arm(tiny):
    """Stops gates that pass for every arm."""
    hf = tiny.models["A"][0].model
    norm = hf.norm.weight.detach()
    for factor, same_tokens in ((1.01, True), (-1.0, False)):
        hf.norm.weight = torch.nn.Parameter(norm * factor)
        gates = bench.check(tiny, ["D"])
        assert gates["D"]["max_dlogp"] > 1e-4 and gates["D"]["relative_gradient_error"] > 1e-4
        assert gates["D"]["greedy_equal"] is same_tokens and not bench.gates_hold(
            gates, torch.float32
        )
    good = {
        "greedy_equal": True,
        "max_dlogp": 1e-6,
        "relative_gradient_error": 1e-7,
        "ratio": [1.0, 1.0, 1.0],
    }
    assert bench.gates_hold({"D": good}, torch.float32)
    for bad in (
        {"greedy_equal": False},
        {"max_dlogp": 2e-4},
        {"relative_gradient_error": 2e-5},
        {"ratio": [0.99, 1, 1]},
        {"max_dlogp": math.nan},
    ):
        assert not bench.gates_hold({"D": good | bad}, torch.float32), bad


def test_weights_are_the_same_tensors():
    """Stops arms whose weights drift apart, because an update in one must be an update in all, and
    a compiled arm that is not compiled."""
    b = bench.set_up(TINY, "E", Ranks(0, 1, CPU), torch.bfloat16)
    for ours, theirs, compiled in zip(b.models["D"], b.models["A"], b.models["E"]):
        decoder = {n: p for n, p in ours.named_parameters() if n.startswith(PARTS["decoder"])}
        hf = dict(theirs.named_parameters())
        assert set(hf) == set(decoder) and all(hf[n] is p for n, p in decoder.items())
        assert theirs.lm_head.weight is ours.model.embed_tokens.weight
        assert all(p is q for p, q in zip(ours.parameters(), compiled.parameters()))
        assert compiled.is_compiled and not ours.is_compiled
        # Rounded positions would be a fault of the benchmark, not of the reference.
        assert (
            ours.dtype == torch.bfloat16 and theirs.model.rotary_emb.inv_freq.dtype == torch.float32
        )
    policy, reference = (dict(m.named_parameters()) for m in b.models["D"])
    moved = {n for n in policy if policy[n] is not reference[n]}
    assert moved == {
        n for n in policy if n.startswith((*PARTS["decoder"], *PARTS["projectors"], *PARTS["gate"]))
    }
    assert all(policy[n].requires_grad and not reference[n].requires_grad for n in moved)


def test_lengths_are_forced_and_equal(tiny, monkeypatch):
    """Stops an arm that ends early at an end token, or counts other tokens than the other arms."""
    counted, sampled = [], []
    loss, generate = bench.grpo_loss, bench.generate
    monkeypatch.setattr(
        bench, "grpo_loss", lambda *a, **k: counted.append(a[4].sum(-1).flatten()) or loss(*a, **k)
    )
    logps = HumanOmni.completion_logps
    monkeypatch.setattr(
        HumanOmni,
        "completion_logps",
        lambda self, embeds, mask, ids, n: (
            counted.append(n.flatten()) or logps(self, embeds, mask, ids, n)
        ),
    )
    monkeypatch.setattr(
        bench, "generate", lambda *a, **k: sampled.append(generate(*a, **k)) or sampled[-1]
    )
    lengths = tiny.mask.sum(-1)
    again = bench.set_up(TINY, "A", Ranks(0, 1, CPU), torch.bfloat16).mask.sum(-1)
    assert (
        torch.equal(lengths, again) and (lengths.amax(1) == T).all() and len(lengths.unique()) > 1
    )
    for arm, times in (("A", 1), ("D", 3)):  # ours: reference model, policy, loss
        counted.clear()
        bench.step(tiny, arm, Timer())
        assert torch.equal(torch.cat(counted), lengths.repeat(times, 1).flatten()), arm
    [(ids, n, _)] = sampled
    assert (n == T).all() and (ids >= 0).all() and (ids < V).all()


def test_every_sampler_makes_all_tokens_and_times_its_halves(tiny):
    """Stops a default end token, prompts and completions in the wrong order, and a decode time that
    contains the prefill."""
    greedy, embeds = {}, bench.faithful_embeds(tiny.models["D"][0], tiny.batch, Timer()).detach()
    for arm in "AD":
        timer, names = Timer(), []
        timer.lap = names.append
        with torch.no_grad():
            assert bench.sample(tiny, arm, embeds, G, T, timer)[0].shape == (B, G, T)
            group = 1 if arm == "A" else G
            greedy[arm] = bench.sample(tiny, arm, embeds, group, T, Timer(), greedy=True)[0]
        assert names == ["prefill", "decode"] and "prefill" not in vars(tiny.models[arm][0])
    assert torch.equal(greedy["D"], greedy["A"].expand(B, G, T))
    assert not torch.equal(greedy["A"][0], greedy["A"][1])


OURS = ["encode", "prefill", "decode", "reference", "train", "optimiser"]
THEIRS = [*OURS[:3] * B, *["encode", "reference"] * B, *["encode", "train"] * B, "optimiser"]


@pytest.mark.parametrize("arm, passes, laps", [("A", 2 * G + 1, THEIRS), ("D", 1, OURS)])
def test_clips_through_the_towers(tiny, arm, passes, laps):
    """Stops a faithful loop that is made slower than it is, a second encoding in the other arms,
    and time that is counted in another section."""
    seen, clock = {"audio": 0, "video": 0}, Timer()
    for model in tiny.models["D"]:  # two trees of modules, though the towers' weights are one
        tower = model.model.vision_tower
        model.model.audio_tower.register_forward_hook(
            lambda m, a, out: seen.update(audio=seen["audio"] + len(out.last_hidden_state))
        )
        getattr(tower, "vision_model", tower).embeddings.register_forward_hook(
            lambda m, a, out: seen.update(video=seen["video"] + len(out))
        )
    names = []
    clock.lap = names.append
    bench.step(tiny, arm, clock)
    assert seen == {"audio": B * passes, "video": B * 8 * passes}  # 8 frames a clip
    assert names == laps


def test_toy_is_the_model_of_the_toy_setup(tmp_path):
    """Stops a toy size that differs from the model of the toy setup."""
    theirs = tiny_humanomni(tmp_path, ["a few words to learn merges from"], 0)
    ours = build_model(SIZES["toy"], "meta", torch.float32)
    # vocabularies: the world's sentences decide them
    words = "embed_tokens", "bert_model.embeddings"
    shapes = [
        {n: p.shape for n, p in m.named_parameters() if not any(w in n for w in words)}
        for m in (theirs, ours)
    ]
    assert shapes[0] == shapes[1]
    assert (
        theirs.config.rope_theta == ours.config.rope_theta
        and theirs.config.head_dim == ours.config.head_dim
    )


def test_sizes_are_what_they_are_called():
    """Stops a size mid that is not between the others, a prompt of another length than 950, and
    towers that need other than 2.5 TFLOP per clip."""
    full, mid = (build_model(SIZES[s], "meta", torch.bfloat16) for s in ("full", "mid"))
    count = lambda model, part: sum(
        p.numel() for n, p in model.named_parameters() if n.startswith(PARTS[part])
    )
    assert 55e6 < count(mid, "decoder") < 65e6
    assert all(7 < count(full, part) / count(mid, part) < 9 for part in ("vision", "audio"))
    meta = Ranks(0, 1, torch.device("meta"))
    for size in ("mid", "full"):
        b = bench.set_up(dataclasses.replace(SIZES[size], B=1), "", meta, torch.float32)
        assert b.models["D"][0].prompt_length(b.batch.input_ids) == 950
    # a prefill
    assert bench.flops(full, 950, 950 * 951 // 2, 0) == pytest.approx(0.72e12, rel=0.01)
    # Whisper 2.27 TFLOP a clip, 8 frames of SigLIP without its last layer 0.26, projectors 0.05.
    model, batch = b.models["D"][0], b.batch
    with FlopCounterMode(display=False) as towers:
        batch = encode_media(model, batch)
    with FlopCounterMode(display=False) as projectors:
        model.model.audio_projector(batch.features["audio"])
        model.model.mm_projector(batch.features["video"], torch.ones(1, 3, device="meta"))
    assert towers.get_total_flops() == pytest.approx(2.53e12, rel=0.01)
    assert projectors.get_total_flops() == pytest.approx(0.049e12, rel=0.02)


def test_floor_formulas(tiny):
    """Stops a floor without a matrix, with attention in another unit, or above the least time. The
    examples are computed by hand."""
    model, P = tiny.models["D"][0], 20
    with FlopCounterMode(display=False) as counted, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model.logits(model.hidden(torch.randn(1, P, 64), torch.ones(1, P, dtype=torch.bool)))
    # The kernel computes all P x P scores; the floor counts those that are looked at.
    assert bench.flops(model, P, P * P, P) == counted.get_total_flops()
    slow = {"bytes_per_second": 1.0, "flops_per_second": 1e30}
    weights, kv = 4 * (bench.flops(model, 1, 0, 0) // 2 + 64 * V), 2 * 2 * 2 * 16 * 4
    # Two steps: the prompt's keys once, each of three completions its own, one and two tokens long.
    assert bench.decode_floor(model, 7, 1, 3, 3, slow) == 2 * weights + kv * (7 + 3 + 7 + 6)
    slow = {"bytes_per_second": 1e30, "flops_per_second": 1.0}
    assert bench.decode_floor(model, 7, 1, 3, 2, slow) == bench.flops(model, 3, 24, 3)


def test_floors_of_the_sections(tiny):
    """Stops a training floor without its backward pass, and a completion that is read too far."""
    model, rates = tiny.models["D"][0], {"bytes_per_second": 2.0, "flops_per_second": 3.0}
    # A prompt of 5 and completions of 3 and 1: tokens 5 + 2 + 0; pairs 15,
    # then 6 + 7; four tokens are predicted.
    tiny.mask = torch.arange(3) < torch.tensor([[3, 1], [3, 1]])[..., None]
    forward = 2 * bench.flops(model, 7, 28, 4)
    expected = {
        "prefill": bench.flops(model, 10, 30, 2) / 3,
        "decode": bench.decode_floor(model, 5, 2, 2, 3, rates),
        "reference": forward / 3,
        "train": forward,
    }
    assert bench.floors(tiny, 5, rates) == pytest.approx(expected, rel=1e-12)


def test_arms_take_turns():
    """Stops one arm from having all the quiet minutes, a warm-up round that is counted, and a step
    without one of its parts."""
    order, ticks = [], iter(range(1, 1000))

    def run(arm, timer):
        order.append(arm)
        for name in ("encode", "train", "encode"):
            timer.seconds[name] = timer.seconds.get(name, 0.0) + next(ticks)

    runs = {arm: lambda timer, arm=arm: run(arm, timer) for arm in "AD"}
    rows = bench.take_turns(runs, {"A": 1, "D": 3}, {"encode": 1.0})
    assert order == ["D", "A", "D", "D", "D"]  # the slow one is not warmed up on a CPU
    assert [(row["section"], row["arm"]) for row in rows] == [
        (section, arm) for section in ("encode", "train", "step") for arm in "AD"
    ]
    # Ticks: D 1 to 3, A 4 to 6, D 7 to 9, 10 to 12, 13 to 15.
    assert rows[0] == {
        "section": "encode",
        "arm": "A",
        "median_ms": 10e3,
        "min_ms": 10e3,
        "percent_of_floor": 10.0,
        "x_first": 1.0,
    }
    assert rows[1] == {
        "section": "encode",
        "arm": "D",
        "median_ms": 22e3,
        "min_ms": 16e3,
        "percent_of_floor": pytest.approx(100 / 22),
        "x_first": pytest.approx(10 / 22),
    }
    assert rows[5]["median_ms"] == 1e3 * (10 + 11 + 12)
    order.clear()
    bench.take_turns(runs, {"A": 2, "D": 2}, {})
    assert order == ["A", "D"] * 3


def test_targets_are_judged():
    """Stops a target that is judged on a slower arm, or on one that did not run."""
    times = {
        "step": {"A": 40.0, "D": 9.0},
        "decode": {"A": 14.0, "D": 10.0},
        "train": {"A": 20.0, "D": 9.0},
        "decode step of 64 rows": {"A": 25.0, "D": 2.0, "E": 1.3},
        "decode step of 512 rows": {"E": 3.8},
    }

    def judge(size, device):
        rows = [
            {"section": name, "arm": arm, "median_ms": ms}
            for name, arms in times.items()
            for arm, ms in arms.items()
        ]
        return bench.judge(size, device, rows)

    # 4.4x; 1.4x; 2.2x
    assert [t["met"] for t in judge("mid", "cpu")] == [True, False, True]
    judged = {t["target"]: t for t in judge("full", "cuda")}
    # 1.3 ms; 3.8 ms, which is 135,000 tokens/s; 19x; 2.2x; 9 ms; 4.4x
    assert [t["met"] for t in judged.values()] == [True, False, True, False, True, False]
    faster = judged["decode step of 64 rows: speed-up over A, at least"]
    assert faster["value"] == pytest.approx(25 / 1.3) and faster["limit"] == 10
    most = judged["decode step of 512 rows: ms, at most"]["limit"]
    assert 512 / most * 1e3 == pytest.approx(140e3)  # tokens per second
    whole = judged["step: ms, at most"]
    assert whole["value"] == 9.0 and whole["limit"] == 750
    del times["step"]["A"], times["train"]["D"]
    assert len(judge("mid", "cpu")) == 1
    assert judge("toy", "cpu") == []


def test_report_and_json(tmp_path, monkeypatch, capsys):
    """Stops a table without its circumstances, gates or numbers, and a failure without a report."""
    monkeypatch.setitem(bench.SIZES, "mid", TINY)
    out = tmp_path / "deep" / "bench.json"
    bench.bench_arms(bench.Args(size="mid", device="cpu", out=str(out)))
    report = json.loads(out.read_text())
    assert {
        "command",
        "date",
        "machine",
        "threads",
        "torch",
        "transformers",
        "dtype",
        "what",
        "processes",
        "rates",
        "gates",
        "gates_hold",
        "rows",
        "targets",
        "seconds",
    } == set(report)
    assert report["what"] == f"mid: B {B}, G {G}, P {30 + 8 + 16}, T {T}"
    assert report["processes"] == 1 and len(report["targets"]) == 3 and report["gates_hold"]
    sections = ["encode", "prefill", "decode", "reference", "train", "optimiser", "step"]
    sections += ["decode step of 6 rows", "decode step of 12 rows"]
    assert [(row["section"], row["arm"]) for row in report["rows"]] == [
        (section, arm) for section in sections for arm in "AD"
    ]
    for theirs, ours in zip(report["rows"][::2], report["rows"][1::2]):
        assert theirs["x_first"] == 1.0 and 0 < ours["min_ms"] <= ours["median_ms"]
        assert ours["x_first"] == theirs["median_ms"] / ours["median_ms"]
        has_floor = ours["section"] not in ("encode", "optimiser", "step")
        assert (ours["percent_of_floor"] != "") is has_floor
    assert list(report["gates"]) == ["D"] and len(report["gates"]["D"]["ratio"]) == 3
    screen = capsys.readouterr().out
    for section in sections:
        for arm in "AD":
            assert len(re.findall(rf"^\| +{section} \| +{arm} \|", screen, re.MULTILINE)) == 1
    assert "gates: arm D greedy equal" in screen and "PASS  correctness gates" in screen
    # Gates that do not hold: the report is written all the same, and the exit status is 1.
    out.unlink()
    monkeypatch.setattr(bench, "gates_hold", lambda gates, dtype: False)
    monkeypatch.setitem(bench.SIZES, "toy", dataclasses.replace(TINY, rows=()))
    with pytest.raises(SystemExit) as stop:
        bench.bench_arms(bench.Args(arms=["D"], device="cpu", out=str(out)))
    assert stop.value.code == 1 and json.loads(out.read_text())["gates_hold"] is False


def test_two_ranks_have_their_own_prompts_and_one_gradient(tmp_path):
    """Stops two processes that do the same work twice, and weights that differ between ranks."""
    one, two = (bench.set_up(TINY, "D", Ranks(r, 2, CPU), torch.float32) for r in (0, 1))
    for ours, theirs in zip(one.models["D"], two.models["D"]):
        assert all(map(torch.equal, ours.parameters(), theirs.parameters()))
    assert one.batch.input_ids != two.batch.input_ids and not torch.equal(one.mask, two.mask)
    # The loss is divided by the completions of all ranks.
    alone = bench.set_up(TINY, "D", Ranks(0, 1, CPU), torch.float32)
    completions = torch.randint(V, (B, G, T), generator=torch.Generator().manual_seed(0))
    for b in (one, alone):
        bench.step(b, "D", Timer(), completions)
    torch.testing.assert_close(2 * one.optimizer.flat, alone.optimizer.flat)
    out = tmp_path / "bench.json"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    program = ["-m", "tools.bench", "--arms", "D", "--device", "cpu", "--out", str(out)]
    done = subprocess.run([*launcher, *program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("PASS  correctness gates") == 1  # rank 0 alone prints
    assert json.loads(out.read_text())["processes"] == 2


def test_an_unknown_arm_is_named():
    """Stops a traceback, or ten minutes of work, where an error message of one sentence is due."""
    with pytest.raises(bench.UserError, match="--arms F"):
        bench.bench_arms(bench.Args(arms=["F"]))


@pytest.mark.parametrize(
    "words, flag, other",
    [
        ([], "--arms", "--dtypes"),
        (["memory"], "--prompt_length", "--arms"),
        (["rehearsal"], "--dtypes", "--arms"),
    ],
)
def test_the_first_word_chooses_the_command(monkeypatch, capsys, words, flag, other):
    """Stops a command that gets the flags of another one."""
    monkeypatch.setattr(bench.sys, "argv", ["bench.py", *words, "--help"])
    with pytest.raises(SystemExit) as stop:
        bench.main()
    text = capsys.readouterr().out
    assert stop.value.code == 0 and text.startswith(
        " ".join(["usage: python -m tools.bench", *words])
    )
    assert f"\n  {flag} " in text or f"\n  {flag}\n" in text
    assert f"\n  {other} " not in text
    monkeypatch.setattr(bench.sys, "argv", ["bench.py", "memroy"])
    with pytest.raises(SystemExit) as stop:
        bench.main()
    assert stop.value.code == 2 and "memroy" in capsys.readouterr().err
