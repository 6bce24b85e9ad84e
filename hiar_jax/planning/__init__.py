"""Costs of a job: operations, memory, weights."""
