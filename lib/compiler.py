"""torch.compile with the settings of this repository."""

import functools
import logging
import sys

import torch

# Number of graphs that torch.compile may build for one function; torch's own limit is 8. A decode
# step without the fused kernels needs up to 12 (tests/commands/test_compiled.py).
RECOMPILE_LIMIT = 64


class RecompileLimitNotice(logging.Handler):
    """Print a warning after torch's log record about the limit of graphs."""

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

    Never compile a bound method of a model. If it is stored in a module, a copy of the model
    computes with the weights of the original.
    """
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    return torch.compile(function)
