"""Other processes that tests start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def environment(**changes: str) -> dict[str, str]:
    """This process's variables; the checkout comes before what else Python imports from."""
    places = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(places), **changes}


def interpret(folder: Path, code: str) -> str:
    """What Python code prints under Triton's interpreter; a failure fails the test, and without Triton it is skipped.

    Args:
        folder: for the file that the code goes to: Triton reads a kernel's source from its file.
    """
    pytest.importorskip("triton", reason="Triton is not installed on this platform")
    script = folder / "script.py"
    script.write_text(code)
    command = [sys.executable, str(script)]
    done = subprocess.run(command, env=environment(TRITON_INTERPRET="1"), capture_output=True, text=True, cwd=ROOT / "tests")
    assert done.returncode == 0, done.stderr
    return done.stdout
