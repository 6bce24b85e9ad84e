"""Loops over blocks and noise levels, for generation and for training.

They take a `forward` function (models.dit.bind), never a module.
"""
