"""Attention of one decode step in PyTorch, and the check whether Triton kernels can replace it.

In a decode step each row has one new token. Its queries attend to two sets of keys: those of the
prompt, which the completions of a group share, and those of the row's own completion.

`attend` is the version in PyTorch. In bf16 it launches 12 kernels, and most of their time goes
into writing and reading scores. Where the machine can build them, the two Triton kernels of
decode_kernel.py replace it.

Legend   B prompts   G completions per prompt   P prompt length   T longest completion
         S cache slots of a completion that a step reads (S <= T)
         H query heads   K key/value heads   R = H/K query heads per key/value head   d head size
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
    """Return the products of queries and keys in fp32. q (N, m, d), k (N, n, d) -> (N, m, n)

    Rounding to bf16 would move a score near 300 by up to 1, which is 0.125 after scaling by
    d**-0.5 with d = 64. The sampler's policy would then differ from the trainer's.
    """
    if q.is_cuda and q.dtype != torch.float32:
        # PyTorch has kernels for out_dtype only on CUDA.
        return torch.bmm(q, k.transpose(1, 2), out_dtype=torch.float32)
    return q.float() @ k.float().transpose(1, 2)


def attend(
    q: torch.Tensor, prefix: torch.Tensor, suffix: torch.Tensor, bias: torch.Tensor, S: int
) -> torch.Tensor:
    """Return the attention output of one new token per row, (B, G, H*d).

    q       (B, G, H, d), rotated queries
    prefix  (2, B, K, P, d), keys and values of the prompts
    suffix  (2, B, K, G, T, d), keys and values of the completions, of which the first S slots count
    bias    (B, 1, 1, 1, P + T) fp32, added to the scores: -inf hides a key, such as padding

    All G * R queries that share a key head are multiplied with the prompt's keys in one product, so
    no prompt key is copied per completion. One fp32 softmax runs over the concatenated scores of
    prompt and completion.
    """
    B, G, _, d = q.shape
    _, _, K, P, _ = prefix.shape
    q = q.reshape(B, G, K, -1, d).transpose(1, 2)  # (B, K, G, R, d)
    suffix = suffix[..., :S, :]  # (2, B, K, G, S, d)

    prefix_scores = scores(q.reshape(B * K, -1, d), prefix[0].flatten(0, 1))  # (B*K, G*R, P)
    suffix_scores = scores(q.reshape(B * K * G, -1, d), suffix[0].flatten(0, 2))  # (B*K*G, R, S)
    prefix_scores = prefix_scores.view(B, K, G, -1, P)  # (B, K, G, R, P)
    suffix_scores = suffix_scores.view(B, K, G, -1, S)  # (B, K, G, R, S)
    all_scores = torch.cat((prefix_scores, suffix_scores), -1)  # (B, K, G, R, P + S)
    weights = torch.add(bias[..., : P + S], all_scores, alpha=d**-0.5).softmax(-1).to(q.dtype)

    out = weights[..., :P].reshape(B, K, -1, P) @ prefix[1]  # (B, K, G*R, d)
    out = out.view(B, K, G, -1, d)  # (B, K, G, R, d)
    out = out + weights[..., P:] @ suffix[1]
    return out.transpose(1, 2).reshape(B, G, -1)  # (B, G, H*d)


@functools.cache
def can_build_kernels() -> bool:
    """Return True if Triton can build its kernels on this machine; warn if it cannot."""
    triton = importlib.util.find_spec("triton")
    if triton and os.environ.get("TRITON_INTERPRET") == "1":
        return True  # the interpreter runs on any machine; it is slow and meant for tests

    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    # Triton replaces the scheme in the same way when it looks for Python.h.
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    header_exists = (Path(sysconfig.get_path("include", scheme)) / "Python.h").exists()
    can_compile = triton and compiler and header_exists
    if can_compile and torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0):
        return True

    warnings.warn(
        "the kernels of decoding cannot be built here (needed: triton, a C compiler, Python.h, "
        "an Ampere GPU or newer), so sampling is slower: a decode step runs three times as many "
        "kernels",
        stacklevel=2,
    )
    return False


def load_kernels() -> types.SimpleNamespace:
    """Return `rotate_write_attend` and `append_token`. Only this function imports Triton."""
    from ops import decode_kernel, sample_kernel

    return types.SimpleNamespace(
        rotate_write_attend=decode_kernel.rotate_write_attend,
        append_token=sample_kernel.append_token,
    )
