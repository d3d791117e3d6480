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
        return torch.mm(x, weight.t(), out_dtype=torch.float32)          # only here: it has no kernel elsewhere
    return F.linear(x.float(), weight.float())


class HeadLogps(torch.autograd.Function):
    """log softmax(states @ weight.T / temperature) at `targets`, a chunk of rows at a time.

    Written out, because autograd would keep several (N, V) tensors: 1 GB for each 1,600 tokens at V = 152,000.  A row's
    log-probability needs of its logits only one entry and log sum exp.  The backward pass makes the logits again:
    d logp / d logits = (one at the target) - softmax.
    """

    @staticmethod
    def forward(ctx, states, weight, targets, temperature, chunk, with_entropy):
        wide = weight if weight.is_cuda else weight.float()        # once, not once per chunk
        logps, norms, entropies = [], [], []
        for s, y in zip(states.split(chunk), targets.split(chunk)):
            logits = fp32_product(s, wide).div_(temperature)                       # (chunk, V)
            norms.append(logits.logsumexp(-1))                                     # (chunk,)
            logps.append(logits.gather(-1, y[:, None])[:, 0] - norms[-1])
            if with_entropy:                                       # - sum p log p = log sum exp - sum p * logits
                p = (logits - norms[-1][:, None]).exp_()
                entropies.append(norms[-1] - p.mul_(logits).sum(-1))
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
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        d_states = []
        for s, y, norm, g in zip(*(x.split(ctx.chunk) for x in (states, targets, norms, grad / ctx.temperature))):
            d = fp32_product(s, wide).div_(ctx.temperature).sub_(norm[:, None]).exp_()     # softmax (chunk, V)
            d.mul_(-g[:, None]).scatter_add_(-1, y[:, None], g[:, None])
            d = d.to(wide.dtype)
            d_states.append(torch.mm(d, wide).to(s.dtype))
            if d_weight is not None:
                d_weight += fp32_product(d.t(), s.t())           # summed over the chunks in fp32, rounded once
        return torch.cat(d_states), None if d_weight is None else d_weight.to(weight.dtype), None, None, None, None
