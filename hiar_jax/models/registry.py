"""The kinds of networks: those that an experiment trains, and those whose weights are kept.

NETWORKS: `model.kind` of an experiment. A new kind is a class with the fields that an experiment
chooses (`dtype` among them, which commands may replace), whose `network(channels, text_dim,
places)` returns a models.frames.Network, and a line here; places: see dit.DiTConfig. The first is
what a config without `kind` means.

WEIGHTS: kinds of weights, the folders of a weights directory (checkpoints.weights), each with the
config of its network. That of a kind in NETWORKS has the same name.
"""

from hiar_jax.models.dit import DiTConfig, ModelConfig
from hiar_jax.models.taehv import TinyVAEConfig
from hiar_jax.models.umt5 import UMT5Config
from hiar_jax.models.vae import VAEConfig

NETWORKS: dict[str, type] = {
  "dit": ModelConfig,
}

WEIGHTS: dict[str, type] = {
  "dit": DiTConfig,
  "vae": VAEConfig,
  "umt5": UMT5Config,
  "tiny_vae": TinyVAEConfig,
}
