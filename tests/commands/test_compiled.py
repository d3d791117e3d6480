"""torch.compile, which takes half a minute to compile: the compiled layers are the layers."""
import functools
import re
import shutil

import pytest
import torch
from conftest import load_golden_model
from torch._inductor.utils import run_and_get_code

import sampler
from model import compiled

G, T = 3, 5
MEDIA = ("input_ids", "frames", "mel", "question_ids", "question_mask")


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
def test_compiled_layers_are_the_layers(forward):
    """Stops a compiled path that computes something else, in sampling, in the loss or in its gradient."""
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
        results.append((tokens, logps, out.detach(), torch.cat([p.grad.flatten() for p in trained if p.grad is not None])))
    plain, fast = results
    assert torch.equal(plain[0], fast[0])
    for a, b in zip(plain[1:3], fast[1:3]):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert float((plain[3] - fast[3]).norm() / plain[3].norm()) < 1e-4
    compiled.cache_clear()


def test_layers_and_shapes_share_what_is_compiled(model, monkeypatch):
    """Stops a compiler that is called anew for each layer, step or batch: on a GPU the sampler is compiled by default."""
    torch._dynamo.reset()                                    # what it has seen of shapes, too
    built = []

    def compile_(function):
        return torch.compile(function, backend=lambda graph, inputs: built.append(function) or graph)

    monkeypatch.setattr(sampler, "compiled", functools.cache(compile_))
    monkeypatch.setattr(sampler, "ONEDNN", False)
    monkeypatch.setattr(model, "eos_ids", [-7])              # never produced: all rows run to the end
    monkeypatch.setattr(model, "is_compiled", True)
    kept = sampler.Decoder(model)                            # as on a GPU
    monkeypatch.setattr(sampler.Decoder, "of", lambda model: kept)
    for B, P, g, t in ((3, 7, 4, 5), (2, 9, 3, 5), (4, 5, 5, 20), (3, 6, 2, 7)):
        sampler.generate(model, torch.randn(B, P, model.config.hidden_size), torch.ones(B, P, dtype=torch.bool), g, t)
    # The first shape, one for any other number of rows, and for what reads the memory one for any other length.
    halves = {sampler.PackedLayer.before_attention: 3, sampler.PackedLayer.after_attention: 2}
    assert {f: built.count(f) for f in halves} == halves


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
def test_kernels_of_a_compiled_layer(model):
    """Stops a graph break or a copy in the sampler's layers: 9 kernels a layer beside attention, 17 when not compiled."""
    kept, rows = sampler.Decoder(model), sampler.Rows(model, 2, G, 8, 6)
    layer, x, rope = kept.layers[0], torch.randn(2, G, model.config.hidden_size), rows.rope.index_select(2, rows.t).unbind(0)
    halves = {sampler.PackedLayer.before_attention: (layer, x, rope, rows.suffix[0], rows.t),
              sampler.PackedLayer.after_attention: (layer, x, x)}
    torch._dynamo.reset()
    counts = []
    for half, inputs in halves.items():
        with torch.no_grad():
            _, (code,) = run_and_get_code(torch.compile(half), *inputs)
        counts.append(len(re.findall(r"(?:extern_kernels\.|cpp_fused)\w+\(", code.split("def call(")[1])))
    assert counts == [3, 6]
