"""Processes and devices: the same script runs under python (one rank) and under torchrun."""

import dataclasses
import datetime
import os
import platform
import re
import time
import uuid
from pathlib import Path

import torch
import torch.distributed as dist

from lib.args import UserError

# How long a rank waits for the others, of which rank 0 may be saving to a slow disk.
PATIENCE = datetime.timedelta(minutes=30)


@dataclasses.dataclass(frozen=True)
class Ranks:
    """The number of this process among all processes of a run, and its device."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on rank 0, which alone prints and writes."""
        return self.rank == 0

    def print0(self, *words) -> None:
        """Print on rank 0."""
        if self.is_main:
            print(*words, flush=True)

    def all_reduce_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, rows: list) -> list:
        """Return the lists of all ranks, joined in rank order. They hold plain Python values."""
        if self.world == 1:
            return rows
        parts: list = [None] * self.world
        dist.all_gather_object(parts, rows)
        return [row for part in parts for row in part]

    def barrier(self) -> None:
        """Wait until every rank has come here."""
        if self.world > 1:
            dist.barrier()


def start_ranks(device: str = "auto") -> Ranks:
    """Join torchrun's process group if there is one, with gloo on CPU and NCCL on CUDA."""
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    has_cuda = torch.cuda.is_available()
    use_cuda = has_cuda if device == "auto" else device.startswith("cuda")
    if use_cuda and not has_cuda:
        raise UserError(
            f"--device {device}: this machine has no usable CUDA device; use --device cpu."
        )
    own_device = torch.device("cpu")
    if use_cuda:
        own_device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        set_up_cuda(own_device)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group(
            "nccl" if use_cuda else "gloo",
            store=fresh_store(),
            rank=rank,
            world_size=world,
            device_id=own_device if use_cuda else None,
            timeout=PATIENCE,
        )
    return Ranks(rank, world, own_device)


def set_up_cuda(device: torch.device) -> None:
    """Select this process's GPU, and the settings with which it computes what a CPU computes."""
    torch.cuda.set_device(device)
    use_expandable_segments(device)
    # From torch 2.11 on, cuDNN is the first choice on Hopper. With a mask its gradients can be NaN
    # (pytorch issue 196678), and it plans for half a second at every new shape; each micro-batch
    # has a new one.
    torch.backends.cuda.enable_cudnn_sdp(False)
    # Partial sums stay in fp32.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    # Convolutions in fp32, too: by default their factors are rounded to 10 bits, which changes the
    # norm of a gradient by 3e-3. Matrix products are exact by torch's default.
    torch.backends.cudnn.allow_tf32 = False


def use_expandable_segments(device: torch.device) -> None:
    """Let the allocator's segments grow.

    Micro-batches differ in length, and fixed segments leave holes between them. A user's own
    setting has precedence. Some drivers refuse such memory (WSL2: pytorch issue 192330).
    """
    if {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & set(os.environ):
        return
    # The variable is read at the first allocation, which follows.
    os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    try:
        torch.empty(1, device=device)
    except RuntimeError:
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:False"
        torch._C._accelerator_setAllocatorSettings(os.environ["PYTORCH_ALLOC_CONF"])


def fresh_store() -> dist.Store:
    """Return a store in which ranks find each other's addresses, without those of earlier attempts.

    torchrun --max_restarts (torch 2.13) keeps one store for all attempts, so a restarted rank could
    read the address of a dead one and wait forever. Therefore rank 0 draws a name under which the
    keys of this attempt are stored, and repeats it until all ranks have it. The others delete the
    name that they find, which a dead rank 0 may have left, and wait for the next one.
    """
    store, rank, world = next(dist.rendezvous("env://"))
    if rank == 0:
        name = uuid.uuid4().hex
        while not store.check([f"{name}/{r}" for r in range(1, world)]):
            for r in range(1, world):
                store.set(f"name/{r}", name)
            time.sleep(0.05)
    else:
        store.delete_key(f"name/{rank}")
        name = store.get(f"name/{rank}").decode()
        store.set(f"{name}/{rank}", "received")
    return dist.PrefixStore(name, store)


def machine_name(device: torch.device) -> str:
    """Return the model of the GPU, or of the processor with its number of cores: no host name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", info.read_text() if info.exists() else "")
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def dtype_of(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of the working weights.

    "auto" is bfloat16 on a GPU (eight times as fast there), float32 on a CPU (faster there).
    """
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def as_slice(index: list[int]) -> slice | list[int]:
    """Return consecutive numbers as a slice, [3, 4, 5] -> slice(3, 6), and other lists as they are.

    A list has to be sent to a GPU, for which the host waits; a slice does not.
    """
    consecutive = bool(index) and index == list(range(index[0], index[-1] + 1))
    return slice(index[0], index[-1] + 1) if consecutive else index
