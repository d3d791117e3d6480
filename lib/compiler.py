"""torch.compile as this repository uses it.

`compiled` wraps a function once per process, and prints a warning when the function reaches its limit
of graphs.
"""

import functools
import logging
import sys

import torch

# Graphs per function.  torch's own limit is 8.  Where the numbers of prompts, completions and tokens
# vary, a decode step without kernels of its own needs up to 12 (tests/commands/test_compiled.py).
RECOMPILE_LIMIT = 64


class RecompileLimitNotice(logging.Handler):
    """Follows torch's log record about the limit by a sentence on what it means and what to do."""

    def emit(self, record: logging.LogRecord) -> None:
        if "config.recompile_limit" in record.getMessage():
            print(
                f"warning: torch.compile has compiled one function {RECOMPILE_LIMIT} times and will not compile it again: "
                "new shapes run uncompiled and slower. Set TORCH_LOGS=recompiles to see why, or raise RECOMPILE_LIMIT "
                "in lib/compiler.py.",
                file=sys.stderr,
                flush=True,
            )


logging.getLogger("torch._dynamo.convert_frame").addHandler(RecompileLimitNotice())


@functools.cache
def compiled(function):
    """`function` through torch.compile, once per process.

    Functions are compiled, never a model's own methods: a bound method that sits in a module is not
    copied with the module, and a copy of the model would compute with the weights of the original.
    """
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    return torch.compile(function)
