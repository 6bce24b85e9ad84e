"""Contents of the config.json files that other tools read beside exported weights.

The field names and values are those of Wan2.1's original release, diffusers and transformers.
"""

from typing import Any

from hiar_jax.models.dit import DiTConfig
from hiar_jax.models.rope import THETA, split_pairs
from hiar_jax.models.umt5 import UMT5Config
from hiar_jax.models.vae import VAEConfig

DIFFUSERS = "0.33.0"  # the first version with Wan2.1

# The scheduler of diffusers' published Wan2.1 pipelines; 3.0 is their shift for 480p.
SCHEDULER = {
  "_class_name": "UniPCMultistepScheduler",
  "_diffusers_version": DIFFUSERS,
  "num_train_timesteps": 1000,
  "prediction_type": "flow_prediction",
  "use_flow_sigmas": True,
  "flow_shift": 3.0,
  "solver_order": 2,
}
PIPELINE = {
  "_class_name": "WanPipeline",
  "_diffusers_version": DIFFUSERS,
  "scheduler": ["diffusers", "UniPCMultistepScheduler"],
  "text_encoder": ["transformers", "UMT5EncoderModel"],
  "tokenizer": ["transformers", "T5TokenizerFast"],
  "transformer": ["diffusers", "WanTransformer3DModel"],
  "vae": ["diffusers", "AutoencoderKLWan"],
}
# google/umt5-xxl's tokenizer; 512 is Wan2.1's text length.
TOKENIZER = {
  "tokenizer_class": "T5TokenizerFast",
  "model_max_length": 512,
  "pad_token": "<pad>",
  "eos_token": "</s>",
  "unk_token": "<unk>",
  "extra_ids": 0,
}


def model_config(kind: str, config: Any, layout: str) -> dict | None:
  """Returns the content of config.json, or None if the layout has none for this kind."""
  if kind == "dit":
    if config.packing:
      return _helios_transformer(config)
    return _wan_model(config) if layout == "original" else _wan_transformer(config)
  if layout == "original":
    return None
  return _autoencoder(config) if kind == "vae" else _umt5(config)


def _wan_model(config: DiTConfig) -> dict:
  return {
    "_class_name": "WanModel",
    "_diffusers_version": "0.30.0",  # as in Wan2.1's own config.json
    "model_type": "t2v",
    "text_len": 512,
    "dim": config.dim,
    "ffn_dim": config.ffn_dim,
    "freq_dim": config.freq_dim,
    "num_heads": config.num_heads,
    "num_layers": config.num_layers,
    "in_dim": config.channels,
    "out_dim": config.channels,
    "eps": config.eps,
  }


def _wan_transformer(config: DiTConfig) -> dict:
  return {
    "_class_name": "WanTransformer3DModel",
    "_diffusers_version": DIFFUSERS,
    "patch_size": list(config.patch),
    "num_attention_heads": config.num_heads,
    "attention_head_dim": config.head_dim,
    "in_channels": config.channels,
    "out_channels": config.channels,
    "text_dim": config.text_dim,
    "freq_dim": config.freq_dim,
    "ffn_dim": config.ffn_dim,
    "num_layers": config.num_layers,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": config.eps,
    "image_dim": None,
    "added_kv_proj_dim": None,
    "rope_max_seq_len": 1024,
  }


def _helios_transformer(config: DiTConfig) -> dict:
  """History at timestep 0 and without text, as Helios's own; groups of frames say so here, and no
  weight does.
  """
  fields = _wan_transformer(config)
  for wan_only in ("image_dim", "rope_max_seq_len"):
    del fields[wan_only]
  return {
    **fields,
    "_class_name": "HeliosTransformer3DModel",
    "rope_dim": [2 * pairs for pairs in split_pairs(config.head_dim)],
    "rope_theta": THETA,
    "guidance_cross_attn": True,
    "zero_history_timestep": True,
    "has_multi_term_memory_patch": True,
    "is_amplify_history": False,
  }


def _autoencoder(config: VAEConfig) -> dict:
  return {
    "_class_name": "AutoencoderKLWan",
    "_diffusers_version": DIFFUSERS,
    "base_dim": config.dim,
    "z_dim": config.z_dim,
    "dim_mult": list(config.dim_mult),
    "num_res_blocks": config.num_res_blocks,
    "attn_scales": [],
    "temperal_downsample": list(config.temporal_downsample),  # diffusers' spelling
    "dropout": 0.0,
    "latents_mean": list(config.latents_mean),
    "latents_std": list(config.latents_std),
  }


def _umt5(config: UMT5Config) -> dict:
  return {
    "architectures": ["UMT5EncoderModel"],
    "model_type": "umt5",
    "vocab_size": config.vocab,
    "d_model": config.dim,
    "d_kv": config.dim_attn // config.num_heads,
    "d_ff": config.dim_ffn,
    "num_layers": config.num_layers,
    "num_decoder_layers": config.num_layers,
    "num_heads": config.num_heads,
    "feed_forward_proj": "gated-gelu",
    "relative_attention_num_buckets": config.num_buckets,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "is_encoder_decoder": True,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
  }
