"""pytest-benchmark suites over the workloads of ``fvgen bench``, ``python -m benchmarks.record``, and the recorded results."""
