"""A digest of every program of every experiment, at full size: `python -m benchmarks.programs`.

digest.py reads a lowered program; full_size.py and listing.py say which programs there are (these
two alone import the package); recording.py keeps and compares digests; __main__.py is the command.
"""
