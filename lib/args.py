"""The command line: flags from a dataclass, errors in one sentence.

Each script has one dataclass of arguments.  Its fields are the flags, its comments are the help.
"""

import argparse
import ast
import dataclasses
import difflib
import inspect
import io
import os
import re
import sys
import textwrap
import tokenize
import typing

import torch
import torch.distributed as dist


class UserError(Exception):
    """Something that the user can fix.

    The message is one sentence that names the file, flag or row and says what to do.
    """


def printable(text: str) -> str:
    """Escape control characters: a file's name or a sampled text could steer the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


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
