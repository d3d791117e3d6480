"""Attention of one new token a row, over [the prompt's keys, shared by its group | the row's own keys].

`attend` says what is computed.  It launches 12 kernels in bf16, most of whose time goes into writing and reading scores.
Where a GPU can build them, the two kernels of ops/decode_kernel.py replace it, together with the rotation of queries and
keys and the write to the cache.

Legend   B prompts   G completions per prompt   P prompt length   T longest completion   S how much of T is looked at
         H query heads   K key/value heads   R = H/K   d head size
"""

import functools
import importlib.util
import os
import shutil
import sysconfig
import types
import warnings
from pathlib import Path

import torch


def scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """(N, m, d), (N, n, d) -> q @ k.T (N, m, n) in fp32.  Rounded to bf16, a score near 300 is off by up to 1, which
    is 0.125 after scaling: the sampler would sample from another policy than the trainer scores."""
    if q.is_cuda and q.dtype != torch.float32:
        return torch.bmm(
            q, k.transpose(1, 2), out_dtype=torch.float32
        )  # only here: it has no kernel elsewhere
    return q.float() @ k.float().transpose(1, 2)


def attend(
    q: torch.Tensor, prefix: torch.Tensor, suffix: torch.Tensor, bias: torch.Tensor, S: int
) -> torch.Tensor:
    """q (B, G, H, d), prefix (2, B, K, P, d), suffix (2, B, K, G, T, d), bias (B, 1, 1, 1, P + T) fp32 -> (B, G, H*d)

    Slots below S of the suffix are looked at; the bias is -inf where nothing is to be seen.
    All G * R queries of a key head meet the shared prefix in one product; nothing is copied per completion.
    One softmax over the concatenated scores, in fp32: no merging of partial results, nothing approximated.
    """
    B, G, _, d = q.shape
    _, _, K, P, _ = prefix.shape
    q = q.reshape(B, G, K, -1, d).transpose(1, 2)  # (B, K, G, R, d)
    own = suffix[..., :S, :]  # (2, B, K, G, S, d)
    from_prefix = scores(q.reshape(B * K, -1, d), prefix[0].flatten(0, 1))  # (B*K, G*R, P)
    from_own = scores(q.reshape(B * K * G, -1, d), own[0].flatten(0, 2))  # (B*K*G, R, S)
    both = torch.cat(
        (from_prefix.view(B, K, G, -1, P), from_own.view(B, K, G, -1, S)), -1
    )  # (B, K, G, R, P + S)
    weights = torch.add(bias[..., : P + S], both, alpha=d**-0.5).softmax(-1).to(q.dtype)
    out = (weights[..., :P].reshape(B, K, -1, P) @ prefix[1]).view(
        B, K, G, -1, d
    )  # (B, K, G, R, d)
    out = out + weights[..., P:] @ own[1]
    return out.transpose(1, 2).reshape(B, G, -1)


@functools.cache
def can_build_kernels() -> bool:
    """True if Triton can build the kernels here: it needs a C compiler, Python's headers and a GPU of capability 8.0 or
    higher.  Under TRITON_INTERPRET=1 it needs nothing."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    scheme = sysconfig.get_default_scheme().replace(
        "posix_local", "posix_prefix"
    )  # as Triton looks for it
    header = (Path(sysconfig.get_path("include", scheme)) / "Python.h").exists()
    triton = importlib.util.find_spec("triton")
    if triton and os.environ.get("TRITON_INTERPRET") == "1":  # runs anywhere, slowly, for tests
        return True
    if (
        triton
        and compiler
        and header
        and torch.cuda.is_available()
        and torch.cuda.get_device_capability() >= (8, 0)
    ):
        return True
    warnings.warn(
        "the kernels of decoding cannot be built here (needed: triton, a C compiler, Python.h, an Ampere GPU or "
        "newer), so sampling is slower: a decode step runs three times as many kernels",
        stacklevel=2,
    )
    return False


def load_kernels() -> types.SimpleNamespace:
    """`rotate_write_attend` and `append_token` as kernels.  Triton is imported only here, where it is needed."""
    from ops import decode_kernel, sample_kernel

    return types.SimpleNamespace(
        rotate_write_attend=decode_kernel.rotate_write_attend,
        append_token=sample_kernel.append_token,
    )
