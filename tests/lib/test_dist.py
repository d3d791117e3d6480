"""Processes and devices, as far as one process can show it."""

import pytest
import torch

from lib.args import UserError
from lib.dist import Ranks, as_slice, dtype_of, start_ranks


def test_one_process_is_one_rank_on_the_cpu(monkeypatch):
    """Stops a run without torchrun that waits for other ranks, or that ignores --device."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    ranks = start_ranks("cpu")
    assert ranks == Ranks(0, 1, torch.device("cpu")) and ranks.is_main
    ranks.barrier()
    assert ranks.gather([1, 2]) == [1, 2]
    assert ranks.all_reduce_(torch.tensor([3.0])).item() == 3.0


def test_a_missing_gpu_is_reported_with_its_flag(monkeypatch):
    """Stops a traceback of torch for --device cuda on a machine without one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert start_ranks("auto").device.type == "cpu"
    with pytest.raises(UserError, match=r"^--device cuda: .*use --device cpu"):
        start_ranks("cuda")


def test_auto_is_bfloat16_on_a_gpu_only():
    """Stops bf16 on a CPU, where it is slower, and fp32 on a GPU by default."""
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert dtype_of("auto", gpu) == dtype_of("bfloat16", cpu) == torch.bfloat16
    assert dtype_of("auto", cpu) == dtype_of("float32", gpu) == torch.float32


def test_only_consecutive_numbers_become_a_slice():
    """Stops rows that are left out, doubled or reordered by an index that looks like a slice."""
    rows = torch.arange(9)
    for index in ([3, 4, 5], [0], [2, 4], [5, 4], [3, 3, 4], []):
        assert rows[as_slice(index)].tolist() == index
    assert as_slice([3, 4, 5]) == slice(3, 6) and as_slice([5, 4]) == [5, 4]
