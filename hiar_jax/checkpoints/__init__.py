"""Files on disk: training states, converted weights, and published weight files.

on_disk.py tells what lies in a workdir and in a directory of converted weights.
"""
