"""The command ``fvgen``; each sub-command is one module here, imported once its arguments are parsed."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from fvgen.cli.parser import build_parser
from fvgen.utils.errors import UserError

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line and returns the exit status.

    It is 0, 2 for bad input (one sentence on stderr), 130 when interrupted, 143 or 129 when ended by SIGTERM or SIGHUP.
    """
    received: list[int] = []
    try:
        with _ending_signals(received):
            arguments = build_parser().parse_args(argv)
            importlib.import_module(arguments.module).run(arguments)
            sys.stdout.flush()
    except UserError as error:
        return _fail(str(error))
    except KeyboardInterrupt as interrupt:
        print(f"\nfvgen: interrupted; {str(interrupt) or 'nothing was left behind'}", file=sys.stderr)
        return 128 + (received or [signal.SIGINT])[0]
    except BrokenPipeError:  # `fvgen doctor | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        return _fail("memory ran out; use fewer or smaller photos, fewer --frames, or another --device")
    return 0


@contextmanager
def _ending_signals(received: list[int]) -> Iterator[None]:
    """Makes SIGTERM and SIGHUP clean up what Ctrl-C does; further ones do not disturb that.

    Args:
        received: gets the signal.
    """
    if threading.current_thread() is not threading.main_thread():  # the only one that may
        yield
        return
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    numbers = [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL]  # nohup ignores one
    process = os.getpid()

    def end(number: int, _frame: object) -> None:
        if os.getpid() != process:  # a fork, which has nothing to clean up
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        received.append(number)
        raise KeyboardInterrupt

    for number in numbers:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def _fail(message: str) -> int:
    print(f"fvgen: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _out_of_memory(error: Exception) -> bool:
    known = type(error).__name__ in ("OutOfMemoryError", "MemoryError")
    return known or "can't allocate memory" in str(error)
