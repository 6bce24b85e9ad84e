"""The converter at the published sizes, both ways, without the numbers: every tensor finds its
place here, and its way back.
"""

import jax
import numpy as np
import pytest

from hiar_jax.conversion import layouts
from hiar_jax.conversion.key_maps import iterate_published, view_published
from hiar_jax.models import dit, taehv, umt5, vae

LARGE = dit.DiTConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)
MODELS = {
  "1.3B": ("dit", dit.DiTConfig(), dit.DiTConfig.init),
  "14B": ("dit", LARGE, dit.DiTConfig.init),
  "VAE": ("vae", vae.VAEConfig(), vae.init),
  "UMT5-XXL": ("umt5", umt5.UMT5Config(), umt5.init),
  "taew2_1": ("tiny_vae", taehv.TinyVAEConfig(), taehv.init),
}
LARGEST = ("14B", "UMT5-XXL")  # some ten seconds of zeros


@pytest.mark.parametrize("layout", ["original", "diffusers"])
@pytest.mark.parametrize(
  "name", [pytest.param(n, marks=pytest.mark.slow) if n in LARGEST else n for n in MODELS]
)
def test_every_tensor_goes_there_and_back(name, layout):
  kind, config, init = MODELS[name]
  rules = layouts.key_map(kind, config, layout)
  tree = view_published(
    {rule.name: np.broadcast_to(np.zeros((), np.int8), rule.shape) for rule in rules}, rules, name
  )
  expected = jax.eval_shape(lambda: init(config, jax.random.key(0)))
  assert jax.tree.map(lambda leaf: leaf.shape, tree) == jax.tree.map(
    lambda leaf: leaf.shape, expected
  )
  back = {tensor: array.shape for tensor, array in iterate_published(tree, rules, name)}
  assert back == {rule.name: rule.shape for rule in rules}
