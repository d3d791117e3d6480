"""Batched sampling: G completions for each of B prompts, and the log-probability of every token sampled.

    prefill        every prompt once, not once per completion
    decode step    one token for all B*G rows: attention over [the prompt's keys, shared by its group |
                   the row's own keys]; the head in fp32; the next token from the full distribution
    generate       the loop over steps
    generate_naive its slow twin: no cache, the whole sequence again for every token.  Same tokens.

The full distribution, always: no top-k, no top-p, no repetition penalty.  The loss scores the full
softmax, and a policy must be scored by the distribution it was sampled from.

Randomness is one uniform number per (seed, prompt, completion, position), drawn ahead.  So what is sampled
for a prompt depends neither on the other prompts of its batch nor on the number of ranks.

Legend   B prompts   G completions per prompt   P prompt length   T max_new_tokens   V vocabulary
         D width   H query heads   K key/value heads   R = H/K   d head size
"""
import numpy as np
import torch

from model import HumanOmni, sdpa


def uniforms(seed: int, prompt_ids: list[int], num_generations: int, T: int, device) -> torch.Tensor:
    """(B, G, T) float64 in [0, 1): a counter-based generator keyed by (seed, prompt, completion)."""
    rows = [[np.random.Generator(np.random.Philox(key=[seed, (prompt << 20) + g])).random(T)
             for g in range(num_generations)] for prompt in prompt_ids]
    return torch.from_numpy(np.array(rows)).to(device)


def choose(logits: torch.Tensor, u: torch.Tensor, temperature: float, greedy: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """logits (N, V) fp32, u (N,) -> token (N,) and its log-probability (N,) under softmax(logits / temperature).

    Inverse CDF: the first token whose cumulative probability exceeds u.  In float64: an fp32 sum over
    152,000 tokens is off by more than the probability of most of them.
    """
    logp = (logits / temperature).log_softmax(-1)                        # (N, V)
    if greedy:
        token = logits.argmax(-1)
    else:
        cdf = logp.double().exp().cumsum(-1)                             # (N, V)
        token = torch.searchsorted(cdf, (u * cdf[:, -1])[:, None], right=True)[:, 0]
        token = token.clamp(max=logits.shape[-1] - 1)
    return token, logp.gather(-1, token[:, None])[:, 0]


class SuffixCache:
    """Keys and values of the completions, preallocated: per layer (B, K, G, T, d)."""

    def __init__(self, model: HumanOmni, B: int, G: int, T: int):
        c = model.config
        shape = (c.num_hidden_layers, 2, B, c.num_key_value_heads, G, T, c.head_dim)
        self.kv = torch.empty(shape, dtype=model.dtype, device=model.device)


def decode_attend(prefix, suffix: SuffixCache, prefix_bias: torch.Tensor | None, t: int):
    """Attention of one new token per completion (position t of the suffix) over [prefix | suffix up to t].

    All G * R queries of a key head meet the shared prefix in one product; nothing is copied per completion.
    One softmax over the concatenated scores, in fp32: no merging of partial results, nothing approximated.
    """

    def attend(i, q, k, v):
        # q (B, G, H, d), k and v (B, G, K, d): the group stands where a sequence would.
        B, G, H, d = q.shape
        K = k.shape[2]
        own = suffix.kv[i]                                               # (2, B, K, G, T, d)
        own[0, :, :, :, t] = k.transpose(1, 2)
        own[1, :, :, :, t] = v.transpose(1, 2)
        prefix_k, prefix_v = prefix[i]                                   # (B, K, P, d)
        own_k, own_v = own[0, ..., :t + 1, :], own[1, ..., :t + 1, :]    # (B, K, G, t+1, d)
        P = prefix_k.shape[2]

        q = (q * d ** -0.5).view(B, G, K, H // K, d).permute(0, 2, 1, 3, 4)                # (B, K, G, R, d)
        from_prefix = q.reshape(B, K, -1, d) @ prefix_k.transpose(-1, -2)                  # (B, K, G*R, P)
        if prefix_bias is not None:
            from_prefix = from_prefix + prefix_bias
        scores = torch.cat((from_prefix.view(B, K, G, -1, P), q @ own_k.transpose(-1, -2)), -1)
        weights = scores.float().softmax(-1).to(q.dtype)                                   # (B, K, G, R, P+t+1)
        out = weights[..., :P].reshape(B, K, -1, P) @ prefix_v                             # (B, K, G*R, d)
        out = out.view(B, K, G, -1, d) + weights[..., P:] @ own_v                          # (B, K, G, R, d)
        return out.permute(0, 2, 1, 3, 4).reshape(B, G, H * d)

    return attend


@torch.no_grad()
def generate(model: HumanOmni, embeds: torch.Tensor, mask: torch.Tensor, num_generations: int, max_new_tokens: int,
             temperature: float = 1.0, seed: int = 0, greedy: bool = False, prompt_ids: list[int] | None = None
             ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sample `num_generations` completions for each prompt.

    embeds (B, P, D) and mask (B, P) from `embed_prompt`.  `prompt_ids`: the prompts' identities for the random
    numbers, by default 0 .. B-1.  -> completions (B, G, T) ids, lengths (B, G), logps (B, G, T) fp32.
    A completion ends with its end token, which is kept and counted; what stands past the length is an end
    token with log-probability 0, and belongs to nothing.
    """
    B, G, T = len(embeds), num_generations, max_new_tokens
    u = uniforms(seed, list(range(B)) if prompt_ids is None else prompt_ids, G, T, model.device)
    ends = torch.tensor(model.eos_ids, device=model.device)
    hidden, prefix = model.prefill(embeds, mask)                         # (B, D); per layer k, v (B, K, P, d)
    suffix = SuffixCache(model, B, G, T)
    prefix_bias = None if bool(mask.all()) else \
        torch.zeros(mask.shape, dtype=model.dtype, device=model.device).masked_fill(~mask, -torch.inf)[:, None, None]
    start = mask.sum(-1, keepdim=True)                                   # (B, 1) position of the first new token

    completions = ends[0].repeat(B, G, T)
    logps = torch.zeros(B, G, T, device=model.device)
    lengths = torch.zeros(B, G, dtype=torch.long, device=model.device)
    done = torch.zeros(B, G, dtype=torch.bool, device=model.device)
    logits = model.logits(hidden)[:, None].expand(B, G, -1)              # (B, G, V): all start from the same state
    for t in range(T):
        token, logp = choose(logits.reshape(B * G, -1), u[:, :, t].reshape(-1), temperature, greedy)
        token, logp = token.view(B, G), logp.view(B, G)
        completions[:, :, t] = torch.where(done, ends[0], token)
        logps[:, :, t] = logp.masked_fill(done, 0.0)
        lengths += ~done
        done |= torch.isin(token, ends)
        # Looking at `done` waits for the device: on a GPU only now and then.
        if t == T - 1 or ((not done.is_cuda or t % 16 == 15) and bool(done.all())):
            break
        x = model.model.embed_tokens(completions[:, :, t])               # (B, G, D)
        hidden = model.run_layers(x, (start + t).expand(B, G), decode_attend(prefix, suffix, prefix_bias, t))
        logits = model.logits(hidden)                                    # (B, G, V)
    return completions, lengths, logps


@torch.no_grad()
def generate_naive(model: HumanOmni, embeds: torch.Tensor, mask: torch.Tensor, num_generations: int, max_new_tokens: int,
                   temperature: float = 1.0, seed: int = 0, greedy: bool = False, prompt_ids: list[int] | None = None
                   ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The slow obvious twin of `generate`: one completion at a time, no cache, everything again for every token."""
    B, G, T = len(embeds), num_generations, max_new_tokens
    u = uniforms(seed, list(range(B)) if prompt_ids is None else prompt_ids, G, T, model.device)
    completions = torch.full((B, G, T), model.eos_ids[0], device=model.device)
    logps = torch.zeros(B, G, T, device=model.device)
    lengths = torch.zeros(B, G, dtype=torch.long, device=model.device)
    for b in range(B):
        for g in range(G):
            x = embeds[b, mask[b]]                                       # (P_b, D)
            for t in range(T):
                positions = torch.arange(len(x), device=x.device)[None]
                hidden = model.run_layers(x[None], positions, lambda i, q, k, v: sdpa(q, k, v, causal=True))
                token, logp = choose(model.logits(hidden[:, -1]), u[b, g, t:t + 1], temperature, greedy)
                completions[b, g, t], logps[b, g, t], lengths[b, g] = token[0], logp[0], t + 1
                if int(token) in model.eos_ids:
                    break
                x = torch.cat((x, model.model.embed_tokens(token)))      # (P_b + t + 1, D)
    return completions, lengths, logps
