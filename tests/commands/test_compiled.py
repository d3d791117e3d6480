"""torch.compile, which takes half a minute to compile: the compiled layers are the layers."""
import shutil

import pytest
import torch
from conftest import load_golden_model

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
