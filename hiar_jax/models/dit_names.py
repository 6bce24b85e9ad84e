"""The DiT's tensors in published files: Wan2.1's original names."""

import numpy as np

from hiar_jax.models.dit import DiTConfig
from hiar_jax.models.published_names import Rule

_OUTER = {
  "text_embedding.0": "text_embedding_in",
  "text_embedding.2": "text_embedding_out",
  "time_embedding.0": "time_embedding_in",
  "time_embedding.2": "time_embedding_out",
  "time_projection.1": "time_projection",
  "head.head": "head",
}
_ATTENTIONS = {"self_attn": "self_attention", "cross_attn": "text_attention"}


def dit_rules(config: DiTConfig) -> list[Rule]:
  """One rule per published tensor, in the order of the network. Layers are stacked on a leading axis here."""
  d, text, freq = config.dim, config.text_dim, config.freq_dim
  ends = {
    "text_embedding.0": (d, text), "text_embedding.2": (d, d), "time_embedding.0": (d, freq), "time_embedding.2": (d, d),
    "time_projection.1": (6 * d, d), "head.head": (int(np.prod(config.patch)) * config.channels, d),
  }  # fmt: skip
  patch = (d, config.channels, *config.patch)
  rules = [
    Rule("patch_embedding.weight", patch, ("patch_embedding", "kernel"), "patches"),
    Rule("patch_embedding.bias", (d,), ("patch_embedding", "bias")),
  ]
  for name, shape in ends.items():
    rules += _linear(name, shape, (_OUTER[name],))
  for layer in range(config.num_layers):
    rules += _layer_rules(config, layer)
  return [*rules, Rule("head.modulation", (1, 2, d), ("head_modulation",))]


def _layer_rules(config: DiTConfig, layer: int) -> list[Rule]:
  d, stem = config.dim, f"blocks.{layer}"
  rules = [
    Rule(f"{stem}.modulation", (1, 6, d), ("layers", "modulation"), layer=layer),
    Rule(f"{stem}.norm3.weight", (d,), ("layers", "norm_text", "scale"), layer=layer),
    Rule(f"{stem}.norm3.bias", (d,), ("layers", "norm_text", "bias"), layer=layer),
  ]
  for theirs, ours in _ATTENTIONS.items():
    for p in "qkvo":
      rules += _linear(f"{stem}.{theirs}.{p}", (d, d), ("layers", ours, p), layer)
    for p in "qk":
      path = ("layers", ours, f"norm_{p}", "scale")
      rules.append(Rule(f"{stem}.{theirs}.norm_{p}.weight", (d,), path, layer=layer))
  rules += _linear(f"{stem}.ffn.0", (config.ffn_dim, d), ("layers", "mlp_in"), layer)
  return rules + _linear(f"{stem}.ffn.2", (d, config.ffn_dim), ("layers", "mlp_out"), layer)


def _linear(name: str, shape: tuple[int, int], path: tuple[str, ...], layer: int | None = None) -> list[Rule]:
  return [
    Rule(f"{name}.weight", shape, (*path, "kernel"), "linear", layer),
    Rule(f"{name}.bias", shape[:1], (*path, "bias"), layer=layer),
  ]
