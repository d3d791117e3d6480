"""Exercise 7: three estimators of the KL, their values, and their gradients as losses."""

import torch

import grpo
from course.checks import expect_close, student_module

CASES = [
    ([0.5, 0.3, 0.2], [0.2, 0.3, 0.5]),
    ([0.7, 0.2, 0.05, 0.05], [0.25, 0.25, 0.25, 0.25]),
    ([0.9, 0.1], [0.5, 0.5]),
]
X = torch.tensor([-6.0, -2.0, -0.5, 0.0, 0.5, 2.0, 6.0])  # log reference - log policy
RATIOS = (1.0, 1.5, 0.6)


def cases():
    """Yield p, the reference, log(p / reference), the reverse KL, and a name of the case."""
    for p, ref in CASES:
        name = f"p {p}, reference {ref}"
        p, ref = torch.tensor(p).double(), torch.tensor(ref).double()
        yield p, ref, (p / ref).log(), (p * (p / ref).log()).sum(), name


def kl_loss(kl: str, x: torch.Tensor, rho: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the value of `grpo.kl_loss` for each token, and its gradient in log p."""
    logps = torch.full_like(x, -1.0).requires_grad_()
    ratio = (logps - logps.detach()).exp() * rho
    value = grpo.kl_loss(grpo.kl_terms(logps, x - 1.0), ratio, kl)
    return value.detach(), torch.autograd.grad(value.sum(), logps)[0]


def expect_each(got: dict, expected: dict, case: str, hint: str = "") -> None:
    assert got.keys() == expected.keys(), f"the keys must be {', '.join(expected)}."
    for name, value in expected.items():
        expect_close(f"{case}: {name}", got[name], value, 1e-4, hint)


def check_kl():
    """`kl` is the reverse KL, the mean of log(p / reference) over samples of p."""
    for p, ref, _, kl, case in cases():
        expect_close(f"{case}: kl", student_module("ex07.py").kl(p, ref), kl, 1e-4, "Who samples?")


def check_kl_gradient():
    """`kl_gradient` is the gradient of the reverse KL in the logits of p."""
    hint = "Adding 1 to all logits changes nothing. What does this say about the gradient's sum?"
    for p, ref, log_ratio, kl, case in cases():
        got = student_module("ex07.py").kl_gradient(p.log() + 0.3, ref)
        expect_close(f"{case}: kl_gradient", got, p * (log_ratio - kl), 1e-4, hint)


def check_means():
    """`means`: the mean of k1 and of k3 is the reverse KL, the mean of k2 is not.
    So no estimator of kl_terms is reversed."""
    for p, ref, log_ratio, kl, case in cases():
        expected = {"k1": kl, "k2": (p * log_ratio**2).sum() / 2, "k3": kl}
        got = student_module("ex07.py").means(p, ref)
        expect_each(got, expected, case)


def check_terms():
    """kl_terms of each token: k1 = -x, k2 = x^2 / 2, k3 = e^x - x - 1, also for a tiny x."""
    terms = grpo.kl_terms(torch.zeros_like(X), X)
    expected = {"k1": -X, "k2": X**2 / 2, "k3": X.exp() - X - 1}
    expect_each(terms, expected, f"x = {X.tolist()}", "x is log reference - log policy.")
    tiny = 1e8 * grpo.kl_terms(torch.tensor(0.0), torch.tensor(1e-4))["k3"]
    expect_close("10^8 times k3 of x = 0.0001", tiny, 0.5, 1e-2, "e^x - 1 has lost its digits.")


def check_loss_gradients():
    """`loss_gradients`: k1 has none, k2 and k3_ratio have the gradient of the reverse KL,
    k3 has that of the forward KL."""
    hint = "Training samples o with probability p(o); autograd does not see it. Is kl_loss done?"
    for p, ref, log_ratio, kl, case in cases():
        reverse = p * (log_ratio - kl)
        expected = {"k1": 0 * p, "k2": reverse, "k3": p - ref, "k3_ratio": reverse}
        got = student_module("ex07.py").loss_gradients(p.log() - 0.2, ref)
        expect_each(got, expected, case, hint)


def check_values():
    """--kl k3_ratio has the value rho k3."""
    for rho in RATIOS:
        what = f"rho = {rho}, x = {X.tolist()}: the value"
        expect_close(what, kl_loss("k3_ratio", X, rho)[0], rho * (X.exp() - X - 1))


def check_slopes():
    """The gradients in log p are those of the formulas: k2 -x, k3 1 - e^x, k3_ratio -rho x."""
    for rho in RATIOS:
        for kl, expected in (("k3_ratio", -rho * X), ("k2", -X), ("k3", 1 - X.exp())):
            what = f"--kl {kl}, rho = {rho}, x = {X.tolist()}: the gradient"
            expect_close(what, kl_loss(kl, X, rho)[1], expected, 1e-3)


def check_far():
    """--kl k3_ratio keeps its gradient in fp32 where the policy has almost lost a token, x = 18."""
    hint = "Two numbers of size e^18 had to cancel. Value and gradient may come from two terms."
    expect_close("the gradient", kl_loss("k3_ratio", torch.tensor([18.0]), 1.0)[1], -18, 5e-3, hint)
