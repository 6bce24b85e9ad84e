"""Training steps: pure functions step(state, batch, ..., mean) -> (state, metrics), one file
each.
"""
