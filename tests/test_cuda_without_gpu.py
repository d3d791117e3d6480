"""The CUDA path without a GPU."""
import datetime

import pytest
import torch

from lib import common


@pytest.fixture
def settings(monkeypatch):
    """What a process chooses for its GPU, put back afterwards."""
    before = torch.backends.cuda.cudnn_sdp_enabled(), torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    yield
    torch.backends.cuda.enable_cudnn_sdp(before[0])
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = before[1]


def test_a_process_on_a_gpu_starts_with_the_right_kernels(settings, monkeypatch):
    """Stops NaN gradients of cuDNN's masked attention, bf16 partial sums, and a run killed by one slow save."""
    asked = {}
    monkeypatch.setattr(common.dist, "init_process_group", lambda *a, **k: asked.update(k))
    monkeypatch.setattr(common, "fresh_store", lambda: None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert common.start_ranks("cuda").device == torch.device("cuda", 0)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction is False
    assert asked["timeout"] == datetime.timedelta(minutes=30)
