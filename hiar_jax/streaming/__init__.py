"""Streaming: endless generation, block by block, on any number of devices."""
