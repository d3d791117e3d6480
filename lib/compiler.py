"""torch.compile with the settings of this repository.

`compiled` wraps a function once per process, and prints a warning when the function reaches its
limit of graphs.
"""

import functools
import logging
import sys

import torch

# Number of graphs that torch.compile may build for one function; torch's own limit is 8. Where the
# numbers of prompts, completions and tokens vary, a decode step without the fused kernels needs up
# to 12 (tests/commands/test_compiled.py).
RECOMPILE_LIMIT = 64


class RecompileLimitNotice(logging.Handler):
    """Follow torch's log record about the limit with a warning: what it means, and what to do."""

    def emit(self, record: logging.LogRecord) -> None:
        if "config.recompile_limit" not in record.getMessage():
            return
        print(
            f"warning: torch.compile has compiled one function {RECOMPILE_LIMIT} times and will "
            "not compile it again: new shapes run uncompiled and slower. Set TORCH_LOGS=recompiles "
            "to see why, or raise RECOMPILE_LIMIT in lib/compiler.py.",
            file=sys.stderr,
            flush=True,
        )


logging.getLogger("torch._dynamo.convert_frame").addHandler(RecompileLimitNotice())


@functools.cache
def compiled(function):
    """Return `function` compiled by torch.compile, once per process.

    Only plain functions are compiled, never the bound methods of a model. A bound method that is
    stored in a module is not copied with the module, so a copy of the model would compute with the
    weights of the original.
    """
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    return torch.compile(function)
