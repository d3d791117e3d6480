"""The model against the reference code's numbers, against transformers, and against slow twins."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import GOLDEN

from grpo import grpo_loss
from lib.args import UserError
from lib.modalities import AUDIO, PAD, VIDEO
from model import (
    Config,
    HumanOmni,
    causal_mask,
    embed,
    encode_media,
    frozen_reference,
    shared_prefix_attend,
)
from ops.logprob_head import HeadLogps
from sampler import generate

INPUTS = ("input_ids", "frames", "mel", "question_ids", "question_mask")


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference, as a share of the largest value."""
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-30))


def gradients(model, loss) -> dict[str, torch.Tensor]:
    """Name -> gradient of `loss` (zeros where it does not reach)."""
    model.zero_grad()
    loss.backward()
    grads = {
        n: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for n, p in model.named_parameters()
        if p.requires_grad
    }
    model.zero_grad()
    return grads


def assert_same_gradients(ours: dict, theirs: dict, tolerance: float = 1e-5) -> None:
    scale = max(float(g.abs().max()) for g in theirs.values())
    assert scale > 0
    for name, gradient in theirs.items():
        assert float((ours[name] - gradient).abs().max()) <= tolerance * scale, name


# ------------------------------------------------------------------------------------------------
# Parity with the reference
# ------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_gate_and_tokens(model, forward):
    """Stops a projector that computes another function (eps, order of t h w, shifted frames),
    or a tower's wrong layer."""
    gate = model.gate(forward["question_ids"], forward["question_mask"])
    torch.testing.assert_close(gate, forward["gate"], atol=1e-6, rtol=0)
    video = model.model.mm_projector(model.encode_video(forward["frames"]), gate)
    torch.testing.assert_close(video[:, ::7], forward["video_tokens"], atol=2e-6, rtol=1e-5)
    audio = model.model.audio_projector(model.encode_audio(forward["mel"]))
    torch.testing.assert_close(audio[:, ::7], forward["audio_tokens"], atol=2e-6, rtol=1e-5)
    # The three branches differ, so a gate in the wrong order would be seen above.
    assert gate[0].diff().abs().min() > 0.05


@pytest.mark.parametrize(
    "ids, heard, golden",
    [("input_ids", True, "logits_last"), ("input_ids_video_only", False, "logits_video_only_last")],
)
@torch.no_grad()
def test_logits(model, forward, ids, heard, golden):
    """Stops a decoder that is nearly Qwen2 (rope pairs, norm eps, missing bias), media tokens at
    the wrong place of the prompt, a video-only prompt that still hears something."""
    logits = model(
        forward[ids],
        forward["frames"],
        forward["mel"] if heard else None,
        *(forward[k] for k in INPUTS[3:]),
    )
    assert logits.dtype == torch.float32
    torch.testing.assert_close(
        logits[:, -forward[golden].shape[1] :], forward[golden], atol=5e-5, rtol=1e-4
    )


def test_greedy(model, prompt, forward):
    """Stops cached decoding from drifting off the reference's own generation."""
    completions, lengths, _ = generate(model, *prompt, 1, 24, greedy=True)
    assert completions[:, 0].tolist() == forward["greedy"].tolist()
    assert lengths.tolist() == [[24], [24]]


def split_sft(forward) -> tuple[list, torch.Tensor, torch.Tensor]:
    """The golden SFT rows -> (prompt ids, targets (B, 1, T), lengths (B, 1))."""
    taught = forward["sft_labels"] != -100
    prompts = [row[~keep].tolist() for row, keep in zip(forward["sft_input_ids"], taught)]
    targets = torch.stack([row[keep] for row, keep in zip(forward["sft_input_ids"], taught)])[
        :, None
    ]
    return prompts, targets, torch.full((len(prompts), 1), targets.shape[2])


@torch.no_grad()
def test_sft_loss(model, forward):
    """Stops labels that are off by one, and a shared-prefix loss that
    differs from the plain one."""
    logits = model(forward["sft_input_ids"], *(forward[k] for k in INPUTS[1:]))
    prompts, targets, lengths = split_sft(forward)
    T = targets.shape[2]
    plain = F.cross_entropy(logits[:, -T - 1 : -1].flatten(0, 1), targets.flatten())
    torch.testing.assert_close(plain, forward["sft_loss"], atol=1e-5, rtol=0)

    embeds, mask = model.embed_prompt(prompts, *(forward[k] for k in INPUTS[1:]))
    logps = model.completion_logps(embeds, mask, targets, lengths)
    torch.testing.assert_close(-logps.sum() / lengths.sum(), forward["sft_loss"], atol=1e-5, rtol=0)


def test_grpo_loss_and_every_gradient(fresh_model, forward, grpo_golden):
    """Stops a loss with the right value and a wrong gradient, in any of the 209 trained tensors."""
    model, golden = fresh_model, grpo_golden
    model.set_trained(["decoder", "projectors", "gate", "bert"])
    embeds, prompt_mask = model.embed_prompt(*(forward[k] for k in INPUTS))
    logps = model.completion_logps(embeds, prompt_mask, golden["completions"], golden["lengths"])
    mask = torch.arange(golden["completions"].shape[2]) < golden["lengths"][..., None]
    torch.testing.assert_close(logps[mask], golden["logps"][mask], atol=5e-5, rtol=0)
    assert (logps[~mask] == 0).all() and (golden["logps"][~mask] != 0).any()

    loss, metrics = grpo_loss(
        logps,
        logps.detach(),
        golden["ref_logps"],
        golden["advantages"],
        mask,
        ratio="token",
        gate="clip",
        clip_low=0.2,
        clip_high=0.2,
        agg="seq",
        beta=golden["beta"],
        kl="k3",
    )
    torch.testing.assert_close(loss, golden["loss"], atol=2e-7, rtol=0)
    torch.testing.assert_close(metrics["kl"], golden["kl"][mask].mean(), atol=1e-6, rtol=0)

    grads = gradients(model, loss)
    for name, norm in golden["grad_norms"].items():
        assert abs(float(grads[name].norm()) - norm) <= 1e-3 * norm + 1e-7, name
    # Beside them only what the loss cannot reach: BERT's pooler.
    assert {n for n in grads if n not in golden["grad_norms"] and grads[n].any()} == set()
    assert len(golden["grad_norms"]) == 209


# ------------------------------------------------------------------------------------------------
# The decoder alone, against transformers
# ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def qwen():
    """(our model, transformers' Qwen2) with the same random weights,
    another geometry than the golden one."""
    torch.manual_seed(0)
    shape = {
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "intermediate_size": 80,
        "vocab_size": 101,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5000.0,
    }
    theirs = transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            **{k: v for k, v in shape.items() if k != "rope_theta"},
            tie_word_embeddings=False,
            attn_implementation="eager",
            rope_parameters={"rope_type": "default", "rope_theta": shape["rope_theta"]},
        )
    ).eval()
    with torch.no_grad():
        for (
            name,
            p,
        ) in theirs.named_parameters():  # norms and biases too: ones and zeros would hide faults
            p.copy_(torch.randn_like(p) * 0.3 + ("norm" in name))
    config = Config(
        **shape,
        mm_vision_tower="",
        mm_audio_tower="",
        mm_hidden_size=8,
        audio_hidden_size=8,
        head_dim=8,
        tie_word_embeddings=False,
    )
    small = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "intermediate_size": 8,
    }
    ours = HumanOmni(
        config,
        transformers.SiglipVisionConfig(**small, image_size=16, patch_size=8),
        transformers.WhisperConfig(
            d_model=8, encoder_layers=1, encoder_attention_heads=1, encoder_ffn_dim=8
        ),
        transformers.BertConfig(**small, vocab_size=8),
    )
    missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert not unexpected
    assert not any(
        k.startswith(("model.layers", "model.embed", "model.norm", "lm_head")) for k in missing
    )
    return ours, theirs


@pytest.mark.parametrize("side", ["none", "left", "right"])
@torch.no_grad()
def test_decoder_equals_qwen2(qwen, side):
    """Stops faults that one geometry hides: grouped heads, theta, the untied head,
    positions under padding."""
    ours, theirs = qwen
    ids = torch.randint(0, 101, (3, 9), generator=torch.Generator().manual_seed(1))
    pads = torch.tensor([0, 3, 5]) if side != "none" else torch.zeros(3, dtype=torch.long)
    column = torch.arange(9) if side == "left" else torch.arange(9).flip(0)
    mask = column[None] >= pads[:, None]
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    expected = theirs(input_ids=ids, attention_mask=mask.long(), position_ids=positions).logits
    got = ours.logits(ours.hidden(ours.model.embed_tokens(ids), mask))
    torch.testing.assert_close(got[mask], expected[mask], atol=2e-5, rtol=1e-4)
    see = causal_mask(mask)
    assert see is None if side == "none" else bool(see.any(-1).all())  # no softmax of nothing
    assert got.isfinite().all()


# ------------------------------------------------------------------------------------------------
# Shared prefix = repeated prefix
# ------------------------------------------------------------------------------------------------


def ragged(model, B=3, G=3, T=6, left=True):
    """Random embeddings of ragged prompts, padded on one side,
    and completions of ragged lengths."""
    gen = torch.Generator().manual_seed(0)
    P, V = 7, model.config.vocab_size
    embeds = torch.randn(B, P, model.config.hidden_size, generator=gen) * 0.5
    mask = torch.arange(P) >= torch.tensor([0, 3, 5])[:B, None]
    mask = mask if left else mask.flip(1)
    completions = torch.randint(0, V, (B, G, T), generator=gen)
    completions[0, 1] = V - 1  # no word of the tokenizer, but a policy can sample it
    lengths = torch.randint(1, T + 1, (B, G), generator=gen)
    lengths[0, 0], lengths[-1, -1] = T, 1
    return embeds, mask, completions, lengths


def naive_logps(model, embeds, mask, completions, lengths, temperature=1.0):
    """The twin: every completion alone behind its own copy of the prompt, without any padding.
    Entropies too."""
    B, G, T = completions.shape
    rows = []
    for b in range(B):
        for g in range(G):
            n = int(lengths[b, g])
            ids = completions[b, g, :n]
            x = torch.cat((embeds[b, mask[b]], model.model.embed_tokens(ids)))[None]
            logits = model.logits(model.hidden(x, torch.ones(x.shape[:2], dtype=torch.bool)))[
                0, -n - 1 : -1
            ]
            policy = torch.distributions.Categorical(logits=logits / temperature)
            rows.append(F.pad(torch.stack((policy.log_prob(ids), policy.entropy())), (0, T - n)))
    return torch.stack(rows, 1).view(2, B, G, T)


@pytest.mark.parametrize(
    "temperature, T, left", [(1.0, 6, True), (0.7, 6, True), (1.0, 6, False), (1.0, 1, True)]
)
def test_shared_prefix_equals_repeated_prefix(fresh_model, temperature, T, left):
    """Stops siblings that see each other, wrong positions after the prompt, a lost gradient of the
    prompt, a prompt's last state read where its padding is, a crash where no token is ever read
    (label SFT: the bare word), an entropy of other logits than those the token came from."""
    model = fresh_model
    model.set_trained(["decoder"])
    embeds, mask, completions, lengths = ragged(model, T=T, left=left)
    weights = torch.randn(completions.shape, generator=torch.Generator().manual_seed(5))
    results = []
    for logps_of in (
        lambda *a: model.completion_logps(*a, with_entropy=True),
        lambda *a: naive_logps(model, *a),
    ):
        x = embeds.clone().requires_grad_()
        logps, entropies = logps_of(x, mask, completions, lengths, temperature)
        grads = gradients(model, (logps * weights).sum())
        results.append((logps.detach(), entropies.detach(), grads | {"embeds": x.grad}))
    (ours, our_entropies, our_grads), (theirs, their_entropies, their_grads) = results
    assert relative(ours, theirs) < 1e-5 and relative(our_entropies, their_entropies) < 1e-5
    assert_same_gradients(our_grads, their_grads)
    # the prompt is really part of the loss
    assert their_grads["embeds"][mask].abs().amin(-1).min() > 0
    assert not our_grads["embeds"][~mask].any()  # and its padding is not


def test_attention_without_a_mask_equals_the_masked_form():
    """Stops a completion aligned to the upper left (it would not see its prompt's end),
    and a path for padded prompts."""
    torch.manual_seed(0)
    B, G, P, S, H, K, d = 2, 3, 5, 4, 6, 2, 8
    rows = [torch.randn(B, P + G * S, heads, d) for heads in (H, K, K)]
    mask, results = torch.ones(B, P, dtype=torch.bool), []
    for flash in (True, False):
        q, k, v = (x.clone().requires_grad_() for x in rows)
        out = shared_prefix_attend(mask, G, S, flash)(0, q, k, v)
        (out * torch.arange(H * d)).sum().backward()
        results.append((out.detach(), q.grad, k.grad, v.grad))
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-5)
    mask[1, 0] = False
    padded = [shared_prefix_attend(mask, G, S, flash)(0, *rows) for flash in (True, False)]
    assert torch.equal(*padded) and not torch.allclose(padded[0], results[0][0])


def test_checkpointed_layers_have_the_same_gradient(fresh_model):
    """Stops a layer that is run again with something else than before: not one bit may differ."""
    model = fresh_model
    model.set_trained(["decoder"])
    embeds, mask, completions, lengths = ragged(model)
    results = []
    for model.checkpoint_layers in (False, True):
        x = embeds.clone().requires_grad_()
        calls, run = [], model.model.layers[0].mlp.forward
        model.model.layers[0].mlp.forward = lambda x, run=run, calls=calls: (
            calls.append(1) or run(x)
        )
        logps = model.completion_logps(x, mask, completions, lengths)
        grads = gradients(model, logps.sum())
        del model.model.layers[0].mlp.forward
        results.append((len(calls), {"logps": logps.detach(), "embeds": x.grad} | grads))
    (once, plain), (twice, again) = results
    assert (once, twice) == (1, 2)
    assert all(torch.equal(again[name], plain[name]) for name in plain)


def test_past_the_length_nothing_counts(fresh_model):
    """Stops loss or gradient from tokens after the end, and from padding columns."""
    model = fresh_model
    model.set_trained(["decoder"])
    embeds, mask, completions, lengths = ragged(model)
    outside = torch.arange(completions.shape[2]) >= lengths[..., None]

    logps = model.completion_logps(embeds, mask, completions, lengths)
    assert (logps[outside] == 0).all()
    reference = gradients(model, logps.sum())

    # Other tokens past the end, also ids that no vocabulary has; two more columns;
    # another prompt column.
    junk = torch.where(outside, torch.tensor(10**6), completions)
    junk = F.pad(junk, (0, 2), value=-100)
    wider = F.pad(embeds, (0, 0, 1, 0), value=9.0)
    again = model.completion_logps(wider, F.pad(mask, (1, 0)), junk, lengths)
    assert (
        relative(again[:, :, :-2].detach(), logps.detach()) < 1e-5 and (again[:, :, -2:] == 0).all()
    )
    assert_same_gradients(gradients(model, again.sum()), reference)

    # The gradient of what is outside the mask alone is exactly zero, for every parameter.
    alone = model.completion_logps(embeds, mask, completions, lengths)
    assert not any(g.any() for g in gradients(model, (alone * outside).sum()).values())


# ------------------------------------------------------------------------------------------------
# Log-probabilities and entropies
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("temperature, chunk", [(1.0, 3), (0.7, 3), (0.7, 1), (0.7, 100)])
def test_the_head_equals_log_softmax_over_all_logits(dtype, tolerance, temperature, chunk):
    """Stops a lost temperature, exponentials that overflow, a gradient of the target or of a row's
    weight that is lost, a chunk's border that loses or doubles a row."""
    torch.manual_seed(0)
    states, weight = torch.randn(7, 16) * torch.tensor([[300.0]] + 6 * [[1.0]]), torch.randn(33, 16)
    states, weight = (x.to(dtype) for x in (states, weight))
    targets, g = torch.arange(7), torch.tensor([1.0, -2.0, 0.0, 0.5, 3.0, 1.0, 1.0])
    results = []
    for wide in (False, True):
        x, w = (t.double() if wide else t.clone() for t in (states, weight))
        x.requires_grad_(), w.requires_grad_()
        if wide:
            logp = (x @ w.T / temperature).log_softmax(-1)
            logps, entropies = logp[torch.arange(7), targets], -(logp.exp() * logp).sum(-1)
        else:
            logps, entropies = HeadLogps.apply(x, w, targets, temperature, chunk, True)
            assert torch.equal(HeadLogps.apply(x, w, targets, temperature, chunk, False)[0], logps)
        (logps * g).sum().backward()
        results.append((logps.detach(), entropies.detach(), x.grad, w.grad))
    for name, ours, theirs in zip(("logps", "entropy", "states", "weight"), *results):
        assert relative(ours.double(), theirs) < (
            tolerance if name in ("states", "weight") else 1e-6
        ), name
    assert not results[0][2][2].any()  # a row that counts nothing gets nothing


def test_logits_are_fp32_from_bf16_weights():
    """Stops logits rounded to bf16: rounding alone moves log-probabilities by 2e-2."""
    model = HumanOmni.from_pretrained(
        GOLDEN / "humanomni", dtype=torch.bfloat16, log=lambda line: None
    )
    states = torch.randn(5, model.config.hidden_size).bfloat16()
    logits = model.logits(states)
    exact = (states.double() @ model.head_weight.double().T).detach()
    assert logits.dtype == torch.float32 and relative(logits.detach().double(), exact) < 1e-5


# ------------------------------------------------------------------------------------------------
# Prompts of different kinds in one batch
# ------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_mixed_batch_equals_each_alone(model, forward, processor):
    """Stops a clip's tokens landing in another row's prompt when some rows lack a modality."""
    question = "which emotion?"
    rows = [processor.encode_prompt(question, m) for m in ("audio", "video_audio", "video")]
    q = torch.tensor([processor.encode_question(question)] * 3)
    frames, mel = forward["frames"] * torch.tensor([1.0, 0.5]).view(2, 1, 1, 1, 1), forward["mel"]
    embeds, mask = model.embed_prompt(rows, frames, mel, q, torch.ones_like(q))
    alone = [
        model.embed_prompt(rows[:1], None, mel[:1], q[:1], torch.ones_like(q[:1])),
        model.embed_prompt(rows[1:2], frames[:1], mel[1:], q[:1], torch.ones_like(q[:1])),
        model.embed_prompt(rows[2:], frames[1:], None, q[:1], torch.ones_like(q[:1])),
    ]
    for i, (one, one_mask) in enumerate(alone):
        assert one_mask.all() and int(mask[i].sum()) == one.shape[1]
        assert mask[i, -1] and relative(embeds[i, mask[i]], one[0]) < 1e-5  # padded on the left
    hidden = model.hidden(embeds, mask)
    for i, (one, one_mask) in enumerate(alone):
        assert relative(hidden[i, mask[i]], model.hidden(one, one_mask)[0]) < 2e-5


@torch.no_grad()
def test_the_question_moves_the_gate(model, forward, processor):
    """Stops a gate that reads another row's question, or the padding of its own."""
    questions = "which emotion?", "the characters emotion is the most obvious"
    short, long = (torch.tensor(processor.encode_question(q)) for q in questions)
    ids = torch.zeros(2, max(len(short), len(long)), dtype=torch.long)
    ids[0, : len(short)], ids[1, : len(long)] = short, long
    mask = torch.arange(ids.shape[1]) < torch.tensor([[len(short)], [len(long)]])
    both = model.gate(ids, mask.long())
    torch.testing.assert_close(
        both[:1], model.gate(short[None], torch.ones_like(short[None])), atol=1e-6, rtol=0
    )
    assert (both[0] - both[1]).abs().max() > 1e-4
    # An audio-only row before a video row: the video row's own question decides.
    rows = [[AUDIO, 5], [VIDEO, 5]]
    embeds, kept = model.embed_prompt(
        rows, forward["frames"][:1], forward["mel"][:1], ids, mask.long()
    )
    video = model.model.mm_projector(model.encode_video(forward["frames"][:1]), both[1:])
    torch.testing.assert_close(embeds[1, kept[1]][:-1], video[0], atol=1e-6, rtol=0)


@torch.no_grad()
def test_padding_in_ids_and_text_only(model, processor):
    """Stops padding ids being embedded, a text prompt being refused,
    a crash on a row that no word of the tokenizer has."""
    padded = torch.tensor([[PAD, PAD, 5, 6, 7], [1, 2, 3, 4, PAD]])
    embeds, mask = model.embed_prompt(padded)
    assert mask.tolist() == [[False, True, True, True], [True] * 4]
    assert torch.equal(embeds[0, 1:], model.model.embed_tokens(torch.tensor([5, 6, 7])))
    last = model.config.vocab_size - 1
    assert last >= len(processor.tokenizer) and isinstance(processor.decode([last, last]), str)


def test_wrong_ids_are_named(model):
    """Stops an id outside the vocabulary ending in an index error of the device."""
    for row, said in (([5, 390], "390"), ([-5], "-5"), ([VIDEO, VIDEO], "twice")):
        with pytest.raises(ValueError, match=said):
            model.embed_prompt([row])


# ------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------


def test_train_leaves_dropout_off(fresh_model, forward):
    """Stops BERT's dropout making the policy differ from itself:
    the first ratio must be exactly 1."""
    model = fresh_model
    assert any(isinstance(m, torch.nn.Dropout) and m.p > 0 for m in model.modules())
    model.train()
    assert not any(m.training for m in model.modules())
    gates = [model.gate(forward["question_ids"], forward["question_mask"]) for _ in range(2)]
    assert torch.equal(*gates)


def test_frozen_reference_shares_what_is_frozen(fresh_model):
    """Stops a reference that doubles the memory of frozen towers, or that moves with the policy."""
    model = fresh_model
    trained = model.set_trained(["decoder", "gate"])
    reference = frozen_reference(model)
    ours, theirs = dict(model.named_parameters()), dict(reference.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, p in ours.items():
        assert (p.data_ptr() == theirs[name].data_ptr()) == (not p.requires_grad), name
        assert torch.equal(p, theirs[name])
    assert not any(p.requires_grad for p in reference.parameters())
    assert len(trained) == sum(p.requires_grad for p in model.parameters())
    embeds, mask, completions, lengths = ragged(model)
    with torch.no_grad():
        before = reference.completion_logps(embeds, mask, completions, lengths)
        for p in trained:
            p.mul_(1.1)
        assert torch.equal(reference.completion_logps(embeds, mask, completions, lengths), before)
        assert not torch.equal(model.completion_logps(embeds, mask, completions, lengths), before)


def test_set_trained(fresh_model):
    """Stops a part that is named to be trained and stays frozen, or the other way round."""
    model = fresh_model
    parts = ["decoder", "projectors", "gate", "bert", "vision", "audio"]
    groups = [{id(p) for p in model.set_trained([part])} for part in parts]
    assert all(groups) and set().union(*groups) == {id(p) for p in model.parameters()}
    assert sum(map(len, groups)) == len(list(model.parameters()))
    with pytest.raises(UserError, match="towers"):
        model.set_trained(["towers"])


def test_encode_once_changes_nothing(fresh_model, forward, batch):
    """Stops cached tower outputs that differ from the towers,
    and a trained tower that gets no gradient."""
    model = fresh_model
    model.set_trained(["gate"])
    once = encode_media(model, batch)
    assert once.media == {} and not once.features["video"].requires_grad
    with torch.no_grad():
        plain = model.embed_prompt(*(forward[k] for k in INPUTS))[0]
        torch.testing.assert_close(embed(model, once)[0], plain, atol=1e-6, rtol=0)
    assert torch.equal(
        encode_media(model, once).features["video"], once.features["video"]
    )  # a second time is harmless
    model.set_trained(["vision"])
    kept = encode_media(model, batch)
    assert (
        kept.media["video"] is batch.media["video"]
        and kept.features == {}
        and embed(model, kept)[0].requires_grad
    )
