"""Acceptance on a GPU: is everything right there that was only tested on a CPU, and how fast is it?  Under ten minutes.

    python -m tools.gpu_check                            the true geometry, random weights
    python -m tools.gpu_check --device cpu --size toy    a dry run: everything that does without a GPU

Writes results/gpu_MACHINE.json and .md (of a dry run: runs/...): a row for each check, also for one that failed, and why.
Exit status 1 if one did.

Legend   B prompts   G completions per prompt   P prompt length   T completion length   N = B * G rows
"""
import dataclasses
import datetime
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal
from unittest import mock

import torch

import grpo
import sampler
from data import PromptBatch, Sample
from lib import decode_attention
from lib.common import AUDIO, VIDEO, Ranks, run_main, start_ranks, write_json, write_text
from model import HumanOmni, embed, encode_once, frozen_reference
from tools.memory import GIB, peak
from tools.sizes import SIZES, build_model, machine_name, machine_rates
from training import MasterAdamW

ROOT, G = Path(__file__).resolve().parents[1], 8
GOLDEN = ROOT / "tests" / "golden"
SHAPES = {"toy": (32, 64, (16, 32)), "full": (512, 1024, (16, 64, 128, 512))}        # T; P and N of the decode table


@dataclasses.dataclass
class Args:
    size: Literal["toy", "full"] = "full"               # geometry of the model
    device: Literal["auto", "cpu", "cuda"] = "auto"     # auto: cuda where there is one


# A check: (args, device) -> what was found, and True or False, or "measured".
def golden(device, parts=("decoder",)) -> tuple[HumanOmni, torch.Tensor, torch.Tensor]:
    """The reference code's tiny checkpoint in fp32, and its prompts."""
    model = HumanOmni.from_pretrained(GOLDEN / "humanomni", bert=GOLDEN / "bert", device=device, say=str)
    model.eos_ids = [380, *range(0, 380, 12)]                # many, so that completions differ in length
    model.set_trained(parts)
    forward = torch.load(GOLDEN / "forward.pt", weights_only=True)
    ids, frames, mel, *question = (forward[k] for k in ("input_ids", "frames", "mel", "question_ids", "question_mask"))
    return model, *model.embed_prompt(ids, *(x.to(device) for x in (frames.float(), mel.float(), *question)))


def reference_parity(args, device):
    """loss and every gradient norm of the reference code, fp32"""
    model, embeds, mask = golden(device, ("decoder", "projectors", "gate", "bert"))
    g = {k: v.to(device) if torch.is_tensor(v) else v for k, v in torch.load(GOLDEN / "grpo.pt", weights_only=True).items()}
    logps = model.completion_logps(embeds, mask, g["completions"], g["lengths"])
    inside = torch.arange(logps.shape[2], device=device) < g["lengths"][..., None]
    loss, _ = grpo.grpo_loss(logps, logps.detach(), g["ref_logps"], g["advantages"], inside, beta=g["beta"], kl="k3")
    loss.backward()
    ours, off = dict(model.named_parameters()), abs(float(loss.detach() - g["loss"]))
    worst = max(abs(float(ours[name].grad.norm()) - norm) / (norm + 1e-4) for name, norm in g["grad_norms"].items())
    return f"loss off by {off:.0e}, a norm by {worst:.0e}", off < 1e-5 and worst < 2e-3


def twins(args, device):
    """tokens of the sampler as it runs here, without graphs, and without kernels too: those of its naive twin, fp32"""
    model, embeds, mask = golden(device)
    found, off = [], lambda *_: False
    for greedy in (True, False):
        run = lambda how, greedy=greedy: how(model, embeds.detach(), mask, G, 48, seed=1, greedy=greedy)[0]
        naive, here = run(sampler.generate_naive), run(sampler.generate)
        with mock.patch.object(sampler, "uses_graphs", off):
            eager = run(sampler.generate)
            with mock.patch.object(decode_attention, "can_build_kernels", off):
                found += [torch.equal(tokens, naive) for tokens in (here, eager, run(sampler.generate))]
    return f"{sum(found)} of {len(found)} equal", all(found)


def random_batch(size, B: int, model: HumanOmni) -> PromptBatch:
    gen, side = torch.Generator().manual_seed(0), size.vision["image_size"]
    ids = torch.randint(size.decoder["vocab_size"], (B, size.text), generator=gen).tolist()
    return PromptBatch(
        indices=list(range(B)), samples=[Sample("clip", Path(), "?", "happy", "happy", "video_audio")] * B, asked=[""] * B,
        input_ids=[[*row[:-24], VIDEO, *row[-24:-20], AUDIO, *row[-20:]] for row in ids], targets=[[]] * B, bad=[], notes=[],
        frames=torch.rand(B, 8, 3, side, side, generator=gen) * 2 - 1, vision=[None] * B, audio=[None] * B,
        mel=torch.randn(B, size.audio["num_mel_bins"], 2 * size.audio["max_source_positions"], generator=gen),
        question_ids=torch.randint(size.bert["vocab_size"], (B, 40), generator=gen), question_mask=torch.ones(B, 40).long(),
        keys=[{"video": "", "audio": ""}] * B).to(model.device)


def whole_step(args, device):
    """one GRPO step, bf16: finite, sampler = trainer, peak memory against tools.memory"""
    T, B, model = SHAPES[args.size][0], 2, build_model(SIZES[args.size], device, torch.bfloat16)
    model.eos_ids = [model.config.vocab_size]                # nothing ends: everybody samples T tokens
    reference, optimizer = frozen_reference(model), MasterAdamW(model.set_trained(), 1e-6)
    flags = grpo.Args(model="", data="", out="", num_generations=G, max_new_tokens=T, micro_batch=1)
    batch, meter, ranks = encode_once(model, random_batch(SIZES[args.size], B, model)), grpo.Meter(), Ranks(0, 1, device)
    rollout = grpo.roll_out(model, reference, mock.Mock(text=str), batch, flags, grpo.Clock())
    rollout.rewards["accuracy"] = torch.arange(float(B * G), device=device).view(B, G) % 3         # of noise all are 0
    grpo.compare(rollout, flags, ranks)
    with torch.no_grad():
        logps = torch.cat([model.completion_logps(*embed(model, batch.select([b])), rollout.completions[b:b + 1],
                                                  rollout.lengths[b:b + 1]) for b in range(B)])
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    moved = grpo.update(model, optimizer, batch, rollout, flags, ranks, 1e-6, meter)
    norm = grpo.Meter.join([meter.entries])["grad_norm"]
    ratio = (logps - rollout.logps)[rollout.mask].exp().quantile(torch.tensor([0.01, 0.5, 0.99], device=device)).tolist()
    told = f"gradient norm {norm:.3f}, ratio at 1, 50, 99 % {' / '.join(f'{r:.3f}' for r in ratio)}"
    right = moved and norm > 0 and all(abs(r - 1) < 0.1 for r in ratio)
    if device.type != "cuda":
        return f"{told}; memory is not measured", right
    expected = sum(peak(model, 1, G, rollout.prompt_length, T, torch.bfloat16).values())
    expected += sum(r.nbytes for r in sampler.Decoder.of(model).rows.values())
    measured = torch.cuda.max_memory_allocated()
    return f"{told}; peak {measured / GIB:.1f} GiB, expected {expected / GIB:.1f}", right and measured < 1.15 * expected


def decode(args, device):
    """ms per decode step, bf16, in the last quarter of T, against weights, keys and logits read once"""
    T, P, table = SHAPES[args.size]
    model, told, rates = build_model(SIZES[args.size], device, torch.bfloat16), [], machine_rates(device, torch.bfloat16)
    model.eos_ids = [model.config.vocab_size]
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for N in table:
        decoder = sampler.Decoder.of(model)
        rows = decoder.rows_for(model, N // G, G, P, T)
        with torch.no_grad():
            decoder.advance(model, rows, T * 3 // 4, 1.0, False)         # compiles and captures
            wait()
            start = time.perf_counter()
            for t in range(T * 3 // 4 + 1, T):
                decoder.advance(model, rows, t, 1.0, False)
            wait()
        ms = 1e3 * (time.perf_counter() - start) / (T // 4 - 1)
        moved = sum(p.nbytes for p in (*model.model.layers.parameters(), model.head_weight, rows.prefix, rows.suffix))
        floor = 1e3 * (moved + 4 * N * model.config.vocab_size) / rates["bytes_per_second"]
        told.append(f"{N} rows {ms:.2f} ms (floor {floor:.2f}), {1e3 * N / ms:.0f} tokens/s")
    return "; ".join(told), "measured"


def one_rank(rank: int, world: int, backend: str, kind: str, store: str) -> None:
    """A step of the shared optimiser on gradients rank + 1, whose norm is known."""
    torch.distributed.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=world)
    ranks, p = Ranks(rank, world, torch.device(kind)), torch.nn.Parameter(torch.ones(10_000, device=kind).bfloat16())
    optimizer = MasterAdamW([p], 0.1)
    p.grad = torch.full_like(p, rank + 1.0)
    optimizer.collect()
    norm, moved = optimizer.step(ranks, 0.1, 1.0)
    seen = ranks.gather([(round(norm), moved, float(p.detach().float().sum()))])
    assert seen == [(100 * world * (world + 1) // 2, True, seen[0][2])] * world, seen


def several_ranks(args, device):
    """gradients of processes on one device: two with gloo, one with NCCL"""
    kinds = {"gloo": 2, "nccl": 1} if device.type == "cuda" else {"gloo": 2}
    for backend, world in kinds.items():
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(one_rank, (world, backend, device.type, f"{folder}/store"), nprocs=world)
    return str(kinds), True


def out_folder(device) -> Path:
    """A dry run is no result."""
    return ROOT / ("results" if device.type == "cuda" else "runs")


def side_by_side(args, device):
    """tools.bench with one repeat: the faithful loop, ours, ours compiled; its own gates"""
    words = f"--size {args.size} --device {device.type} --repeats 1 --arms A D" + " E" * (device.type == "cuda")
    words += f" --out {out_folder(device) / 'bench_of_gpu_check.json'}"
    done = subprocess.run([sys.executable, "-m", "tools.bench", *words.split()], capture_output=True, text=True, timeout=420)
    told = [" ".join(line.split()) for line in done.stdout.splitlines() if line.startswith(("step", "PASS", "FAIL"))]
    return "; ".join(told), done.returncode == 0


CHECKS = [reference_parity, twins, whole_step, decode, several_ranks, side_by_side]


def main(args: Args) -> None:
    device, rows = start_ranks(args.device).device, []
    for check in CHECKS:
        start = time.perf_counter()
        try:
            found, right = check(args, device)
        except Exception as error:           # whatever it is: the other checks still say something
            found, right = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", False
        rows.append({"check": check.__doc__, "verdict": {True: "right", False: "WRONG"}.get(right, right), "found": found,
                     "s": round(time.perf_counter() - start)})
        print(" | ".join(map(str, rows[-1].values())), flush=True)
    machine, today = machine_name(device), datetime.date.today().isoformat()
    about = f"python -m tools.gpu_check {' '.join(sys.argv[1:])}; {machine}, torch {torch.__version__}, {today}"
    out = out_folder(device) / f"gpu_{re.sub('[^a-z0-9]+', '-', machine.lower()).strip('-')}.json"
    write_json(out, {"about": about, "checks": rows})
    cells = [rows[0].keys(), ("---",) * 4, *(row.values() for row in rows)]
    write_text(out.with_suffix(".md"), f"# GPU check\n\n{about}\n\n" +
               "".join(f"| {' | '.join(map(str, row))} |\n" for row in cells))
    print(f"written to {out} and .md")
    sys.exit(any(row["verdict"] == "WRONG" for row in rows))


if __name__ == "__main__":
    run_main(main, Args)
