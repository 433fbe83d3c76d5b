"""Benchmarks: pytest-benchmark suites, and ``python -m benchmarks.<name> --json OUT``."""
