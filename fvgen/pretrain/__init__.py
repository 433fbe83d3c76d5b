"""Trains the bundled ``tiny`` model from the synthetic world alone: first its VAE, then its network."""
