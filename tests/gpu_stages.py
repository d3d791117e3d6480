"""The stages of tools.gpu_check: checks on a GPU of what the other tests check on a CPU.

A check is a function that returns what it found, and True, False or "measured".

Legend   B prompts   G completions per prompt   N = B * G rows   P prompt length
         T completion length   K key/value heads   R query heads per key head   d head size
         V vocabulary
"""

import dataclasses
import faulthandler
import functools
import math
import os
import signal
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
import transformers
from torch.nn.attention.bias import causal_lower_right

import grpo
import sampler
from course.one_update import one_update
from lib.args import run_main
from lib.dist import Ranks, dtype_of, start_ranks
from lib.files import write_text
from model import HumanOmni, encode_media, frozen_reference, sdpa
from ops import decode_attention
from ops.logprob_head import add_product_, fp32_product
from tools import bench
from tools.bench import (
    GIB,
    SIZES,
    build_model,
    decode_floor,
    machine_rates,
    peak,
    random_batch,
)
from tools.gpu_check import StageArgs, add_finding
from training import MasterAdamW

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"
GROUP = 8  # completions per prompt
# T and P of the decode measurements, and their numbers of rows in the order of measurement.
SHAPES = {"toy": (32, 64, (16, 8, 32)), "full": (512, 960, (64, 16, 512, 8, 128))}


class Stage:
    """What the checks of a stage share.

    A check is a function that returns what it found, and True, False or "measured".
    """

    def __init__(self, args: StageArgs, ranks: Ranks):
        self.args, self.ranks, self.device = args, ranks, ranks.device
        self.on_gpu = self.device.type == "cuda"
        self.dtype = dtype_of("auto", self.device)

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def check(self, name: str, run: Callable[..., tuple[str, bool | str]], *given) -> None:
        """Run one check and record its finding.

        An exception is recorded as WRONG and the stage continues. After a CUDA fault its later
        checks fail too.
        """
        start = time.monotonic()
        try:
            found, verdict = run(*given)
            self.wait()  # a kernel that failed raises here
        except Exception as error:
            found, verdict = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", False
        verdict = {True: "right", False: "WRONG"}.get(verdict, verdict)
        add_finding(self.args.findings, self.args.stage, name, verdict, found, start)
        print(name, verdict, found, sep=" | ", flush=True)


def relative_error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    """Return the norm of the difference over the norm, and infinity for NaN.

    A NaN would pass every comparison with a limit.
    """
    error = float((ours.double() - exact.double()).norm() / exact.double().norm())
    return error if math.isfinite(error) else math.inf


# ---- smoke: single operations against float64 or their twins -------------------------------------


def versions(stage: Stage) -> tuple[str, str]:
    found = f"torch {torch.__version__}, transformers {transformers.__version__}"
    if stage.on_gpu:
        import triton

        free, total = torch.cuda.mem_get_info()
        found += f", triton {triton.__version__}, {free / GIB:.1f} of {total / GIB:.1f} GiB free"
        found += f", {os.environ.get('PYTORCH_ALLOC_CONF', 'allocator as set by the user')}"
    return found, "measured"


def source(device, seed: int) -> Callable[..., torch.Tensor]:
    """Return a function: shape, dtype -> normal numbers that are the same on every device."""
    gen = torch.Generator().manual_seed(seed)
    return lambda *shape, dtype=torch.float32: torch.randn(*shape, generator=gen).to(device, dtype)


def products(device) -> tuple[str, bool]:
    """Products with fp32 output and fp32 convolutions differ from float64 by rounding alone."""
    dtype, draw = dtype_of("auto", device), source(device, 0)
    a, b = draw(300, 512, dtype=dtype), draw(300, 512, dtype=dtype)
    sums, sound, picture = draw(300, 300), draw(2, 80, 400), draw(2, 3, 56, 56)
    kernel1, kernel2 = draw(96, 80, 3), draw(96, 3, 14, 14)
    summed = sums.clone()
    add_product_(summed, a, b.t())
    exact = a.double() @ b.double().t()
    conv1, conv2 = F.conv1d(sound, kernel1), F.conv2d(picture, kernel2, stride=14)
    errors = {
        "mm": relative_error(fp32_product(a, b), exact),
        "addmm": relative_error(summed, sums.double() + exact),
        "bmm": relative_error(decode_attention.scores(a[None], b[None])[0], exact),
        "conv1d": relative_error(conv1, F.conv1d(sound.double(), kernel1.double())),
        "conv2d": relative_error(conv2, F.conv2d(picture.double(), kernel2.double(), stride=14)),
    }
    found = ", ".join(f"{name} {error:.0e}" for name, error in errors.items())
    return found, max(errors.values()) < 1e-5


def attention_twin(qkv, rope, prefix, suffix, bias, t) -> torch.Tensor:
    """ops.decode_kernel.rotate_write_attend in PyTorch, with its arguments. Writes to `suffix`."""
    _, B, _, P, _ = prefix.shape
    q = sampler.rotate_and_write(qkv[0].unflatten(0, (B, -1)), rope.unbind(0), suffix, t)
    visible = bias.clone()
    visible[..., P : P + int(t) + 1] = 0.0
    return decode_attention.attend(q, prefix, suffix, visible, int(t) + 1).view(1, qkv.shape[1], -1)


def append_token_twin(
    logits, u, tokens, logps, lengths, done, ends, t, temperature, greedy
) -> None:
    """ops.sample_kernel.append_token in PyTorch, with its arguments."""
    rows = types.SimpleNamespace(
        u=u, tokens=tokens, logps=logps, lengths=lengths, done=done, ends=ends, t=t
    )
    sampler.append_token(rows, logits, temperature, greedy)


def kernels_here(device) -> types.SimpleNamespace:
    """Return the kernels. On a CPU return their twins, so that a dry run runs the same checks."""
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


def attention_error(device, attend, dtype: torch.dtype, shape: tuple) -> float:
    """Return the relative error of the output and of the written cache against the fp32 twin."""
    B, G, K, R, d, P, T, t = shape
    gen = torch.Generator().manual_seed(P + t)
    draw = lambda *shape: torch.randn(*shape, generator=gen).to(device, dtype)
    angle = torch.rand(B, 1, 1, d // 2, generator=gen).repeat(1, 1, 1, 2) * 6
    rope = torch.stack((angle.cos(), angle.sin())).to(device, dtype)
    qkv, prefix = draw(1, B * G, K * R + 2 * K, d), draw(2, B, K, P, d)
    suffix, position = draw(2, B, K, G, T, d), torch.tensor([t], device=device)
    bias = torch.full((B, 1, 1, 1, P + T), -torch.inf, device=device)
    bias[..., :P] = 0.0
    bias[0, ..., : P // 2] = -torch.inf  # a short prompt: spans without a key
    exact = [x.float().clone() for x in (qkv, rope, prefix, suffix)]
    suffix[..., t:, :] = torch.nan  # positions that are not written yet must not be read
    expected = attention_twin(*exact, bias, position)
    error = relative_error(attend(qkv, rope, prefix, suffix, bias, position), expected)
    return max(error, relative_error(suffix[..., t, :], exact[3][..., t, :]))


def attention_kernels(device, attend=None) -> tuple[str, bool]:
    """The attention kernels at six shapes, in bf16 and fp32, agree with their twin in fp32."""
    attend = attend or kernels_here(device).rotate_write_attend
    shapes = ATTENTION_SHAPES if device.type == "cuda" else ATTENTION_SHAPES[3:5]
    share, dtype, shape = max(
        (attention_error(device, attend, dtype, shape) / limit, str(dtype), shape)
        for dtype, limit in ((torch.bfloat16, 2e-2), (torch.float32, 1e-5))
        for shape in shapes
    )
    return f"at worst {100 * share:.0f} % of the allowed error, {dtype} {shape}", share < 1


def sampling_kernels(device, append_token=None) -> tuple[str, bool]:
    """Tokens and log-probabilities of the sampling kernels are those of their twin, 64 rows."""
    append_token = append_token or kernels_here(device).append_token
    N, equal, errors = 64, [], []
    zeros = functools.partial(torch.zeros, device=device)
    for V, temperature, greedy in ((151_936, 1.0, False), (1000, 0.7, False), (151_936, 1.0, True)):
        gen = torch.Generator().manual_seed(V + 1)
        logits = (torch.randn(N, V, generator=gen) * 3).to(device)
        u = torch.rand(3, N, dtype=torch.float64, generator=gen).to(device)
        ends, t = torch.tensor([5], device=device), torch.tensor([1], device=device)
        results = []
        for append in (append_token, append_token_twin):
            tokens, logps = zeros(3, N, dtype=torch.long), zeros(3, N)
            lengths, done = zeros(N, dtype=torch.long), zeros(N, dtype=torch.bool)
            append(logits, u, tokens, logps, lengths, done, ends, t, temperature, greedy)
            results.append((tokens[1], logps))
        (tokens, logps), (expected_tokens, expected_logps) = results
        equal += (tokens == expected_tokens).tolist()
        errors.append(relative_error(logps, expected_logps))
    # Sums that are rounded differently put the borders between tokens up to 1e-8 apart. With this
    # seed no random number is closer than 8e-7 to a border. With any seed, one draw in some
    # thousands would be.
    found = f"{sum(equal)} of {len(equal)} tokens equal, log-probabilities off by {max(errors):.0e}"
    return found, all(equal) and max(errors) < 1e-5


def training_attention(device) -> tuple[str, bool]:
    """Training attention through flash (CausalBias) agrees with an explicit mask in fp32."""
    S, P, draw = 60, 200, source(device, 0)
    qkv = draw(4, S, 14, 64), draw(4, P + S, 2, 64), draw(4, P + S, 2, 64)
    mask = torch.ones(S, P + S, dtype=torch.bool, device=device).tril(P)
    results = []
    flash = dtype_of("auto", device), causal_lower_right(S, P + S)
    for dtype, bias in (flash, (torch.float32, mask)):
        inputs = [x.detach().to(dtype).requires_grad_() for x in qkv]
        out = sdpa(*inputs, bias)
        out.float().square().sum().backward()
        results.append([out.detach(), *(x.grad for x in inputs)])
    errors = [relative_error(a, b) for a, b in zip(*results)]
    return "output, dq, dk, dv off by " + ", ".join(f"{e:.0e}" for e in errors), max(errors) < 2e-2


def rates(stage: Stage) -> tuple[str, str]:
    found = machine_rates(stage.device, stage.dtype)
    copied, multiplied = found["bytes_per_second"] / 1e9, found["flops_per_second"] / 1e12
    return f"copy {copied:.0f} GB/s, product {multiplied:.2f} TFLOP/s, {stage.dtype}", "measured"


def smoke(stage: Stage) -> None:
    stage.check("versions", versions, stage)
    stage.check("products and convolutions", products, stage.device)
    stage.check("attention kernels", attention_kernels, stage.device)
    stage.check("sampling kernels", sampling_kernels, stage.device)
    stage.check("training attention", training_attention, stage.device)
    stage.check("rates", rates, stage)


# ---- full: the true size -------------------------------------------------------------------------


@torch.no_grad()
def decode(stage: Stage, model: HumanOmni, N: int, machine: dict) -> tuple[str, str]:
    """Mean time of a decode step over the last quarter of T.

    Beside it stands the time to read weights, keys and values once.
    """
    T, P, _ = SHAPES[stage.args.size]
    B, first = N // GROUP, T * 3 // 4
    decoder = sampler.Decoder.of(model)
    rows = decoder.state_for(model, B, GROUP, P, T)
    mask = torch.ones(B, P, dtype=torch.bool, device=stage.device)
    u = torch.rand(B, GROUP, T, dtype=torch.float64, device=stage.device)
    rows.start(model, mask, [], u)
    rows.tokens.zero_()  # tokens of the vocabulary, which the model's end token is not
    rows.prefix.normal_()  # zeros would be faster than real values
    rows.suffix.normal_()
    rows.t.fill_(first)

    def advance(steps: range) -> float:
        """-> seconds"""
        stage.wait()
        start = time.perf_counter()
        for t in steps:
            decoder.advance(model, rows, t, 1.0, False)
        stage.wait()
        return time.perf_counter() - start

    warm_up = advance(range(first, first + 1))  # compiles and captures
    timed = range(first + 1, T - 1)
    ms = 1e3 * advance(timed) / len(timed)
    # decode_floor(T) is the floor of all steps up to T.
    before, all_steps = (decode_floor(model, P, B, GROUP, n, machine) for n in (first + 2, T))
    floor = 1e3 * (all_steps - before) / len(timed)
    speed = f"{ms:.3f} ms a step (floor {floor:.2f}), {1e3 * N / ms:.0f} tokens/s"
    return f"{speed}; first call {warm_up:.1f} s", "measured"


@torch.no_grad()
def profile(stage: Stage, model: HumanOmni, N: int) -> tuple[str, str]:
    """Write the time of each kernel in a step of N rows to a file beside the findings."""
    T, P, _ = SHAPES[stage.args.size]
    decoder, steps = sampler.Decoder.of(model), 4
    rows = decoder.state_for(model, N // GROUP, GROUP, P, T)
    rows.t.fill_(T - steps - 2)
    column = f"self_{'device' if stage.on_gpu else 'cpu'}_time_total"
    kinds = torch.profiler.ProfilerActivity
    kind = kinds.CUDA if stage.on_gpu else kinds.CPU
    with torch.profiler.profile(activities=[kind]) as profiled:
        for t in range(T - steps - 2, T - 2):
            decoder.advance(model, rows, t, 1.0, False)
        stage.wait()
    events = profiled.key_averages()
    table = events.table(sort_by=column, row_limit=-1, max_name_column_width=100)
    path = stage.args.findings.with_suffix(".profile.txt")
    write_text(path, f"{steps} decode steps of {N} rows\n{table}\n")
    busy = sum(getattr(event, column) for event in events) / steps
    launches = sum(event.count for event in events if getattr(event, column)) / steps
    return f"{launches:.0f} launches a step, {busy:.0f} us of work; see {path.name}", "measured"


def whole_step(stage: Stage, model: HumanOmni) -> tuple[str, bool]:
    """One GRPO step.

    The gradient is finite. The trainer's probabilities over the sampler's are within 0.1 of 1 at
    three quantiles. The peak memory of the update is at most 1.09 times the estimate of `peak`.
    """
    size, device, B, T = SIZES[stage.args.size], stage.device, 2, SHAPES[stage.args.size][0]
    reference, optimizer = frozen_reference(model), MasterAdamW(model.set_trained(), 1e-6)
    flags = grpo.Args(
        model="", data="", out="", num_generations=GROUP, max_new_tokens=T, micro_batch=1
    )
    batch = random_batch(size, B, torch.Generator().manual_seed(0), model.dtype).to(device)
    batch, meter = encode_media(model, batch), grpo.Meter()
    rollout = grpo.sample_completions(model, mock.Mock(decode=str), batch, flags)
    rollout.ref_logps = grpo.rollout_logps(reference, batch, rollout, flags)
    # The rewards of noise are all 0, so others are made up.
    rollout.total_rewards = torch.arange(float(B * GROUP), device=device).view(B, GROUP) % 3
    rollout.advantages = grpo.compute_advantages(rollout, flags, stage.ranks)
    logps = grpo.rollout_logps(model, batch, rollout, flags)
    if stage.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    updated = one_update(model, optimizer, batch, rollout, flags, stage.ranks, 1e-6, meter)
    norm = grpo.Meter.join([meter.totals()])["grad_norm"]
    quantiles = torch.tensor([0.01, 0.5, 0.99], device=device)
    ratios = (logps - rollout.logps)[rollout.mask].exp().quantile(quantiles).tolist()
    shown = " / ".join(f"{ratio:.3f}" for ratio in ratios)
    found = f"gradient norm {norm:.3f}, ratio at 1, 50, 99 % {shown}"
    right = updated and norm > 0 and all(abs(ratio - 1) < 0.1 for ratio in ratios)
    if not stage.on_gpu:
        return f"{found}; memory is not measured", right
    P = model.prompt_length(batch.input_ids)
    expected = sum(peak(model, 1, GROUP, P, T, model.dtype).values())
    expected += sum(state.nbytes for state in sampler.Decoder.of(model).states.values())
    measured = torch.cuda.max_memory_allocated()
    found += f"; peak {measured / GIB:.1f} GiB, expected {expected / GIB:.1f}"
    return found, right and measured < 1.09 * expected


def compiler_counters() -> tuple[str, bool]:
    """No function reached the limit of recompilations."""
    counters = torch._dynamo.utils.counters
    limits = sum(n for reason, n in counters["unimplemented"].items() if "limit" in reason)
    graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    found = f"{graphs} graphs, {breaks} breaks, {limits} times at the limit of recompilations"
    return found, not limits


def full(stage: Stage) -> None:
    start = time.perf_counter()
    model = build_model(SIZES[stage.args.size], stage.device, stage.dtype)
    stage.wait()
    stage.check("model", lambda: (f"built in {time.perf_counter() - start:.1f} s", "measured"))
    machine = machine_rates(stage.device, stage.dtype)
    first, second, *others = SHAPES[stage.args.size][2]
    for N in (first, second):
        stage.check(f"decode, {N} rows", decode, stage, model, N, machine)
    stage.check("one GRPO step", whole_step, stage, model)
    for N in others:
        stage.check(f"decode, {N} rows", decode, stage, model, N, machine)
    stage.check("compiler", compiler_counters)
    # Last, because profilers have hung on captured graphs (pytorch issues 75504, 135003).
    stage.check(f"profile, {first} rows", profile, stage, model, first)


# ---- golden: the numbers of the reference code, and every way to run a decode step ---------------


def golden_model(device, parts=("decoder",)) -> tuple[HumanOmni, torch.Tensor, torch.Tensor]:
    """Return the reference code's tiny checkpoint in fp32, and its prompts as embeds and mask."""
    paths = {"path": GOLDEN / "humanomni", "bert": GOLDEN / "bert"}
    model = HumanOmni.from_pretrained(**paths, device=device, log=str)
    model.eos_ids = [380, *range(0, 380, 12)]  # many, so that completions differ in length
    model.set_trained(parts)
    golden = torch.load(GOLDEN / "forward.pt", weights_only=True, map_location=device)
    media = golden["frames"].float(), golden["mel"].float()
    question = golden["question_ids"], golden["question_mask"]
    embeds, mask = model.embed_prompt(golden["input_ids"], *media, *question)
    return model, embeds, mask


def reference_parity(device) -> tuple[str, bool]:
    """Loss and gradient norms are those of the reference code, in fp32."""
    model, embeds, mask = golden_model(device, ("decoder", "projectors", "gate", "bert"))
    g = torch.load(GOLDEN / "grpo.pt", weights_only=True, map_location=device)
    logps = model.completion_logps(embeds, mask, g["completions"], g["lengths"])
    inside = torch.arange(logps.shape[2], device=device) < g["lengths"][..., None]
    loss, _ = grpo.grpo_loss(
        logps, logps.detach(), g["ref_logps"], g["advantages"], inside, beta=g["beta"], kl="k3"
    )
    loss.backward()
    ours, loss_error = dict(model.named_parameters()), abs(float(loss.detach() - g["loss"]))
    errors = [
        abs(float(ours[name].grad.norm()) - norm) / (norm + 1e-4)
        for name, norm in g["grad_norms"].items()
    ]
    worst = float(torch.tensor(errors).max())  # NaN if one of them is NaN
    found = f"loss off by {loss_error:.0e}, a norm by {worst:.0e}"
    return found, loss_error < 1e-5 and worst < 2e-3


def golden_tokens(device, generate: Callable) -> dict[str, torch.Tensor]:
    """Return the tokens of a sampler, greedy and sampled."""
    model, embeds, mask = golden_model(device)
    flags = {"num_generations": GROUP, "max_new_tokens": 48, "seed": 1}
    return {
        name: generate(model, embeds.detach(), mask, **flags, greedy=name == "greedy")[0]
        for name in ("greedy", "sampled")
    }


@functools.cache
def naive_tokens(device) -> dict[str, torch.Tensor]:
    return golden_tokens(device, sampler.generate_naive)


def path_equals_naive(device, path: str) -> tuple[str, bool]:
    """The sampler draws the tokens of its naive twin on this decode path, in fp32."""
    with mock.patch.dict(os.environ, {sampler.PATH_VARIABLE: path}):
        tokens = golden_tokens(device, sampler.generate)
    naive = naive_tokens(device)
    equal = {name: torch.equal(tokens[name], naive[name]) for name in naive}
    return f"tokens equal: {equal}", all(equal.values())


def golden(stage: Stage) -> None:
    stage.check("loss and gradient norms", reference_parity, stage.device)
    stage.check("naive sampler", lambda: (" and ".join(naive_tokens(stage.device)), "measured"))
    # The simplest path first: a failed capture or kernel would make the later ones fail too.
    for path in sampler.DECODE_PATHS if stage.on_gpu else ["eager"]:
        stage.check(f"decode path {path}", path_equals_naive, stage.device, path)


# ---- bench: side by side -------------------------------------------------------------------------


def side_by_side(stage: Stage, arms: str, rows: tuple[int, ...]) -> tuple[str, bool]:
    """Run tools.bench with few repeats. Its own gates decide."""
    few = {"slow": 1, "repeats": 1 + stage.on_gpu}
    size = dataclasses.replace(SIZES[stage.args.size], rows=rows, **few)
    flags = bench.Args(
        size=stage.args.size,
        device=stage.device.type,
        arms=list(arms),
        out=str(stage.args.findings.with_suffix(f".bench_{arms}.json")),
    )
    report = bench.bench(flags, size)
    found = [
        f"{row['section']} {row['arm']} {row['median_ms']:.2f} ms"
        for row in report["rows"]
        if "step" in row["section"]
    ]
    found += [
        f"{'MET' if t['met'] else 'MISSED'} {t['target']} {t['limit']:g}: {t['value']:.3g}"
        for t in report["targets"]
    ]
    return "; ".join(found), report["gates_hold"]


def bench_stage(stage: Stage) -> None:
    rows = (64, 16, 512) if stage.on_gpu else ()
    stage.check("bench, ours", side_by_side, stage, "D", ())
    stage.check("bench, ours beside the faithful loop", side_by_side, stage, "AD", rows)
    if stage.on_gpu:
        stage.check("bench, ours compiled", side_by_side, stage, "DE", ())


# ---- ranks: several processes --------------------------------------------------------------------


def one_rank(rank: int, world: int, backend: str, kind: str, store: str) -> None:
    """Run the collectives of training, and an optimizer step.

    The gradients are rank + 1 everywhere, so the norm of their sum is known.
    """
    dist = torch.distributed
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=world)
    device = torch.device(kind, 0) if kind == "cuda" else torch.device(kind)
    # Called directly: `Ranks` skips collectives if there is one process, and NCCL would never run.
    total = torch.full((1000,), rank + 1.0, device=device)
    dist.all_reduce(total)
    assert float(total.sum()) == 1000 * world * (world + 1) / 2
    gathered = [None] * world
    dist.all_gather_object(gathered, {"rank": rank})
    assert gathered == [{"rank": r} for r in range(world)]
    dist.barrier()

    ranks = Ranks(rank, world, device)
    p = torch.nn.Parameter(torch.ones(10_000, device=device).bfloat16())
    optimizer = MasterAdamW([p], 0.1)
    p.grad = torch.full_like(p, rank + 1.0)
    optimizer.accumulate_grads()
    norm, updated = optimizer.step(ranks, 0.1, 1.0)
    gathered = ranks.gather([(round(norm), updated, float(p.detach().float().sum()))])
    expected = (100 * world * (world + 1) // 2, True, gathered[0][2])
    assert gathered == [expected] * world, gathered
    dist.destroy_process_group()


def processes(backend: str, world: int, kind: str) -> tuple[str, bool]:
    with tempfile.TemporaryDirectory() as folder:
        given = world, backend, kind, f"{folder}/store"
        torch.multiprocessing.spawn(one_rank, given, nprocs=world)
    return f"{world} process(es): sums, objects, barrier, an optimizer step", True


def ranks(stage: Stage) -> None:
    kind = stage.device.type
    if stage.on_gpu:
        stage.check("nccl", processes, "nccl", 1, kind)
    stage.check("gloo", processes, "gloo", 2, kind)


STAGES = {"smoke": smoke, "full": full, "golden": golden, "ranks": ranks, "bench": bench_stage}


def stage_main(args: StageArgs) -> None:
    faulthandler.enable()  # a crash leaves its stack in the log
    left = args.until - time.time()
    faulthandler.dump_traceback_later(max(0.1, left - 3))
    signal.alarm(max(1, int(left) + 5))  # ends this process even if the main process is dead
    STAGES[args.stage](Stage(args, start_ranks(args.device)))


if __name__ == "__main__":
    run_main(stage_main, StageArgs)
