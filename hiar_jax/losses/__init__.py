"""The objectives, one per file.

Each returns [b], one value per example, so that callers may mask or weight; `forward` is the
function that models.dit.bind returns.
"""
