"""The sampler against its slow twin, against the trainer's log-probabilities,
and against the softmax."""

import copy
import gc
import weakref

import numpy as np
import pytest
import torch
from conftest import load_golden_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import sampler
from model import HumanOmni
from sampler import DecodeState, compact, generate, generate_naive, halvings, sample_token, uniforms

T = 10


@pytest.fixture(scope="module")
def sampled_model():
    """The golden model with many end tokens, so that short and long
    completions are both sampled."""
    model = load_golden_model()
    model.eos_ids = [380, *range(0, 380, 12)]
    return model


def prompts(model: HumanOmni, lengths=(7, 2, 5), seed=0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random ragged prompts, padded on the left."""
    gen = torch.Generator().manual_seed(seed)
    P = max(lengths)
    embeds = torch.randn(len(lengths), P, model.config.hidden_size, generator=gen) * 0.5
    return embeds, torch.arange(P) >= P - torch.tensor(lengths)[:, None]


def inside(lengths: torch.Tensor) -> torch.Tensor:
    return torch.arange(T) < lengths[..., None]


def assert_same(a, b) -> None:
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    # sums in another order, by processor
    torch.testing.assert_close(a[2], b[2], atol=1e-5, rtol=1e-5)


def both(model, seed=3, G=4, lengths=(7, 2, 5), temperature=1.0, greedy=False, left=True):
    """-> (generate's results, its naive twin's) for the same random prompts,
    padded on the left or on the right."""
    embeds, mask = prompts(model, lengths, seed)
    if not left:
        embeds, mask = (
            torch.stack([torch.cat((e[m], e[~m])) for e, m in zip(embeds, mask)]),
            mask.flip(1),
        )
    return [
        f(model, embeds, mask, G, T, temperature, seed=seed, greedy=greedy)
        for f in (generate, generate_naive)
    ]


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("temperature, greedy", [(1.0, False), (0.6, False), (1.0, True)])
def test_equals_its_naive_twin(sampled_model, temperature, greedy, left):
    """Stops every fault of the cache: positions, ragged prompts padded on either side,
    a group's keys mixed up, a stale step."""
    fast, slow = both(sampled_model, temperature=temperature, greedy=greedy, left=left)
    assert_same(fast, slow)
    if not greedy:
        assert fast[1].min() < fast[1].max()  # ragged results, or nothing is shown


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logps_are_the_trainers(sampled_model, temperature):
    """Stops a sampler that scores another distribution than the loss:
    the first ratio would not be 1."""
    embeds, mask = prompts(sampled_model)
    completions, lengths, logps = generate(sampled_model, embeds, mask, 5, T, temperature, seed=1)
    with torch.no_grad():
        ours = sampled_model.completion_logps(embeds, mask, completions, lengths, temperature)
    torch.testing.assert_close(logps, ours, atol=1e-5, rtol=1e-5)
    assert (logps[inside(lengths)] < 0).all()


def test_end_token_is_kept_and_nothing_follows(sampled_model):
    """Stops end tokens that are dropped (never trained), and text after the end that counts."""
    embeds, mask = prompts(sampled_model)
    completions, lengths, logps = generate(sampled_model, embeds, mask, 16, T, seed=0)
    ends = torch.isin(completions, torch.tensor(sampled_model.eos_ids))  # (B, G, T)
    first = torch.where(ends.any(-1), ends.int().argmax(-1) + 1, T)
    assert torch.equal(lengths, first)
    assert (logps[~inside(lengths)] == 0).all() and (logps[inside(lengths)] != 0).all()
    assert (completions[~inside(lengths)] == sampled_model.eos_ids[0]).all()
    # Completions ended by different ids, some early, some never.
    finished = completions.gather(2, lengths[..., None] - 1)[..., 0]
    assert len({int(t) for t in finished[lengths < T]}) > 2
    assert (lengths == T).any() and (lengths < T / 2).any()


def test_a_prompt_does_not_feel_its_batch(sampled_model):
    """Stops rollouts that depend on micro-batch, order or number of ranks."""
    embeds, mask = prompts(sampled_model)
    ids = [11, 5, 900_000]
    together = generate(sampled_model, embeds, mask, 3, T, seed=4, prompt_ids=ids)
    for order in ([2, 0, 1], [1], [0, 2]):
        some = generate(
            sampled_model,
            embeds[order],
            mask[order],
            3,
            T,
            seed=4,
            prompt_ids=[ids[i] for i in order],
        )
        for a, b in zip(some, together):
            torch.testing.assert_close(a, b[order], atol=1e-5, rtol=0)
    fewer = generate(sampled_model, embeds, mask, 2, T, seed=4, prompt_ids=ids)
    assert torch.equal(fewer[0], together[0][:, :2])


def test_every_identity_draws_its_own_numbers(sampled_model):
    """Stops siblings, prompts, seeds or positions that share their random numbers,
    and numbers that are not uniform."""
    u = torch.stack([uniforms(seed, [0, 1, 2, 5_000_000], 6, T, "cpu") for seed in (0, 1)])
    assert u.unique().numel() == u.numel() and u.min() >= 0 and u.max() < 1
    assert torch.equal(uniforms(1, [5_000_000], 6, T, "cpu")[0], u[1, 3])
    # a longer run begins like a shorter one
    assert torch.equal(uniforms(1, [2], 6, 3, "cpu"), u[1, 2:3, :, :3])
    # over siblings, over positions: Kolmogorov-Smirnov, p = 0.001
    for axis in ((8000, 1), (1, 8000)):
        drawn = uniforms(7, [3], *axis, "cpu").flatten().sort().values
        assert (drawn - (torch.arange(8000) + 0.5) / 8000).abs().max() < 1.95 / 8000**0.5
    # The same prompt under two identities, and its siblings, give different texts.
    embeds, mask = prompts(sampled_model, (4, 4))
    embeds[1] = embeds[0]
    completions, _, _ = generate(sampled_model, embeds, mask, 3, T, seed=0)
    assert len({tuple(c) for c in completions.flatten(0, 1).tolist()}) == 6
    again, _, _ = generate(sampled_model, embeds, mask, 3, T, seed=1)
    assert (again != completions).any(-1).all()


def test_small_probabilities_in_a_large_vocabulary():
    """Stops rounding: of 150,000 tokens that share a thousandth of the probability, u says which,
    to the token."""
    V = 150_000
    logits = torch.zeros(1, V)
    logits[0, 0] = np.log(999 * V)
    p = logits.log_softmax(-1)[0].double().exp().numpy()
    wanted = [0, 1, 77_777, V - 2, V - 1]
    u = torch.from_numpy((np.cumsum(p) - p / 2)[wanted] / p.sum())
    token, _ = sample_token(logits.expand(5, -1), u, 1.0, False)
    assert token.tolist() == wanted


# ------------------------------------------------------------------------------------------------
# Choosing in a large vocabulary
# ------------------------------------------------------------------------------------------------


def full_cumsum(logits: torch.Tensor, u: torch.Tensor, temperature: float) -> torch.Tensor:
    """The slow twin of `sample_token`: every probability in float64, one sum over all of them."""
    p = (logits / temperature).double().softmax(-1)
    cdf = p.cumsum(-1)
    token = torch.searchsorted(cdf, (u * cdf[:, -1])[:, None], right=True)[:, 0]
    last = torch.arange(logits.shape[1]).where(p > 0, torch.tensor(-1)).amax(-1)
    return token.minimum(last)


@pytest.mark.parametrize("V", [151_936, 152_000, 256, 255, 1])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_blocks_choose_what_the_full_sum_chooses(V, temperature):
    """Stops a token of the wrong block, a tail that is never drawn or drawn past its end, fp32
    sums, a token of probability zero (its log-probability is -inf), a temperature that multiplies
    or is forgotten, greedy answers that heed `u`."""
    gen = torch.Generator().manual_seed(0)
    logits = torch.randn(64, V, generator=gen) * 3
    logits[1::4, : V // 2] = -torch.inf  # whole blocks without mass, at the front
    logits[2::4, V - V // 3 :] = -torch.inf  # and at the end
    u = torch.rand(64, dtype=torch.float64, generator=gen)
    u[:8], u[-8:] = 0.0, 1 - 2**-53
    token, logp = sample_token(logits, u, temperature, False)
    slow = full_cumsum(logits, u, temperature)
    # The fp32 exponentials of the one and the float64 ones of the other put a border elsewhere by
    # some 1e-7: of 64 random numbers hardly one can fall between, and then into the neighbour
    # that has any mass.
    assert (token != slow).sum() <= 1
    assert (token[:8] == slow[:8]).all()
    expected = (logits / temperature).double().log_softmax(-1).gather(1, token[:, None])[:, 0]
    assert logp.isfinite().all()
    torch.testing.assert_close(logp.double(), expected, atol=2e-6, rtol=1e-6)
    greedy, logp = sample_token(logits, u, temperature, True)
    assert torch.equal(greedy, logits.argmax(-1))
    torch.testing.assert_close(
        logp.double(),
        (logits / temperature).double().log_softmax(-1).amax(-1),
        atol=2e-6,
        rtol=1e-6,
    )


def test_evenly_spread_numbers_meet_every_token_as_often_as_its_probability():
    """Stops a hidden top-k and mass that moves from block to block:
    no count is off by more than its two borders."""
    V, n, temperature = 1000, 40_000, 0.8  # four blocks, the last one short
    logits = torch.randn(V, generator=torch.Generator().manual_seed(1)) * 2
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    counts = torch.zeros(V, dtype=torch.long)
    for part in u.split(4000):
        counts += torch.bincount(
            sample_token(logits.expand(len(part), -1), part, temperature, False)[0], minlength=V
        )
    p = (logits.double() / temperature).softmax(-1)
    assert (counts - n * p).abs().max() <= 1.01
    assert (counts[n * p >= 1.01] > 0).all() and counts[768:].sum() > 0


def test_logits_that_are_no_numbers_do_not_crash():
    """Stops an index past the vocabulary when a policy has diverged:
    on a GPU it would end the process."""
    u = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
    for bad in (torch.nan, torch.inf):
        token, _ = sample_token(torch.full((3, 1000), bad), u, 1.0, False)
        assert ((token >= 0) & (token < 1000)).all()


# ------------------------------------------------------------------------------------------------
# Buckets, compaction, graphs: same results by another route
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix_step, suffix_step", [(1, 1), (1, 3), (8, 128), (64, 4)])
def test_buckets_change_nothing(sampled_model, monkeypatch, prefix_step, suffix_step):
    """Stops empty places of a bucket being attended to. (1, 1) is the exact slice,
    nothing empty at all."""
    monkeypatch.setitem(sampler.PREFIX_STEP, "cpu", prefix_step)
    monkeypatch.setitem(sampler.SUFFIX_STEP, "cpu", suffix_step)
    looked_at = []
    monkeypatch.setattr(
        sampler,
        "decode_step",
        lambda *a, run=sampler.decode_step: looked_at.append((a[2].P, a[3])) or run(*a),
    )
    assert_same(*both(sampled_model))
    assert (
        looked_at[0] == (sampler.round_up(7, prefix_step), min(T, suffix_step))
        and looked_at[-1][1] <= T
    )


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize(
    "G, lengths", [(8, (7, 2, 5, 4)), (1, (7, 2, 5, 3, 6, 4, 2, 5)), (7, (3,))]
)
def test_leaving_finished_rows_behind_changes_nothing(
    sampled_model, monkeypatch, request, graphs, G, lengths
):
    """Stops rows that swap their keys, prompts, numbers or results when the others move up."""
    if graphs:
        request.getfixturevalue("tapes")
    shapes = []
    monkeypatch.setattr(
        DecodeState,
        "copy_from",
        lambda self, rows, index, run=DecodeState.copy_from: (
            shapes.append((rows.B * rows.G, index.numel())) or run(self, rows, index)
        ),
    )
    monkeypatch.setitem(sampler.COMPACT_FROM, "cpu", 1)
    monkeypatch.setitem(sampler.CHECK_DONE_EVERY, "cpu", 1)
    for seed in range(3):
        assert_same(*both(sampled_model, seed, G, lengths))
    assert shapes and all(after < before for before, after in shapes)
    used, shapes[:] = len(shapes), []
    monkeypatch.setitem(sampler.COMPACT_FROM, "cpu", 10**9)
    assert_same(*both(sampled_model, 0, G, lengths))
    assert used and not shapes


def test_regrouping():
    """Stops a row that is lost or doubled, two prompts in one line,
    and a move that saves nothing."""
    gen = torch.Generator().manual_seed(0)
    moved = 0
    for _ in range(200):
        B, G = (int(n) for n in torch.randint(1, 10, (2,), generator=gen))
        alive = torch.rand(B, G, generator=gen) < torch.rand(1, generator=gen)
        for exact in (True, False):
            index = compact(alive, exact)
            if index is None:
                continue
            moved += 1
            assert sorted(index[index >= 0].tolist()) == alive.flatten().nonzero()[:, 0].tolist()
            for line in index:
                assert len({int(i) // G for i in line[line >= 0]}) <= 1
            assert index.shape[1] in halvings(G) and (exact or index.shape[0] in halvings(B))
            assert index.shape[0] * (index.shape[1] + 1) <= 0.75 * B * (G + 1)
    assert moved > 100
    assert halvings(8) == [8, 4, 2, 1] and halvings(6) == [6, 3, 2, 1] and halvings(1) == [1]
    assert compact(torch.ones(4, 8, dtype=torch.bool), True) is None
    # Three of eight left with each of four prompts: four lines of four, and no prefix twice.
    three = torch.arange(8).expand(4, 8) < 3
    assert compact(three, True).shape == (4, 4) and compact(three, False).shape == (4, 4)


class Tape:
    """Stands in for StepGraph where there is no GPU. Like a captured graph it knows operations and
    memory, nothing of Python: it makes the operations of one step again, in the same order, with
    the same numbers, on the same tensors."""

    made = 0

    def __init__(self, run, memory):
        Tape.made += 1
        self.operations, undo = [], []
        tape = self

        class Recorder(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                name = str(function)
                assert not any(
                    word in name for word in ("local_scalar", "nonzero", "masked_select", "_to_cpu")
                ), f"{name} waits for the device: it cannot be captured"
                # capturing computes nothing: put back what it changes
                if function._schema.is_mutable:
                    undo.append((args[0], args[0].clone()))
                out = function(*args, **(kwargs or {}))
                tape.operations.append((function, args, kwargs or {}, out))
                return out

        with Recorder():
            run()
        for tensor, before in reversed(undo):
            tensor.copy_(before)
        run()  # the warm-up: a real step (last, since recording computes here)

    def replay(self):
        now = {}  # what was computed then -> what is computed now
        find = lambda x: now.get(id(x), x) if torch.is_tensor(x) else x
        for function, args, kwargs, out in self.operations:
            again = function(*tree_map(find, args), **tree_map(find, kwargs))
            for then, here in zip(tree_leaves(out), tree_leaves(again)):
                now[id(then)] = here


@pytest.fixture
def tapes(monkeypatch):
    """The route of a GPU, on a CPU: static memory, captured steps, rare looks at who is done."""
    monkeypatch.setattr(sampler, "uses_graphs", lambda model: True)
    monkeypatch.setattr(sampler, "graph_memory", lambda: None)
    monkeypatch.setattr(sampler, "StepGraph", Tape)
    monkeypatch.setattr(sampler, "_decoders", weakref.WeakKeyDictionary())
    monkeypatch.setattr(sampler, "kept_bytes", lambda model: 2**30)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    for figures, value in (
        (sampler.PREFIX_STEP, 8),
        (sampler.SUFFIX_STEP, 4),
        (sampler.CHECK_DONE_EVERY, 4),
        (sampler.COMPACT_FROM, 10**9),
    ):
        monkeypatch.setitem(figures, "cpu", value)
    monkeypatch.setattr(Tape, "made", 0)


def test_a_captured_step_serves_every_position(sampled_model, tapes):
    """Stops whatever Python would do anew at each step and a graph does not: a position, a length,
    an address."""
    for seed, lengths in ((3, (7, 2, 5)), (4, (3, 8, 8)), (5, (4, 4, 1))):
        assert_same(*both(sampled_model, seed, lengths=lengths))
        assert Tape.made == 3  # S = 4, 8, 10; the second and third batch capture nothing
    # another graph: the temperature is part of it
    assert_same(*both(sampled_model, temperature=0.7))
    assert_same(*both(sampled_model, greedy=True))
    assert Tape.made == 9


def test_reused_memory_is_clean(sampled_model, tapes):
    """Stops a rollout that inherits NaN from the one before,
    through places that a mask only hides."""
    assert_same(*both(sampled_model))
    for rows in sampler.Decoder.of(sampled_model).states.values():
        for name, x in vars(rows).items():
            if torch.is_tensor(x) and name not in ("ends", "seen"):
                x.fill_(torch.nan if x.is_floating_point() else 1)
    assert_same(*both(sampled_model, 1))
    assert Tape.made == 3


@pytest.mark.parametrize("graphs", [False, True])
def test_weights_are_never_stale(request, graphs, tmp_path):
    """Stops packed copies and captured addresses that outlive the weights: a policy sampled as it
    was some steps ago, or before it was resumed."""
    if graphs:
        request.getfixturevalue("tapes")
    model, other = load_golden_model(), load_golden_model()
    other.save_pretrained(tmp_path / "saved")
    model.eos_ids = other.eos_ids = [380, *range(0, 380, 12)]
    before = both(model)
    assert_same(*before)
    noise = torch.Generator().manual_seed(0)

    def changed() -> list:
        results = both(model)
        assert_same(*results)
        assert not torch.equal(results[0][0], before[0][0])  # the change can be seen
        return results

    with torch.no_grad():
        for p in model.model.layers.parameters():  # as an optimiser does: in place
            p.add_(torch.randn(p.shape, generator=noise) * 0.1)
        stepped = changed()
        assert Tape.made == 3 * graphs  # the graphs still stood
        for p in model.model.layers.parameters():  # new memory
            p.data = p.data.clone() + 0.05
        changed()
        assert Tape.made == 6 * graphs
        model.load_state_dict(other.state_dict(), assign=True)  # new tensors
        assert_same(both(model)[0], before[0])
        for p in model.model.layers.parameters():  # a copy of a model that has sampled
            p.add_(torch.randn(p.shape, generator=noise) * 0.1)
        copied = copy.deepcopy(model)
        held = both(copied)[0]
        for p in model.model.layers.parameters():
            p.mul_(0.5)
        assert_same(both(copied)[0], held)
        changed()
    assert not torch.equal(stepped[0][0], held[0])
    model.load_weights(tmp_path / "saved")  # as a run that goes on does
    assert_same(both(model)[0], before[0])


def test_the_shape_that_was_not_used_for_longest_is_let_go(sampled_model, tapes, monkeypatch):
    """Stops a GPU that fills up with the buffers of every batch size there ever was, and one that
    keeps none: a call that leaves rows behind needs several shapes, and would capture all of them
    anew each time."""
    one = DecodeState(sampled_model, 3, 2, 8, T).nbytes
    monkeypatch.setattr(sampler, "kept_bytes", lambda model: 2 * one)
    made = []
    for G in (1, 2, 3, 1, 2, 3, 4, 1, 2):  # three fit; the fourth replaces the first of them
        assert_same(*both(sampled_model, G=G))
        made.append(Tape.made // 3)
        assert len(sampler.Decoder.of(sampled_model).states) <= 3
        assert {key[:4] for key in sampler.Decoder.of(sampled_model).graphs} == set(
            sampler.Decoder.of(sampled_model).states
        )
    assert made == [1, 2, 3, 3, 3, 3, 4, 5, 6]


def test_the_last_graph_takes_its_memory_along(sampled_model, tapes, monkeypatch):
    """Stops "use_count > 0 INTERNAL ASSERT FAILED": a pool whose last graph is gone cannot be
    captured into again."""
    pools, used = iter(range(100)), []
    monkeypatch.setattr(sampler, "graph_memory", lambda: next(pools))
    monkeypatch.setattr(
        sampler, "StepGraph", lambda run, memory: used.append(memory) or Tape(run, memory)
    )
    # every new shape replaces the one before
    monkeypatch.setattr(sampler, "kept_bytes", lambda model: 1)
    for G in (1, 2, 1):
        assert_same(*both(sampled_model, G=G))
    assert used == [0] * 3 + [1] * 3 + [2] * 3
    monkeypatch.setattr(sampler, "kept_bytes", lambda model: 2**30)
    assert_same(*both(sampled_model, G=3))
    assert used[9:] == [2] * 3  # other graphs are in it still


def test_a_decoder_dies_with_its_model(tapes):
    """Stops a cache that keeps a model, and its gigabytes, alive."""
    model = load_golden_model()
    both(model)
    assert len(sampler._decoders) == 1
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None and len(sampler._decoders) == 0


# below and above the size from which oneDNN lays them out
@pytest.mark.parametrize("width", [64, 1024])
@pytest.mark.parametrize("count, bias", [(1, False), (3, True)])
def test_a_packed_product_is_the_products(width, count, bias):
    """Stops weights stacked in the wrong order, and a bias that is lost."""
    layers = [torch.nn.Linear(512, width, bias=bias) for _ in range(count)]
    packed = sampler.PackedLinear(
        [x.weight for x in layers], [x.bias for x in layers] if bias else None
    )
    assert (packed.blocked is not None) == (sampler.ONEDNN and count * width * 512 >= 2**18)
    with torch.no_grad():
        for shape in ((1, 1), (3, 5), (2, 40)):
            x = torch.randn(*shape, 512)
            torch.testing.assert_close(
                packed(x), torch.cat([layer(x) for layer in layers], -1), atol=1e-5, rtol=1e-5
            )
