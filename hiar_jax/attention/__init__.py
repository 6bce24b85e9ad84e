"""Attention that never holds queries x keys: what a run of queries sees, and the kernels for it."""
