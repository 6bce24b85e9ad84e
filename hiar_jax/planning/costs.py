"""What a video would cost, before anything is loaded: parameters, bytes, forwards, floating-point
operations, memory of a device.

Numbers come from shapes alone. Memory at the peak is the compiler's own count, for the devices that
are here and the program that generates; a floor that holds everywhere (weights, cache, latents, and
the widest activations) stands beside it.
"""

from collections.abc import Callable
import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from hiar_jax import peak_memory
from hiar_jax.components import chunked_decoder
from hiar_jax.errors import UserError, at_least
from hiar_jax.method import Method
from hiar_jax.models import dit, taehv, umt5, vae
from hiar_jax.models.dit import DiTConfig
from hiar_jax.models.taehv import TinyVAEConfig
from hiar_jax.models.umt5 import UMT5Config
from hiar_jax.models.vae import VAEConfig
from hiar_jax.models.vae_tiling import Tiling
from hiar_jax.parallel.mesh import BATCH_AXES, MeshConfig, make_mesh
from hiar_jax.parallel.rules import state_shardings
from hiar_jax.rollout.past import ring as caches
from hiar_jax.rollout.sample import make_sampler
from hiar_jax.types import LatentShape, PyTree

DTYPES = ("float32", "bfloat16")
_FLOAT = 4  # bytes of float32


@dataclasses.dataclass(frozen=True)
class JobSize:
  """What is asked for: `frames` new latent frames of height x width after `given` ones, in `levels`
  steps.

  New frames are whole blocks; given ones too, or a picture's one. text: tokens of a prompt. dtype:
  of weights, products and cache.
  vae, umt5: None where they are not needed. tiling: of the decoder.
  """

  dit: DiTConfig
  method: Method
  levels: int
  frames: int
  height: int
  width: int
  batch: int = 1
  given: int = 0
  text: int = 512
  dtype: str = "bfloat16"
  vae: VAEConfig | TinyVAEConfig | None = VAEConfig()
  umt5: UMT5Config | None = UMT5Config()
  tiling: Tiling | None = None

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
    return dataclasses.replace(self.dit, dtype=self.dtype)

  @property
  def tokens(self) -> int:
    """Of one latent frame."""
    return self.dit.tokens(self.height, self.width)

  @property
  def slots(self) -> int:
    """Frames that the cache holds."""
    return self.method.cache_frames(self.given + self.frames)


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
  parameters: int
  bytes: int


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes of one device, as its compiler counts them.

  flops: of the decoder's step (loops of other programs are not counted out).
  """

  arguments: int
  outputs: int
  temporary: int
  flops: float

  @property
  def total(self) -> int:
    return self.arguments + self.outputs + self.temporary


@dataclasses.dataclass(frozen=True)
class CostPlan:
  """See `text`. compiled: of the programs `generate` and `decode`; empty where nothing was
  compiled, and `note` says why.

  weights: bytes of the DiT on one device; floor: the least that one device holds while it
  generates. All for the whole batch.
  """

  parts: dict[str, Part]
  devices: int
  platform: str
  weights: int
  cache: int
  floor: int
  tokens_frame: int
  tokens_block: int
  blocks: int
  forwards: tuple[ForwardCost, ...]
  flops_block: float
  flops_video: float
  compiled: dict[str, Memory]
  note: str

  def text(self) -> str:
    """For a person, some ten lines."""
    size = peak_memory.size
    lines = [
      f"{name}: {part.parameters / 1e9:.3f} billion parameters, {size(part.bytes)}"
      for name, part in self.parts.items()
    ]
    calls = ", ".join(f"{f.count} of {f.frames} frames on {f.keys}" for f in self.forwards)
    lines += [
      f"blocks: {self.blocks}, {self.tokens_block} tokens each ({self.tokens_frame} a latent "
      "frame)",
      f"forwards: {sum(f.count for f in self.forwards)} ({calls})",
      f"FLOPs: {_flops(self.flops_block)} a block, {_flops(self.flops_video)} the video (text "
      "encoder and decoder left out)",
      f"KV cache: {size(self.cache)}",
      f"memory of each of {self.devices} {self.platform} device{'s' * (self.devices > 1)}: at "
      f"least {size(self.floor)}"
      f" ({size(self.weights)} of it weights)",
    ]
    for name, m in self.compiled.items():
      detail = f"{size(m.arguments)} arguments, {size(m.temporary)} temporary"
      lines.append(f"compiled for {self.platform}, {name}: {size(m.total)} a device ({detail})")
    return "\n".join([*lines, *([self.note] if self.note else [])])


def _flops(count: float) -> str:
  """3.28e14 -> '328 T'."""
  return f"{count / 1e15:.4g} P" if count >= 1e15 else f"{count / 1e12:.4g} T"


def make(request: JobSize, mesh: Mesh | None = None, compile: bool = True) -> CostPlan:
  """The plan. mesh: the devices to spread over, default the first; compile: ask the compiler too,
  some ten seconds for 1.3B.

  Raises UserError where the request does not fit together.
  """
  mesh = mesh or make_mesh(MeshConfig(data=1), jax.local_devices()[:1])
  calls, blocks = forwards(request), request.frames // request.method.block
  video = request.batch * sum(
    f.count * forward_flops(request.network, request.tokens, f.frames, f.keys, request.text)
    for f in calls
  )
  weights = _device_bytes(_params(request, mesh))
  cache = _bytes(_cache(request))
  compiled, note = (
    _compiled(request, mesh) if compile else ({}, "nothing was compiled, as was asked")
  )
  return CostPlan(
    parts=parts(request),
    devices=mesh.size,
    platform=mesh.devices.flat[0].platform,
    weights=weights,
    cache=cache,
    floor=weights + _share(request, mesh) * (cache + _widest(request)) // request.batch,
    tokens_frame=request.tokens,
    tokens_block=request.tokens * request.method.block,
    blocks=blocks,
    forwards=calls,
    flops_block=video / blocks,
    flops_video=video,
    compiled=compiled,
    note=note,
  )


# ----------------------------------------------------------------------------- sizes and operations


def parts(request: JobSize) -> dict[str, Part]:
  """Parameters and bytes of each network; the autoencoder's are float32."""
  trees = {"DiT": (_abstract_dit(request.network), request.dtype)}
  if request.vae is not None:
    module = vae if isinstance(request.vae, VAEConfig) else taehv
    trees["VAE" if module is vae else "tiny VAE"] = (module.abstract_params(request.vae), "float32")
  if request.umt5 is not None:
    trees["UMT5"] = (
      jax.eval_shape(lambda: umt5.init(request.umt5, jax.random.key(0))),
      request.dtype,
    )
  return {name: _part(tree, dtype) for name, (tree, dtype) in trees.items()}


def forwards(request: JobSize) -> tuple[ForwardCost, ...]:
  """What rollout.generate evaluates for one video: by hand, from the loops' shape."""
  method, slots = request.method, request.slots
  k, new, given = method.block, request.frames // method.block, request.given // method.block
  alone = [ForwardCost(1, 1, slots + 1)] if request.given % k else []  # a picture
  single, pair = ForwardCost(1, k, slots + k), ForwardCost(1, 2 * k, slots + 2 * k)
  times = lambda forward, count: dataclasses.replace(forward, count=count)
  if method.order == "block_first":
    calls = [times(single, given + new * (request.levels + 1))]
  else:
    head = 0 if request.given else min(method.clean_sink // k, new)
    sweeps = [_sweep(method, n) for n in (head, new - head) if n]
    shown = given or (head if head < new else 0)  # blocks that are put into the cache clean
    calls = [
      times(single, shown + request.levels * sum(a for a, _ in sweeps)),
      times(pair, request.levels * sum(b for _, b in sweeps)),
    ]
  return tuple(call for call in alone + calls if call.count)


def _sweep(method: Method, blocks: int) -> tuple[int, int]:
  """(forwards of one block, forwards of two) of one noise level; see rollout.step_first.sweep."""
  return (blocks, 0) if method.level == "input" else (1, blocks - 1)


def forward_flops(config: DiTConfig, tokens: int, frames: int, keys: int, text: int) -> float:
  """Operations (two for a multiply-add) of one forward of one video, products alone: 2 d (...) a
  token and layer, 4 d a query and key.
  """
  n, m, d = frames * tokens, keys * tokens, config.dim
  patch = math.prod(config.patch) * config.channels
  projections = 2 * n * (4 * d * d + 2 * d * d + 2 * d * config.ffn_dim) + 2 * text * 2 * d * d
  attention = 4 * n * m * d + 4 * n * text * d
  ends = (
    2 * n * 2 * patch * d
    + 2 * text * (config.text_dim * d + d * d)
    + 2 * frames * (config.freq_dim * d + 7 * d * d)
  )
  return float(config.num_layers * (projections + attention) + ends)


def _abstract_dit(config: DiTConfig) -> PyTree:
  # no parameter depends on it, and a kernel may be unknown here
  plain = dataclasses.replace(config, attention="xla")
  return jax.eval_shape(lambda: dit.init(plain, jax.random.key(0)))


def _part(tree: PyTree, dtype: str) -> Part:
  count = sum(leaf.size for leaf in jax.tree.leaves(tree))
  return Part(count, count * jnp.dtype(dtype).itemsize)


def _cache(request: JobSize) -> PyTree:
  return jax.eval_shape(
    lambda: caches.empty(
      request.network,
      request.method,
      batch=request.batch,
      frames=request.given + request.frames,
      height=request.height,
      width=request.width,
    )
  )


def _bytes(tree: PyTree) -> int:
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _device_bytes(tree: PyTree) -> int:
  """Of sharded shapes: what one device holds."""
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
  )


def _share(request: JobSize, mesh: Mesh) -> int:
  """Videos on one device."""
  return request.batch // mesh.size if request.batch % mesh.size == 0 else request.batch


def _widest(request: JobSize) -> int:
  """Bytes that no program avoids, for the batch: latents, text, and the larger of the MLP's
  activations and the attention's logits.
  """
  c, widest = request.network, max(forwards(request), key=lambda f: f.frames * f.keys)
  rows = widest.frames * request.tokens
  visible = (
    0
    if c.attention == "cudnn"
    else (request.tokens if c.attention == "chunked" else rows) * widest.keys * request.tokens
  )
  activations = max(
    rows * c.ffn_dim * jnp.dtype(request.dtype).itemsize, visible * c.num_heads * _FLOAT
  )
  latents = (request.given + request.frames) * request.height * request.width * c.channels * _FLOAT
  return request.batch * (
    activations + latents + request.text * c.text_dim * jnp.dtype(request.dtype).itemsize
  )


# ------------------------------------------------------------------------------ the compiler's word


def _params(request: JobSize, mesh: Mesh) -> PyTree:
  """The DiT's parameters as shapes that know where they lie."""
  shapes = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, request.dtype), _abstract_dit(request.network)
  )
  places = state_shardings(shapes, mesh, MeshConfig().min_shard)
  return jax.tree.map(
    lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes, places
  )


def _rows(request: JobSize, mesh: Mesh, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
  """An argument with a row a video, split over the devices where they divide the batch."""
  spec = jax.P(BATCH_AXES) if request.batch % mesh.size == 0 else jax.P()
  return jax.ShapeDtypeStruct((request.batch, *shape), dtype, sharding=NamedSharding(mesh, spec))


def _generator(request: JobSize) -> Callable:
  """generate(params, text, seeds, given) of rollout.sample, on texts."""
  r = request
  return make_sampler(
    r.network,
    lambda text: text,
    jnp.linspace(1.0, 0.0, r.levels + 1),
    r.method,
    key=jax.random.key(0),
    latent=LatentShape(r.frames, r.height, r.width, r.dit.channels),
    frames=r.frames,
  )


def _compiled(request: JobSize, mesh: Mesh) -> tuple[dict[str, Memory], str]:
  """({program: memory}, why there is none)."""
  platform = mesh.devices.flat[0].platform
  if request.dit.attention == "cudnn" and platform != "gpu":
    return (
      {},
      f"nothing was compiled: attention = 'cudnn' is for GPUs, and the devices here are {platform}",
    )
  rows = functools.partial(_rows, request, mesh)
  arguments = [
    _params(request, mesh),
    rows((request.text, request.dit.text_dim), request.dtype),
    rows((), jnp.int32),
  ]
  frame = (request.height, request.width, request.dit.channels)
  if request.given:
    arguments.append(rows((request.given, *frame), jnp.float32))
  programs = {"generate": (_generator(request), arguments)}
  if request.vae is not None:
    programs["decode"] = _decoder(request, mesh)
  found = {}
  with jax.set_mesh(mesh):
    for name, (program, shapes) in programs.items():
      try:
        done = jax.jit(program).lower(*shapes).compile()
      except jax.errors.JaxRuntimeError as error:
        # a program that cannot fit is refused by some compilers
        return found, f"{name} cannot be compiled for {platform}: {str(error).splitlines()[0]}"
      found[name] = _counted(done)
  note = (
    "a CPU computes bfloat16 in float32 and holds copies for it: other devices need less"
    if platform == "cpu"
    else ""
  )
  return found, note if request.dtype == "bfloat16" else ""


def _decoder(request: JobSize, mesh: Mesh) -> tuple[Callable, list]:
  """One step of the streamed decoder, in the middle of one video: its frames over the devices, or
  in tiles on one.
  """
  module = vae if isinstance(request.vae, VAEConfig) else taehv
  params = module.abstract_params(request.vae)
  if module is vae:
    stream = chunked_decoder.from_vae(params, request.vae, tiling=request.tiling)
  else:
    stream = chunked_decoder.from_taehv(params, request.vae)
  stream = (
    stream if request.tiling else dataclasses.replace(stream, devices=tuple(mesh.devices.flat))
  )
  latents = jax.ShapeDtypeStruct(
    (1, 1, request.height, request.width, request.dit.channels), jnp.float32
  )
  _, cache = jax.eval_shape(lambda p, z: stream.decode(p, z, None), params, latents)
  where = stream.place(request.width)
  if where is None:
    return stream.decode, [params, latents, cache]
  at = lambda place: lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
  return stream.decode, [
    jax.tree.map(at(NamedSharding(where.mesh, jax.P())), params),
    *jax.tree.map(at(where), (latents, cache)),
  ]


def _counted(compiled: Any) -> Memory:
  m, costs = compiled.memory_analysis(), compiled.cost_analysis() or {}
  outputs = m.output_size_in_bytes - m.alias_size_in_bytes
  return Memory(
    m.argument_size_in_bytes, outputs, m.temp_size_in_bytes, float(costs.get("flops", math.nan))
  )
