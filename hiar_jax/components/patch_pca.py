"""The autoencoder of the small worlds: principal components of image patches, fitted on the data.

A frame is cut into patches of `patch` x `patch` pixels, p = patch * patch * 3 numbers each:

    z = (x - mean) basis / scale,   x = (z * scale) basis^T + mean

`basis` [p c] holds the c leading principal components, `scale` [c] brings the latents to about the
variance of the noise. Linear and frozen; one latent frame per frame. It takes the role of Wan's
VAE. Lapped, patches are cut from filtered frames, and overlap (components.lapped_transform).
"""

from collections.abc import Callable, Iterator
import dataclasses
import functools
import io
import pathlib

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from hiar_jax.components import lapped_transform
from hiar_jax.components.block_decoder import FramewiseDecoder
from hiar_jax.components.interfaces import AutoencoderConfig
from hiar_jax.errors import Damaged, UserError, at_least
from hiar_jax.files import reading, write_atomic
from hiar_jax.types import Pixels, Video, typed
from hiar_jax.video.frames import to_float, to_uint8

FILE = "codec.npz"  # in the data's directory
FIT_NUMBERS = 2**27  # of clips to fit on: more no longer change the components


@dataclasses.dataclass(frozen=True)
class PatchPCAConfig(AutoencoderConfig):
  """patch: pixels a side; channels: components kept; whitening: from 0 to 1, the latents' variances
  are the components' to the power 1 - whitening (0 keeps their ratios, 1 makes them equal). lapped:
  no seams between patches, for real footage.
  """

  kind: str = "patches"
  patch: int = 8
  channels: int = 32
  whitening: float = 0.5
  lapped: bool = dataclasses.field(default=False, metadata={"since": "2026-11"})
  fitted = True
  fitted_files = (FILE,)
  temporal_factor = 1

  def __post_init__(self):
    at_least(1, patch=self.patch, channels=self.channels)
    if self.lapped:
      lapped_transform.check(self.patch)
    if self.channels > self.patch**2 * 3:
      raise UserError(
        f"codec.channels = {self.channels}: a patch of {self.patch} x {self.patch} pixels has "
        f"{self.patch**2 * 3} numbers"
      )

  @property
  def spatial_factor(self) -> int:
    return self.patch

  def fit(self, directory: pathlib.Path, clips: Callable[[], np.ndarray]) -> None:
    if not (directory / FILE).exists():
      given = clips()
      count = min(len(given), max(1, FIT_NUMBERS // given[0].size))
      rows = [i * len(given) // count for i in range(count)]
      save(directory / FILE, fit(given[rows], self))

  def open(self, directory: pathlib.Path) -> "PatchPCA":
    path = directory / FILE
    if not path.exists():
      raise UserError(f"{path} is missing: the data stage fits it; run the training command first")
    advice = "remove it: the data stage fits it anew"
    # read whole: numpy leaves a file open that is no archive
    with reading(path, advice), np.load(io.BytesIO(path.read_bytes())) as stored:
      arrays = {name: stored[name] for name in stored.files}
      numbers = [np.asarray(arrays[name], np.float32) for name in ("mean", "basis", "scale")]
      patch = int(arrays["patch"])
      lapped = bool(arrays.get("lapped", False))  # earlier files do not say
    p, c = 3 * patch**2, numbers[2].size
    if [array.shape for array in numbers] != [(p,), (p, c), (c,)]:
      raise Damaged(path, f"shapes that are not those of patches of {patch}", advice)
    if not all(np.isfinite(array).all() for array in numbers):
      raise Damaged(path, "numbers that are not finite", advice)
    return PatchPCA(*numbers, patch=patch, lapped=lapped)


@flax.struct.dataclass
class PatchPCA:
  """An `Autoencoder`: mean [p], basis [p c] orthonormal, scale [c] with p = patch * patch * 3."""

  mean: jax.Array
  basis: jax.Array
  scale: jax.Array
  patch: int = flax.struct.field(pytree_node=False, default=8)
  lapped: bool = flax.struct.field(pytree_node=False, default=False)
  identity = ""  # the run's config says on what it is fitted

  @functools.cached_property
  def encode(self) -> Callable[[jax.Array], Video]:
    # the codec by closure: as constants, its numbers are folded into the program
    return jax.jit(lambda video: encode(self, to_unit(video)))

  def latents(self, video: np.ndarray) -> np.ndarray:
    return np.asarray(encode(self, to_unit(video)))

  def pieces(self, latents) -> Iterator[np.ndarray]:
    # one piece: a small world's whole video fits into memory
    yield to_uint8(_decode(self, latents))

  def block_decoder(self, device: jax.Device | None = None) -> FramewiseDecoder:
    return FramewiseDecoder(self.pieces)  # wherever it is: a few numbers a frame


def patches(video: jax.Array, patch: int) -> jax.Array:
  """Cuts frames into patches: [b f H W 3] -> [b f h w p]."""
  b, f, height, width, c = video.shape
  # [b f h i w j c], (i, j) the pixel within its patch -> [b f h w i j c] -> p = (i, j, c) flattened
  grid = video.reshape(b, f, height // patch, patch, width // patch, patch, c)
  return grid.transpose(0, 1, 2, 4, 3, 5, 6).reshape(b, f, height // patch, width // patch, -1)


def fit(videos: np.ndarray, config: PatchPCAConfig) -> PatchPCA:
  """Fits the components to the patches of videos [n f H W 3], uint8 or in [-1, 1].

  Two passes, clip by clip: memory for the patches of one, whatever their number.
  """

  def rows(video: np.ndarray) -> np.ndarray:
    # float64: in float32 the small eigenvalues drown in the covariance's rounding
    frames = to_float(video)[None]
    if config.lapped:
      frames = lapped_transform.forward(frames, config.patch)
    cut = patches(frames, config.patch)
    return cut.reshape(-1, config.patch**2 * 3).astype(np.float64)

  count = sum(len(rows(video)) for video in videos)
  mean = sum(rows(video).sum(0) for video in videos) / count
  covariance = sum((x := rows(video) - mean).T @ x for video in videos) / count
  variances, vectors = np.linalg.eigh(covariance)  # ascending; the columns are the vectors
  variances = variances[::-1][: config.channels]
  basis = vectors[:, ::-1][:, : config.channels]
  # eigh leaves the signs open: each component's largest entry is made positive
  basis = basis * np.sign(basis[np.abs(basis).argmax(0), np.arange(basis.shape[1])])
  # lower bounds 1e-8, 1e-6: components without variance (plain backgrounds) divide by no zero
  scale = np.maximum(variances, 1e-8) ** (config.whitening / 2)
  # mean variance of a latent number: 1
  scale = scale * np.sqrt(max((variances / scale**2).mean(), 1e-6))
  numbers = (jnp.asarray(x, jnp.float32) for x in (mean, basis, scale))
  return PatchPCA(*numbers, patch=config.patch, lapped=config.lapped)


@typed
def encode(codec: PatchPCA, video: Pixels) -> Video:
  """Encodes pixels [b f H W 3] in [-1, 1] into latents [b f h w c]."""
  if codec.lapped:
    video = lapped_transform.forward(video, codec.patch)
  centred = patches(video, codec.patch) - codec.mean.reshape(1, 1, 1, 1, -1)
  return centred @ codec.basis / codec.scale.reshape(1, 1, 1, 1, -1)


@typed
def decode(codec: PatchPCA, latents: Video) -> Pixels:
  """Decodes latents [b f h w c] into pixels [b f H W 3], not clipped."""
  b, f, h, w, _ = latents.shape
  rows = (latents * codec.scale.reshape(1, 1, 1, 1, -1)) @ codec.basis.T
  rows = rows + codec.mean.reshape(1, 1, 1, 1, -1)
  # the inverse of `patches`: [b f h w i j c] -> [b f h i w j c]
  grid = rows.reshape(b, f, h, w, codec.patch, codec.patch, 3).transpose(0, 1, 2, 4, 3, 5, 6)
  video = grid.reshape(b, f, h * codec.patch, w * codec.patch, 3)
  return lapped_transform.inverse(video, codec.patch) if codec.lapped else video


_decode = jax.jit(decode)


def to_unit(video: jax.Array) -> jax.Array:
  """uint8 -> float32 in [-1, 1], of any shape."""
  return video.astype(jnp.float32) / 127.5 - 1.0


def save(path: pathlib.Path, codec: PatchPCA) -> None:
  """Writes an .npz file, atomically."""
  buffer = io.BytesIO()
  numbers = {"mean": codec.mean, "basis": codec.basis, "scale": codec.scale}
  lapped = {"lapped": True} if codec.lapped else {}
  np.savez(buffer, **numbers, patch=codec.patch, **lapped)
  write_atomic(path, buffer.getvalue())
