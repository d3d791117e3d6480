"""The memory table equals what was traced on a whole step, and what a layer keeps."""

import dataclasses

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model import HumanOmni, shared_prefix_attend
from tools.bench import GIB, SIZES, MemoryArgs, build_model, kept_by_a_layer, memory, peak


class Live(TorchDispatchMode):
    """Records every storage that is made, and counts the bytes of those that still exist."""

    def __init__(self):
        super().__init__()
        self.made = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if torch.is_tensor(x):
                storage = x.untyped_storage()
                self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return out

    @property
    def bytes(self) -> int:
        return sum(n for ref, n in self.made.values() if not ref.expired())


@pytest.mark.parametrize(
    "dtype, B, T, traced",
    [
        (torch.bfloat16, 1, 512, 19.9),
        (torch.bfloat16, 2, 512, 27.6),
        (torch.bfloat16, 4, 512, 42.5),
        (torch.bfloat16, 4, 200, 28.9),
        (torch.float32, 1, 512, 29.0),
    ],
)
def test_the_estimate_is_what_was_traced(dtype, B, T, traced):
    """Stops an estimate without a part of the step. Traced at full size with a mask, G 8, P 976."""
    model = build_model(SIZES["full"], "meta", torch.float32)
    assert sum(peak(model, B, 8, 976, T, dtype).values()) / GIB == pytest.approx(traced, rel=0.03)


@pytest.mark.parametrize("B, G, P, S", [(2, 3, 37, 11), (1, 4, 20, 30)])
def test_what_a_layer_keeps(model, B, G, P, S):
    """Stops an additional tensor per layer that is not counted, and checkpointing that keeps more
    than the layer's input."""
    towers = (
        model.model.vision_tower.config,
        model.model.audio_tower.config,
        model.model.bert_model.config,
    )
    mask, positions, kept = (
        torch.ones(B, P, dtype=torch.bool),
        torch.arange(P + G * S).expand(B, -1),
        {},
    )
    for layers in (2, 4):
        config = dataclasses.replace(model.config, num_key_value_heads=2, num_hidden_layers=layers)
        run = HumanOmni(config, *towers)
        # a view of each is kept
        weights = sum(p.nbytes for p in run.model.layers.parameters() if p.dim() == 2)
        x = torch.randn(B, P + G * S, config.hidden_size, requires_grad=True)
        for run.checkpoint_layers in (False, True):
            with Live() as live:
                out = run.run_layers(x, positions, shared_prefix_attend(mask, G, S, False))
            kept[layers, run.checkpoint_layers] = live.bytes - weights
            del out
    # on a CPU each keeps one tensor more than a GPU's
    norms = 2 * B * (P + G * S) * config.hidden_size * 4
    expected = kept_by_a_layer(config, B, G, P, S, 4, repeated=1)
    assert (kept[4, False] - kept[2, False]) / 2 - norms == pytest.approx(expected, rel=0.02)
    assert (kept[4, True] - kept[2, True]) / 2 == pytest.approx(
        x.nbytes, rel=0.02
    ) and x.nbytes < expected / 10


def test_the_printed_table(capsys):
    """Stops a table whose columns or first row are those of another case."""
    memory(MemoryArgs())
    text = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines[0] == "GiB at the peak of a micro-batch with a padded prompt; P 976, G 8"
    assert lines[4].startswith("| bfloat16 | 1 | 512 | 19.87 | 12.99 | 2.56 | 0.99 | ")
