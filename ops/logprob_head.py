"""The head's log-probabilities without its logits: what makes a vocabulary of 152,000 affordable.

Its slow obvious twin is log_softmax over all logits (tests/test_model.py).

Legend   N tokens   D width   V vocabulary
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


def fp32_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x (N, D), weight (V, D) -> x @ weight.T (N, V), summed and kept in fp32 also for bf16 factors.  No gradient."""
    if x.is_cuda and x.dtype != torch.float32:
        return torch.mm(
            x, weight.t(), out_dtype=torch.float32
        )  # only here: it has no kernel elsewhere
    return F.linear(x.float(), weight.float())


def add_product_(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total (V, D) fp32 += a (V, N) @ b (N, D), without the product in memory of its own."""
    if a.is_cuda and a.dtype != torch.float32:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.float(), b.float())


def scaled_logits(states: torch.Tensor, weight: torch.Tensor, temperature: float) -> torch.Tensor:
    logits = fp32_product(states, weight)
    return logits if temperature == 1 else logits.div_(temperature)


class HeadLogps(torch.autograd.Function):
    """log softmax(states @ weight.T / temperature) at `targets`, a chunk of rows at a time.

    Written out, because autograd would keep several (N, V) tensors: 1 GB for each 1,600 tokens at V = 152,000.  A row's
    log-probability needs of its logits only one entry and log sum exp.  The backward pass makes the logits again:
    d logp / d logits = (one at the target) - softmax.  Its time is that of reading and writing (chunk, V), not of the
    products, so no pass over it is made that can be made over (chunk, D) or over one number a row.
    """

    @staticmethod
    def forward(ctx, states, weight, targets, temperature, chunk, with_entropy):
        wide = weight if weight.is_cuda else weight.float()  # once, not once per chunk
        logps, norms, entropies = [], [], []
        for s, y in zip(states.split(chunk), targets.split(chunk)):
            logits = scaled_logits(s, wide, temperature)  # (chunk, V)
            top = logits.amax(-1, keepdim=True)
            own = logits.sub_(top).gather(-1, y[:, None])[:, 0]  # (chunk,)
            p = logits.exp() if with_entropy else logits.exp_()  # without the denominator
            total = p.sum(-1)
            norm = total.log()
            logps.append(own - norm)
            norms.append(norm + top[:, 0])
            if with_entropy:  # - sum p log p = log sum exp - sum p * logits
                entropies.append(norm - p.mul_(logits).sum(-1) / total)
        ctx.save_for_backward(states, weight, targets, torch.cat(norms))
        ctx.temperature, ctx.chunk = temperature, chunk
        entropy = torch.cat(entropies) if with_entropy else None
        if with_entropy:
            ctx.mark_non_differentiable(entropy)
        return torch.cat(logps), entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        states, weight, targets, norms = ctx.saved_tensors
        wide = weight if weight.is_cuda else weight.float()
        d_weight = (
            torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        )
        d_states = []
        columns = (x[:, None].split(ctx.chunk) for x in (targets, norms, -grad / ctx.temperature))
        for s, y, norm, g in zip(
            states.split(ctx.chunk), *columns
        ):  # s (chunk, D), the others (chunk, 1)
            d = scaled_logits(s, wide, ctx.temperature).sub_(norm).exp_()  # softmax (chunk, V)
            d = d.scatter_add_(-1, y, -torch.ones_like(g)).to(wide.dtype)
            d_states.append((fp32_product(d, wide.t()) * g).to(s.dtype))
            if d_weight is not None:
                add_product_(
                    d_weight, d.t(), (s * g).to(s.dtype)
                )  # summed over the chunks, rounded once
        return (
            torch.cat(d_states),
            None if d_weight is None else d_weight.to(weight.dtype),
            None,
            None,
            None,
            None,
        )
