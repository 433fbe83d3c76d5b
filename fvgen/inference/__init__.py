"""Inference engines: networks with packed weights, built from the modules of ``fvgen.models`` for speed on one GPU."""
