"""HiAR in JAX: long video by hierarchical denoising (arXiv 2603.08703).

model = hiar_jax.load("runs/shapes")
frames = model.generate("a red circle moving left", frames=72, seed=1)

for chunk in hiar_jax.stream(workdir="runs/shapes", prompt="a red circle moving left"):
  ...
"""

import importlib

__version__ = "0.1.0"


def __getattr__(name: str):
  """Imports `hiar_jax.stream` or `hiar_jax.load` (and with it JAX) at its first use."""
  # the module is callable; importing it sets the attribute, so this runs once
  if name == "stream":
    return importlib.import_module("hiar_jax.stream")
  if name == "load":
    return importlib.import_module("hiar_jax.model").load
  raise AttributeError(f"module 'hiar_jax' has no attribute {name!r}")
