"""Measurements behind ``fvgen bench``: kernels, rasterizer, sampler and training step, as records that tell their origin."""
