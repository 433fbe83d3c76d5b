"""A procedural, endless, seeded world and the training pairs it yields."""

from fvgen.data.synthetic.pairs import ClipPairs, synthetic_frames, synthetic_pairs

__all__ = ["ClipPairs", "synthetic_frames", "synthetic_pairs"]
