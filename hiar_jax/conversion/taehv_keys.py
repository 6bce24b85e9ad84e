"""The tiny autoencoder's tensors in published files (`taew2_1.pth`, `taew2_1.safetensors`), as
rules.

The published halves are lists of layers, and a tensor is named by its layer's place in them; layers
without weights count too.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from hiar_jax.conversion.key_maps import TensorMapping, from_published, to_published
from hiar_jax.models.taehv import TinyVAEConfig
from hiar_jax.types import Params

_WHAT = "tiny VAE (TAEHV's names)"


def _conv(
  name: str, fan_in: int, width: int, path: tuple[str, ...], bias: bool = True
) -> list[TensorMapping]:
  rules = [TensorMapping(f"{name}.weight", (width, fan_in, 3, 3), (*path, "kernel"), "conv")]
  return [*rules, TensorMapping(f"{name}.bias", (width,), (*path, "bias"))] if bias else rules


def _pointwise(name: str, fan_in: int, width: int, path: tuple[str, ...]) -> list[TensorMapping]:
  return [TensorMapping(f"{name}.weight", (width, fan_in, 1, 1), (*path, "kernel"), "linear")]


def _memory(half: str, first: int, stage: int, width: int, blocks: int) -> list[TensorMapping]:
  rules = []
  for j in range(blocks):
    for i in range(3):
      name, path = f"{half}.{first + j}.conv.{2 * i}", (half, f"memory_{stage}_{j}", f"conv_{i}")
      rules += _conv(name, 2 * width if i == 0 else width, width, path)
  return rules


def _encoder(config: TinyVAEConfig) -> list[TensorMapping]:
  width, place = config.encoder_width, 2  # after the first convolution and its ReLU
  rules = _conv("encoder.0", 3, width, ("encoder", "conv_in"))
  for stage, time in enumerate(config.temporal_downsample):
    rules += _pointwise(
      f"encoder.{place}.conv",
      width * (2 if time else 1),
      width,
      ("encoder", f"down_{stage}", "pool"),
    )
    rules += _conv(
      f"encoder.{place + 1}", width, width, ("encoder", f"down_{stage}", "conv"), bias=False
    )
    rules += _memory("encoder", place + 2, stage, width, config.blocks)
    place += 2 + config.blocks
  return rules + _conv(f"encoder.{place}", width, config.z_dim, ("encoder", "conv_out"))


def _decoder(config: TinyVAEConfig) -> list[TensorMapping]:
  widths, place = config.decoder_widths, 3  # after the clamp, the first convolution and its ReLU
  rules = _conv("decoder.1", config.z_dim, widths[0], ("decoder", "conv_in"))
  for stage, time in enumerate(config.temporal_upsample):
    rules += _memory("decoder", place, stage, widths[stage], config.blocks)
    place += config.blocks + 1  # the upsampling has no weights
    path = ("decoder", f"up_{stage}")
    rules += _pointwise(
      f"decoder.{place}.conv", widths[stage], widths[stage] * (2 if time else 1), (*path, "grow")
    )
    rules += _conv(
      f"decoder.{place + 1}", widths[stage], widths[stage + 1], (*path, "conv"), bias=False
    )
    place += 2
  # after a ReLU
  return rules + _conv(f"decoder.{place + 1}", widths[-1], 3, ("decoder", "conv_out"))


def tiny_vae_rules(config: TinyVAEConfig) -> list[TensorMapping]:
  """One rule per published tensor."""
  return [*_encoder(config), *_decoder(config)]


def tiny_vae_params_from_published(named: Mapping[str, Any], config: TinyVAEConfig) -> Params:
  """Parameters from named tensors; raises UserError where names or shapes do not fit the config."""
  return from_published(named, tiny_vae_rules(config), _WHAT)


def tiny_vae_params_to_published(params: Params, config: TinyVAEConfig) -> dict[str, np.ndarray]:
  """Named tensors of parameters; the exact inverse of `tiny_vae_params_from_published`."""
  return to_published(params, tiny_vae_rules(config), _WHAT)
