"""What every script needs and no part of the lesson: arguments, processes, files.

The arguments come from a dataclass; torchrun's processes join in a group; files are never left half
written.
"""

import argparse
import ast
import dataclasses
import datetime
import difflib
import inspect
import io
import json
import os
import re
import sys
import tempfile
import textwrap
import time
import tokenize
import typing
import uuid
from pathlib import Path

import torch
import torch.distributed as dist


class UserError(Exception):
    """Something that the user can fix.

    The message is one sentence that names the file, flag or row and says what to do.
    """


# ------------------------------------------------------------------------------------------------
# Arguments: one dataclass per script.  Its fields are the flags, its comments are the help.
# ------------------------------------------------------------------------------------------------


def list_of(*words: str):
    """The default of a flag that takes several words."""
    return dataclasses.field(default_factory=lambda: list(words))


class Help(argparse.RawDescriptionHelpFormatter):
    """Each line of a flag's comment is a line of its help, wrapped if it is too long."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        lines = []
        for line in text.split("\n"):
            lines += super()._split_lines(line, width)
        return lines


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that suggests a similar flag for an unknown one."""

    def parse_args(self, argv: list[str] | None = None):
        # Before parsing: otherwise a misspelt required flag would be reported as missing.
        for word in sys.argv[1:] if argv is None else argv:
            flag = word.split("=")[0]
            if flag.startswith("--") and flag not in self._option_string_actions:
                similar = difflib.get_close_matches(flag, self._option_string_actions, 1)
                hint = f"; did you mean {similar[0]}?" if similar else ""
                self.error(f"unrecognized arguments: {flag}{hint}")
        return super().parse_args(argv)


def read_comments(cls) -> tuple[dict[str, str], dict[str, str]]:
    """Help and group of each field of a dataclass, from the comments in its source.

        # -- optimizer                  starts a group
        lr: float = 1e-6  # peak learning rate
        # more lines of the same help

    A field that is redefined in a subclass stays in its group.
    """
    helps, groups = {}, {}
    for base in reversed(cls.__mro__[:-1]):
        source = textwrap.dedent(inspect.getsource(base))
        fields = [
            node for node in ast.parse(source).body[0].body if isinstance(node, ast.AnnAssign)
        ]
        starts = {field.lineno: field.target.id for field in fields}
        ends = {field.lineno: field.end_lineno for field in fields}
        group, name, last = "", None, 0
        comments: dict[str, list[str]] = {}
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            line = token.start[0]
            if line in starts:
                name = starts[line]
                groups.setdefault(name, group)
                comments.setdefault(name, [])
                last = ends[line]
            if token.type != tokenize.COMMENT:
                continue
            text = token.string.lstrip("# ").rstrip()
            if text.startswith("-- "):
                group, name = text.removeprefix("-- "), None
            elif name and line <= last + 1:  # right after the field: not a comment of the code
                comments[name].append(text)
                last = max(last, line)
        for name, lines in comments.items():
            helps[name] = "\n".join(lines) or helps.get(name, "")
    return helps, groups


def parse_args(cls, argv: list[str] | None = None, prog: str | None = None):
    """Command line -> an instance of the dataclass `cls`.  Unknown flags are an error (exit 2).

    Every field is a flag of the same name; `x: int = 3  # help` gives its type, default and help
    (see `read_comments`).  A bool is a switch, a list takes several words, a Literal is a choice.
    """
    helps, groups = read_comments(cls)
    main_spec = sys.modules["__main__"].__spec__  # of a program that was started by `python -m`
    if prog is None and main_spec and cls.__module__ == "__main__":
        prog = f"python -m {main_spec.name.removesuffix('.__main__')}"
    parser = Parser(
        prog=prog,
        description=sys.modules[cls.__module__].__doc__,
        formatter_class=Help,
        allow_abbrev=False,
    )
    sections = {"": parser}
    for group in groups.values():
        if group not in sections:
            sections[group] = parser.add_argument_group(group)

    fields = dataclasses.fields(cls)
    for field in fields:
        options = flag_options(field, helps[field.name])
        sections[groups[field.name]].add_argument(f"--{field.name}", **options)
    if len(fields) > 12:  # a usage line of fifty flags would hide the error below it
        required = [field.name for field in fields if is_required(field)]
        words = "".join(f" --{name} {name.upper()}" for name in required)
        parser.usage = f"%(prog)s [-h]{words} [--flag value ...]"
    return cls(**vars(parser.parse_args(argv)))


def is_required(field: dataclasses.Field) -> bool:
    return field.default is field.default_factory is dataclasses.MISSING


def flag_options(field: dataclasses.Field, text: str) -> dict:
    """The options of `add_argument` for a field of a dataclass.  text: its help"""
    kind = field.type
    if type(None) in typing.get_args(kind):  # `int | None` -> int
        kind = next(arg for arg in typing.get_args(kind) if arg is not type(None))

    options: dict = {}
    if kind is bool:
        options["action"] = "store_true"
    elif typing.get_origin(kind) is list:
        options |= {"nargs": "*", "type": typing.get_args(kind)[0]}
    elif typing.get_origin(kind) is typing.Literal:
        options["choices"] = typing.get_args(kind)
    else:
        options["type"] = kind

    if is_required(field):
        options["required"] = True
    else:
        default = field.default
        if default is dataclasses.MISSING:
            default = field.default_factory()
        options["default"] = default
        # A 0 is not shown if the help explains it ("; 0: off").
        explained = default == 0 and re.search(r"\b0: ", text)
        if kind is not bool and default not in (None, "", []) and not explained:
            shown = " ".join(map(str, default)) if isinstance(default, list) else default
            first, *more = text.split("\n")
            text = "\n".join([f"{first} ({shown})", *more])
    options["help"] = text.replace("%", "%%")
    return options


OUT_OF_MEMORY = (
    "out of GPU memory: lower --micro_batch, --num_generations or --max_new_tokens, or give "
    "--checkpoint_layers."
)


def out_of_memory(error: BaseException | None) -> bool:
    """Whether the device ran out of memory.

    A later error may hide it: the capture of a graph ends with its own.  cuBLAS has its own words.
    """
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError) or "CUBLAS_STATUS_ALLOC_FAILED" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def run_main(main, args_cls, prog: str | None = None, first: str | None = None) -> None:
    """Run a script's `main(args)`.  A UserError ends it in one sentence, not in a traceback.

    `first`: the flag of words that stand before all flags, as in
    `python -m tools.rescore RUN --last 20`.
    """
    if first and sys.argv[1:] and not sys.argv[1].startswith("-"):
        sys.argv.insert(1, f"--{first}")
    try:
        main(parse_args(args_cls, prog=prog))
        sys.stdout.flush()
    except BrokenPipeError:  # `... | head` has closed its end: exit silently, as the shell would
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        os._exit(141) if dist.is_initialized() else sys.exit(141)
    except Exception as error:
        if not isinstance(error, UserError) and not out_of_memory(error):
            raise
        # Plain text and exit 1 on this rank; torchrun then ends the others.
        who = f" (rank {dist.get_rank()})" if dist.is_initialized() else ""
        message = str(error) if isinstance(error, UserError) else OUT_OF_MEMORY
        print(f"error{who}: {printable(message)}", file=sys.stderr, flush=True)
        os._exit(1) if dist.is_initialized() else sys.exit(1)
    # Not after another error: leaving the group would wait for ranks that wait for this one.
    if dist.is_initialized():
        dist.destroy_process_group()


# ------------------------------------------------------------------------------------------------
# Processes: the same script runs under python (one rank) and under torchrun (any number)
# ------------------------------------------------------------------------------------------------

# How long a rank waits for the others.  NCCL's own 10 minutes would end a run whose rank 0 is still
# saving to a slow disk.
PATIENCE = datetime.timedelta(minutes=30)


@dataclasses.dataclass(frozen=True)
class Ranks:
    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Rank 0 prints and writes; the others only compute."""
        return self.rank == 0

    def print0(self, *words) -> None:
        if self.is_main:
            print(*words, flush=True)

    def all_reduce_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, rows: list) -> list:
        """Every rank's list of plain Python values, joined in rank order, on every rank."""
        if self.world == 1:
            return rows
        parts: list = [None] * self.world
        dist.all_gather_object(parts, rows)
        return [row for part in parts for row in part]

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()


def start_ranks(device: str = "auto") -> Ranks:
    """Join torchrun's process group if there is one.  gloo on CPU, nccl on CUDA."""
    rank, world, local = (
        int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    cuda = torch.cuda.is_available() if device == "auto" else device.startswith("cuda")
    if cuda and not torch.cuda.is_available():
        raise UserError(
            f"--device {device}: this machine has no usable CUDA device; use --device cpu."
        )
    where = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        set_up_cuda(where)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            store=fresh_store(),
            rank=rank,
            world_size=world,
            device_id=where if cuda else None,
            timeout=PATIENCE,
        )
    return Ranks(rank, world, where)


def set_up_cuda(device: torch.device) -> None:
    """This process's GPU, and the settings under which it computes what a CPU computes."""
    torch.cuda.set_device(device)
    use_expandable_segments(device)
    # From torch 2.11 on, cuDNN is the first choice on Hopper.  With a mask its gradients can be NaN
    # (pytorch issue 196678), and it plans for half a second at every new shape; each micro-batch
    # has a new one.
    torch.backends.cuda.enable_cudnn_sdp(False)
    # Partial sums stay in fp32.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    # Convolutions in fp32, too: by default their factors are rounded to 10 bits, which moves a
    # gradient's norm by 3e-3.  Matrix products are exact by torch's default.
    torch.backends.cudnn.allow_tf32 = False


def use_expandable_segments(device: torch.device) -> None:
    """Let the allocator's segments grow.

    Micro-batches differ in length, and fixed segments leave holes between them.  A user's own
    setting wins.  If the driver refuses such memory (WSL2: pytorch issue 192330), segments stay
    fixed.
    """
    if {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & set(os.environ):
        return
    # It is read at the first allocation, which follows.
    os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    try:
        torch.empty(1, device=device)
    except RuntimeError:
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:False"
        torch._C._accelerator_setAllocatorSettings(os.environ["PYTORCH_ALLOC_CONF"])


def fresh_store() -> dist.Store:
    """The store in which ranks find each other's addresses, without those of an earlier attempt.

    torchrun --max_restarts (torch 2.13) keeps one store for all attempts.  So a restarted rank
    could read the address of a dead one, and be refused or wait for ever.  Here rank 0 draws a name
    under which this attempt's keys are stored.  The other ranks must not mistake a dead rank 0's
    name for it: each deletes the name that it finds and waits for the next one, and rank 0 repeats
    its name until all have it.
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
        store.set(f"{name}/{rank}", "has it")
    return dist.PrefixStore(name, store)


def printable(text: str) -> str:
    """Escape control characters: a file's name or a sampled text could steer the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def dtype_of(name: str, device: torch.device) -> torch.dtype:
    """The dtype of the working weights.

    auto: bfloat16 on a GPU (eight times as fast there), float32 on a CPU (faster there).
    """
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def as_slice(index: list[int]) -> slice | list[int]:
    """[3, 4, 5] -> slice(3, 6), if the numbers are consecutive.

    A list has to be sent to a GPU, for which the host waits; a slice does not.
    """
    consecutive = bool(index) and index == list(range(index[0], index[-1] + 1))
    return slice(index[0], index[-1] + 1) if consecutive else index


def chunks(rows: list[int], size: int) -> list[list[int]]:
    """[0, 1, 2, 3, 4], 2 -> [[0, 1], [2, 3], [4]]"""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


# ------------------------------------------------------------------------------------------------
# Files are written beside their place and renamed: a reader sees the old one or the new one
# ------------------------------------------------------------------------------------------------


def sync(what) -> None:
    """Write an open file, or the file or folder of a path, to the disk, against a power failure."""
    if not isinstance(what, (str, Path)):
        what.flush()
        os.fsync(what.fileno())
        return
    handle = os.open(what, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_writable(path, folder_flag: str = "") -> None:
    """Check before the work that a file, and missing folders above it, can be written.

    Leaves nothing behind; raises UserError.  `folder_flag`: the flag that names `path`, if that is
    a folder to be filled.
    """
    path = Path(path).absolute()
    try:
        if folder_flag and path.exists() and not path.is_dir():
            raise OSError(None, "it is no folder")
        if not folder_flag and path.exists() and not path.is_file():
            raise OSError(None, "it is a folder or a device, not a file")
        places = [path, *path.parents] if folder_flag else path.parents
        existing = next(place for place in places if os.path.lexists(place))
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        what = f"give {folder_flag} a folder" if folder_flag else "name a file in a folder"
        raise UserError(
            f"cannot write {path}: {error.strerror}; {what} that can be written."
        ) from None


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` in one step; its folders are made."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Replace `path` by `content` in one step; its folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + f".tmp{os.getpid()}")
    try:
        with open(beside, "wb") as file:
            file.write(content)
            sync(file)
        os.replace(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_json(path: Path, value) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")
