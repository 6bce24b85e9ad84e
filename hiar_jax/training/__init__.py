"""The stages of a run, in order: data, teacher, trajectories, causal_init, distill, sample.

Each resumes, and is skipped when done.
"""
