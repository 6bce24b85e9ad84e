"""The UMT5 encoder's tensors in published files: Wan2.1's (`models_t5_*.pth`) and transformers' (`text_encoder/`)."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from hiar_jax.errors import UserError
from hiar_jax.models.published_names import Rule, from_published, to_published
from hiar_jax.models.umt5 import UMT5Config
from hiar_jax.types import Params

LAYOUTS = ("original", "diffusers")


def umt5_rules(config: UMT5Config, layout: str = "original") -> list[Rule]:
  """One rule per published tensor. layout: "original" (Wan2.1's names) or "diffusers" (transformers' UMT5EncoderModel).

  Transformers ties `encoder.embed_tokens.weight` to `shared.weight` and saves the latter alone; so do these rules.
  """
  if layout not in LAYOUTS:
    raise UserError(f"UMT5: unknown layout {layout!r}; expected one of {', '.join(LAYOUTS)}.")
  here = 0 if layout == "original" else 1
  cfg = config
  layer_parts = (  # original name, transformers' name, published shape, path here, kind
    ("norm1", "layer.0.layer_norm", (cfg.dim,), ("norm_attention", "scale"), "same"),
    ("attn.q", "layer.0.SelfAttention.q", (cfg.dim_attn, cfg.dim), ("attention", "q", "kernel"), "linear"),
    ("attn.k", "layer.0.SelfAttention.k", (cfg.dim_attn, cfg.dim), ("attention", "k", "kernel"), "linear"),
    ("attn.v", "layer.0.SelfAttention.v", (cfg.dim_attn, cfg.dim), ("attention", "v", "kernel"), "linear"),
    ("attn.o", "layer.0.SelfAttention.o", (cfg.dim, cfg.dim_attn), ("attention", "o", "kernel"), "linear"),
    (
      "pos_embedding.embedding", "layer.0.SelfAttention.relative_attention_bias",
      (cfg.num_buckets, cfg.num_heads), ("attention", "distance"), "same",
    ),
    ("norm2", "layer.1.layer_norm", (cfg.dim,), ("norm_ffn", "scale"), "same"),
    ("ffn.gate.0", "layer.1.DenseReluDense.wi_0", (cfg.dim_ffn, cfg.dim), ("ffn", "gate", "kernel"), "linear"),
    ("ffn.fc1", "layer.1.DenseReluDense.wi_1", (cfg.dim_ffn, cfg.dim), ("ffn", "up", "kernel"), "linear"),
    ("ffn.fc2", "layer.1.DenseReluDense.wo", (cfg.dim, cfg.dim_ffn), ("ffn", "down", "kernel"), "linear"),
  )  # fmt: skip
  embed, stem, norm = (
    ("token_embedding", "blocks", "norm") if here == 0 else ("shared", "encoder.block", "encoder.final_layer_norm")
  )
  rules = [Rule(f"{embed}.weight", (cfg.vocab, cfg.dim), ("embed", "embedding"))]
  for layer in range(cfg.num_layers):
    for *names, shape, path, kind in layer_parts:
      rules.append(Rule(f"{stem}.{layer}.{names[here]}.weight", shape, ("layers", *path), kind, layer))
  return [*rules, Rule(f"{norm}.weight", (cfg.dim,), ("norm", "scale"))]


def umt5_params_from_published(named: Mapping[str, Any], config: UMT5Config, layout: str = "original") -> Params:
  """Parameters from named tensors; raises UserError where names or shapes do not fit the config."""
  return from_published(named, umt5_rules(config, layout), f"UMT5 ({layout} names)")


def umt5_params_to_published(params: Params, config: UMT5Config, layout: str = "original") -> dict[str, np.ndarray]:
  """Named tensors of parameters; the exact inverse of `umt5_params_from_published`."""
  return to_published(params, umt5_rules(config, layout), f"UMT5 ({layout} names)")
