"""pytest-benchmark suites over the workloads of ``fvgen bench``, searches for tile sizes, and the recorded results."""
