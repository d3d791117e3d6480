"""Work that is not done: counted operations against formulas from the geometry.
Never a wall time."""

import collections
import copy
import dataclasses
import types

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import grpo
import sampler
from course.one_update import one_update
from data import Sample
from lib.dist import start_ranks
from model import HumanOmni, RMSNorm, encode_media, frozen_reference
from ops.logprob_head import HeadLogps
from training import MasterAdamW

G, T = 3, 5


def flops(run) -> int:
    # The fused kernels of a CPU are not counted; written out,
    # attention is products like all others.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def linear_flops(model) -> int:
    """Of the decoder's products for one position: 2 x weights, the embedding and norms apart."""
    return 2 * sum(p.numel() for p in model.model.layers.parameters() if p.dim() == 2)


def pair_flops(model) -> int:
    """Of attention, for one query position and one key position in all layers:
    q k and weights v, 2 d each and head."""
    c = model.config
    return c.num_hidden_layers * c.num_attention_heads * 4 * c.head_dim


def head_flops(model) -> int:
    return 2 * model.config.hidden_size * model.config.vocab_size


def test_prefill_runs_each_prompt_once(model, prompt):
    """Stops a prompt that is run once per completion, or a head over its positions."""
    embeds, mask = prompt
    B, P = mask.shape
    with torch.no_grad():
        counted = flops(lambda: model.prefill(embeds, mask))
    assert counted == B * P * linear_flops(model) + B * P * P * pair_flops(model)


def test_decoding_costs_a_token_and_not_a_prompt(model, prompt, monkeypatch):
    """Stops a cache that is not used, a prefix read per completion as a product of its own,
    a head over the past."""
    embeds, mask = prompt
    B, P = mask.shape
    monkeypatch.setattr(model, "eos_ids", [-7])  # never produced: all rows run to the end
    with torch.no_grad():
        prefill = flops(lambda: model.prefill(embeds, mask))
        counted = flops(lambda: sampler.generate(model, embeds, mask, G, T))
    rows, seen = B * G * (T - 1), P + min(T, sampler.SUFFIX_STEP["cpu"])
    first = B * head_flops(model)  # one head for a group: it starts from one state
    assert counted == prefill + first + rows * (
        linear_flops(model) + head_flops(model) + seen * pair_flops(model)
    )


def test_the_loss_runs_the_prompt_once_and_the_head_on_completions(model, prompt):
    """Stops G copies of the prompt in training, and logits over it:
    7 times the work at full size."""
    embeds, mask = prompt
    B, P = mask.shape
    completions, lengths = torch.randint(0, 300, (B, G, T)), torch.tensor([[5, 3, 1], [2, 5, 4]])
    S = T - 1  # the last token is predicted, never read
    expected = B * (P + G * S) * linear_flops(model)
    expected += B * (P * P + G * S * (P + S)) * pair_flops(model)
    expected += int(lengths.sum()) * head_flops(model)  # not on padding either
    with torch.no_grad():
        assert flops(lambda: model.completion_logps(embeds, mask, completions, lengths)) == expected
        repeated = flops(
            lambda: model.logits(model.hidden(*(x.repeat_interleave(G, 0) for x in (embeds, mask))))
        )
    assert repeated > 2 * expected  # what it replaces, even before the completions


def test_a_step_runs_the_towers_once_per_clip(fresh_model, batch, monkeypatch):
    """Stops towers that run again for the reference, for the loss or for each completion:
    17 times in the reference code."""
    model = fresh_model
    model.set_trained()
    calls = {"vision": 0, "audio": 0}

    def counted(name, method):
        def run(media):
            calls[name] += len(media)
            return method(media)

        return run

    monkeypatch.setattr(model, "encode_video", counted("vision", model.encode_video))
    monkeypatch.setattr(model, "encode_audio", counted("audio", model.encode_audio))
    reference = frozen_reference(model)
    args = grpo.Args(
        model="",
        data="",
        out="",
        num_generations=G,
        max_new_tokens=T,
        update_epochs=2,
        micro_batch=1,
    )
    ranks = start_ranks("cpu")
    samples = [Sample("a", None, "?", "happy", "happy", "video_audio")] * 2
    once = encode_media(model, batch.__class__(**(vars(batch) | {"samples": samples})))
    assert calls == {"vision": 2, "audio": 2}
    decode = type("P", (), {"decode": staticmethod(lambda ids: " ".join(map(str, ids)))})
    rollout = grpo.sample_completions(model, decode, once, args)
    rollout.ref_logps = grpo.rollout_logps(reference, once, rollout, args)
    rollout.advantages = torch.randn(2, G)
    one_update(
        model, MasterAdamW(model.set_trained(), 0.0), once, rollout, args, ranks, 0.0, grpo.Meter()
    )
    assert calls == {"vision": 2, "audio": 2}


def test_nothing_as_large_as_tokens_times_vocabulary_is_kept(model, prompt):
    """Stops a (tokens, V) tensor that autograd keeps for the backward pass:
    5 GB a group at full size."""
    embeds, mask = prompt
    completions = torch.randint(0, 300, (2, 20, 40))
    lengths = torch.full((2, 20), 40)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.append(tuple(x.shape)) or x, lambda x: x
    ):
        model.completion_logps(embeds, mask, completions, lengths, with_entropy=True)
    V, D = model.config.vocab_size, model.config.hidden_size
    assert {shape for shape in kept if V in shape} == {(V, D)}  # the head itself


# ---- what a GPU would do: kernels of a decode step, passes of the head ---------------------------


class Operations(TorchDispatchMode):
    """Counts what would be a kernel on a GPU, and how often tensors of each size are read or
    written. Views are nothing."""

    def __init__(self):
        super().__init__()
        self.kernels, self.passes = 0, collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if not function.is_view and name not in ("empty", "_unsafe_view"):
            self.kernels += 1
            if name not in ("gather", "scatter_add_"):  # these touch one entry a row
                self.passes.update(
                    x.numel() for x in tree_leaves((args, kwargs, out)) if torch.is_tensor(x)
                )
        return out


def kernels_of_a_step(model, layers: int, kernels) -> int:
    few = copy.copy(model)
    few.config = dataclasses.replace(model.config, num_hidden_layers=layers)
    decoder, rows = sampler.Decoder(model), sampler.DecodeState(few, 2, 3, 8, 6)
    decoder.layers, decoder.kernels = decoder.layers[:layers], kernels
    with torch.no_grad(), Operations() as counted:
        sampler.decode_step(few, decoder, rows, 4, 1.0, False)
    return counted.kernels


def test_kernels_of_a_decode_step(model, monkeypatch):
    """Stops a step that grows: for a few rows, the number of kernels decides
    how long it takes on a GPU."""
    # one kernel, as on a GPU
    monkeypatch.setattr(RMSNorm, "forward", lambda self, x: x * self.weight)
    towers = (
        model.model.vision_tower.config,
        model.model.audio_tower.config,
        model.model.bert_model.config,
    )
    grouped = HumanOmni(dataclasses.replace(model.config, num_key_value_heads=2), *towers)
    grouped.eos_ids = model.eos_ids
    # Each of the two is two kernels, see tests/ops.
    own = types.SimpleNamespace(
        rotate_write_attend=lambda qkv, *_: qkv[:, :, :-4].flatten(2) * 1 * 1,
        append_token=lambda logits, *_: logits[:1] * 1 * 1,
    )
    counts = []
    for kernels in (None, own):
        one, two = (kernels_of_a_step(grouped, layers, kernels) for layers in (1, 2))
        counts.append((two - one, 2 * one - two))
    # Eager, bf16 has one more: a cast of the attention weights. Compiled, what is between our
    # kernels is 7 a layer and not 10 (tests/commands/test_compiled.py): 225 at 24 layers.
    assert counts == [(28, 65), (12, 8)]


@pytest.mark.parametrize("temperature, more", [(1.0, 0), (0.7, 4)])
def test_passes_of_the_head(temperature, more):
    """Stops another pass over (tokens, V): they are the head's time,
    92 GB for 8 x 512 completions with 28 of them."""
    N, V, D, chunk = 12, 1009, 16, 4
    states, weight = torch.randn(N, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    with Operations() as counted:
        logps, _ = HeadLogps.apply(states, weight, torch.arange(N), temperature, chunk, True)
        logps.sum().backward()
    # logits; maximum; less it; exponentials; their sum; times logits; that sum
    forward = 1 + 1 + 2 + 2 + 1 + 3 + 1
    backward = 1 + 2 + 2 + 1 + 1  # logits; less the norm; exponentials; two products
    assert counted.passes[chunk * V] == (forward + backward + more) * N // chunk
    # The head's gradient: zeros once, read and written by each chunk.
    # The weight: read by each product of each chunk.
    assert counted.passes[V * D] == 2 + 2 * N // chunk + 3 * N // chunk
