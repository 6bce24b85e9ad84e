"""Measures of generated videos: the shapes world's exact state, and drift without a network."""
