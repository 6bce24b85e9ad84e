"""One objective a file.

Each returns [b], one value per example, so that callers may mask or weight; `forward` is
models.dit.bind's.
"""
