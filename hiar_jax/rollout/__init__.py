"""Loops over blocks and noise levels.

They take a `forward` function (models.dit.bind), never a module.
"""
