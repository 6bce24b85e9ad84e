"""Discretised history (FramePack, arXiv 2504.12626, v3): latents of the history are replaced by the
nearest centroids of a codebook.

The centroids are k-means of the clean latents of training clips. What a section reads of the past
is then one of a few vectors that clean data has, whatever errors the sections before it made: with
one centroid there is no drift and no memory, with ever more of them nothing changes. The paper
gives K-means over all latent pixels and

    Q(F)_p = argmin_k |F_p - C_k|,    F_p -> C_Q(F)_p                                      (Eq. 6)

for all history in training; that it also holds in sampling is implied, not stated. Nobody has
published code of it. What is packed is the result: pooling comes after it.
"""

from collections.abc import Callable
import dataclasses
import functools
import hashlib
import io
import os
import pathlib
import warnings

import jax
import jax.numpy as jnp
import numpy as np

from hiar_jax.errors import Damaged, UserError, at_least
from hiar_jax.files import reading, write_atomic
from hiar_jax.types import Array, Video

FILE = "codebook.npz"  # in the stage's directory
BATCH = 64  # clips encoded at once
SCORES = 2**24  # of vectors against centroids, held at once: 64 MiB
_ADVICE = "remove it and run the training command again, which fits it anew"


@dataclasses.dataclass(frozen=True)
class CodebookConfig:
  """How a codebook is fitted.

  centroids: the paper's Table 2 has 256; its text says that 128 already drift much less. unit:
  latent pixels a side of the square whose numbers are one vector; the paper clusters single latent
  pixels, of all channels. per_centroid: vectors of the data that are fitted on, for each centroid,
  and iterations of k-means: the paper gives neither; these are the defaults of the library faiss.
  """

  centroids: int = 256
  unit: int = 1
  per_centroid: int = 256
  iterations: int = 25

  def __post_init__(self):
    at_least(1, **dataclasses.asdict(self))

  def check(self, height: int, width: int) -> None:
    """Raises UserError where latents of height x width are not whole units."""
    if height % self.unit or width % self.unit:
      raise UserError(
        f"framepack.codebook.unit = {self.unit}: latents of {height} x {width} are not whole "
        "squares of it"
      )

  def fit(
    self,
    directory: pathlib.Path,
    clips: Callable[[], np.ndarray],
    encode: Callable[[np.ndarray], Video],
    seed,
  ) -> None:
    """Fits a codebook to the latents of clips and writes its file; does nothing where it is there.

    clips: returns [n ...]. encode: clips -> clean latents. seed: of numpy.random.default_rng.
    """
    if (directory / FILE).exists():
      return
    rng, given = np.random.default_rng(seed), clips()
    parts = np.array_split(given, -(-len(given) // BATCH))
    share = -(-self.centroids * self.per_centroid // len(parts))  # equally many of each
    drawn = []
    for part in parts:
      units = np.asarray(to_units(encode(part), self.unit))
      units = units.reshape(-1, units.shape[-1])
      drawn.append(units[rng.choice(len(units), min(share, len(units)), replace=False)])
    save(directory / FILE, Codebook(_fit(np.concatenate(drawn), self, rng), self.unit))

  def open(self, directory: pathlib.Path, channels: int) -> "Codebook":
    """Reads the codebook. Raises UserError, in one line, where it is missing, damaged or another's.

    channels: of a latent pixel.
    """
    path = directory / FILE
    if not path.exists():
      raise UserError(
        f"{path} is missing: discretised history (+D) needs the codebook that the codebook stage "
        "fits; run the training command first"
      )
    # read whole: numpy leaves a file open that is no archive
    with reading(path, _ADVICE), np.load(io.BytesIO(path.read_bytes())) as stored:
      found = Codebook(np.asarray(stored["centroids"], np.float32), int(stored["unit"]))
    wanted = (self.centroids, self.unit**2 * channels)
    if found.centroids.shape != wanted or found.unit != self.unit:
      reason = f"centroids {found.centroids.shape} of unit {found.unit}, not {wanted}"
      raise Damaged(path, f"{reason} of unit {self.unit}", _ADVICE)
    if not np.isfinite(found.centroids).all():
      raise Damaged(path, "a centroid is not finite", _ADVICE)
    return found


@dataclasses.dataclass(frozen=True, eq=False)
class Codebook:
  """centroids: float32 [centroids, unit * unit * c]. unit: as in CodebookConfig."""

  centroids: np.ndarray
  unit: int = 1

  def discretise(self, video: Video) -> Video:
    """Returns latents [b f h w c] with each unit replaced by its nearest centroid. Traceable; what
    is NaN becomes some centroid.
    """
    units = to_units(video, self.unit)
    centroids = jnp.asarray(self.centroids)
    rows = centroids[nearest(centroids, units.reshape(-1, units.shape[-1]))]
    b, f, h, w, c = video.shape
    squares = rows.reshape(b, f, h // self.unit, w // self.unit, self.unit, self.unit, c)
    return squares.swapaxes(3, 4).reshape(video.shape).astype(video.dtype)

  @functools.cached_property
  def fingerprint(self) -> str:
    """16 hex digits of the numbers."""
    shape = f"{self.centroids.shape} {self.unit} "
    content = shape.encode() + np.ascontiguousarray(self.centroids, "<f4").tobytes()
    return hashlib.sha256(content).hexdigest()[:16]


def to_units(video: Array, unit: int) -> Array:
  """Cuts latents into the vectors that are clustered: [b f h w c] -> [b f h/u w/u u*u*c]."""
  b, f, h, w, c = video.shape
  squares = video.reshape(b, f, h // unit, unit, w // unit, unit, c).swapaxes(3, 4)
  return squares.reshape(b, f, h // unit, w // unit, unit * unit * c)


def nearest(centroids: Array, vectors: Array) -> jax.Array:
  """Returns the index of the centroid [k d] nearest to each vector [n d], int32 [n].

  Of distances no more than SCORES are held at once, and never the differences [n k d].
  """
  half = (centroids**2).sum(-1) / 2

  def best(rows):
    # |v - c|^2 / 2 without |v|^2 / 2, which is the same for every c. In full precision: an
    # accelerator's products of 8 bits would choose other centroids.
    score = jnp.einsum("nd,kd->nk", rows, centroids, precision=jax.lax.Precision.HIGHEST)
    return jnp.argmax(score - half[None], axis=-1).astype(jnp.int32)

  count, size = len(vectors), max(1, SCORES // len(centroids))
  if count <= size:
    return best(vectors)
  chunks = -(-count // size)
  padded = jnp.pad(vectors, ((0, chunks * size - count), (0, 0)))
  return jax.lax.map(best, padded.reshape(chunks, size, -1)).reshape(-1)[:count]


def save(path: str | os.PathLike, codebook: Codebook) -> None:
  """Writes an .npz file, atomically."""
  buffer = io.BytesIO()
  np.savez(buffer, centroids=codebook.centroids, unit=codebook.unit)
  write_atomic(path, buffer.getvalue())


def _fit(vectors: np.ndarray, config: CodebookConfig, rng: np.random.Generator) -> np.ndarray:
  """Returns centroids, float32 [centroids d], of vectors [n d]."""
  from scipy.cluster.vq import kmeans2  # half a second to import, and only a fit needs it

  rows = np.asarray(vectors, np.float64)
  start = _spread(rows, config.centroids, rng)
  with warnings.catch_warnings():
    # a centroid that is nearest to nothing any more stays where it was
    warnings.filterwarnings("ignore", "One of the clusters is empty", UserWarning)
    centroids, _ = kmeans2(rows, start, iter=config.iterations, minit="matrix")
  return np.asarray(centroids, np.float32)


def _spread(rows: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
  """Returns `count` different rows to start from, [count d]: k-means++.

  SciPy's own takes time in the square of `count`. Raises UserError for fewer different rows.
  """
  chosen = [rows[rng.integers(len(rows))]]
  distance = np.inf
  while len(chosen) < count:
    distance = np.minimum(distance, ((rows - chosen[-1]) ** 2).sum(-1))
    if not distance.any():
      raise UserError(
        f"framepack.codebook.centroids = {count}: the clips have {len(chosen)} different latent "
        "vectors; take fewer"
      )
    chosen.append(rows[rng.choice(len(rows), p=distance / distance.sum())])
  return np.stack(chosen)
