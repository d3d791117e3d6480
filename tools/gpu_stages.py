"""The stages of tools.gpu_check.  Each runs in a process of its own:

    python -m tools.gpu_stages --stage smoke --findings /tmp/findings.jsonl

A check is a function that returns what it found and True, False or "measured".  An exception is
recorded as WRONG and the stage goes on; after a CUDA fault its later checks fail too.

Legend   B prompts   G completions per prompt   N = B * G rows   P prompt length
         T completion length   K key/value heads   R query heads per key head   d head size
         V vocabulary
"""

import dataclasses
import faulthandler
import math
import os
import signal
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Literal
from unittest import mock

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

import grpo
import sampler
from course.one_update import one_update
from lib.args import run_main
from lib.dist import Ranks, dtype_of, start_ranks
from lib.files import write_text
from model import HumanOmni, embed, encode_media, frozen_reference, sdpa
from ops import decode_attention
from ops.logprob_head import add_product_, fp32_product
from tools import bench
from tools.bench import GIB, SIZES, build_model, decode_floor, machine_rates, peak, random_batch
from tools.gpu_check import LIMITS, add_finding
from training import MasterAdamW

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"
GROUP = 8  # completions per prompt
# T and P of the decode measurements, and the numbers of rows in the order in
# which they are measured.
SHAPES = {"toy": (32, 64, (16, 8, 32)), "full": (512, 960, (64, 16, 512, 8, 128))}


@dataclasses.dataclass
class Args:
    stage: Literal[tuple(LIMITS)]  # what to check
    findings: str  # jsonl file that gets a line for each finding
    size: Literal["toy", "full"] = "full"  # geometry of the model
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one
    until: float = 0.0  # time.time() at which the parent kills this; 0: never


@dataclasses.dataclass
class Stage:
    """What a stage's checks share."""

    args: Args
    ranks: Ranks

    @property
    def device(self) -> torch.device:
        return self.ranks.device

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        return dtype_of("auto", self.device)

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def check(self, what: str, run: Callable[[], tuple[str, bool | str]]) -> None:
        """Run one check and put its finding on the disk."""
        start = time.perf_counter()
        try:
            found, verdict = run()
            self.wait()  # a kernel that failed says so at the next wait
        except Exception as error:
            found, verdict = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", False
        verdict = {True: "right", False: "WRONG"}.get(verdict, verdict)
        row = add_finding(
            Path(self.args.findings),
            self.args.stage,
            what,
            verdict,
            found,
            time.perf_counter() - start,
        )
        print(" | ".join(map(str, row.values())), flush=True)


def relative_error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    """Norm of the difference over the norm.  Infinite if it is not a number,
    so that every limit finds it."""
    error = float((ours.double() - exact.double()).norm() / exact.double().norm())
    return error if math.isfinite(error) else math.inf


# ------------------------------------------------------------------------------------------------
# smoke: single operations against float64 or their twins
# ------------------------------------------------------------------------------------------------


def products(device) -> tuple[str, bool]:
    """Products with fp32 output, and fp32 convolutions: off by rounding alone."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    gen = torch.Generator().manual_seed(0)
    a, b = (torch.randn(300, 512, generator=gen).to(device, dtype) for _ in range(2))
    sums = torch.randn(300, 300, generator=gen).to(device)
    summed = sums.clone()
    add_product_(summed, a, b.t())
    sound = torch.randn(2, 80, 400, generator=gen).to(device)
    picture = torch.randn(2, 3, 56, 56, generator=gen).to(device)
    taps1, taps2 = (
        torch.randn(*shape, generator=gen).to(device) for shape in ((96, 80, 3), (96, 3, 14, 14))
    )
    exact = a.double() @ b.double().t()
    errors = {
        "mm": relative_error(fp32_product(a, b), exact),
        "addmm": relative_error(summed, sums.double() + exact),
        "bmm": relative_error(decode_attention.scores(a[None], b[None])[0], exact),
        "conv1d": relative_error(F.conv1d(sound, taps1), F.conv1d(sound.double(), taps1.double())),
        "conv2d": relative_error(
            F.conv2d(picture, taps2, stride=14),
            F.conv2d(picture.double(), taps2.double(), stride=14),
        ),
    }
    return ", ".join(f"{name} {error:.0e}" for name, error in errors.items()), max(
        errors.values()
    ) < 1e-5


def attention_twin(qkv, rope, prefix, suffix, bias, t) -> torch.Tensor:
    """ops.decode_kernel.rotate_write_attend in PyTorch, called as it is called.
    Writes to suffix."""
    _, B, _, P, _ = prefix.shape
    q = sampler.rotate_and_write(qkv[0].unflatten(0, (B, -1)), rope.unbind(0), suffix, t)
    visible = bias.clone()
    visible[..., P : P + int(t) + 1] = 0.0
    return decode_attention.attend(q, prefix, suffix, visible, int(t) + 1).view(1, qkv.shape[1], -1)


def append_token_twin(
    logits, u, tokens, logps, lengths, done, ends, t, temperature, greedy
) -> None:
    """ops.sample_kernel.append_token in PyTorch, called as it is called."""
    rows = types.SimpleNamespace(
        u=u, tokens=tokens, logps=logps, lengths=lengths, done=done, ends=ends, t=t
    )
    sampler.append_token(rows, logits, temperature, greedy)


def kernels_here(device) -> types.SimpleNamespace:
    """The kernels; on a CPU their twins, so that a dry run goes through the same checks."""
    if device.type == "cuda":
        return decode_attention.load_kernels()
    return types.SimpleNamespace(rotate_write_attend=attention_twin, append_token=append_token_twin)


ATTENTION_SHAPES = [  # B, G, K, R, d, P, T, t
    (8, 8, 2, 7, 64, 960, 512, 300),
    (2, 8, 2, 7, 64, 960, 512, 511),
    (64, 8, 2, 7, 64, 960, 64, 5),
    (1, 1, 1, 1, 32, 5, 3, 0),
    (3, 12, 1, 4, 32, 130, 16, 9),
    (1, 16, 2, 8, 128, 2000, 80, 70),
]


def attention_kernels(device, attend=None) -> tuple[str, bool]:
    """The attention kernels at six shapes, bf16 and fp32, against their twin in fp32."""
    attend = attend or kernels_here(device).rotate_write_attend
    shapes = ATTENTION_SHAPES if device.type == "cuda" else ATTENTION_SHAPES[3:5]
    worst = {}
    for dtype, limit in ((torch.bfloat16, 2e-2), (torch.float32, 1e-5)):
        for shape in shapes:
            B, g, K, R, d, P, T, t = shape
            gen = torch.Generator().manual_seed(P + t)
            draw = lambda *s, gen=gen, dtype=dtype: torch.randn(*s, generator=gen).to(device, dtype)
            angle = torch.rand(B, 1, 1, d // 2, generator=gen).repeat(1, 1, 1, 2) * 6
            rope = torch.stack((angle.cos(), angle.sin())).to(device, dtype)
            qkv, prefix = draw(1, B * g, K * R + 2 * K, d), draw(2, B, K, P, d)
            suffix, position = draw(2, B, K, g, T, d), torch.tensor([t], device=device)
            bias = torch.full((B, 1, 1, 1, P + T), -torch.inf, device=device)
            bias[..., :P] = 0.0
            bias[0, ..., : P // 2] = -torch.inf  # a short prompt: spans without a key
            given = [x.float().clone() for x in (qkv, rope, prefix, suffix)]
            suffix[..., t:, :] = torch.nan  # what is not yet written must not be read
            expected = attention_twin(*given, bias, position)
            ours = attend(qkv, rope, prefix, suffix, bias, position)
            error = relative_error(ours, expected)
            error = max(error, relative_error(suffix[..., t, :], given[3][..., t, :]))
            worst[dtype, shape] = error / limit
    dtype, shape = max(worst, key=worst.get)
    found = f"at worst {100 * worst[dtype, shape]:.0f} % of what is allowed, {dtype} {shape}"
    return found, max(worst.values()) < 1


def sampling_kernels(device, append_token=None) -> tuple[str, bool]:
    """Tokens and log-probabilities of the sampling kernels against those of `append_token`,
    64 rows."""
    append_token = append_token or kernels_here(device).append_token
    equal = count = 0
    worst = 0.0
    for V, temperature, greedy in ((151_936, 1.0, False), (1000, 0.7, False), (151_936, 1.0, True)):
        gen, N = torch.Generator().manual_seed(V + 1), 64
        logits = (torch.randn(N, V, generator=gen) * 3).to(device)
        u = torch.rand(3, N, dtype=torch.float64, generator=gen).to(device)
        both = []
        for how in (append_token, append_token_twin):
            tokens = torch.zeros(3, N, dtype=torch.long, device=device)
            logps = torch.zeros(3, N, device=device)
            lengths = torch.zeros(N, dtype=torch.long, device=device)
            done = torch.zeros(N, dtype=torch.bool, device=device)
            ends, t = torch.tensor([5], device=device), torch.tensor([1], device=device)
            how(logits, u, tokens, logps, lengths, done, ends, t, temperature, greedy)
            both.append((tokens, logps))
        equal += int((both[0][0][1] == both[1][0][1]).sum())
        count += N
        worst = max(worst, relative_error(both[0][1], both[1][1]))
    # Sums that are rounded differently put the borders between tokens up to 1e-8 apart.  With this
    # seed no random number is closer than 8e-7 to a border; with any seed, one draw in some
    # thousands would be.
    return (
        f"{equal} of {count} tokens equal, log-probabilities off by {worst:.0e}",
        equal == count and worst < 1e-5,
    )


def training_attention(device) -> tuple[str, bool]:
    """Training attention through flash (CausalBias) against an explicit mask in fp32:
    output and gradients."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    gen, S, P = torch.Generator().manual_seed(0), 60, 200
    q, k, v = (
        torch.randn(4, n, heads, 64, generator=gen).to(device)
        for n, heads in ((S, 14), (P + S, 2), (P + S, 2))
    )
    mask = torch.ones(S, P + S, dtype=torch.bool, device=device).tril(P)
    results = []
    for cast, bias in ((dtype, causal_lower_right(S, P + S)), (torch.float32, mask)):
        inputs = [x.to(cast).requires_grad_() for x in (q, k, v)]
        out = sdpa(*inputs, bias)
        out.float().square().sum().backward()
        results.append([out.detach(), *(x.grad for x in inputs)])
    errors = [relative_error(a, b) for a, b in zip(*results)]
    return "output, dq, dk, dv off by " + ", ".join(f"{e:.0e}" for e in errors), max(errors) < 2e-2


def rates(stage: Stage) -> tuple[str, str]:
    found = machine_rates(stage.device, stage.dtype)
    return (
        f"copy {found['bytes_per_second'] / 1e9:.0f} GB/s, "
        f"product {found['flops_per_second'] / 1e12:.2f} TFLOP/s, {stage.dtype}"
    ), "measured"


def smoke(stage: Stage) -> None:
    stage.check("versions", lambda: (versions(stage), "measured"))
    stage.check("products and convolutions", lambda: products(stage.device))
    stage.check("attention kernels", lambda: attention_kernels(stage.device))
    stage.check("sampling kernels", lambda: sampling_kernels(stage.device))
    stage.check("training attention", lambda: training_attention(stage.device))
    stage.check("rates", lambda: rates(stage))


def versions(stage: Stage) -> str:
    import transformers

    found = f"torch {torch.__version__}, transformers {transformers.__version__}"
    if stage.on_gpu:
        import triton

        free, total = torch.cuda.mem_get_info()
        found += f", triton {triton.__version__}, {free / GIB:.1f} of {total / GIB:.1f} GiB free"
        found += f", {os.environ.get('PYTORCH_ALLOC_CONF', 'allocator as set by the user')}"
    return found


# ------------------------------------------------------------------------------------------------
# full: the true size
# ------------------------------------------------------------------------------------------------


@torch.no_grad()
def decode(stage: Stage, model: HumanOmni, N: int, machine: dict) -> tuple[str, str]:
    """Mean time of a decode step over the last quarter of T, beside the time to read weights,
    keys and values once."""
    T, P, _ = SHAPES[stage.args.size]
    decoder = sampler.Decoder.of(model)
    rows = decoder.state_for(model, N // GROUP, GROUP, P, T)
    first = T * 3 // 4
    rows.start(
        model,
        torch.ones(N // GROUP, P, dtype=torch.bool, device=stage.device),
        [],
        torch.rand(N // GROUP, GROUP, T, dtype=torch.float64, device=stage.device),
    )
    rows.tokens.zero_()  # tokens of the vocabulary, which this model's end token is not
    rows.prefix.normal_()  # zeros would be faster than what is real
    rows.suffix.normal_()
    rows.t.fill_(first)
    stage.wait()
    start = time.perf_counter()
    decoder.advance(model, rows, first, 1.0, False)  # compiles and captures
    stage.wait()
    warm_up = time.perf_counter() - start
    start = time.perf_counter()
    for t in range(first + 1, T - 1):
        decoder.advance(model, rows, t, 1.0, False)
    stage.wait()
    ms = 1e3 * (time.perf_counter() - start) / (T - 2 - first)
    # The floor of all steps up to the last one, less that of the steps before the timed ones.
    floors = [
        decode_floor(model, P, N // GROUP, GROUP, tokens, machine) for tokens in (first + 2, T)
    ]
    floor = 1e3 * (floors[1] - floors[0]) / (T - 2 - first)
    found = (
        f"{ms:.3f} ms a step (floor {floor:.2f}), {1e3 * N / ms:.0f} tokens/s; "
        f"first call {warm_up:.1f} s"
    )
    return found, "measured"


@torch.no_grad()
def profile(stage: Stage, model: HumanOmni, N: int) -> tuple[str, str]:
    """Kernel by kernel: what a step of N rows spends its time on,
    into a file beside the findings."""
    T, P, _ = SHAPES[stage.args.size]
    decoder, steps = sampler.Decoder.of(model), 4
    rows = decoder.state_for(model, N // GROUP, GROUP, P, T)
    activity = torch.profiler.ProfilerActivity
    rows.t.fill_(T - steps - 2)
    with torch.profiler.profile(
        activities=[activity.CUDA if stage.on_gpu else activity.CPU]
    ) as seen:
        for t in range(T - steps - 2, T - 2):
            decoder.advance(model, rows, t, 1.0, False)
        stage.wait()
    name = "self_device_time_total" if stage.on_gpu else "self_cpu_time_total"
    events = [
        (getattr(e, name) / steps, e.count / steps, e.key)
        for e in seen.key_averages()
        if getattr(e, name)
    ]
    events.sort(reverse=True)
    path = Path(stage.args.findings).with_suffix(".profile.txt")
    lines = [f"{us:10.1f} us  {n:7.1f} launches  {key}" for us, n, key in events]
    write_text(path, f"a decode step of {N} rows\n" + "\n".join(lines) + "\n")
    busy, launches = sum(us for us, *_ in events), sum(n for _, n, _ in events)
    what = "kernels" if stage.on_gpu else "operations"
    return f"{launches:.0f} {what} a step, {busy:.0f} us of work; see {path.name}", "measured"


def whole_step(stage: Stage, model: HumanOmni) -> tuple[str, bool]:
    """One GRPO step.  The gradient is finite, the trainer's probability over the sampler's is
    within 0.1 of 1 at three quantiles, and the update's peak memory is at most 1.15 times the
    estimate of tools.bench.peak."""
    size, device, B, T = SIZES[stage.args.size], stage.device, 2, SHAPES[stage.args.size][0]
    reference, optimizer = frozen_reference(model), MasterAdamW(model.set_trained(), 1e-6)
    flags = grpo.Args(
        model="", data="", out="", num_generations=GROUP, max_new_tokens=T, micro_batch=1
    )
    batch = random_batch(size, B, torch.Generator().manual_seed(0), model.dtype).to(device)
    batch, meter = encode_media(model, batch), grpo.Meter()
    rollout = grpo.sample_completions(model, mock.Mock(decode=str), batch, flags)
    rollout.ref_logps = grpo.rollout_logps(reference, batch, rollout, flags)
    # The rewards of noise are all 0.
    rollout.total_rewards = torch.arange(float(B * GROUP), device=device).view(B, GROUP) % 3
    rollout.advantages = grpo.compute_advantages(rollout, flags, stage.ranks)
    with torch.no_grad():
        logps = torch.cat(
            [
                model.completion_logps(
                    *embed(model, batch.select([b])),
                    rollout.completions[b : b + 1],
                    rollout.lengths[b : b + 1],
                )
                for b in range(B)
            ]
        )
    if stage.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    moved = one_update(model, optimizer, batch, rollout, flags, stage.ranks, 1e-6, meter)
    norm = grpo.Meter.join([meter.totals()])["grad_norm"]
    quantiles = torch.tensor([0.01, 0.5, 0.99], device=device)
    ratio = (logps - rollout.logps)[rollout.mask].exp().quantile(quantiles).tolist()
    found = (
        f"gradient norm {norm:.3f}, ratio at 1, 50, 99 % {' / '.join(f'{r:.3f}' for r in ratio)}"
    )
    right = moved and norm > 0 and all(abs(r - 1) < 0.1 for r in ratio)
    if not stage.on_gpu:
        return f"{found}; memory is not measured", right
    expected = sum(
        peak(model, 1, GROUP, model.prompt_length(batch.input_ids), T, model.dtype).values()
    )
    expected += sum(r.nbytes for r in sampler.Decoder.of(model).states.values())
    measured = torch.cuda.max_memory_allocated()
    return (
        f"{found}; peak {measured / GIB:.1f} GiB, expected {expected / GIB:.1f}",
        right and measured < 1.15 * expected,
    )


def compiler_counters() -> tuple[str, bool]:
    """Number of compiled graphs and of graph breaks; wrong if a function reached the limit of
    recompilations."""
    counters = torch._dynamo.utils.counters
    limits = sum(n for reason, n in counters["unimplemented"].items() if "limit" in reason)
    graphs, breaks = (
        counters["stats"].get("unique_graphs", 0),
        sum(counters["graph_break"].values()),
    )
    return (
        f"{graphs} graphs, {breaks} breaks, {limits} times at the limit of recompilations",
        not limits,
    )


def full(stage: Stage) -> None:
    start = time.perf_counter()
    model = build_model(SIZES[stage.args.size], stage.device, stage.dtype)
    model.eos_ids = [model.config.vocab_size]  # nothing ends: every completion has T tokens
    stage.wait()
    stage.check("model", lambda: (f"built in {time.perf_counter() - start:.1f} s", "measured"))
    machine = machine_rates(stage.device, stage.dtype)
    first, second, *others = SHAPES[stage.args.size][2]
    stage.check(f"decode, {first} rows", lambda: decode(stage, model, first, machine))
    stage.check(f"decode, {second} rows", lambda: decode(stage, model, second, machine))
    stage.check("one GRPO step", lambda: whole_step(stage, model))
    for N in others:
        stage.check(f"decode, {N} rows", lambda N=N: decode(stage, model, N, machine))
    stage.check("compiler", compiler_counters)
    # Last: profilers have hung on captured graphs (pytorch issues 75504, 135003).
    stage.check(f"profile, {first} rows", lambda: profile(stage, model, first))


# ------------------------------------------------------------------------------------------------
# golden: the reference code's own numbers, and every way to run a decode step
# ------------------------------------------------------------------------------------------------


def golden_model(device, parts=("decoder",)) -> tuple[HumanOmni, torch.Tensor, torch.Tensor]:
    """The reference code's tiny checkpoint in fp32, and its prompts."""
    model = HumanOmni.from_pretrained(
        GOLDEN / "humanomni", bert=GOLDEN / "bert", device=device, log=str
    )
    model.eos_ids = [380, *range(0, 380, 12)]  # many, so that completions differ in length
    model.set_trained(parts)
    forward = torch.load(GOLDEN / "forward.pt", weights_only=True)
    ids, frames, mel, *question = (
        forward[k] for k in ("input_ids", "frames", "mel", "question_ids", "question_mask")
    )
    media = (x.to(device) for x in (frames.float(), mel.float(), *question))
    return model, *model.embed_prompt(ids, *media)


def reference_parity(device) -> tuple[str, bool]:
    """Loss and gradient norms of the reference code, fp32."""
    model, embeds, mask = golden_model(device, ("decoder", "projectors", "gate", "bert"))
    stored = torch.load(GOLDEN / "grpo.pt", weights_only=True)
    g = {k: v.to(device) if torch.is_tensor(v) else v for k, v in stored.items()}
    logps = model.completion_logps(embeds, mask, g["completions"], g["lengths"])
    inside = torch.arange(logps.shape[2], device=device) < g["lengths"][..., None]
    loss, _ = grpo.grpo_loss(
        logps, logps.detach(), g["ref_logps"], g["advantages"], inside, beta=g["beta"], kl="k3"
    )
    loss.backward()
    ours, off = dict(model.named_parameters()), abs(float(loss.detach() - g["loss"]))
    errors = [
        abs(float(ours[name].grad.norm()) - norm) / (norm + 1e-4)
        for name, norm in g["grad_norms"].items()
    ]
    worst = float(torch.tensor(errors).max())  # NaN if one of them is
    return f"loss off by {off:.0e}, a norm by {worst:.0e}", off < 1e-5 and worst < 2e-3


GOLDEN_SAMPLING = {"num_generations": GROUP, "max_new_tokens": 48, "seed": 1}


def naive_tokens(device) -> dict[bool, torch.Tensor]:
    """greedy or sampled -> the tokens of the sampler's slow twin."""
    model, embeds, mask = golden_model(device)
    given = model, embeds.detach(), mask
    return {
        greedy: sampler.generate_naive(*given, **GOLDEN_SAMPLING, greedy=greedy)[0]
        for greedy in (True, False)
    }


def path_equals_naive(device, path: str, naive: dict[bool, torch.Tensor]) -> tuple[str, bool]:
    """Tokens of the sampler as `path` runs it: those of its naive twin, fp32."""
    model, embeds, mask = golden_model(device)
    given = model, embeds.detach(), mask
    with mock.patch.dict(os.environ, {sampler.PATH_VARIABLE: path}):
        equal = {
            ("greedy" if greedy else "sampled"): torch.equal(
                sampler.generate(*given, **GOLDEN_SAMPLING, greedy=greedy)[0], tokens
            )
            for greedy, tokens in naive.items()
        }
    return f"tokens equal: {equal}", len(equal) == 2 and all(equal.values())


def golden(stage: Stage) -> None:
    stage.check("loss and gradient norms", lambda: reference_parity(stage.device))
    naive: dict[bool, torch.Tensor] = {}

    def run_naive() -> tuple[str, str]:
        naive.update(naive_tokens(stage.device))
        return "done", "measured"

    stage.check("naive sampler", run_naive)
    # The simplest first: what a failed capture or kernel leaves behind would fail the others, too.
    paths = sampler.DECODE_PATHS if stage.on_gpu else ["eager"]
    for path in paths:
        stage.check(
            f"decode path {path}", lambda path=path: path_equals_naive(stage.device, path, naive)
        )


# ------------------------------------------------------------------------------------------------
# bench: side by side
# ------------------------------------------------------------------------------------------------


def side_by_side(stage: Stage, arms: str, rows: tuple[int, ...]) -> tuple[str, bool]:
    """tools.bench with few repeats; its own gates decide."""
    size = dataclasses.replace(SIZES[stage.args.size], rows=rows, slow=1)
    out = Path(stage.args.findings).with_suffix(f".bench_{arms}.json")
    flags = bench.Args(
        size=stage.args.size,
        device=stage.device.type,
        repeats=1 + stage.on_gpu,
        arms=list(arms),
        out=str(out),
    )
    report = bench.bench(flags, size)
    found = [
        f"step {arm} {row['median_ms']:.0f} ms"
        for arm, row in report["sections"].get("step", {}).items()
    ]
    found += [
        f"decode {row['arm']} {row['rows']} rows {row['median_ms']:.2f} ms"
        for row in report["decode"]
    ]
    found += [
        f"{'MET' if t['met'] else 'MISSED'} {t['target']} {t['limit']:g}: {t['value']:.3g}"
        for t in report["targets"]
    ]
    return "; ".join(found), report["gates_hold"]


def bench_stage(stage: Stage) -> None:
    rows = (64, 16, 512) if stage.on_gpu else ()
    stage.check("bench, ours", lambda: side_by_side(stage, "D", ()))
    stage.check("bench, ours beside the faithful loop", lambda: side_by_side(stage, "AD", rows))
    if stage.on_gpu:
        stage.check("bench, ours compiled", lambda: side_by_side(stage, "DE", ()))


# ------------------------------------------------------------------------------------------------
# ranks: several processes
# ------------------------------------------------------------------------------------------------


def one_rank(rank: int, world: int, backend: str, kind: str, store: str) -> None:
    """The collectives that training uses, then an optimizer step on gradients rank
    + 1, whose norm is known."""
    dist = torch.distributed
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=world)
    device = torch.device(kind, 0) if kind == "cuda" else torch.device(kind)
    # Called directly: `Ranks` skips collectives when there is one process,
    # and NCCL would never run.
    total = torch.full((1000,), rank + 1.0, device=device)
    dist.all_reduce(total)
    assert float(total.sum()) == 1000 * world * (world + 1) / 2
    seen = [None] * world
    dist.all_gather_object(seen, {"rank": rank})
    assert seen == [{"rank": r} for r in range(world)]
    dist.barrier()

    ranks = Ranks(rank, world, device)
    p = torch.nn.Parameter(torch.ones(10_000, device=device).bfloat16())
    optimizer = MasterAdamW([p], 0.1)
    p.grad = torch.full_like(p, rank + 1.0)
    optimizer.accumulate_grads()
    norm, moved = optimizer.step(ranks, 0.1, 1.0)
    seen = ranks.gather([(round(norm), moved, float(p.detach().float().sum()))])
    assert seen == [(100 * world * (world + 1) // 2, True, seen[0][2])] * world, seen
    dist.destroy_process_group()


def processes(backend: str, world: int, kind: str) -> tuple[str, bool]:
    with tempfile.TemporaryDirectory() as folder:
        given = world, backend, kind, f"{folder}/store"
        torch.multiprocessing.spawn(one_rank, given, nprocs=world)
    return f"{world} process(es): sums, objects, barrier, an optimizer step", True


def ranks(stage: Stage) -> None:
    kind = stage.device.type
    if stage.on_gpu:
        stage.check("nccl", lambda: processes("nccl", 1, kind))
    stage.check("gloo", lambda: processes("gloo", 2, kind))


STAGES = {"smoke": smoke, "full": full, "golden": golden, "bench": bench_stage, "ranks": ranks}


def main(args: Args) -> None:
    faulthandler.enable()  # a crash leaves its stack in the log
    if args.until:
        left = args.until - time.time()
        faulthandler.dump_traceback_later(max(0.1, left - 3))
        signal.alarm(max(1, int(left) + 5))  # ends this process also if the parent is dead
    STAGES[args.stage](Stage(args, start_ranks(args.device)))


if __name__ == "__main__":
    run_main(main, Args)
