"""Prompts in, pixels out: text encoders and autoencoders."""
