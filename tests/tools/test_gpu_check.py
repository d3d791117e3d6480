"""The acceptance on a GPU, as far as a CPU can run it."""
import json

import pytest
import torch

import sampler
from tools import gpu_check


@pytest.fixture
def run(monkeypatch, tmp_path):
    """-> exit status, check -> verdict"""
    def run(*checks):
        monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
        monkeypatch.setattr(gpu_check, "CHECKS", list(checks))
        with pytest.raises(SystemExit) as ended:
            gpu_check.main(gpu_check.Args(size="toy", device="cpu"))
        (file,) = (tmp_path / "runs").glob("gpu_*.json")
        rows = json.loads(file.read_text())["checks"]
        assert file.with_suffix(".md").read_text().count("\n| ") == 2 + len(rows)
        return ended.value.code, [row["verdict"] for row in rows]

    (tmp_path / "runs").mkdir()
    return run


def test_what_runs_without_a_gpu_is_right(run):
    """Stops a first hour on a GPU that is spent on mending the check."""
    g = gpu_check
    assert run(g.reference_parity, g.twins, g.whole_step, g.decode) == (0, ["right", "right", "right", "measured"])


def test_what_is_wrong_is_told(run, monkeypatch):
    """Stops a check that cannot fail, and one that ends all others."""
    choose = sampler.choose
    with monkeypatch.context() as wrong:
        wrong.setattr(gpu_check.sampler, "generate_naive", lambda *a, **k: [torch.zeros(2, gpu_check.G, 48)])
        wrong.setattr(gpu_check, "build_model", lambda *a: 1 / 0)
        assert run(gpu_check.twins, gpu_check.whole_step, gpu_check.reference_parity) == (1, ["WRONG", "WRONG", "right"])
    # A sampler that is not the trainer's policy: its ratio is not 1.
    monkeypatch.setattr(sampler, "choose", lambda logits, *a: choose(logits * 3, *a))
    assert run(gpu_check.whole_step) == (1, ["WRONG"])
