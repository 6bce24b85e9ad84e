"""HiAR in JAX: long video by hierarchical denoising (arXiv 2603.08703).

for chunk in hiar_jax.stream(workdir="runs/shapes", prompt="a red circle moving left"):
  ...
"""

import importlib

__version__ = "0.1.0"


def __getattr__(name: str):
  """Imports `hiar_jax.stream` (and with it JAX) at its first use."""
  # the module is callable; importing it sets the attribute, so this runs once
  if name == "stream":
    return importlib.import_module("hiar_jax.stream")
  raise AttributeError(f"module 'hiar_jax' has no attribute {name!r}")
