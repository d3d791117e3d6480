"""The CUDA path without a GPU: whole steps and answers on tensors that say they are on one.

`OnGpu` computes on the CPU and claims to be on a GPU. It refuses what a GPU refuses: a CPU tensor
among GPU tensors. It counts what makes the host wait for a GPU: item, tolist, nonzero, a boolean
index, a copy that is not from or to pinned memory. In a step that is to be captured as a graph,
each of those is an error.

Not shown here: which kernels a GPU picks, their rounding and speed, streams, graphs themselves.
"""

import contextlib
import datetime
import os
import weakref

import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN, three_prompts
from torch.nn.attention.bias import CausalBias
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

import eval as evaluation
import grpo
import sampler
import sft
from course.one_update import one_update
from data import PromptBatch, Sample
from lib import args as lib_args
from lib import dist as lib_dist
from lib.dist import Ranks
from model import HumanOmni, encode_media, frozen_reference
from training import MasterAdamW

CUDA = torch.device("cuda", 0)
aten = torch.ops.aten
READS_VALUES = {
    aten._local_scalar_dense,
    aten.nonzero,
    aten.masked_select,
    aten._unique2,
    aten.equal,
    aten.bincount,
    aten.repeat_interleave,
    aten.is_nonzero,
    aten.unique_dim,
    aten.unique_consecutive,
}
waits: list[str] = []  # what the host waited for, so far
flash: list[tuple] = []  # shapes of the queries that met a kernel without a mask
strict = False  # inside of a step that is captured


def wait(what: str) -> None:
    if strict:
        raise RuntimeError(f"{what} waits for the device: it cannot be captured")
    waits.append(what)


@contextlib.contextmanager
def captured():
    global strict
    strict = True
    try:
        yield
    finally:
        strict = False


class OnGpu(torch.Tensor):
    @staticmethod
    def __new__(cls, inner: torch.Tensor):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            dtype=inner.dtype,
            storage_offset=inner.storage_offset(),
        )

    def __init__(self, inner: torch.Tensor):
        self.inner = inner

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def __repr__(self):
        return f"OnGpu({self.inner})"

    def data_ptr(self):
        return self.inner.data_ptr()

    def tolist(self):
        wait("tolist")
        return self.inner.tolist()

    def numpy(self):
        raise TypeError("can't convert a GPU tensor to numpy")

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            new = OnGpu(self.inner.detach().clone())
            new = (
                torch.nn.Parameter(new, self.requires_grad)
                if isinstance(self, torch.nn.Parameter)
                else new
            )
            memo[id(self)] = new
        return memo[id(self)]

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        packet, tensors = (
            function.overloadpacket,
            [x for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)],
        )
        host = [x for x in tensors if type(x) is not OnGpu and x.dim() > 0]
        indices = (
            [x for x in args[1] if x is not None]
            if packet in (aten.index, aten.index_put, aten.index_put_)
            else []
        )
        if packet is aten.copy_ and host:
            if not (
                getattr(host[0], "pinned", False)
                and (kwargs.get("non_blocking") or args[2:3] == (True,))
            ):
                wait("a copy between host and device")
        elif host and all(any(x is i for i in indices) for x in host):
            wait("an index on the host")
        elif host:
            raise RuntimeError(f"{function}: tensors on cuda and on cpu")
        if packet in READS_VALUES or any(i.dtype == torch.bool for i in indices):
            wait(str(function))
        wrapped = {id(x.inner): x for x in tensors if type(x) is OnGpu}
        plain_args, plain_kwargs = tree_map(inner_of, (args, kwargs))
        if function in (aten.mm.dtype, aten.bmm.dtype):  # these have kernels on a GPU alone
            a, b, out = plain_args
            assert a.dtype == b.dtype == torch.bfloat16 and out == torch.float32
            result = a.float() @ b.float()
        elif function is aten.addmm.dtype_out:  # so has this
            total, a, b, out = plain_args
            assert a.dtype == b.dtype == torch.bfloat16 and out == total.dtype == torch.float32
            assert plain_kwargs["out"] is total
            result = total.addmm_(a.float(), b.float())
        else:
            result = function(*plain_args, **plain_kwargs)
        if packet is aten.copy_ and type(args[0]) is not OnGpu:
            return args[0]
        wrap = lambda x: wrapped[id(x)] if id(x) in wrapped else OnGpu(x)
        return tree_map(lambda x: wrap(x) if torch.is_tensor(x) else x, result)


def inner_of(x):
    return x.inner if type(x) is OnGpu else x


def is_cuda(device) -> bool:
    return device is not None and torch.device(device).type == "cuda"


class Gpu(TorchFunctionMode):
    """Makes `device="cuda"` mean OnGpu, and pinned memory a mark on a tensor."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is torch.Tensor.to:
            return self.move(*args, **kwargs)
        if function in (torch.Tensor.cpu, torch.Tensor.cuda):
            return self.move(args[0], "cpu" if function is torch.Tensor.cpu else CUDA)
        if function is torch.Tensor.pin_memory or kwargs.pop("pin_memory", False):
            out = (
                args[0].clone()
                if function is torch.Tensor.pin_memory
                else function(*args, **kwargs)
            )
            out.pinned = True
            return out
        if function is F.scaled_dot_product_attention and isinstance(
            kwargs["attn_mask"], CausalBias
        ):
            assert args[0].dtype == torch.bfloat16, (
                "flash takes no fp32; the kernel that does would keep all scores"
            )
            flash.append(args[0].shape)
            kwargs["attn_mask"] = OnGpu(kwargs["attn_mask"]._materialize("cpu"))
        if is_cuda(kwargs.get("device")):
            kwargs.pop("device")
            if function in (torch.tensor, torch.as_tensor):
                wait(f"{function.__name__}(..., device=cuda)")
            return OnGpu(
                inner_of(function(*tree_map(inner_of, args), **tree_map(inner_of, kwargs)))
            )
        return function(*args, **kwargs)

    @staticmethod
    def move(x, *args, **kwargs):
        device, rest = kwargs.pop("device", None), []
        for a in args:
            if isinstance(a, (str, torch.device)):
                device = a
            elif torch.is_tensor(a):
                device, rest = a.device, [*rest, a.dtype]
            else:
                rest.append(a)
        there, here = is_cuda(device), type(x) is OnGpu
        if device is None or there == here:
            return torch.Tensor.to(x, *rest, **kwargs)
        if not (getattr(x, "pinned", False) and kwargs.pop("non_blocking", False)):
            wait("a copy between host and device")
        kwargs.pop("non_blocking", None), kwargs.pop("copy", None)
        moved = inner_of(x).detach().to(*rest, **kwargs, copy=True)
        return OnGpu(moved) if there else moved


class Captured:
    """Stands in for StepGraph: every run of the step is held to what a graph demands."""

    def __init__(self, run, memory):
        self.run = run
        self.replay()

    def replay(self):
        with captured():
            self.run()


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(sampler, "StepGraph", Captured)
    monkeypatch.setattr(sampler, "graph_memory", lambda: None)
    monkeypatch.setattr(sampler, "can_build_kernels", lambda: False)
    monkeypatch.setattr(sampler, "kept_bytes", lambda model: 2**30)
    monkeypatch.setattr(sampler, "_decoders", weakref.WeakKeyDictionary())
    monkeypatch.setattr(sampler.DecodeState, "alive", alive)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: wait("synchronize"))
    for figures, value in (
        (sampler.PREFIX_STEP, 8),
        (sampler.SUFFIX_STEP, 4),
        (sampler.CHECK_DONE_EVERY, 4),
        (sampler.COMPACT_FROM, 4),
    ):
        monkeypatch.setitem(figures, "cuda", value)
    waits.clear(), flash.clear()
    with Gpu():
        yield


def alive(self) -> torch.Tensor:
    self.seen.copy_(self.done, non_blocking=True)
    wait("looking who is done")
    return ~self.seen.view(self.B, self.G)


# ------------------------------------------------------------------------------------------------
# What is run
# ------------------------------------------------------------------------------------------------


def on(device, dtype=torch.float32) -> HumanOmni:
    model = HumanOmni.from_pretrained(
        GOLDEN / "humanomni", bert=GOLDEN / "bert", dtype=dtype, device=device, log=str
    )
    model.eos_ids = [380, *range(0, 380, 12)]
    return model


def golden_batch(forward) -> PromptBatch:
    """Three golden prompts at other positions than 0, 1, 2, of one sample."""
    sample = Sample("clip", GOLDEN / "none", "?", "happy", "happy", "video_audio")
    return three_prompts(forward, indices=[4, 1, 7], samples=[sample] * 3)


class Bench:
    """A model in training on a device. `waits`: how often the host waited for it, by part."""

    def __init__(self, device, dtype, forward):
        self.ranks, self.model, self.waits, self.row = (
            Ranks(0, 1, torch.device(device)),
            on(device, dtype),
            {},
            {},
        )
        self.trained = self.model.set_trained()
        self.optimizer = MasterAdamW(self.trained, 1e-4)
        self.before = self.weights
        step = self.optimizer.step
        self.optimizer.step = lambda *a: (
            setattr(self, "gradient", inner_of(self.optimizer.flat).clone()),
            step(*a),
        )[1]
        self.batch = self.part(
            "encode", lambda: encode_media(self.model, golden_batch(forward).to(device))
        )

    def part(self, name, run):
        waits.clear()
        result = run()
        self.waits[name] = len(waits)
        return result

    @property
    def weights(self) -> torch.Tensor:
        return inner_of(self.trained[-1]).detach().clone()

    @property
    def moved(self) -> bool:
        return not torch.equal(self.weights, self.before)


def grpo_step(device, dtype, forward, processor) -> tuple[Bench, grpo.Rollout]:
    args = grpo.Args(
        model="",
        data="",
        out="",
        num_generations=4,
        max_new_tokens=14,
        micro_batch=2,
        scale="none",
    )
    b = Bench(device, dtype, forward)
    meter, reference = grpo.Meter(), frozen_reference(b.model)
    rollout = b.part(
        "rollout",
        lambda: grpo.sample_completions(b.model, processor, b.batch, args),
    )
    rollout.ref_logps = b.part(
        "reference", lambda: grpo.rollout_logps(reference, b.batch, rollout, args)
    )
    r = torch.arange(12.0).view(3, 4) % 5
    # of noise all rewards are 0
    rollout.rewards = {"accuracy": r.to(device), "format": r.to(device)}
    rollout.total_rewards = 2 * r.to(device)
    rollout.advantages = b.part(
        "compute_advantages", lambda: grpo.compute_advantages(rollout, args, b.ranks)
    )
    assert b.part(
        "update",
        lambda: one_update(b.model, b.optimizer, b.batch, rollout, args, b.ranks, 1e-4, meter),
    )
    assert b.moved
    b.part(
        "tell",
        lambda: (
            grpo.measure_rollout(meter, rollout),
            meter.totals(),
            grpo.rollout_rows(b.batch, rollout, 1),
        ),
    )
    b.row = grpo.Meter.join([meter.totals()])
    return b, rollout


def sft_step(device, dtype, forward) -> Bench:
    b, args = Bench(device, dtype, forward), sft.Args(model="", data="", out="", micro_batch=2)
    row, moved = b.part(
        "update", lambda: sft.update(b.model, b.optimizer, b.batch, args, b.ranks, 1e-4)
    )
    assert moved and b.moved and row["num_tokens"] == 12
    return b


# ------------------------------------------------------------------------------------------------
# Tests
# ------------------------------------------------------------------------------------------------

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
# How often the host may wait for the device in each part: bounds that only go down. (The
# optimiser asks once, in its first step, which weights have a gradient; rewards know whether a
# completion was finished.)
# two micro-batches of 5
MOST_WAITS = {
    "encode": 4,
    "rollout": 16,
    "reference": 10,
    "compute_advantages": 0,
    "update": 7 + 2 * 5,
    "tell": 6,
}
MOST_WAITS_SFT = {"encode": 4, "update": 7 + 2 * 5}


def within(counted: dict, most: dict) -> bool:
    return counted.keys() == most.keys() and all(counted[name] <= most[name] for name in most)


@DTYPES
def test_a_whole_grpo_step(gpu, forward, processor, dtype):
    """Stops a tensor left on the CPU, a step that cannot be captured, a loop that waits,
    and another result than a CPU's."""
    b, rollout = grpo_step("cuda", dtype, forward, processor)
    parts = [x for x in (*vars(rollout).values(), *rollout.rewards.values()) if torch.is_tensor(x)]
    assert len(parts) == 9 and all(x.is_cuda for x in parts)
    assert within(b.waits, MOST_WAITS), b.waits
    assert bool(flash) == (dtype == torch.bfloat16)
    if dtype == torch.float32:
        on_cpu, expected = grpo_step("cpu", dtype, forward, processor)
        assert torch.equal(rollout.completions.inner, expected.completions)
        assert len(set(expected.lengths.flatten().tolist())) > 2
        assert float((b.gradient - on_cpu.gradient).norm() / on_cpu.gradient.norm()) < 1e-5
        assert len(b.row) == 25 and b.row == pytest.approx(on_cpu.row, rel=1e-3, abs=1e-5)
        fused = [x.optimizer.adam.param_groups[0]["fused"] for x in (b, on_cpu)]
        assert fused[0] is True and not fused[1]
        torch.testing.assert_close(b.weights, on_cpu.weights, atol=1e-6, rtol=0)


@DTYPES
def test_a_whole_sft_step(gpu, forward, dtype):
    """Stops the same in the other trainer."""
    b = sft_step("cuda", dtype, forward)
    assert within(b.waits, MOST_WAITS_SFT), b.waits
    if dtype == torch.float32:
        expected = sft_step("cpu", dtype, forward).gradient
        assert float((b.gradient - expected).norm() / expected.norm()) < 1e-5


def test_an_evaluation(gpu, forward, processor):
    """Stops the same in greedy decoding, one completion a prompt."""
    answers = [
        evaluation.answer(on(device), processor, golden_batch(forward), 14)
        for device in ("cuda", "cpu")
    ]
    assert answers[0] == answers[1] and len(set(answers[0])) > 1


@DTYPES
@pytest.mark.parametrize("temperature, greedy", [(1.0, False), (0.7, False), (1.0, True)])
def test_a_step_can_be_captured(gpu, dtype, temperature, greedy):
    """Stops whatever waits for the device or sits on the CPU in the captured step,
    and memory that moves."""
    advance(on("cuda", dtype), temperature, greedy)


def advance(model, temperature=1.0, greedy=False) -> None:
    with torch.no_grad():
        decoder, r = sampler.Decoder(model), sampler.DecodeState(model, 2, 3, 8, 6)
        held = {name: (x, x.data_ptr()) for name, x in vars(r).items() if torch.is_tensor(x)}
        for _ in range(2):
            with captured():
                sampler.decode_step(model, decoder, r, 4, temperature, greedy)
        for name, (x, address) in held.items():
            assert getattr(r, name) is x and x.data_ptr() == address, (
                f"{name} moved: a graph would write the old place"
            )


FAULTS = {
    "an item": (lambda r, *_: r.t.item(), "waits"),
    "a condition": (lambda r, *_: bool(r.done.all()), "waits"),
    "a boolean index": (lambda r, *_: r.tokens[:, r.done], "waits"),
    "nonzero": (lambda r, *_: r.done.nonzero(), "waits"),
    "a list to the device": (lambda r, *_: torch.tensor([1, 2], device=r.t.device), "waits"),
    "to the CPU": (lambda r, logits, *_: logits.cpu(), "waits"),
    "from the CPU": (lambda r, *_: torch.arange(3).to(r.t.device), "waits"),
    "a CPU tensor": (lambda r, logits, *_: logits + torch.zeros(logits.shape[-1]), "on cpu"),
    "a CPU index": (lambda r, *_: r.tokens[torch.tensor([0, 1])], "waits"),
    "memory that moves": (lambda r, *_: setattr(r, "t", r.t + 1), "moved"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_noticed(gpu, monkeypatch, fault):
    """The test of this test."""
    does, told = FAULTS[fault]
    monkeypatch.setattr(
        sampler,
        "append_token",
        lambda *a, append_token=sampler.append_token: (does(*a), append_token(*a)),
    )
    with pytest.raises((RuntimeError, AssertionError), match=told):
        advance(on("cuda"))


# ------------------------------------------------------------------------------------------------
# What a process chooses
# ------------------------------------------------------------------------------------------------


@pytest.fixture
def settings(monkeypatch):
    """What a process chooses for its GPU, put back afterwards."""
    before = (
        torch.backends.cuda.cudnn_sdp_enabled(),
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
    )
    tf32 = torch.backends.cudnn.allow_tf32
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(name, "set, so that what is set by the code is put back")
        monkeypatch.delenv(name)
    monkeypatch.setattr(lib_dist.torch, "empty", lambda *a, **k: None)  # the first allocation
    yield
    torch.backends.cuda.enable_cudnn_sdp(before[0])
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = before[1]
    torch.backends.cudnn.allow_tf32 = tf32


def test_a_process_on_a_gpu_starts_with_the_right_kernels(settings, monkeypatch):
    """Stops NaN gradients of cuDNN's masked attention, bf16 partial sums, fp32 convolutions in TF32
    (a gradient's norm off by 3e-3), memory in fixed segments, and a run killed by one slow save."""
    asked = {}
    monkeypatch.setattr(lib_dist.dist, "init_process_group", lambda *a, **k: asked.update(k))
    monkeypatch.setattr(lib_dist, "fresh_store", lambda: None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert lib_dist.start_ranks("cuda").device == torch.device("cuda", 0)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction is False
    assert (
        torch.backends.cudnn.allow_tf32 is False and torch.backends.cuda.matmul.allow_tf32 is False
    )
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert asked["timeout"] == datetime.timedelta(minutes=30)


def test_segments_stay_fixed_where_the_driver_refuses_others(settings, monkeypatch):
    """Stops every script ending in "CUDA driver error" on a machine whose driver cannot map memory
    piece by piece."""

    def refuse(*args, **kwargs):
        raise RuntimeError("CUDA driver error: unknown error")

    told = []
    monkeypatch.setattr(lib_dist.torch, "empty", refuse)
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", told.append)
    lib_dist.start_ranks("cuda")
    assert told == ["expandable_segments:False"] and os.environ["PYTORCH_ALLOC_CONF"] == told[0]


def test_the_allocator_of_the_user_stays(settings, monkeypatch):
    """Stops a user's setting of the allocator being replaced by ours."""
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:512")
    lib_dist.start_ranks("cuda")
    assert "PYTORCH_ALLOC_CONF" not in os.environ


def test_a_gpu_works_in_bf16():
    """Stops a GPU that computes in fp32, at an eighth of its speed, because nobody gave a flag."""
    named = [
        [lib_dist.dtype_of(name, torch.device(d)) for d in ("cuda", "cpu")]
        for name in ("auto", "float32", "bfloat16")
    ]
    assert named == [[torch.bfloat16, torch.float32], [torch.float32] * 2, [torch.bfloat16] * 2]


def test_out_of_memory_in_a_capture_is_told_in_one_sentence(monkeypatch, capsys):
    """Stops a traceback of "operation failed due to a previous error during capture" that does not
    say which flags help."""

    def capture(args):
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        finally:  # as leaving torch.cuda.graph does
            raise RuntimeError("operation failed due to a previous error during capture")

    def wrong(args):
        raise RuntimeError("something else")

    monkeypatch.setattr(lib_args, "parse_args", lambda *a, **k: None)
    with pytest.raises(SystemExit) as ended:
        lib_args.run_main(capture, None)
    assert ended.value.code == 1 and lib_args.OUT_OF_MEMORY in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="something else"):
        lib_args.run_main(wrong, None)


@pytest.fixture
def paths(gpu, monkeypatch):
    """-> how a step is run on a device: (kernels, compiled, graph), as the sampler decides it"""
    monkeypatch.setattr(sampler, "load_kernels", lambda: "kernels")

    def paths(device, can_build=True, asked=None):
        monkeypatch.setattr(sampler, "can_build_kernels", lambda: can_build)
        monkeypatch.setenv(sampler.PATH_VARIABLE, asked or "")
        model = on(device)
        decoder = sampler.Decoder(model)
        return decoder.kernels == "kernels", decoder.compile, sampler.uses_graphs(model)

    return paths


def test_a_gpu_samples_with_kernels_compiled_and_captured(paths):
    """Stops the fast path being built and never taken, or taken where it cannot be built."""
    assert paths("cuda") == (True, True, True)
    assert paths("cuda", can_build=False) == (False, False, True)
    assert paths("cpu") == (False, False, False)


def test_the_variable_chooses_how_a_step_is_run(paths):
    """Stops a run that cannot go on where the kernels, the compiler or the capture fail;
    and a switch that is ignored."""
    ways = {name: paths("cuda", asked=name) for name in sampler.DECODE_PATHS}
    assert ways == {
        "eager": (False, False, False),
        "kernels": (True, False, False),
        "compiled": (True, True, False),
        "graph": (True, True, True),
    }
    for asked, can_build, device, words in (
        ("graphs", True, "cuda", "must be one of"),
        ("kernels", False, "cuda", "eager"),
        ("graph", True, "cpu", "eager"),
    ):
        with pytest.raises(lib_args.UserError, match=words) as told:
            paths(device, can_build, asked)
        assert f"{sampler.PATH_VARIABLE}={asked}" in str(told.value)


@pytest.mark.parametrize("fails", ["decode_step", "append_token"])
def test_a_step_that_fails_names_the_variable(gpu, monkeypatch, fails):
    """Stops a traceback out of Triton, the compiler or a capture after which nobody knows how
    to continue. The first token is chosen before the first step: a kernel that cannot be
    built fails there."""

    def broken(*args):
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(sampler, fails, broken)
    model = on("cuda")
    embeds, mask = (
        torch.zeros(2, 3, 64, device="cuda"),
        torch.ones(2, 3, dtype=torch.bool, device="cuda"),
    )
    with pytest.raises(RuntimeError) as failed:
        sampler.generate(model, embeds, mask, 2, 4)
    assert len(failed.value.__notes__) == 1 and sampler.PATH_VARIABLE in failed.value.__notes__[0]
