"""Log-probabilities of the target tokens, computed without ever holding all logits in memory.

Legend   N tokens   D width of a hidden state   V vocabulary
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


def fp32_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return x @ weight.T in fp32, also for bf16 inputs. It has no gradient.

    x (N, D), weight (V, D) -> (N, V). Sums are accumulated in fp32, and the result is not rounded.
    """
    if x.is_cuda and x.dtype != torch.float32:
        # PyTorch has kernels for out_dtype only on CUDA.
        return torch.mm(x, weight.t(), out_dtype=torch.float32)
    return F.linear(x.float(), weight.float())


def add_product_(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Add a @ b to `total` in place, without allocating memory for the product.

    total (V, D) fp32, a (V, N), b (N, D).
    """
    if a.is_cuda and a.dtype != torch.float32:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.float(), b.float())


def scaled_logits(states: torch.Tensor, weight: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return states @ weight.T / temperature in fp32. states (N, D), weight (V, D) -> (N, V)."""
    logits = fp32_product(states, weight)
    return logits if temperature == 1 else logits.div_(temperature)


class HeadLogps(torch.autograd.Function):
    """Log-probability of each target token, and optionally the entropy, in chunks of rows.

    `HeadLogps.apply(states, weight, targets, temperature, chunk, with_entropy)` takes the hidden
    states (N, D), the weight of the head (V, D) and the target ids (N,), and computes `chunk` rows
    at a time. It returns logps (N,) in fp32 and the entropy (N,) in fp32, or None without
    `with_entropy`. Only logps has a gradient.

    Why chunks. The logits are the largest tensor of a training step, and log_softmax under autograd
    keeps several (N, V) tensors for the backward pass. At V = 152,000, each of them takes 1 GB per
    1,600 tokens in fp32. But the result depends on the logits z (V,) of a row only through two
    numbers: the logit of the target y, and log sum exp.

        z = weight @ state / temperature
        logp = z[y] - log sum_v exp z[v]

    The forward pass therefore computes the logits of one chunk, reduces each row to these two
    numbers, and discards the logits. For the backward pass it saves the inputs and log sum exp.

    How the backward pass works. It computes the logits of a chunk a second time and obtains the
    softmax from them with the saved number, p = exp(z - log sum exp z). With onehot(y) = 1 at the
    target and 0 elsewhere, the gradients of one row are

        d logp / d z      = onehot(y) - p                                   (V,)
        d logp / d state  = (onehot(y) - p) @ weight / temperature          (D,)
        d logp / d weight = outer(onehot(y) - p, state) / temperature       (V, D)

    Each is multiplied by the gradient that arrives for the row's logp, and the gradients of the
    weight are summed over the rows.

    Speed. Most of the time goes into reading and writing (chunk, V) tensors, not into the matrix
    products. So the backward pass leaves p - onehot(y) unscaled: it puts the minus sign, the
    arriving gradient and 1 / temperature into one factor per row, for (chunk, D) tensors.
    """

    @staticmethod
    def forward(ctx, states, weight, targets, temperature, chunk, with_entropy):
        # On a CPU the weight is converted to fp32 once and not per chunk.
        head_weight = weight if weight.is_cuda else weight.float()
        logps, log_sum_exps, entropies = [], [], []

        for chunk_states, chunk_targets in zip(states.split(chunk), targets.split(chunk)):
            logits = scaled_logits(chunk_states, head_weight, temperature)  # (chunk, V)
            row_max = logits.amax(-1, keepdim=True)  # (chunk, 1)
            logits.sub_(row_max)  # exp cannot overflow
            target_logit = logits.gather(-1, chunk_targets[:, None])[:, 0]  # (chunk,)

            # The softmax times its denominator. Only the entropy needs the logits after this line.
            exps = logits.exp() if with_entropy else logits.exp_()  # (chunk, V)
            total = exps.sum(-1)  # (chunk,)
            log_total = total.log()

            logps.append(target_logit - log_total)
            log_sum_exps.append(log_total + row_max[:, 0])
            if with_entropy:
                # - sum p log p = log sum exp z - sum p z, and row_max cancels in the difference.
                entropies.append(log_total - exps.mul_(logits).sum(-1) / total)

        ctx.save_for_backward(states, weight, targets, torch.cat(log_sum_exps))
        ctx.temperature, ctx.chunk = temperature, chunk
        entropy = torch.cat(entropies) if with_entropy else None
        if with_entropy:
            ctx.mark_non_differentiable(entropy)
        return torch.cat(logps), entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logps, _grad_entropy):
        states, weight, targets, log_sum_exps = ctx.saved_tensors
        head_weight = weight if weight.is_cuda else weight.float()
        weight_has_grad = ctx.needs_input_grad[1]
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if weight_has_grad else None
        d_states = []

        factors = -grad_logps / ctx.temperature  # (N,)
        chunks = zip(
            states.split(ctx.chunk),  # (chunk, D)
            targets[:, None].split(ctx.chunk),  # (chunk, 1)
            log_sum_exps[:, None].split(ctx.chunk),  # (chunk, 1)
            factors[:, None].split(ctx.chunk),  # (chunk, 1)
        )
        for chunk_states, chunk_targets, log_sum_exp, factor in chunks:
            # Softmax minus onehot: (chunk, V).
            d_logits = scaled_logits(chunk_states, head_weight, ctx.temperature)
            d_logits.sub_(log_sum_exp).exp_()
            d_logits.scatter_add_(-1, chunk_targets, -torch.ones_like(factor))
            d_logits = d_logits.to(head_weight.dtype)

            d_chunk = fp32_product(d_logits, head_weight.t()) * factor  # (chunk, D)
            d_states.append(d_chunk.to(chunk_states.dtype))
            if weight_has_grad:
                # The sum over chunks is kept in fp32 and rounded once, at the end.
                scaled_states = (chunk_states * factor).to(chunk_states.dtype)
                add_product_(d_weight, d_logits.t(), scaled_states)

        if weight_has_grad:
            d_weight = d_weight.to(weight.dtype)
        return torch.cat(d_states), d_weight, None, None, None, None
