"""Layers of Wan2.1's causal video autoencoder (models.vae), for a video that comes in pieces.

Every layer is `(x, past) -> (y, past)`: x holds the next frames [b f h w c], `past` what the layer
needs of the frames before (an array, a dict, or None where it needs nothing). `past=None` on the
way in is the start of a video: causal convolutions then see zeros, and the temporal resamplers
treat the first frame as the published model does.
"""

from collections.abc import Sequence
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Past = Any  # None, an array or a dict of pasts

SPATIAL = ((1, 1), (1, 1))  # padding that keeps height and width under a kernel of 3


def chain(
  layers: Sequence[nn.Module], x: jax.Array, past: Past
) -> tuple[jax.Array, dict[str, Past]]:
  """Runs named layers one after another; returns y and the pasts by name."""
  new = {}
  for layer in layers:
    x, new[layer.name] = layer(x, None if past is None else past[layer.name])
  return x, new


class RMSNorm(nn.Module):
  """x / |x| * sqrt(c) * gamma over channels, in float32 whatever the dtype of x."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    gamma = self.param("gamma", nn.initializers.ones, (x.shape[-1],))
    x32 = x.astype(jnp.float32)
    # published as F.normalize * sqrt(c), whose floor of the norm is 1e-12
    norm = jnp.sqrt(jnp.sum(jnp.square(x32), axis=-1, keepdims=True))
    x32 = x32 / jnp.maximum(norm, 1e-12) * math.sqrt(x.shape[-1])
    return (x32 * jnp.expand_dims(gamma.astype(jnp.float32), range(x.ndim - 1))).astype(x.dtype)


class CausalConv(nn.Module):
  """3x3x3 convolution over its own frame and the two before.

  past: those two, [b 2 h w c].
  """

  features: int
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, past: Past) -> tuple[jax.Array, Past]:
    if past is None:
      past = jnp.zeros((x.shape[0], 2, *x.shape[2:]), x.dtype)
    x = jnp.concatenate([past, x], axis=1)
    y = nn.Conv(
      self.features, (3, 3, 3), padding=((0, 0), *SPATIAL), dtype=self.dtype, name="conv"
    )(x)
    return y, x[:, -2:]


class NormConv(nn.Module):
  """Norm, SiLU, causal convolution: half of a residual block, and the head of both networks."""

  features: int
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, past: Past) -> tuple[jax.Array, Past]:
    x = jax.nn.silu(RMSNorm(name="norm")(x))
    return CausalConv(self.features, self.dtype, name="causal")(x, past)


class ResBlock(nn.Module):
  """x + two NormConv; a pointwise map on the shortcut where the width changes."""

  features: int
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, past: Past) -> tuple[jax.Array, Past]:
    halves = [NormConv(self.features, self.dtype, name=f"half_{i}") for i in (0, 1)]
    y, past = chain(halves, x, past)
    if x.shape[-1] != self.features:
      x = nn.Dense(self.features, dtype=self.dtype, name="shortcut")(x)
    return x + y, past


class FrameAttention(nn.Module):
  """Self-attention among the pixels of each frame, with one head; no past."""

  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, past: Past) -> tuple[jax.Array, Past]:
    b, f, h, w, c = x.shape
    qkv = nn.Dense(3 * c, dtype=self.dtype, name="qkv")(RMSNorm(name="norm")(x))
    # frames are batch entries: [b*f h*w 1 3c]
    q, k, v = jnp.split(qkv.reshape(b * f, h * w, 1, 3 * c), 3, axis=-1)
    y = jax.nn.dot_product_attention(q, k, v).reshape(x.shape)
    return x + nn.Dense(c, dtype=self.dtype, name="out")(y), None


class Downsample(nn.Module):
  """Halves height and width; with `time` also the frame rate, after a video's first frame.

  past (with `time`): the last frame, [b 1 h/2 w/2 c].
  """

  time: bool
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, past: Past) -> tuple[jax.Array, Past]:
    c = x.shape[-1]
    # published: a zero row below and a zero column to the right, none above and left
    x = nn.Conv(c, (3, 3), strides=2, padding=((0, 1), (0, 1)), dtype=self.dtype, name="conv")(x)
    if not self.time:
      return x, None
    merge = nn.Conv(
      c, (3, 1, 1), strides=(2, 1, 1), padding="VALID", dtype=self.dtype, name="time_conv"
    )
    # windows of 3 frames with stride 2: the last frame before each pair, then the pair
    if past is not None:
      return merge(jnp.concatenate([past, x], axis=1)), x[:, -1:]
    y = jnp.concatenate([x[:, :1], merge(x)], axis=1) if x.shape[1] > 1 else x
    return y, x[:, -1:]


class Upsample(nn.Module):
  """Doubles height and width, halves the channels; with `time` doubles frames after the first.

  past (with `time`): the last two frames, [b 2 h w c]; a video's first frame is zeros there.
  """

  time: bool
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, past: Past) -> tuple[jax.Array, Past]:
    b, _, h, w, c = x.shape
    if self.time:
      first = x[:, :0]
      if past is None:  # the first frame of a video passes unchanged, and the second sees zeros
        first, x = x[:, :1], x[:, 1:]
        past = jnp.zeros((b, 2, h, w, c), x.dtype)
      frames, f = jnp.concatenate([past, x], axis=1), x.shape[1]
      past = frames[:, -2:]
      x = first
      if f:
        y = nn.Conv(2 * c, (3, 1, 1), padding="VALID", dtype=self.dtype, name="time_conv")(frames)
        # the halves of the channels are two frames: [b f h w 2 c] -> [b f 2 h w c]
        y = y.reshape(b, f, h, w, 2, c).transpose(0, 1, 4, 2, 3, 5)
        x = jnp.concatenate([first, y.reshape(b, 2 * f, h, w, c)], axis=1)
    x = jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3)  # nearest neighbour
    x = nn.Conv(c // 2, (3, 3), padding=SPATIAL, dtype=self.dtype, name="conv")(x)
    return x, past
