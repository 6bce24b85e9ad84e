"""Every test sees eight virtual CPU devices and strict array shapes."""

import importlib.util
import os

# before jax is imported, here and in the processes that tests start
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
# Compiling takes most of the time here; processes that tests start compile alike, so that whatever
# is compared bit for bit has one preset on both sides.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_opt_preset=FAST_COMPILE"

from absl import flags
import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

# Worker processes of grain read absl flags, which only `app.run` parses.
flags.FLAGS.mark_as_parsed()


def pytest_collection_modifyitems(items):
  """Live comparisons need the extra [parity]; where it is not installed they are skipped, and the
  summary says so.
  """
  missing = [
    name
    for name in ("torch", "transformers", "diffusers")
    if importlib.util.find_spec(name) is None
  ]
  skip = pytest.mark.skip(reason=f"the extra [parity] is not installed ({', '.join(missing)})")
  for item in items if missing else ():
    if item.get_closest_marker("parity"):
      item.add_marker(skip)
