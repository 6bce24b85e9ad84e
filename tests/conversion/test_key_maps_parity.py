"""The peers' own lists of tensors at the published sizes, on torch's meta device, which allocates
nothing.

Needs the extra `[parity]` (torch, diffusers, transformers).
"""

import pytest

from hiar_jax.conversion import catalog
from hiar_jax.conversion.dit_keys import dit_key_map
from hiar_jax.conversion.umt5_keys import umt5_key_map
from hiar_jax.conversion.vae_keys import vae_key_map
from hiar_jax.models import dit, umt5, vae

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]  # peers may warn

LARGE = dit.DiTConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)
SIZES = {
  "1.3B": ("dit", dit.DiTConfig(), dit_key_map),
  "14B": ("dit", LARGE, dit_key_map),
  "VAE": ("vae", vae.VAEConfig(), vae_key_map),
  "UMT5-XXL": ("umt5", umt5.UMT5Config(), umt5_key_map),
}


def _peer(kind: str, sizes: dict):
  """The peer's model of a config.json that is written here."""
  import diffusers
  import transformers

  if kind == "umt5":
    return transformers.UMT5EncoderModel(transformers.UMT5Config.from_dict(sizes))
  cls = {"dit": diffusers.WanTransformer3DModel, "vae": diffusers.AutoencoderKLWan}[kind]
  return cls.from_config(sizes)


@pytest.mark.parametrize("name", SIZES)
def test_names_and_shapes_at_the_published_sizes(name):
  import torch

  kind, config, rules = SIZES[name]
  with torch.device("meta"):
    peer = _peer(kind, catalog.model_config(kind, config, "diffusers"))
  theirs = {tensor: tuple(value.shape) for tensor, value in peer.state_dict().items()}
  theirs.pop("encoder.embed_tokens.weight", None)  # tied to shared.weight, which alone is saved
  assert theirs == {rule.name: rule.shape for rule in rules(config, "diffusers")}
