"""The Triton kernels of a decode step: equal to their twins in Triton's interpreter, accepted by
the compiler for real GPUs without spilled registers.

Neither needs a GPU. Each runs in a process of its own, because Triton decides at its import which
of the two it is.
"""

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from ops import decode_attention

ROOT = Path(__file__).resolve().parents[2]
SHAPES = [  # B, G, K, R, d, P, T, S, newest token
    (2, 3, 2, 7, 64, 100, 40, 33, 20),
    (1, 1, 1, 1, 8, 5, 3, 3, 2),
    (2, 12, 1, 7, 32, 130, 16, 16, 3),
    (1, 2, 2, 2, 16, 300, 80, 80, 70),
    (1, 2, 1, 4, 16, 64, 4, 1, 0),
]


@pytest.mark.parametrize("what", ["attention", "sampling", "paths", "compile", "launches"])
def test_the_kernels(what):
    """Stops kernels that mix up prompts, groups, heads or spans, look at empty places, choose
    another token than their twins, or do not compile for a GPU."""
    if not importlib.util.find_spec("triton"):
        pytest.skip("triton is not installed: the kernels of decoding are not tested here")
    interpreted = str(int(what in ("attention", "sampling", "paths")))
    env = os.environ | {"TRITON_INTERPRET": interpreted, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, __file__, what], env=env, capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_scores_are_fp32():
    """Stops scores rounded to bf16: at 300 a whole unit is lost,
    and sampler and trainer differ by .5 a token."""
    q, k = (torch.full((1, 1, 64), x).bfloat16() for x in (1.0, 4.6875))
    k[0, 0, 0] = 5.6875
    assert float(decode_attention.scores(q, k)) == 301.0


def interpret() -> None:
    """Triton's interpreter, mended for numpy 2, where int() of an array of one is gone."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def for_numpy_2(tensor, *scope):
        patch(tensor, *scope)
        (scope[0].set_attr if scope else setattr)(
            tensor, "__index__", lambda self: int(self.handle.data.item())
        )

    interpreter._patch_lang_tensor = for_numpy_2


# ------------------------------------------------------------------------------------------------
# Attention
# ------------------------------------------------------------------------------------------------


def make(shape, dtype):
    """qkv (1, N, H + 2K, d), rope (2, B, 1, 1, d), prefix, suffix, bias,
    t: of a step that writes slot t."""
    B, G, K, R, d, P, T, _, t = shape
    torch.manual_seed(0)
    angle = torch.rand(B, 1, 1, d // 2).repeat(1, 1, 1, 2) * 6
    rope = torch.stack((angle.cos(), angle.sin())).to(dtype)
    qkv = torch.randn(1, B * G, K * R + 2 * K, d).to(dtype)
    prefix, suffix = torch.randn(2, B, K, P, d).to(dtype), torch.randn(2, B, K, G, T, d).to(dtype)
    bias = torch.zeros(B, 1, 1, 1, P + T)
    bias[..., P + t + 1 :] = -torch.inf
    bias[0, ..., : P // 2] = -torch.inf  # a short prompt: whole spans without a key
    suffix[..., t:, :] = torch.nan  # what is not yet written must not be read
    return qkv, rope, prefix, suffix, bias, torch.tensor([t])


def attention() -> None:
    """fp16 stands for bf16, which the interpreter's products do not know."""
    import sampler
    from ops import decode_kernel

    interpret()
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.float16, 4e-3)):
        for shape in SHAPES:
            (qkv, rope, prefix, suffix, bias, t), S = make(shape, dtype), shape[7]
            slow_suffix, fast_suffix = suffix.nan_to_num(0.0), suffix.clone()
            q = sampler.rotate_and_write(
                qkv.view(*shape[:2], *qkv.shape[2:]), rope.unbind(0), slow_suffix, t
            )
            theirs = decode_attention.attend(q, prefix, slow_suffix, bias, S).view(
                1, len(qkv[0]), -1
            )
            ours = decode_kernel.rotate_write_attend(qkv, rope, prefix, fast_suffix, bias, t)
            assert ours.dtype == dtype and ours.shape == theirs.shape
            torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=0)
            # The cache: written at t, and nowhere else.
            written = slice(int(t), int(t) + 1)
            torch.testing.assert_close(
                fast_suffix[..., written, :], slow_suffix[..., written, :], atol=tolerance, rtol=0
            )
            untouched = fast_suffix.clone()
            untouched[..., written, :] = suffix[..., written, :]
            assert torch.equal(untouched.nan_to_num(9.0), suffix.nan_to_num(9.0))
            # And the test can fail: one key more to be seen is another result.
            bias[..., 0] = 0.0
            assert (
                decode_attention.attend(q, prefix, slow_suffix, bias, S).view_as(theirs) - theirs
            ).abs().max() > 3 * tolerance


# ------------------------------------------------------------------------------------------------
# Sampling
# ------------------------------------------------------------------------------------------------


def sampling() -> None:
    """Tokens, log-probabilities and bookkeeping of the kernels are those of
    `sampler.append_token`."""
    import types

    import sampler
    from ops import sample_kernel

    interpret()
    gen = torch.Generator().manual_seed(0)
    seen = 0
    for V, N, temperature, greedy in (
        (152_000, 6, 1.0, False),
        (1000, 40, 0.7, False),
        (1000, 8, 0.7, True),
        (256, 40, 1.0, False),
        (255, 40, 1.3, False),
        (1, 3, 1.0, False),
        (5000, 16, 1.0, True),
    ):
        logits = torch.randn(N, V, generator=gen) * 3
        if V > 256:
            logits[1::4, : V // 2] = -torch.inf  # whole blocks without mass, at the front
            logits[2::4, V - V // 3 :] = -torch.inf  # and at the end
        u = torch.rand(3, N, dtype=torch.float64, generator=gen)
        u[1, 0], u[1, -1] = 0.0, 1 - 2**-53
        likely = logits.argmax(-1)
        states = [
            types.SimpleNamespace(
                u=u,
                t=torch.tensor([1]),
                tokens=torch.full((3, N), 7),
                logps=torch.full((3, N), 0.5),
                lengths=torch.arange(N),
                done=torch.arange(N) % 3 == 1,
                ends=torch.tensor([int(likely[0]), V // 2, 3]),
            )
            for _ in range(2)
        ]
        r, k = states
        sampler.append_token(r, logits, temperature, greedy)
        sample_kernel.append_token(
            logits, k.u, k.tokens, k.logps, k.lengths, k.done, k.ends, k.t, temperature, greedy
        )
        for name in ("tokens", "lengths", "done"):
            assert torch.equal(getattr(k, name), getattr(r, name)), (V, temperature, greedy, name)
        torch.testing.assert_close(k.logps, r.logps, atol=2e-6, rtol=1e-6)
        seen += int((r.done & (torch.arange(N) % 3 != 1)).sum())
    assert seen > 3  # some rows ended here
    for bad in (torch.nan, torch.inf):  # a policy that has diverged must not crash
        tokens = torch.zeros(1, 3, dtype=torch.long)
        sample_kernel.append_token(
            torch.full((3, 1000), bad),
            torch.tensor([[0.0, 0.5, 1 - 2**-53]], dtype=torch.float64),
            tokens,
            torch.zeros(1, 3),
            torch.zeros(3, dtype=torch.long),
            torch.zeros(3, dtype=torch.bool),
            torch.tensor([5]),
            torch.tensor([0]),
            1.0,
            False,
        )
        assert ((tokens >= 0) & (tokens < 1000)).all()


def paths() -> None:
    """Each way to run a step samples what `generate_naive` samples.
    (A graph needs a GPU: tests/test_sampler.py.)"""
    sys.path.insert(0, str(ROOT / "tests"))
    from conftest import load_golden_model

    import sampler

    interpret()
    model, gen = load_golden_model(), torch.Generator().manual_seed(3)
    model.eos_ids = [380, *range(0, 380, 12)]
    embeds = torch.randn(2, 7, model.config.hidden_size, generator=gen) * 0.5
    mask = torch.arange(7) >= 7 - torch.tensor([7, 3])[:, None]
    for greedy in (False, True):
        given = embeds, mask, 3, 6, 0.7
        slow = sampler.generate_naive(model, *given, seed=3, greedy=greedy)
        for path in ("kernels",) if greedy else ("", "eager", "kernels", "compiled"):
            os.environ[sampler.PATH_VARIABLE] = path
            fast = sampler.generate(model, *given, seed=3, greedy=greedy)
            assert torch.equal(fast[0], slow[0]) and torch.equal(fast[1], slow[1]), path
            torch.testing.assert_close(fast[2], slow[2], atol=1e-4, rtol=1e-4)
            decoder = sampler.Decoder.of(model)
            assert (decoder.kernels is not None, decoder.compile) == (
                path in ("kernels", "compiled"),
                path == "compiled",
            )


# ------------------------------------------------------------------------------------------------
# The compiler
# ------------------------------------------------------------------------------------------------


def spilled(ptx: str, capability: int) -> int:
    """Bytes of registers that do not fit, as the assembler for this GPU reports them."""
    import triton

    assembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        name = f"sm_{capability}" + "a" * (capability == 90)
        told = subprocess.run(
            [assembler, "-v", f"--gpu-name={name}", file.name, "-o", os.devnull],
            capture_output=True,
            text=True,
            check=True,
        ).stderr
    return sum(int(n) for n in re.findall(r"(\d+) bytes (?:stack frame|spill)", told))


def compile() -> None:
    """For an A100 and an H100, at full size, in bf16 and fp32."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ops import decode_kernel, sample_kernel

    fixed = dict.fromkeys(
        ("bias", "partial_max_total", "partial_values", "logits", "maxima", "rests", "logps"),
        "*fp32",
    )
    fixed |= dict.fromkeys(("tokens", "lengths", "end_tokens", "position"), "*i64")
    fixed |= {"done": "*i1", "uniforms": "*fp64", "scale": "fp32", "temperature": "fp32"}
    head = {"R": 7, "d": 64, "BLOCK": 64, "WIDTH": 64}
    jobs = [
        (decode_kernel.over_prefix, dtype, head | {"QUERIES": rows})
        for dtype, rows in (("bf16", 16), ("bf16", 64), ("fp32", 16))
    ]
    jobs += [
        (decode_kernel.over_suffix, dtype, head | {"QUERIES": 16, "PARTS": parts})
        for dtype, parts in (("bf16", 1), ("bf16", 16), ("fp32", 16))
    ]
    jobs += [(sample_kernel.block_statistics, "fp32", {"TILE": 16})]
    jobs += [
        (sample_kernel.choose_and_record, "fp32", {"GREEDY": greedy, "ENDS": 2, "BLOCKS": 1024})
        for greedy in (False, True)
    ]
    for kernel, dtype, sizes in jobs:
        kinds = dict.fromkeys(("qkv", "rope", "keys", "values", "out"), f"*{dtype}") | fixed
        signature = {
            name: "constexpr" if name in sizes else kinds.get(name, "i32")
            for name in kernel.arg_names
        }
        # What Triton sees at a launch: torch's memory starts at multiples of 16,
        # and so do rows of qkv.
        even = [
            i
            for i, name in enumerate(kernel.arg_names)
            if signature[name].startswith("*")
            or name in ("qkv_stride", "sine_offset", "span_length", "V")
        ]
        source = ASTSource(
            kernel,
            signature,
            constexprs={(kernel.arg_names.index(n),): v for n, v in sizes.items()},
            attrs={(i,): [["tt.divisibility", 16]] for i in even},
        )
        for capability in (80, 90):
            built = triton.compile(source, target=GPUTarget("cuda", capability, 32))
            assert built.metadata.shared <= 99 * 1024
            assert ("mma" in built.asm["ptx"]) == (dtype == "bf16")  # tensor cores are used
            assert spilled(built.asm["ptx"], capability) == 0, (
                kernel.__name__,
                dtype,
                sizes,
                capability,
            )


def launches() -> None:
    """Two launches for attention, two for the token, and no other operation on the device."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from ops import decode_kernel, sample_kernel

    seen = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: seen.append(grid)

    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if not function.is_view and function.overloadpacket.__name__ != "empty":
                seen.append(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    for module, names in (
        (decode_kernel, ("over_prefix", "over_suffix")),
        (sample_kernel, ("block_statistics", "choose_and_record")),
    ):
        for name in names:
            setattr(module, name, Kernel())
    qkv, *others = make((2, 8, 2, 7, 64, 960, 512, 512, 0), torch.bfloat16)
    rows = [torch.zeros(4, 16) for _ in range(5)]
    logits, ends, t = torch.zeros(16, 151_936), torch.zeros(2), torch.zeros(1)
    with Operations():
        decode_kernel.rotate_write_attend(qkv, *others)
        sample_kernel.append_token(logits, *rows, ends, t, 1.0, False)
    assert seen == [(4, 15, 1), (32,), (16, 38), (16,)]

    # Strides that the kernels do not know are refused: they would read another row's numbers.
    wider = torch.cat((qkv, qkv), 2)[:, :, : qkv.shape[2]]
    for given in (
        (wider, *others),
        (qkv, others[0].expand_as(others[0]).transpose(1, 4), *others[1:]),
    ):
        with pytest.raises(AssertionError, match="contiguous"):
            decode_kernel.rotate_write_attend(*given)


if __name__ == "__main__":
    globals()[sys.argv[1]]()
