"""Copies the figures of a result file into the summary that README and docs quote; see :mod:`fvgen.bench.record`.

python -m benchmarks.record RESULT.json [--summary benchmarks/results/h200/summary.json]
"""

from __future__ import annotations

import sys

from fvgen.bench.record import figure, main, update

__all__ = ["figure", "main", "update"]

if __name__ == "__main__":
    sys.exit(main())
