"""Read by Python at its start where this directory is on its path: hiar_jax is found on it alone.

An editable install answers for every name below hiar_jax, from the checkout that it was made of: a
module that a tree has lost would still be found there. Its finders are taken out.
"""

import sys

sys.meta_path[:] = [
  finder
  for finder in sys.meta_path
  if not getattr(finder, "__module__", "").startswith("__editable__")
]
