"""Sizes of a generation job, counted from shapes alone: parameters, bytes, forwards, operations."""

import collections
from collections.abc import Iterable
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from hiar_jax.errors import UserError, at_least
from hiar_jax.method import MethodConfig
from hiar_jax.models import dit, taehv, umt5, vae
from hiar_jax.models.dit import DiTConfig
from hiar_jax.models.taehv import TinyVAEConfig
from hiar_jax.models.umt5 import UMT5Config
from hiar_jax.models.vae import VAEConfig
from hiar_jax.models.vae_tiling import Tiling
from hiar_jax.rollout.past import ring
from hiar_jax.types import LatentShape, PyTree

DTYPES = ("float32", "bfloat16")
_FLOAT = 4  # bytes of float32


@dataclasses.dataclass(frozen=True)
class JobSize:
  """Sizes of a job: `frames` new latent frames of height x width after `given` ones.

  Raises:
    UserError: sizes below 1, an unknown dtype, frames that are not whole blocks, or sides that the
      patches do not divide.
  """

  dit: DiTConfig
  method: MethodConfig
  levels: int  # denoising steps
  frames: int  # new latent frames, whole blocks
  height: int  # of the latents
  width: int
  batch: int = 1
  given: int = 0  # conditioning latent frames: whole blocks, or the one of an image
  text: int = 512  # tokens of a prompt
  dtype: str = "bfloat16"  # of weights, products and cache
  vae: VAEConfig | TinyVAEConfig | None = VAEConfig()  # None: not needed
  umt5: UMT5Config | None = UMT5Config()  # None: not needed
  tiling: Tiling | None = None  # of the decoder

  def __post_init__(self):
    at_least(
      1,
      levels=self.levels,
      frames=self.frames,
      height=self.height,
      width=self.width,
      batch=self.batch,
      text=self.text,
    )
    if self.dtype not in DTYPES:
      raise UserError(f"dtype = {self.dtype!r}: expected one of {', '.join(DTYPES)}")
    if self.frames % self.method.block:
      raise UserError(
        f"frames = {self.frames} latent frames are not whole blocks of {self.method.block}"
      )
    if self.given % self.method.block and self.given != 1:
      raise UserError(
        f"given = {self.given} latent frames: expected one, or whole blocks of {self.method.block}"
      )
    if self.height % self.dit.patch[1] or self.width % self.dit.patch[2]:
      raise UserError(
        f"latents of {self.height}x{self.width} cannot be cut into patches of "
        f"{self.dit.patch[1]}x{self.dit.patch[2]}"
      )

  @functools.cached_property
  def network(self) -> DiTConfig:
    """The DiT that computes in the job's dtype."""
    return dataclasses.replace(self.dit, dtype=self.dtype)

  @property
  def tokens(self) -> int:
    """Tokens of one latent frame."""
    return self.dit.tokens(self.height, self.width)

  @property
  def slots(self) -> int:
    """Frames that the cache holds."""
    return self.method.past_frames(self.given + self.frames)


@dataclasses.dataclass(frozen=True)
class ForwardCost:
  """`count` evaluations of the network on `frames` frames that attend to `keys` frames, empty cache
  slots included.
  """

  count: int
  frames: int
  keys: int


@dataclasses.dataclass(frozen=True)
class Part:
  """Size of one network."""

  parameters: int
  bytes: int


def parts(request: JobSize) -> dict[str, Part]:
  """Returns the parameters and bytes of each network; the autoencoder's are float32."""
  trees = {"DiT": (abstract_dit(request.network), request.dtype)}
  if request.vae is not None:
    module = vae if isinstance(request.vae, VAEConfig) else taehv
    trees["VAE" if module is vae else "tiny VAE"] = (module.abstract_params(request.vae), "float32")
  if request.umt5 is not None:
    encoder = jax.eval_shape(lambda: umt5.init(request.umt5, jax.random.key(0)))
    trees["UMT5"] = (encoder, request.dtype)
  found = {}
  for name, (tree, dtype) in trees.items():
    count = sum(leaf.size for leaf in jax.tree.leaves(tree))
    found[name] = Part(count, count * jnp.dtype(dtype).itemsize)
  return found


def abstract_dit(config: DiTConfig) -> PyTree:
  """Returns the shapes of the DiT's parameters."""
  # No parameter depends on the attention kernel, and the kernel may be unavailable here.
  portable = dataclasses.replace(config, attention="xla")
  return jax.eval_shape(lambda: dit.init(portable, jax.random.key(0)))


def forwards(request: JobSize) -> tuple[ForwardCost, ...]:
  """Returns the network evaluations of one video in rollout.generate, from the shape of its loops.

  A test compares the counts with the loops themselves, for every method.
  """
  method, slots, levels = request.method, request.slots, request.levels
  k, new, given = method.block, request.frames // method.block, request.given // method.block
  counts = collections.Counter()  # (frames, keys) -> evaluations
  if request.given % k:  # an image is one frame, written into the cache by a forward of its own
    counts[1, slots + 1] += 1
  if method.order == "block_first":
    # Each new block takes one forward a level and one that writes it into the cache, clean.
    counts[k, slots + k] += given + new * (levels + 1)
  else:
    # Blocks of a clean sink are denoised first, as a video of their own with a cache of its length.
    head = 0 if request.given else min(method.clean_sink // k, new)
    # Blocks written into the cache clean.
    counts[k, slots + k] += given or (head if head < new else 0)
    # Forwards of one noise level, see rollout.step_first.sweep: where contexts are free one of each
    # block; else one of two blocks, the block before (as context) and the block itself, but for the
    # first block.
    for blocks, held in ((head, method.past_frames(head * k)), (new - head, slots)):
      pairs = 0 if method.context.free else max(blocks - 1, 0)
      counts[k, held + k] += levels * (blocks - pairs)
      counts[2 * k, held + 2 * k] += levels * pairs
  return tuple(ForwardCost(count, *sizes) for sizes, count in counts.items() if count)


def forward_flops(config: DiTConfig, tokens: int, frames: int, keys: int, text: int) -> float:
  """Returns the operations (two a multiply-add) of one forward of one video, matrix products alone.

  tokens: of a latent frame; frames: of the queries; keys: frames attended to; text: tokens.
  """
  n, m, d = frames * tokens, keys * tokens, config.dim
  patch = math.prod(config.patch) * config.channels
  # Of one layer: self-attention's q, k, v, o, cross-attention's q, o and the MLP on the video's
  # tokens; cross-attention's k, v on the text's.
  projections = 2 * n * (4 * d * d + 2 * d * d + 2 * d * config.ffn_dim) + 2 * text * 2 * d * d
  # Logits and weighted values: 2 d each for a query and key.
  attention = 4 * n * m * d + 4 * n * text * d
  # Outside of the layers: patches in and out, the text's MLP, the timestep's MLP and modulation
  # (6 d + d).
  ends = (
    2 * n * 2 * patch * d
    + 2 * text * (config.text_dim * d + d * d)
    + 2 * frames * (config.freq_dim * d + 7 * d * d)
  )
  return float(config.num_layers * (projections + attention) + ends)


def cache_bytes(request: JobSize) -> int:
  """Returns the bytes of the KV cache of the whole batch."""
  r = request
  shape = LatentShape(r.given + r.frames, r.height, r.width, r.dit.channels)
  cache = jax.eval_shape(lambda: ring.empty(r.network, r.method, shape, r.batch))
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))


def activation_bytes(request: JobSize, calls: Iterable[ForwardCost]) -> int:
  """Returns a lower bound of the bytes of activations of the whole batch: latents, text, and the
  larger of the MLP's activations and the attention's logits.
  """
  c, widest = request.network, max(calls, key=lambda call: call.frames * call.keys)
  itemsize = jnp.dtype(request.dtype).itemsize
  rows = widest.frames * request.tokens
  # Queries whose logits exist at once: none in a fused kernel, one frame's in chunks, else all.
  queries = {"cudnn": 0, "chunked": request.tokens}.get(c.attention, rows)
  logits = queries * widest.keys * request.tokens
  activations = max(rows * c.ffn_dim * itemsize, logits * c.num_heads * _FLOAT)
  latents = (request.given + request.frames) * request.height * request.width * c.channels * _FLOAT
  return request.batch * (activations + latents + request.text * c.text_dim * itemsize)
