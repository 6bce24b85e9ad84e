"""Conversion from and to published checkpoints: names, layouts, sizes, configs."""
