"""The small worlds' autoencoder: principal components of image patches. Linear, frozen, fitted once
on the data.

A frame is cut into patches of `patch` x `patch` pixels; each becomes `channels` numbers: its
leading principal components, divided by `scale` so that latents have the size that the noise has.
It stands where Wan's VAE stands (one latent frame per frame here).
"""

import dataclasses
import io
import pathlib

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from hiar_jax.errors import UserError, at_least
from hiar_jax.files import write_atomic
from hiar_jax.types import Pixels, Video, typed


@dataclasses.dataclass(frozen=True)
class PatchPCAConfig:
  """patch: pixels a side; channels: components kept; whitening: 0 keeps their variances' ratios, 1
  makes them all equal.
  """

  kind: str = "patches"
  patch: int = 8
  channels: int = 32
  whitening: float = 0.5

  def __post_init__(self):
    at_least(1, patch=self.patch, channels=self.channels)
    if self.channels > self.patch**2 * 3:
      raise UserError(
        f"codec.channels = {self.channels}: a patch of {self.patch} x {self.patch} pixels has "
        f"{self.patch**2 * 3} numbers"
      )

  @property
  def spatial_factor(self) -> int:
    """Pixels per latent pixel, each way."""
    return self.patch

  @property
  def temporal_factor(self) -> int:
    """Frames per latent frame."""
    return 1


@flax.struct.dataclass
class PatchPCA:
  """mean [p], basis [p, c] orthonormal, scale [c] with p = patch * patch * 3."""

  mean: jax.Array
  basis: jax.Array
  scale: jax.Array
  patch: int = flax.struct.field(pytree_node=False, default=8)


def patches(video: jax.Array, patch: int) -> jax.Array:
  """[b f H W 3] -> [b f h w p]."""
  b, f, height, width, c = video.shape
  grid = video.reshape(b, f, height // patch, patch, width // patch, patch, c)
  return grid.transpose(0, 1, 2, 4, 3, 5, 6).reshape(b, f, height // patch, width // patch, -1)


def fit(videos: np.ndarray, config: PatchPCAConfig) -> PatchPCA:
  """Principal components of the patches of videos [n f H W 3] in [-1, 1]; float64 inside, signs
  fixed.
  """
  rows = patches(videos, config.patch).reshape(-1, config.patch**2 * 3).astype(np.float64)
  mean = rows.mean(0)
  covariance = (rows - mean).T @ (rows - mean) / len(rows)
  variances, vectors = np.linalg.eigh(covariance)
  variances, basis = variances[::-1][: config.channels], vectors[:, ::-1][:, : config.channels]
  basis = basis * np.sign(basis[np.abs(basis).argmax(0), np.arange(basis.shape[1])])
  scale = np.maximum(variances, 1e-8) ** (config.whitening / 2)
  # mean variance of a latent number: 1
  scale = scale * np.sqrt(max((variances / scale**2).mean(), 1e-6))
  return PatchPCA(*(jnp.asarray(x, jnp.float32) for x in (mean, basis, scale)), patch=config.patch)


@typed
def encode(codec: PatchPCA, video: Pixels) -> Video:
  """Pixels [b f H W 3] in [-1, 1] -> latents [b f h w c]."""
  rows = patches(video, codec.patch)
  return (
    (rows - codec.mean.reshape(1, 1, 1, 1, -1)) @ codec.basis / codec.scale.reshape(1, 1, 1, 1, -1)
  )


@typed
def decode(codec: PatchPCA, latents: Video) -> Pixels:
  """Latents [b f h w c] -> pixels [b f H W 3], not clipped."""
  b, f, h, w, _ = latents.shape
  rows = (latents * codec.scale.reshape(1, 1, 1, 1, -1)) @ codec.basis.T + codec.mean.reshape(
    1, 1, 1, 1, -1
  )
  grid = rows.reshape(b, f, h, w, codec.patch, codec.patch, 3).transpose(0, 1, 2, 4, 3, 5, 6)
  return grid.reshape(b, f, h * codec.patch, w * codec.patch, 3)


def to_unit(video: jax.Array) -> jax.Array:
  """uint8 -> [-1, 1]."""
  return video.astype(jnp.float32) / 127.5 - 1.0


def to_uint8(video) -> np.ndarray:
  """[-1, 1] -> uint8, rounded and clipped."""
  return np.clip(np.rint((np.asarray(video) + 1) * 127.5), 0, 255).astype(np.uint8)


def save(path: pathlib.Path, codec: PatchPCA) -> None:
  """Atomically."""
  buffer = io.BytesIO()
  np.savez(buffer, mean=codec.mean, basis=codec.basis, scale=codec.scale, patch=codec.patch)
  write_atomic(path, buffer.getvalue())


def load(path: pathlib.Path) -> PatchPCA:
  if not path.exists():
    raise UserError(f"{path} is missing: the data stage fits it; run the training command first")
  with np.load(path) as stored:
    arrays = {name: stored[name] for name in stored.files}
  return PatchPCA(arrays["mean"], arrays["basis"], arrays["scale"], patch=int(arrays["patch"]))
