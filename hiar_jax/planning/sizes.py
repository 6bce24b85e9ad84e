"""Sizes of a generation job, counted from shapes alone: parameters, bytes, forwards, operations."""

import collections
from collections.abc import Iterable, Mapping
import dataclasses

import jax
import jax.numpy as jnp

from hiar_jax.components.chunked_decoder import ChunkedDecoder
from hiar_jax.errors import UserError, at_least, one_of
from hiar_jax.method import MethodConfig
from hiar_jax.models.frames import Network
from hiar_jax.rollout.past.kinds import kind
from hiar_jax.types import DTYPES, LatentShape, PyTree

_FLOAT = 4  # bytes of float32


@dataclasses.dataclass(frozen=True)
class JobSize:
  """Sizes of a job: `frames` new latent frames of height x width after `given` ones.

  Raises:
    UserError: sizes below 1, an unknown dtype, frames that are not whole blocks, or sides that the
      patches do not divide.
  """

  network: Network
  method: MethodConfig
  levels: int  # denoising steps
  frames: int  # new latent frames, whole blocks
  height: int  # of the latents
  width: int
  batch: int = 1
  given: int = 0  # conditioning latent frames: whole blocks, or the one of an image
  text: int = 512  # tokens of a prompt
  dtype: str = "bfloat16"  # of weights, products and cache
  # text encoder and autoencoder: name -> (shapes of the parameters, dtype, '' for the job's)
  others: Mapping[str, tuple[PyTree, str]] = dataclasses.field(default_factory=dict)
  decoder: ChunkedDecoder | None = None  # with shapes for weights; None: costs next to nothing

  def __post_init__(self):
    at_least(1, frames=self.frames)
    check_job(self)
    if self.frames % self.method.block:
      raise UserError(
        f"frames = {self.frames} latent frames are not whole blocks of {self.method.block}"
      )
    if self.given % self.method.block and self.given != 1:
      raise UserError(
        f"given = {self.given} latent frames: expected one, or whole blocks of {self.method.block}"
      )

  @property
  def tokens(self) -> int:
    """Tokens of one latent frame."""
    return self.network.tokens(self.height, self.width)

  @property
  def slots(self) -> int:
    """Frames that the cache holds."""
    return kind(self.method).capacity(self.method, self.given + self.frames)


def check_job(request) -> None:
  """Checks what a JobSize and a PackedJobSize have in common, and has the network compute in the
  job's dtype.

  Raises UserError for sizes below 1, an unknown dtype, or sides that the patches do not divide.
  """
  r = request
  at_least(1, levels=r.levels, height=r.height, width=r.width, batch=r.batch, text=r.text)
  one_of(DTYPES, dtype=r.dtype)
  _, rows, columns = r.network.patch
  if r.height % rows or r.width % columns:
    raise UserError(
      f"latents of {r.height}x{r.width} cannot be cut into patches of {rows}x{columns}"
    )
  object.__setattr__(r, "network", dataclasses.replace(r.network, dtype=r.dtype))  # it is frozen


@dataclasses.dataclass(frozen=True)
class ForwardCost:
  """`count` evaluations of the network on `frames` frames that attend to `keys` frames, empty cache
  slots included. The tokens of a packed history are fractions of a frame.
  """

  count: int
  frames: float
  keys: float


@dataclasses.dataclass(frozen=True)
class Part:
  """Size of one network."""

  parameters: int
  bytes: int


def parts(request) -> dict[str, Part]:
  """Returns the parameters and bytes of each network of a JobSize or PackedJobSize; the
  autoencoder's are float32.
  """
  trees = {"DiT": (abstract_params(request.network), ""), **request.others}
  found = {}
  for name, (tree, dtype) in trees.items():
    count = sum(leaf.size for leaf in jax.tree.leaves(tree))
    found[name] = Part(count, count * jnp.dtype(dtype or request.dtype).itemsize)
  return found


def abstract_params(network: Network) -> PyTree:
  """Returns the shapes of the network's parameters."""
  return jax.eval_shape(lambda: network.init(jax.random.key(0)))


def forwards(request: JobSize) -> tuple[ForwardCost, ...]:
  """Returns the network evaluations of one video in rollout.generate, from the shape of its loops.

  A test compares the counts with the loops themselves, for every method.
  """
  method, slots, levels = request.method, request.slots, request.levels
  k, new, given = method.block, request.frames // method.block, request.given // method.block
  counts = collections.Counter()  # (frames, keys) -> evaluations
  _, ph, pw = request.network.patch
  packed = kind(method).packed_tokens(method, request.height // ph, request.width // pw)
  packed = packed / request.tokens if packed else 0  # of each block of a forward
  if request.given % k:  # an image is one frame, written into the cache by a forward of its own
    counts[1 + packed, slots + 1 + packed] += 1
  k = k + packed
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
    for blocks, held in ((head, kind(method).capacity(method, head * k)), (new - head, slots)):
      pairs = 0 if method.context.free else max(blocks - 1, 0)
      counts[k, held + k] += levels * (blocks - pairs)
      counts[2 * k, held + 2 * k] += levels * pairs
  return tuple(ForwardCost(count, *sizes) for sizes, count in counts.items() if count)


def cache_bytes(request: JobSize) -> int:
  """Returns the bytes of the KV cache of the whole batch."""
  r = request
  shape = LatentShape(r.given + r.frames, r.height, r.width, r.network.channels)
  cache = jax.eval_shape(lambda: kind(r.method).empty(r.network, r.method, shape, r.batch))
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))


def activation_bytes(request: JobSize, calls: Iterable[ForwardCost]) -> int:
  """Returns a lower bound of the bytes of activations of the whole batch: latents, text, and the
  larger of the MLP's activations and the attention's logits.
  """
  r, widest = request, max(calls, key=lambda call: call.frames * call.keys)
  activations = r.network.activation_bytes(widest.frames, widest.keys, r.tokens)
  return r.batch * (activations + fixed_bytes(r))


def fixed_bytes(request) -> int:
  """Returns the bytes of one video's latents and text, of a JobSize or PackedJobSize."""
  r = request
  latents = (r.given + r.frames) * r.height * r.width * r.network.channels * _FLOAT
  return latents + r.text * r.network.text_dim * jnp.dtype(r.dtype).itemsize
