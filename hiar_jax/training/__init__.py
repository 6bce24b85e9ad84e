"""A run, from data to samples: its experiment, stages, the loop that they share, and its log."""
