"""Cameras and point maps from the point maps that DUSt3R predicts for pairs of photos. Wang et al., arXiv 2312.14132."""
