"""torch.compile, which takes half a minute to compile: the compiled layers are the layers."""

import collections
import functools
import re
import shutil
import types

import pytest
import torch
from conftest import load_golden_model
from gpu_stages import append_token_twin, attention_twin
from torch._inductor.utils import run_and_get_code

import sampler
from lib import compiler
from lib.compiler import compiled
from model import DecoderLayer

G, T = 3, 5
MEDIA = ("input_ids", "frames", "mel", "question_ids", "question_mask")


@pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")),
    reason="torch.compile needs a C++ compiler",
)
def test_compiled_layers_are_the_layers(forward):
    """Stops a compiled path that computes something else, in sampling,
    in the loss or in its gradient."""
    results = []
    for compile_ in (False, True):
        model = load_golden_model()
        if compile_:
            model.compile_layers()
        trained = model.set_trained()
        embeds, mask = model.embed_prompt(*(forward[k] for k in MEDIA))
        tokens, lengths, logps = sampler.generate(model, embeds.detach(), mask, G, T, seed=1)
        out = model.completion_logps(embeds, mask, tokens, lengths)
        out.sum().backward()
        results.append(
            (
                tokens,
                logps,
                out.detach(),
                torch.cat([p.grad.flatten() for p in trained if p.grad is not None]),
            )
        )
    plain, fast = results
    assert torch.equal(plain[0], fast[0])
    for a, b in zip(plain[1:3], fast[1:3]):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert float((plain[3] - fast[3]).norm() / plain[3].norm()) < 1e-4
    compiled.cache_clear()


SHAPES = [  # B, P, G, T: prompts and completions vary, a prompt alone, a completion alone, one row
    (3, 7, 4, 5),
    (2, 9, 3, 5),
    (4, 5, 5, 20),
    (3, 6, 2, 7),
    (1, 4, 8, 6),
    (2, 4, 1, 6),
    (1, 5, 1, 4),
    (8, 3, 4, 4),
    (5, 8, 2, 18),
    (2, 2, 2, 3),
    (6, 6, 3, 9),
    (1, 9, 3, 5),
]


@pytest.fixture
def built(model, monkeypatch):
    """Functions in the order in which the compiler was called for them,
    with a sampler whose halves are compiled."""
    torch._dynamo.reset()  # what it has seen of shapes, too
    built = []

    def compile_(function):
        return torch.compile(
            function, backend=lambda graph, inputs: built.append(function) or graph
        )

    monkeypatch.setattr(sampler, "compiled", functools.cache(compile_))
    monkeypatch.setattr("model.compiled", functools.cache(compile_))
    monkeypatch.setattr(sampler, "ONEDNN", False)
    monkeypatch.setattr(model, "eos_ids", [-7])  # never produced: all rows run to the end
    monkeypatch.setattr(model, "is_compiled", True)
    yield built
    torch._dynamo.reset()


@pytest.mark.parametrize("kernels", [False, True])
def test_layers_and_shapes_share_what_is_compiled(model, built, monkeypatch, kernels):
    """Stops a compiler that is called anew for each layer, step or batch: on a GPU the sampler is
    compiled by default, and after torch's limit of 8 graphs new shapes run uncompiled."""
    kept = sampler.Decoder(model)  # as on a GPU
    if kernels:
        # No view, as the kernel's: of a view the compiler would look at the sizes of its base, too.
        attend = lambda *given: attention_twin(*given).clone()
        kept.kernels = types.SimpleNamespace(
            rotate_write_attend=attend, append_token=append_token_twin
        )
    monkeypatch.setattr(sampler.Decoder, "of", lambda model: kept)
    for i, (B, P, g, t) in enumerate(SHAPES):
        embeds, mask = (
            torch.randn(B, P, model.config.hidden_size),
            torch.ones(B, P, dtype=torch.bool),
        )
        tokens, *_ = sampler.generate(model, embeds, mask, g, t, seed=i)
        if i < 3:
            assert torch.equal(tokens, sampler.generate_naive(model, embeds, mask, g, t, seed=i)[0])
    counts = collections.Counter(built)
    packed, prefill = (
        sampler.PackedLayer,
        (DecoderLayer.before_attention, DecoderLayer.after_attention),
    )
    assert max(counts.pop(f) for f in prefill) <= 6
    if kernels:
        # The first shape, one for any other number of rows, one for a single row,
        # whose size is a constant.
        assert (
            max(counts.pop(f) for f in (packed.project, packed.join, packed.after_attention)) <= 3
        )
    else:
        # Here B and G are sizes of their own, and the memory that is written to has views.
        assert max(counts.pop(f) for f in (packed.before_attention, packed.after_attention)) <= 12
    assert not counts and compiler.RECOMPILE_LIMIT == 64


def test_the_loss_shares_what_is_compiled(model, built):
    """Stops the same in training, where every micro-batch has a length of its own."""
    for i, (B, P, g, t) in enumerate(SHAPES):
        embeds, mask = (
            torch.randn(B, P, model.config.hidden_size),
            torch.ones(B, P, dtype=torch.bool),
        )
        ids, lengths = torch.randint(0, 300, (B, g, t)), torch.full((B, g), t)
        with torch.set_grad_enabled(i % 2 == 0):  # the reference has no gradient
            model.completion_logps(embeds, mask, ids, lengths)
    assert max(collections.Counter(built).values()) <= 6


def test_the_limit_of_recompilations_is_told(monkeypatch, capfd):
    """Stops a run that is half as fast after a while, with a log record that tells
    neither why nor what to do."""
    monkeypatch.setattr(compiler, "RECOMPILE_LIMIT", 2)
    before = torch._dynamo.config.recompile_limit
    monkeypatch.setattr(
        compiler.torch, "compile", functools.partial(torch.compile, backend="eager", dynamic=False)
    )
    try:
        twice = compiler.compiled.__wrapped__(lambda x: 2 * x)
        for n in (2, 3):
            twice(torch.ones(n))
        assert "will not compile it again" not in capfd.readouterr().err
        assert twice(torch.ones(4)).tolist() == [2.0] * 4
    finally:
        torch._dynamo.config.recompile_limit = before
    told = capfd.readouterr().err
    assert told.count("will not compile it again") == 1 and "TORCH_LOGS=recompiles" in told


@pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")),
    reason="torch.compile needs a C++ compiler",
)
def test_kernels_of_a_compiled_layer(model):
    """Stops a graph break or a copy in the sampler's layers: 7 kernels a layer beside attention,
    17 when not compiled."""
    packed, (layer, following, *_) = sampler.PackedLayer, sampler.Decoder(model).layers
    x = torch.randn(1, 6, model.config.hidden_size)
    counts = {}
    for part, inputs in (
        (packed.project, (layer, x)),
        (packed.join, (layer, following, x, x)),
        (packed.after_attention, (layer, x, x)),
    ):
        torch._dynamo.reset()
        with torch.no_grad():
            _, (code,) = run_and_get_code(torch.compile(part), *inputs)
        counts[part.__name__] = len(
            re.findall(r"(?:extern_kernels\.|cpp_fused)\w+\(", code.split("def call(")[1])
        )
        if part is packed.after_attention:
            # "Product plus residual" in one call is two on a GPU: the residual is copied first.
            assert "extern_kernels.addmm" not in code
    assert counts == {"project": 2, "join": 7, "after_attention": 6}


@pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")),
    reason="torch.compile needs a C++ compiler",
)
def test_the_compiled_step_copies_no_cache(monkeypatch):
    """Stops the copy that Inductor made of the whole cache, in every layer of every step: half
    a millisecond of 2.4 at 64 rows on an H100. Eager code has no such copy, so counted
    operations do not see it.

    The shapes of HumanOmni-0.5B; T is a prime beside 512, so that what holds or loops over the
    cache can be divided by it.
    """
    monkeypatch.setattr(sampler, "ONEDNN", False)
    B, G, T, D, H, K, d = 8, 8, 509, 896, 14, 2, 64
    config = types.SimpleNamespace(
        hidden_size=D,
        num_attention_heads=H,
        num_key_value_heads=K,
        head_dim=d,
        rms_norm_eps=1e-6,
        intermediate_size=64,
    )
    layer = sampler.PackedLayer.of(DecoderLayer(config).bfloat16())
    x, suffix, t = (
        torch.randn(B, G, D).bfloat16(),
        torch.zeros(2, B, K, G, T, d).bfloat16(),
        torch.tensor([3]),
    )
    rope = torch.randn(2, B, 1, 1, d).bfloat16().unbind(0)
    torch._dynamo.reset()
    with torch.no_grad():
        expected = suffix.clone()
        layer.before_attention(x, rope, expected, t)
        _, (code,) = run_and_get_code(
            torch.compile(sampler.PackedLayer.before_attention), layer, x, rope, suffix, t
        )
    torch.testing.assert_close(suffix, expected, atol=0.05, rtol=0.05)  # it is written
    assert suffix[..., 3, :].abs().sum() > 0
    buffers = re.findall(r"empty_strided\w*\(\(([\d, ]+)\)", code)
    sizes = [int(n) for shape in buffers for n in shape.replace(",", " ").split()]
    loops = [int(n) for n in re.findall(r"x\d+<static_cast<int64_t>\((\d+)", code)]
    assert len(buffers) > 3 and len(loops) > 3  # the code can be read
    assert not [n for n in sizes + loops if n % T == 0]
