"""pytest-benchmark suites over the workloads of ``fvgen bench``, searches for tile sizes, ``python -m benchmarks.record``, results."""
