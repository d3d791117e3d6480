"""Exercise 7: what three estimators of the KL say, and what they do as losses."""

import torch

import grpo
from course.checks import written

CASES = [
    ([0.5, 0.3, 0.2], [0.2, 0.3, 0.5]),
    ([0.7, 0.2, 0.05, 0.05], [0.25, 0.25, 0.25, 0.25]),
    ([0.9, 0.1], [0.5, 0.5]),
]
X = torch.tensor([-6.0, -2.0, -0.5, 0.0, 0.5, 2.0, 6.0])  # log reference - log policy


def cases():
    """(p, reference, log p / reference, reverse KL) in double."""
    for p, ref in CASES:
        p, ref = torch.tensor(p, dtype=torch.float64), torch.tensor(ref, dtype=torch.float64)
        yield p, ref, (p / ref).log(), float((p * (p / ref).log()).sum())


def slope(kl: str, x: torch.Tensor, rho: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Value and gradient in log p of `grpo.kl_loss`, token by token."""
    logps = torch.full_like(x, -1.0).requires_grad_()
    ratio = (logps - logps.detach()).exp() * rho
    value = grpo.kl_loss(grpo.kl_terms(logps, x - 1.0), ratio, kl)
    return value.detach(), torch.autograd.grad(value.sum(), logps)[0]


def rounded(x: torch.Tensor) -> list[float]:
    return [float(f"{value:.4g}") for value in x.tolist()]


def near(a, b, tolerance: float = 1e-4) -> bool:
    a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
    return bool(((a - b).abs() <= tolerance * (1 + b.abs())).all())


def check_kl():
    """`kl` is the reverse KL, the mean of log p / reference under p."""
    for p, ref, _, true in cases():
        got = float(written("ex07.py").kl(p, ref))
        assert near(got, true), (
            f"p {p.tolist()}, reference {ref.tolist()}: {true:.4f}, not {got:.4f}. Who samples?"
        )


def check_kl_gradient():
    """`kl_gradient` is its gradient in the logits of p."""
    for p, ref, log_ratio, true in cases():
        got = written("ex07.py").kl_gradient(p.log() + 0.3, ref)
        assert near(got, p * (log_ratio - true)), (
            f"p {p.tolist()}: {[round(float(g), 4) for g in got]} does not pass a test by small "
            "differences. Add 1 to all logits: nothing changes, so what is its sum?"
        )


def check_means():
    """`means`: k1 and k3 have the reverse KL for their mean, k2 has not;
    so no estimator of kl_terms is reversed."""
    for p, ref, log_ratio, true in cases():
        got = written("ex07.py").means(p, ref)
        assert set(got) == {"k1", "k2", "k3"}, "give the means of k1, k2 and k3."
        right = {"k1": true, "k2": float((p * log_ratio**2).sum() / 2), "k3": true}
        assert all(near(float(got[k]), right[k]) for k in right), (
            f"p {p.tolist()}, KL {true:.4f}: the means are "
            f"{', '.join(f'{k} {float(v):.4f}' for k, v in got.items())}. "
            "Two of them must be the KL."
        )


def check_terms():
    """kl_terms token by token: k1 = -x, k2 = x^2 / 2, k3 = e^x - x - 1, also where x is tiny."""
    terms = grpo.kl_terms(torch.zeros_like(X), X)
    assert (
        near(terms["k1"], -X) and near(terms["k2"], X**2 / 2) and near(terms["k3"], X.exp() - X - 1)
    ), "one of the three is not what it is for x = log reference - log policy."
    tiny = float(grpo.kl_terms(torch.tensor(0.0), torch.tensor(1e-4))["k3"])
    assert abs(tiny - 5e-9) < 1e-10, (
        f"k3 of x = 0.0001 is 5e-9, not {tiny:.1e}: e^x - 1 has lost its digits."
    )


def check_loss_gradients():
    """`loss_gradients`: k1 does nothing, k2 and k3_ratio have the reverse KL's gradient,
    k3 the forward KL's."""
    for p, ref, log_ratio, true in cases():
        got = written("ex07.py").loss_gradients(p.log() - 0.2, ref)
        reverse = p * (log_ratio - true)
        right = {"k1": 0 * p, "k2": reverse, "k3": p - ref, "k3_ratio": reverse}
        assert set(got) == set(right), f"give the gradients of {', '.join(right)}."
        wrong = [k for k in right if not near(got[k], right[k])]
        assert not wrong, (
            f"p {p.tolist()}: {', '.join(wrong)} is off. p(o) is how often o is sampled: "
            "autograd does not see it. And is kl_loss done?"
        )


def check_values():
    """--kl k3_ratio has the value rho k3."""
    for rho in (1.0, 1.5, 0.6):
        value, _ = slope("k3_ratio", X, torch.full_like(X, rho))
        right = rho * (X.exp() - X - 1)
        assert near(value, right), (
            f"at rho = {rho}, x = {X.tolist()} it is {rounded(value)}, not {rounded(right)}."
        )


def check_slopes():
    """The gradients in log p are those of the formulas: k2 -x, k3 1 - e^x, k3_ratio -rho x."""
    for rho in (1.0, 1.5, 0.6):
        r = torch.full_like(X, rho)
        for kl, right in (("k3_ratio", -rho * X), ("k2", -X), ("k3", 1 - X.exp())):
            got = slope(kl, X, r)[1]
            assert near(got, right, 1e-3), (
                f"--kl {kl} at rho = {rho}, x = {X.tolist()}: the gradient is {rounded(got)}, "
                f"not {rounded(right)}."
            )


def check_far():
    """--kl k3_ratio still has its gradient where the policy has nearly lost a word, x = 18,
    in fp32."""
    got = float(slope("k3_ratio", torch.tensor([18.0]), torch.ones(1))[1])
    assert abs(got + 18) < 0.1, (
        f"it is {got:.1f}, not -18: two numbers of size e^18 were to cancel. Value and gradient "
        "need not come from one expression."
    )
