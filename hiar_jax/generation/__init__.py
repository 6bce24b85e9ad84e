"""A generation as asked for: its model, its start, its cost."""
