"""The command ``fvgen``; each sub-command is one module here, imported once its arguments are parsed."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from fvgen.cli.parser import build_parser
from fvgen.utils.errors import UserError

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line and returns the exit status: 0, 2 for bad input (one sentence on stderr), 130 when interrupted."""
    try:
        arguments = build_parser().parse_args(argv)
        importlib.import_module(arguments.module).run(arguments)
        sys.stdout.flush()
    except UserError as error:
        return _fail(str(error))
    except KeyboardInterrupt as interrupt:
        print(f"\nfvgen: interrupted; {interrupt or 'nothing was left behind'}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `fvgen doctor | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        return _fail("memory ran out; use fewer or smaller photos, fewer --frames, or another --device")
    return 0


def _fail(message: str) -> int:
    print(f"fvgen: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _out_of_memory(error: Exception) -> bool:
    known = type(error).__name__ in ("OutOfMemoryError", "MemoryError")
    return known or "can't allocate memory" in str(error)
