"""The kinds of networks: `model.kind` of an experiment.

A new kind is a class with the fields that an experiment chooses (`dtype` among them, which commands
may replace), whose `network(channels, text_dim, places)` returns a models.frames.Network, and a
line here; places: see dit.DiTConfig. Its weights are converted under a kind of checkpoints.weights.
The first is what a config without `kind` means.
"""

from hiar_jax.models.dit import ModelConfig

NETWORKS: dict[str, type] = {
  "dit": ModelConfig,
}
