"""The benchmark measures the same job in every arm, and its floors are what it says they are.  No wall time in here."""
import dataclasses
import json
import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lib.common import Ranks
from model import PARTS, HumanOmni
from tools import bench
from toy.humanomni import tiny_humanomni
from training import MasterAdamW

CPU = torch.device("cpu")
TINY = dataclasses.replace(
    bench.SIZES["toy"], decoder=bench._decoder(64, 2, 4, 2, 96, 199), vision=bench._vision(32, 3, 2, 32, 48),
    audio=bench._audio(32, 1, 2, 48, 20, 12), bert=bench._bert(16, 1, 2, 24, 40), text=30, arms="ABCD",
    prompts=2, tokens=9, rows=(6,), copied_rows=6, sweep_tokens=5, slow_repeats=1)
B, G, T = 2, 3, 9


@pytest.fixture
def tiny() -> bench.Bench:
    """Arms A to D over a model of 0.3 M parameters: two prompts, three completions of at most nine tokens."""
    return bench.set_up(TINY, bench.fill_in(bench.Args(generations=G), TINY), Ranks(0, 1, CPU), torch.float32)


# ------------------------------------------------------------------------------------------------
# The same job
# ------------------------------------------------------------------------------------------------

def test_arm_a_is_ours(tiny):
    """Stops a faithful loop that is fast or slow because it computes something else."""
    gates = bench.check(tiny, ["A", "B", "C", "D"], G, lambda words: None)
    assert set(gates) == {"B", "C", "D"}
    for arm in "CD":
        assert gates[arm]["max_dlogp"] < 1e-5 and gates[arm]["relative_gradient_error"] < 1e-5, arm
    assert all(g["greedy_equal"] for g in gates.values()) and bench.gates_hold(gates, torch.float32)
    assert float(tiny.optimizer.flat.abs().max()) == 0           # and nothing of it is left for the first step


def test_the_whole_step_of_a_and_d_has_one_gradient(tiny, monkeypatch):
    """Stops a step whose loss is another one: other denominator, mask, KL or advantage than the twin it is compared with."""
    torch.manual_seed(0)
    completions = torch.randint(199, (B, G, T))
    monkeypatch.setattr(bench, "hf_sample", lambda hf, embeds, *a, **k: completions[hf_sampled.pop()][None])
    monkeypatch.setattr(bench, "our_sample", lambda *a, **k: (completions, torch.zeros(B, G, T)))
    seen = []

    def stop(self, ranks, lr, norm):
        seen.append(bench.take_gradient(self))
        return 0.0, True

    monkeypatch.setattr(MasterAdamW, "step", stop)
    hf_sampled = [1, 0]
    bench.faithful_step(tiny, bench.Laps(CPU))
    for arm in "CD":
        for tiny.micro_batch in (1, 2):
            bench.our_step(tiny, arm, bench.Laps(CPU))
    theirs, *others = seen
    assert theirs.norm() > 1e-3 and len(others) == 4
    for ours in others:
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-5


def test_gates_see_a_wrong_arm(tiny):
    """Stops gates that pass whatever they are shown."""
    with torch.no_grad():
        norm = tiny.hf.model.norm.weight
        for factor, same_tokens in ((1.01, True), (-1.0, False)):
            tiny.hf.model.norm.weight = torch.nn.Parameter(norm * factor)
            with torch.enable_grad():
                gates = bench.check(tiny, ["D"], G, lambda words: None)
            assert gates["D"]["max_dlogp"] > 1e-4 and gates["D"]["relative_gradient_error"] > 1e-4
            assert gates["D"]["greedy_equal"] is same_tokens and not bench.gates_hold(gates, torch.float32)
    good = {"greedy_equal": True, "max_dlogp": 1e-6, "relative_gradient_error": 1e-7, "ratio": [1.0, 1.0, 1.0]}
    assert bench.gates_hold({"D": good}, torch.float32)
    for bad in ({"greedy_equal": False}, {"max_dlogp": 2e-4}, {"relative_gradient_error": 2e-5}, {"ratio": [0.99, 1, 1]},
                {"max_dlogp": math.nan}):
        assert not bench.gates_hold({"D": good | bad}, torch.float32), bad


def test_the_kl_counts(tiny):
    """Stops a reference equal to the policy: its KL and the KL's gradient would be zero in every arm, right or wrong."""
    with torch.no_grad():
        features = bench.encode(tiny.model, tiny.job)
        completions = torch.randint(199, (B, G, T))
        embeds = bench.our_embeds(tiny.model, tiny.job, *features)
        own = bench.our_logps(tiny.model, embeds, completions, tiny.job.lengths, True)
        reference = bench.our_reference(tiny, "D", features, completions)
    assert float((own - reference).abs().max()) > 1e-2


def test_weights_are_the_same_tensors(tiny):
    """Stops arms that drift apart: an update in one must be an update in all."""
    hf = dict(tiny.hf.named_parameters())
    decoder = {n: p for n, p in tiny.model.named_parameters() if n.startswith(PARTS["decoder"])}
    assert set(hf) == set(decoder) and all(hf[n] is p for n, p in decoder.items())
    assert tiny.hf.lm_head.weight is tiny.model.model.embed_tokens.weight
    reference = dict(tiny.reference.named_parameters())
    assert all(p is reference[n] and p is not decoder[n] for n, p in tiny.hf_reference.named_parameters())
    assert tiny.reference.model.audio_tower.conv1.weight is tiny.model.model.audio_tower.conv1.weight


def test_bf16_leaves_the_rotary_frequencies_alone():
    """Stops an arm A whose positions are rounded to bf16: a fault of the benchmark, not of the reference."""
    b = bench.set_up(TINY, bench.fill_in(bench.Args(generations=G), TINY), Ranks(0, 1, CPU), torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 for p in b.hf.parameters())
    assert b.hf.model.rotary_emb.inv_freq.dtype == torch.float32


def test_lengths_are_forced_and_equal(tiny, monkeypatch):
    """Stops an arm that stops early at an end token, or counts other tokens than its neighbour."""
    masks, lengths, sampled = [], [], []
    loss, logps, generate = bench.faithful_loss, HumanOmni.completion_logps, bench.generate
    monkeypatch.setattr(bench, "faithful_loss", lambda *a: masks.append(a[3].sum(-1)) or loss(*a))

    def completion_logps(self, embeds, mask, completions, n, *args, **options):
        lengths.append(n.flatten())
        return logps(self, embeds, mask, completions, n, *args, **options)

    monkeypatch.setattr(HumanOmni, "completion_logps", completion_logps)
    monkeypatch.setattr(bench, "generate", lambda *a, **k: sampled.append(generate(*a, **k)) or sampled[-1])
    again = bench.make_job(TINY, B, G, T, CPU, torch.float32, 0).lengths
    assert torch.equal(tiny.job.lengths, again) and (tiny.job.lengths.amax(1) == T).all()
    assert len(tiny.job.lengths.unique()) > 1
    bench.faithful_step(tiny, bench.Laps(CPU))
    assert torch.equal(torch.stack(masks), tiny.job.lengths)
    for arm in "CD":
        lengths.clear()
        bench.our_step(tiny, arm, bench.Laps(CPU))
        assert torch.equal(torch.cat(lengths), tiny.job.lengths.repeat(2, 1).flatten()), arm  # reference, then policy
    for ids, n, _ in sampled:
        assert (n == T).all() and (ids >= 0).all() and (ids < 199).all()


@torch.no_grad()
def test_hugging_face_samples_all_tokens(tiny):
    """Stops a generate that ends at some default end token, or prompts and completions in the wrong order."""
    embeds = bench.our_embeds(tiny.model, tiny.job, *bench.encode(tiny.model, tiny.job))
    for static in (False, True):
        assert bench.hf_sample(tiny.hf, embeds, G, T, static=static).shape == (B, G, T)
        together = bench.hf_sample(tiny.hf, embeds, 1, T, static=static, greedy=True)
        ours = bench.our_sample(tiny.model, embeds, G, T, shared=True, greedy=True)[0]
        assert torch.equal(together.expand(-1, G, -1), ours)
        assert not torch.equal(ours[0], ours[1])
    a, b = (bench.our_sample(tiny.model, embeds, G, T, shared=shared, greedy=True)[0] for shared in (True, False))
    assert torch.equal(a, b)


@pytest.mark.parametrize("arm, passes", [("A", 2 * G + 1), ("C", 1), ("D", 1)])
def test_clips_through_the_towers(tiny, arm, passes):
    """Stops a faithful loop that is made slower than it is, and an encode-once that encodes twice."""
    seen = {"audio": 0, "video": 0}
    for model in (tiny.model, tiny.reference):               # two trees of modules, though the towers' weights are one
        tower = model.model.vision_tower
        model.model.audio_tower.register_forward_hook(
            lambda m, a, out: seen.update(audio=seen["audio"] + len(out.last_hidden_state)))
        getattr(tower, "vision_model", tower).embeddings.register_forward_hook(
            lambda m, a, out: seen.update(video=seen["video"] + len(out)))
    bench.step(tiny, arm, bench.Laps(CPU))
    assert seen == {"audio": B * passes, "video": B * 8 * passes}          # 8 frames a clip


# ------------------------------------------------------------------------------------------------
# Sizes and floors
# ------------------------------------------------------------------------------------------------

def test_toy_is_the_miniature(tmp_path):
    """Stops the toy size from drifting off the miniature's model."""
    theirs = tiny_humanomni(tmp_path, ["a few words to learn merges from"], 0)
    ours = bench.build_model(bench.SIZES["toy"], "meta", torch.float32, 0)
    words = ("embed_tokens", "bert_model.embeddings")        # vocabularies: the world's sentences decide them
    shapes = [{n: p.shape for n, p in m.named_parameters() if not any(w in n for w in words)} for m in (theirs, ours)]
    assert shapes[0] == shapes[1]
    assert theirs.config.rope_theta == ours.config.rope_theta and theirs.config.head_dim == ours.config.head_dim


def test_sizes_are_what_they_are_called():
    """Stops a benchmark at another geometry than the released one, or a middle that is not in the middle."""
    full, mid = (bench.build_model(bench.SIZES[s], "meta", torch.bfloat16, 0) for s in ("full", "mid"))
    count = lambda model, part: sum(p.numel() for n, p in model.named_parameters() if n.startswith(PARTS[part]))
    assert round(count(full, "decoder") / 1e6, 1) == 494.0 and round(count(full, "audio") / 1e6) == 637
    assert round(count(full, "vision") / 1e6, 1) == 92.9 and 55e6 < count(mid, "decoder") < 65e6
    for part in ("vision", "audio"):
        assert 7 < count(full, part) / count(mid, part) < 9
    for size in ("mid", "full"):
        job = bench.make_job(bench.SIZES[size], 1, 2, 2, "cpu", torch.float32, 0)
        assert len(job.input_ids[0]) - 2 + 392 + 500 == 950
    # Whisper 2.27 TFLOP a clip, 8 frames of SigLIP without its last layer 0.26, projectors 0.05.
    towers, projectors = bench.media_flops(bench.SIZES["full"])
    assert towers == pytest.approx(2.53e12, rel=0.01) and projectors == pytest.approx(0.049e12, rel=0.02)


def test_flops_are_those_that_are_done(tiny):
    """Stops a floor that forgets a matrix, or counts attention in another unit than products."""
    c, P = tiny.model.config, 20
    matrices = sum(p.numel() for n, p in tiny.model.named_parameters() if n.startswith("model.layers.") and p.dim() == 2)
    assert bench.layer_parameters(c) == matrices
    with FlopCounterMode(display=False) as counted, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        tiny.model.logits(tiny.model.hidden(torch.randn(1, P, 64), torch.ones(1, P, dtype=torch.bool)))
    # The kernel computes all P x P scores; the floor counts those that are looked at.
    assert bench.decoder_flops(c, P, P * P) + bench.head_flops(c, P) == counted.get_total_flops()


def test_floor_formulas(tiny):
    """Stops percentages of a floor that is not one: a worked example by hand."""
    full = bench.build_model(bench.SIZES["full"], "meta", torch.bfloat16, 0).config
    assert bench.kv_bytes(full, 2) == 12288
    assert bench.decoder_flops(full, 950, 950 * 951 // 2) == pytest.approx(0.72e12, rel=0.01)
    # A prompt of 5 and completions of 3 and 1: tokens 5 + 2 + 0; pairs 15, then 6 + 7.
    assert bench.row_work(5, [3, 1]) == (7, 28)
    # 0.988 GB of weights at 4.3 TB/s: 0.23 ms a step; with 64 rows' keys a little more.
    rates = {"bytes_per_second": 4.3e12, "flops_per_second": 790e12}
    one = bench.decode_floor(full, 1, 1, 1, 2, 2, rates)
    assert one == pytest.approx(0.988e9 / 4.3e12, rel=0.01)
    c, slow = tiny.model.config, {"bytes_per_second": 1.0, "flops_per_second": 1e30}
    weights, kv = 4 * (bench.layer_parameters(c) + 64 * 199), 2 * 2 * 2 * 16 * 4
    # Two steps: the prompt's keys once, each of three completions its own, one and two tokens long.
    assert bench.decode_floor(c, 7, 1, 3, 3, 4, slow) == 2 * weights + kv * (7 + 3 + 7 + 6)
    slow = {"bytes_per_second": 1e30, "flops_per_second": 1.0}
    assert bench.decode_floor(c, 7, 1, 3, 2, 4, slow) == bench.decoder_flops(c, 3, 24) + bench.head_flops(c, 3)


def test_floors_of_the_sections(tiny):
    """Stops a training floor without its backward pass, an optimiser floor without its moments."""
    rates = {"bytes_per_second": 2.0, "flops_per_second": 3.0}
    job, c = tiny.job, tiny.model.config
    parts = bench.floors(TINY, c, 50, job, 1000, 4, rates)
    towers, projectors = bench.media_flops(TINY)
    assert parts["encode"] == B * towers / 3
    forward = B * projectors + bench.head_flops(c, int(job.lengths.sum()))
    for row in job.lengths.tolist():
        read = sum(row) - G
        pairs = 50 * 51 // 2 + sum((n - 1) * 50 + (n - 1) * n // 2 for n in row)
        forward += bench.decoder_flops(c, 50 + read, pairs)
    assert parts["reference"] == forward / 3 and parts["train"] == forward
    assert parts["optimiser"] == 14_000
    assert bench.floors(TINY, c, 50, job, 1000, 2, rates)["optimiser"] == 15_000             # and bf16 weights written back
    assert parts["step"] == sum(v for k, v in parts.items() if k != "step")


# ------------------------------------------------------------------------------------------------
# Running and telling
# ------------------------------------------------------------------------------------------------

def test_arms_take_turns():
    """Stops one arm from having all the quiet minutes, and a warm-up round that is counted."""
    order = []
    runs = {arm: lambda laps, arm=arm: order.append(arm) or laps.lap("encode") for arm in "AD"}
    booked = bench.take_turns(runs, {"A": 1, "D": 3}, CPU, lambda words: None)
    assert order == ["D", "A", "D", "D", "D"]                  # the slow one is not warmed up on a CPU
    assert {arm: len(turns) for arm, turns in booked.items()} == {"A": 1, "D": 3}
    order.clear()
    bench.take_turns(runs, {"A": 2, "D": 2}, CPU, lambda words: None)
    assert order == ["A", "D"] * 3


def test_sections_add_up():
    """Stops a whole step that loses a part, or a section that forgets its second lap."""
    laps = bench.Laps(CPU)
    laps.marks = [("", 0.0), ("encode", 1.0), ("prefill", 1.5), ("prefill", 3.5), ("decode", 10.5), ("reward", 11.0),
                  ("reference", 13.0), ("train", 20.0), ("encode", 20.25), ("train", 21.25), ("optimiser", 22.0)]
    laps.peaks = {name: i for i, (name, _) in enumerate(laps.marks)}
    booked = bench.book(laps)
    assert {name: s for name, (s, _) in booked.items()} == {
        "encode": 1.25, "prefill": 2.5, "decode": 7.0, "reward": 0.5, "reference": 2.0, "train": 8.0, "optimiser": 0.75,
        "step": 22.0}
    assert booked["step"][1] == booked["optimiser"][1] == 10
    del laps.marks[5:]
    assert "step" not in bench.book(laps)                      # the sampling alone is no step


def test_prefill_and_decode_are_told_apart(tiny):
    """Stops a decode time with the prefill in it: of Hugging Face's generate, and of ours."""
    embeds = torch.randn(B, 12, 64)
    for arm in "ABCD":
        laps = bench.Laps(CPU)
        bench.sample(tiny, arm, embeds, G, 4, laps=laps)
        assert [name for name, _ in laps.marks] == ["", "prefill", "decode"], arm
    assert "prefill" not in vars(tiny.model)


def test_targets_are_judged():
    """Stops a target that is met by a slower arm, or by one that was not run."""
    times = {"step": {"A": 40.0, "D": 9.0}, "decode": {"A": 30.0, "B": 14.0, "C": 12.0, "D": 10.0},
             "train": {"A": 30.0, "C": 20.0, "D": 9.0}}
    sections = {name: {arm: {"median_ms": ms} for arm, ms in arms.items()} for name, arms in times.items()}
    judged = bench.targets("mid", "cpu", (1, 8, 200), sections, [], {"D": {"relative_gradient_error": 2e-5}})
    assert [t["met"] for t in judged] == [True, False, True, False]        # 4.4x; 1.4x of the *better* generate; 2.2x; error
    del sections["step"]["A"]
    assert len(bench.targets("mid", "cpu", (1, 8, 200), sections, [], {})) == 2
    swept = [{"rows": rows, "arm": arm, "median_ms": ms} for rows, arm, ms in
             ((64, "A", 25.0), (64, "D", 2.0), (64, "E", 1.3), (512, "E", 3.3))]
    aim = "whole step of 8 x 8, seconds, at most"
    for shape, there in (((8, 8, 200), True), ((4, 8, 200), False)):           # of another shape nothing was said
        judged = {t["target"]: t for t in bench.targets("full", "cuda", shape, sections, swept, {})}
        assert (aim in judged) is there
    assert judged["decode ms a step at 64 rows, at most"]["met"]
    assert not judged["decode tokens a second at 512 rows, at least"]["met"]               # 155k
    assert judged["decode at 64 rows, times Hugging Face generate's (A), at least"]["value"] == pytest.approx(25 / 1.3)
    assert bench.targets("toy", "cpu", (1, 8, 200), sections, [], {}) == []
    ladder = bench.ladders(sections)["decode"]
    assert [(r["arm"], r["ratio"]) for r in ladder] == [("A", 1.0), ("B", 30 / 14), ("C", 2.5), ("D", 3.0)]


def test_report_and_json(tmp_path, monkeypatch, capsys):
    """Stops a table without its circumstances, gates or numbers, and one size that wipes out another."""
    monkeypatch.setitem(bench.SIZES, "toy", TINY)
    out = tmp_path / "deep" / "bench.json"
    bench.main(bench.Args(device="cpu", generations=G, repeats=2, out=str(out)))
    report = json.loads(out.read_text())["toy"]
    assert {"command", "date", "machine", "threads", "torch", "transformers", "dtype", "seed", "what", "shape", "rates",
            "floors_ms", "gates", "gates_hold", "sections", "decode", "ladders", "targets", "seconds"} == set(report)
    assert len(report["shape"].pop("lengths")) == B
    assert report["shape"] == {"prompts": B, "generations": G, "tokens": T, "prefix": 30 + 8 + 4}
    assert set(report["sections"]) == {*bench.SECTIONS, "step"} and report["gates_hold"]
    for name, arms in report["sections"].items():
        assert set(arms) == ({"A", "B", "C", "D"} if name in ("prefill", "decode") else {"A", "C", "D"}), name
        for arm, row in arms.items():
            assert set(row) == {"median_ms", "min_ms", "repeats", "peak_mb", "percent_of_floor"}
            assert row["min_ms"] <= row["median_ms"] and row["peak_mb"] > 1 and row["repeats"] == (2 if arm == "D" else 1)
    assert {row["arm"] for row in report["decode"]} == {"A", "B", "C", "D"}
    assert all(len(report["gates"][arm]["ratio"]) == 3 for arm in "CD")
    screen = capsys.readouterr().out
    assert all(screen.count(f"{name:11}{arm} ") == 1 for name in ("encode", "train", "step") for arm in "ACD")
    assert screen.count("greedy equal") >= 20 and "PASS  correctness gates" in screen
    # Another size into the same file, and gates that do not hold: written all the same, and exit status 1.
    monkeypatch.setattr(bench, "bench", lambda args, size: report | {"gates_hold": False})
    with pytest.raises(SystemExit) as stop:
        bench.main(bench.Args(size="mid", out=str(out)))
    assert stop.value.code == 1 and set(json.loads(out.read_text())) == {"toy", "mid"}


def test_two_ranks_do_one_job(tmp_path):
    """Stops a scaling number where the two processes do something else than the one."""
    out = tmp_path / "bench.json"
    bench.scaling(bench.Args(tokens=3, generations=2, prompts=2, repeats=1, out=str(out)))
    report = json.loads(out.read_text())["ranks_toy"]
    one, two = report["runs"]
    assert (one["processes"], two["processes"]) == (1, 2) and one["grad_norm"] > 0
    assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
    assert report["efficiency"] == pytest.approx(one["median_ms"] / two["median_ms"] / 2) and report["gates_hold"]


@pytest.mark.parametrize("flags", [{"arms": ["F"]}, {"generations": 1}, {"tokens": 1}, {"repeats": 0},
                                   {"rows": [0]}, {"prompts": -1}])
def test_bad_flags_are_named(flags):
    """Stops a traceback, or ten minutes of work, where one sentence is due."""
    with pytest.raises(bench.UserError, match=f"--{next(iter(flags))}"):
        bench.check_args(bench.Args(**flags))
