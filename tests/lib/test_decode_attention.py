"""The fused attention of decoding: equal to its twin in Triton's interpreter, accepted by the compiler for real GPUs.

Neither needs a GPU.  Each runs in a process of its own, because Triton decides at its import which of the two it is.
"""
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lib import decode_attention

ROOT = Path(__file__).resolve().parents[2]
SHAPES = [  # B, G, K, R, d, P, T, S, newest token
    (2, 3, 2, 7, 64, 100, 40, 33, 20), (1, 1, 1, 1, 8, 5, 3, 3, 2), (2, 12, 1, 7, 32, 130, 16, 16, 3),
    (1, 2, 2, 2, 16, 300, 80, 80, 70)]


@pytest.mark.parametrize("what", ["equal", "compile"])
def test_the_kernels(what):
    """Stops kernels that mix up prompts, groups, heads or spans, look at empty places, or do not compile for a GPU."""
    if not importlib.util.find_spec("triton"):
        pytest.skip("triton is not installed: the fused attention of decoding is not tested here")
    env = os.environ | {"TRITON_INTERPRET": str(int(what == "equal")), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, __file__, what], env=env, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]


def test_scores_are_fp32():
    """Stops scores rounded to bf16: at 300 a whole unit is lost, and sampler and trainer differ by .5 a token."""
    q, k = (torch.full((1, 1, 64), x).bfloat16() for x in (1.0, 4.6875))
    k[0, 0, 0] = 5.6875
    assert float(decode_attention.scores(q, k)) == 301.0


def make(shape, dtype):
    B, G, K, R, d, P, T, _, t = shape
    torch.manual_seed(0)
    q = torch.randn(B, G, K * R + K, d).to(dtype)[:, :, :K * R]           # as it comes: a part of q, k and v
    prefix, suffix = torch.randn(2, B, K, P, d).to(dtype), torch.randn(2, B, K, G, T, d).to(dtype)
    bias = torch.zeros(B, 1, 1, 1, P + T)
    bias[..., P + t + 1:] = -torch.inf
    bias[0, ..., :P // 2] = -torch.inf                                    # a short prompt: whole spans without a key
    return q, prefix, suffix, bias


def equal() -> None:
    """fp16 stands for bf16, which the interpreter's products do not know."""
    from triton.runtime import interpreter

    from lib import decode_kernel
    patch = interpreter._patch_lang_tensor

    def for_numpy_2(tensor, scope):                                       # int() of an array of one is gone there
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = for_numpy_2
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float16, 3e-3)):
        for shape in SHAPES:
            inputs, S = make(shape, dtype), shape[7]
            ours, theirs = decode_kernel.attend(*inputs, S), decode_attention.attend(*inputs, S)
            assert ours.dtype == dtype and ours.shape == theirs.shape
            torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=0)
            # And the test can fail: one key more to be seen is another result.
            inputs[3][..., 0] = 0.0
            assert (decode_attention.attend(*inputs, S) - theirs).abs().max() > 3 * tolerance


def compile() -> None:
    """For an A100 and an H100, at full size.  And no more than two launches and no other operation on the device."""
    import triton
    from torch.utils._python_dispatch import TorchDispatchMode
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lib import decode_kernel
    kinds = dict.fromkeys(("q", "keys", "values", "out"), "*bf16") | dict.fromkeys(("bias", "noted", "sums"), "*fp32")
    for kernel, rows in ((decode_kernel.over_prefix, 64), (decode_kernel.over_suffix, 16)):
        sizes = {"R": 7, "d": 64, "ROWS": rows, "BLOCK": 64, "WIDTH": 64}
        signature = {name: "constexpr" if name in sizes else "fp32" if name == "scale" else kinds.get(name, "i32")
                     for name in kernel.arg_names}
        source = ASTSource(kernel, signature, constexprs={(kernel.arg_names.index(n),): v for n, v in sizes.items()})
        for capability in (80, 90):
            built = triton.compile(source, target=GPUTarget("cuda", capability, 32))
            assert built.metadata.shared <= 99 * 1024 and "mma" in built.asm["ptx"]        # tensor cores are used

    seen = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: seen.append(grid)

    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    decode_kernel.over_prefix = decode_kernel.over_suffix = Kernel()
    inputs = make((2, 8, 2, 7, 64, 960, 512, 512, 0), torch.bfloat16)
    with Operations():
        decode_kernel.attend(*inputs, 512)
    assert [x for x in seen if x not in ("empty", "select")] == [(4, 15, 1), (32,)]


if __name__ == "__main__":
    {"equal": equal, "compile": compile}[sys.argv[1]]()
