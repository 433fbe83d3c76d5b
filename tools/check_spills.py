"""Fails if a kernel spills registers: reads the output of a build made with ``-Xptxas=-v``.

python tools/check_spills.py BUILD.log
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")


def read_kernels(log: str) -> list[dict]:
    """One record per kernel: name, architecture, bytes of stack, spill stores and spill loads, registers."""
    kernels: list[dict] = []
    for line in log.splitlines():
        if found := ENTRY.search(line):
            kernels.append({"name": found[1], "arch": found[2], "spills": None, "stack": None, "registers": None})
        elif not kernels:
            continue
        elif (found := SPILLS.search(line)) and kernels[-1]["spills"] is None:
            kernels[-1].update(stack=int(found[1]), spills=int(found[2]) + int(found[3]))
        elif found := REGISTERS.search(line):
            kernels[-1]["registers"] = int(found[1])
    return kernels


def main() -> int:
    kernels = read_kernels(Path(sys.argv[1]).read_text())
    if not kernels or any(k["spills"] is None for k in kernels):
        print(f"{sys.argv[1]} holds no complete register report; was it built with -Xptxas=-v?")
        return 1
    for kernel in (bad := [k for k in kernels if k["spills"]]):
        print(f"{kernel['name']} ({kernel['arch']}): {kernel['spills']} bytes spilled, {kernel['registers']} registers")
    most = max(k["registers"] or 0 for k in kernels)
    print(f"{len(kernels)} kernels, {len(bad)} with spills, at most {most} registers")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
