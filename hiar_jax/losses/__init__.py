"""The objectives, one per file.

Each returns [b], one value per example, so that callers may mask or weight; `bound` is a network
with weights and texts (models.frames.Bound).
"""
