"""Features and norms of the diffusion transformer (models.dit)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

PLACE_PERIODS = (4.0, 8.0, 16.0, 32.0, 64.0, 128.0)  # in tokens, for the frame in frames


def time_features(timestep: jax.Array, width: int) -> jax.Array:
  """Returns sinusoids [..., width] of a timestep in [0, 1000], cosines first, as Wan2.1."""
  half = width // 2
  frequencies = jnp.asarray(10_000.0 ** (-np.arange(half) / half), jnp.float32)
  timestep = timestep[..., None].astype(jnp.float32)
  angles = timestep * along_last_axis(frequencies, timestep)
  return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def place_features(
  frames: jax.Array, rows: int, columns: int, places: tuple[int, int]
) -> jax.Array:
  """Returns sinusoids of a token's frame, row and column.

  frames: [b f] indices; places: see DiTConfig. Returns [b f rows*columns 6*len(PLACE_PERIODS)].
  """

  def waves(count: int) -> jax.Array:  # [count 2*len(PLACE_PERIODS)]
    angles = 2 * np.pi * np.arange(count)[:, None] / np.asarray(PLACE_PERIODS)
    return jnp.asarray(np.concatenate([np.cos(angles), np.sin(angles)], axis=-1), jnp.float32)

  # the first n frames have rows of their own in the table; later ones share `period` rows
  first, period = places
  time = waves(first + period)[jnp.where(frames < first, frames, first + (frames - first) % period)]
  parts = time[:, :, None, None], waves(rows)[None, None, :, None], waves(columns)[None, None, None]
  shape = (*frames.shape, rows, columns, 2 * len(PLACE_PERIODS))
  return jnp.concatenate([jnp.broadcast_to(part, shape) for part in parts], axis=-1).reshape(
    *frames.shape, rows * columns, -1
  )


def layer_norm(x: jax.Array, eps: float) -> jax.Array:
  """Normalises the last axis without scale or bias; computes and returns float32."""
  x = x.astype(jnp.float32)
  x = x - x.mean(-1, keepdims=True)
  return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + eps)


class RMSNorm(nn.Module):
  """RMS norm over the whole model width, before heads are split, as Wan2.1 does for q and k."""

  eps: float

  @nn.compact
  def __call__(self, x):
    scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt((x32 * x32).mean(-1, keepdims=True) + self.eps)
    return (normed * along_last_axis(scale, x)).astype(x.dtype)


def along_last_axis(vector: jax.Array, like: jax.Array) -> jax.Array:
  """Gives a vector explicit leading axes, so that it broadcasts over the last axis of `like`."""
  return vector.reshape((1,) * (like.ndim - 1) + vector.shape)
