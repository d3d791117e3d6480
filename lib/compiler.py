"""torch.compile as this repository uses it: one compiled form a function, and a word when it gives up."""

import functools
import logging
import sys

import torch

# Graphs per function.  torch's own limit of 8 is reached by an ordinary run, in which the numbers
# of prompts, completions and tokens vary and rows are left out on the way.
RECOMPILE_LIMIT = 64


class RecompileLimitNotice(logging.Handler):
    """Follows torch's own log record about the limit by a sentence on what it costs and what to do."""

    def emit(self, record: logging.LogRecord) -> None:
        if "recompile_limit" in record.getMessage():
            print(
                f"warning: torch.compile has met {RECOMPILE_LIMIT} kinds of shapes in one function and compiles no "
                "more: other shapes run uncompiled, at about half the speed. Keep --prompts_per_step, "
                "--num_generations and --max_new_tokens fixed, or raise RECOMPILE_LIMIT in lib/compiler.py.",
                file=sys.stderr,
                flush=True,
            )


@functools.cache
def compiled(function):
    """`function` through torch.compile, once per process.

    Functions are compiled, never a model's own methods: a bound method that sits in a module is not
    copied with the module, and a copy of the model would compute with the weights of the original.
    """
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    log = logging.getLogger("torch._dynamo.convert_frame")
    if not any(isinstance(handler, RecompileLimitNotice) for handler in log.handlers):
        log.addHandler(RecompileLimitNotice())
    return torch.compile(function)
