"""The command line: flags from a dataclass, errors in one sentence.

Each script has one dataclass of arguments. Its fields are the flags, its comments are the help.
"""

import argparse
import ast
import dataclasses
import difflib
import inspect
import itertools
import os
import re
import sys
import textwrap
import typing

import torch
import torch.distributed as dist


class UserError(Exception):
    """An error that the user can fix. The message names the file, flag or row and what to do."""


def printable(text: str) -> str:
    """Return the text with its control characters escaped: they could change the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def list_of(*words: str):
    """Return a dataclass field whose default is a list of words."""
    return dataclasses.field(default_factory=lambda: list(words))


class Help(argparse.RawDescriptionHelpFormatter):
    """A formatter that keeps the lines of a flag's comment, and wraps those that are too long."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        split = super()._split_lines
        return [part for line in text.split("\n") for part in split(line, width)]


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
    """Return the help and the group of each field of a dataclass, from the comments in its source.

        # -- optimizer                  starts a group
        lr: float = 1e-6  # peak learning rate
        # more lines of the same help

    A field that is redefined in a subclass stays in its group.
    """
    helps, groups = {}, {}
    for base in reversed(cls.__mro__[:-1]):
        source = textwrap.dedent(inspect.getsource(base))
        lines = source.splitlines()
        for field in ast.parse(source).body[0].body:
            if not isinstance(field, ast.AnnAssign):
                continue
            name, end = field.target.id, field.end_lineno
            # A comment that does not follow at once belongs to the code.
            more = itertools.takewhile(re.compile(r" *#(?! -- )").match, lines[end:])
            texts = [lines[end - 1][field.end_col_offset :], *more]
            text = "\n".join(text.lstrip("# ").rstrip() for text in texts if text)
            helps[name] = text or helps.get(name, "")
            heads = [line for line in lines[: field.lineno] if line.startswith("    # -- ")]
            groups.setdefault(name, heads[-1].removeprefix("    # -- ") if heads else "")
    return helps, groups


def parse_args(cls, argv: list[str] | None = None, prog: str | None = None):
    """Return an instance of the dataclass `cls` from a command line. An unknown flag exits with 2.

    Every field is a flag of the same name; `x: int = 3  # help` gives its type, default and help
    (see `read_comments`). A bool is a switch, a list takes several words, a Literal is a choice.
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
    fields = dataclasses.fields(cls)
    for field in fields:
        group = groups[field.name]
        if group not in sections:
            sections[group] = parser.add_argument_group(group)
        sections[group].add_argument(f"--{field.name}", **flag_options(field, helps[field.name]))
    if len(fields) > 12:  # a usage line of fifty flags would hide the error below it
        required = [field.name for field in fields if is_required(field)]
        words = "".join(f" --{name} {name.upper()}" for name in required)
        parser.usage = f"%(prog)s [-h]{words} [--flag value ...]"
    return cls(**vars(parser.parse_args(argv)))


def is_required(field: dataclasses.Field) -> bool:
    """Return True if the field has no default."""
    return field.default is field.default_factory is dataclasses.MISSING


def flag_options(field: dataclasses.Field, text: str) -> dict:
    """Return the options of `add_argument` for a field of a dataclass with the help `text`."""
    kind, parts = field.type, typing.get_args(field.type)
    options: dict = {"required": is_required(field)}
    if kind is bool:
        options["action"] = "store_true"
    elif typing.get_origin(kind) is list:
        options |= {"nargs": "*", "type": parts[0]}
    elif typing.get_origin(kind) is typing.Literal:
        options["choices"] = parts
    else:
        options["type"] = parts[0] if parts else kind  # `int | None` -> int

    if not options["required"]:
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
    return options | {"help": text.replace("%", "%%")}


OUT_OF_MEMORY = (
    "out of GPU memory: lower --micro_batch, --num_generations or --max_new_tokens, or give "
    "--checkpoint_layers."
)


def out_of_memory(error: BaseException | None) -> bool:
    """Return True if an error, or one that led to it, is that the device has no memory left.

    The capture of a graph raises another error after it. cuBLAS has a message of its own.
    """
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError) or "CUBLAS_STATUS_ALLOC_FAILED" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def run_main(main, args_cls, prog: str | None = None, first: str | None = None) -> None:
    """Run a script's `main(args)`. A UserError ends it with one sentence and no traceback.

    `first` is the flag of words that stand before all flags, as in
    `python -m tools.rescore RUN --last 20`.
    """
    if first and sys.argv[1:] and not sys.argv[1].startswith("-"):
        sys.argv.insert(1, f"--{first}")
    try:
        main(parse_args(args_cls, prog=prog))
        sys.stdout.flush()
    except BrokenPipeError:  # `head` or the like has ended: exit silently, as the shell would
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
    # Not after an error: leaving the group would wait for ranks that wait for this one.
    if dist.is_initialized():
        dist.destroy_process_group()
