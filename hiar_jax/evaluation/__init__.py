"""Measuring generated videos: against the shapes world's own truth, and by drift numbers that need
no network.
"""
