"""Plan of a generation job before anything is loaded: parameters, bytes, forwards, operations, and
memory of a device.

Numbers come from shapes alone (`sizes`). Peak memory is the compiler's own count, for the devices
that are present and the program that generates; beside it stands a lower bound that holds for every
device (weights, cache, latents, and the widest activations).
"""

from collections.abc import Callable
import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from hiar_jax import peak_memory
from hiar_jax.parallel.mesh import MeshConfig, make_mesh, replicated
from hiar_jax.parallel.rules import leaf_sharding, sharded_shapes, tree_shardings
from hiar_jax.planning import packed_sizes
from hiar_jax.planning.packed_sizes import PackedJobSize, SectionCost
from hiar_jax.planning.sizes import (
  ForwardCost,
  JobSize,
  Part,
  abstract_params,
  activation_bytes,
  cache_bytes,
  forwards,
  parts,
)
from hiar_jax.rollout import packed, sample
from hiar_jax.types import LatentShape, PyTree


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes of one device, as its compiler counts them.

  flops: of the decoder's step; of other programs they are no measure, since the compiler counts the
  body of a loop once.
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
  """Costs of a job, for the whole batch unless noted; `text` formats them. Of a packed model
  a block is a section, and there is no cache.
  """

  parts: dict[str, Part]  # by network
  devices: int
  platform: str
  weights: int  # bytes of the DiT on one device
  cache: int  # bytes of the KV cache
  floor: int  # lower bound of the bytes that one device holds while it generates
  tokens_frame: int  # of one latent frame
  tokens_block: int
  blocks: int  # new ones of a video
  forwards: tuple[ForwardCost | SectionCost, ...]
  flops_block: float
  flops_video: float
  compiled: dict[str, Memory]  # of the programs generate and decode; empty: nothing was compiled
  note: str  # why a program was not compiled, or how its numbers are to be read
  schedule: str = ""  # of packed history, in the paper's notation

  def text(self) -> str:
    """Returns a summary of about ten lines."""
    size = peak_memory.size
    lines = [
      f"{name}: {part.parameters / 1e9:.3f} billion parameters, {size(part.bytes)}"
      for name, part in self.parts.items()
    ]
    block = "section" if self.schedule else "block"
    calls = ", ".join(map(_described, self.forwards))
    lines += [
      f"{block}s: {self.blocks}, {self.tokens_block} tokens each ({self.tokens_frame} a latent "
      "frame)",
      *(_history(self.schedule, self.forwards) if self.schedule else ()),
      f"forwards: {sum(f.count for f in self.forwards)} ({calls})",
      f"FLOPs: {_flops(self.flops_block)} a {block}, {_flops(self.flops_video)} the video (text "
      "encoder and decoder left out)",
      *([] if self.schedule else [f"KV cache: {size(self.cache)}"]),
      f"memory of each of {self.devices} {self.platform} device{'s' * (self.devices > 1)}: at "
      f"least {size(self.floor)} ({size(self.weights)} of it weights)",
    ]
    for name, m in self.compiled.items():
      detail = f"{size(m.arguments)} arguments, {size(m.temporary)} temporary"
      lines.append(f"compiled for {self.platform}, {name}: {size(m.total)} a device ({detail})")
    return "\n".join([*lines, *([self.note] if self.note else [])])


def _described(call: ForwardCost | SectionCost) -> str:
  """Returns a call as 4 of 3 frames on 21."""
  if isinstance(call, ForwardCost):
    return f"{call.count} of {call.frames:.4g} frames on {call.keys:.4g}"
  return f"{call.count} of {call.tokens} + {call.history} tokens"


def _history(schedule: str, calls: tuple[SectionCost, ...]) -> list[str]:
  """Returns the line of the packed tokens, those of the longest history."""
  longest = max(calls, key=lambda call: call.history)
  groups = " + ".join(f"{tokens} by k{pool}" for tokens, pool in longest.packed)
  return [f"history: {schedule}, {longest.history} packed tokens a forward ({groups or 'none'})"]


def _flops(count: float) -> str:
  """3.28e14 -> '328 T'."""
  return f"{count / 1e15:.4g} P" if count >= 1e15 else f"{count / 1e12:.4g} T"


@dataclasses.dataclass(frozen=True)
class _Work:
  """What a job computes and holds, beside its weights: bytes and operations of the whole batch."""

  calls: tuple[ForwardCost | SectionCost, ...]
  blocks: int
  block: int  # latent frames
  flops: float
  cache: int
  activations: int


def _work(request: JobSize | PackedJobSize) -> _Work:
  r = request
  if isinstance(r, PackedJobSize):
    calls = packed_sizes.sections(r)
    flops = sum(call.count * packed_sizes.flops(r, call) for call in calls)
    activations = packed_sizes.activation_bytes(r, calls)
    return _Work(calls, r.sections, r.schedule.generate, r.batch * flops, 0, activations)
  calls, block = forwards(r), r.method.block
  flops = sum(
    call.count * r.network.flops(call.frames, call.keys, r.tokens, r.text) for call in calls
  )
  cache, activations = cache_bytes(r), activation_bytes(r, calls)
  return _Work(calls, r.frames // block, block, r.batch * flops, cache, activations)


def make_plan(
  request: JobSize | PackedJobSize, mesh: Mesh | None = None, compile: bool = True
) -> CostPlan:
  """Returns the plan of a job.

  Args:
    mesh: the devices to spread over, default the first one.
    compile: compiles the programs for their memory, about ten seconds for 1.3B.
  """
  mesh = mesh or make_mesh(MeshConfig(data=1), jax.local_devices()[:1])
  work = _work(request)
  # Weights are sharded as in training; each device holds its shard of the large ones.
  weights = sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(_params(request, mesh))
  )
  # Videos of one device: a batch that the devices do not divide is computed on each of them.
  share = request.batch // mesh.size if request.batch % mesh.size == 0 else request.batch
  compiled, note = {}, "nothing was compiled, as was asked"
  if compile:
    compiled, note = _compiled(request, mesh)
  return CostPlan(
    parts=parts(request),
    devices=mesh.size,
    platform=mesh.devices.flat[0].platform,
    weights=weights,
    cache=work.cache,
    floor=weights + share * (work.cache + work.activations) // request.batch,
    tokens_frame=request.tokens,
    tokens_block=request.tokens * work.block,
    blocks=work.blocks,
    forwards=work.calls,
    flops_block=work.flops / work.blocks,
    flops_video=work.flops,
    compiled=compiled,
    note=note,
    schedule=request.schedule.notation if isinstance(request, PackedJobSize) else "",
  )


# ------------------------------------------------------------------------- memory by the compiler


def _params(request: JobSize | PackedJobSize, mesh: Mesh) -> PyTree:
  """Returns the DiT's parameters as sharded shapes."""
  shapes = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, request.dtype), abstract_params(request.network)
  )
  rules = request.network.sharding_rules
  shardings = tree_shardings(shapes, mesh, rules, min_shard=MeshConfig().min_shard)
  return sharded_shapes(shapes, shardings)


def _with_sharding(leaf: jax.ShapeDtypeStruct, sharding: Any) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _compiled(request: JobSize | PackedJobSize, mesh: Mesh) -> tuple[dict[str, Memory], str]:
  """Compiles the job's programs -> ({program: memory}, note)."""
  platform = mesh.devices.flat[0].platform
  if reason := request.network.unavailable_on(platform):
    return {}, f"nothing was compiled: {reason}"
  programs = {"generate": _generator(request, mesh)}
  if request.decoder is not None:
    programs["decode"] = _decoder(request, mesh)
  found = {}
  with jax.set_mesh(mesh):
    for name, (program, arguments) in programs.items():
      try:
        executable = jax.jit(program).lower(*arguments).compile()
      except jax.errors.JaxRuntimeError as error:
        # Compilers for accelerators refuse a program that exceeds the device's memory.
        return found, f"{name} cannot be compiled for {platform}: {str(error).splitlines()[0]}"
      memory, costs = executable.memory_analysis(), executable.cost_analysis() or {}
      found[name] = Memory(
        arguments=memory.argument_size_in_bytes,
        # Outputs that alias a donated argument take no memory of their own.
        outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        temporary=memory.temp_size_in_bytes,
        flops=float(costs.get("flops", math.nan)),
      )
  if platform == "cpu" and request.dtype == "bfloat16":
    return found, (
      "a CPU computes bfloat16 in float32 and holds copies for it: other devices need less"
    )
  return found, ""


def _sampler(request: JobSize | PackedJobSize) -> Callable:
  """Returns generate(params, text, seeds, given) of rollout.sample or rollout.packed."""
  r, key = request, jax.random.key(0)
  # The values of the levels do not change the program.
  levels = np.linspace(1.0, 0.0, r.levels + 1)
  frame = r.height, r.width, r.network.channels
  if isinstance(r, JobSize):
    shape = LatentShape(r.frames, *frame)
    return sample.make_sampler(r.network, r.method.at(levels), key=key, shape=shape)
  sections = packed.SectionSampler(
    network=r.network,
    schedule=r.schedule,
    history=r.history,
    sigmas=jnp.asarray(levels, jnp.float32),
    negative=jnp.zeros((1, r.text, r.network.text_dim), r.dtype),
    guidance=r.guidance,
    distilled=r.distilled,
    key=key,
    frame=frame,
    published=r.published,
    solver=r.solver,
  )
  return packed.make_sampler(sections, r.steps, r.frames)


def _generator(request: JobSize | PackedJobSize, mesh: Mesh) -> tuple[Callable, list]:
  """Returns the job's generate(params, text, seeds, given) on texts, and its arguments."""
  r = request
  generate = _sampler(r)
  # A row a video, split over the devices where they divide the batch.
  rows = leaf_sharding("batch/rows", mesh, shape=(r.batch,))
  shape = functools.partial(jax.ShapeDtypeStruct, sharding=rows)
  arguments = [
    _params(r, mesh),
    shape((r.batch, r.text, r.network.text_dim), r.dtype),
    shape((r.batch,), jnp.int32),
  ]
  if r.given:
    arguments.append(shape((r.batch, r.given, r.height, r.width, r.network.channels), jnp.float32))
  return generate, arguments


def _decoder(request: JobSize | PackedJobSize, mesh: Mesh) -> tuple[Callable, list]:
  """Returns one step of the chunked decoder in the middle of one video, and its arguments: frames
  split over the devices, or tiles on one.
  """
  decoder = dataclasses.replace(request.decoder, devices=tuple(mesh.devices.flat))
  params = decoder.params
  latents = jax.ShapeDtypeStruct(
    (1, 1, request.height, request.width, request.network.channels), jnp.float32
  )
  # The first step has no cache and a program of its own; its result has the shape of the cache.
  _, cache = jax.eval_shape(lambda p, z: decoder.decode(p, z, None), params, latents)
  split = decoder.place(request.width)
  if split is None:
    return decoder.decode, [params, latents, cache]
  # Weights are copied to every device, latents and cache are split by columns.
  everywhere = replicated(split.mesh)
  return decoder.decode, [
    jax.tree.map(lambda leaf: _with_sharding(leaf, everywhere), params),
    *jax.tree.map(lambda leaf: _with_sharding(leaf, split), (latents, cache)),
  ]
