"""Which mesh axes each array is split over: one table from paths to axes, for all meshes.

A rule is (pattern, axes). Its pattern is compared with the end of a leaf's path, as in
"state/ema/layers/mlp_in/kernel"; `*` stands for any characters, `/` included, and `[ab]` for one of
them (fnmatch). Averages, gradients and the optimizer's moments are split as their parameter is,
since their paths end in its path. `axes` gives for each dimension the name of a mesh axis, several
names, or None; dimensions beyond them are not split. The first rule that matches holds: a network's
own (`Network.sharding_rules`), then RULES; without one an array is replicated.

A mesh has the axes that its purpose needs (training `data` and `fsdp`, streaming `level`, `tensor`
and `sequence`), so one table serves all: axes that a mesh lacks split nothing there.
"""

import fnmatch
import math

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from hiar_jax.types import PyTree

AXES = {
  "data": "examples of a batch",
  "fsdp": "examples of a batch, parameters and the optimizer's state",
  "level": "noise levels of a pipeline, each with its past and its latents in flight",
  "tensor": "heads and the hidden units of the MLP, of weights and caches",
  "sequence": "rows of a frame, in layers that work token by token, and heads in attention",
  "ring": "tokens of a frame, in attention too, where K/V go round",
  "width": "columns of a frame, in the autoencoder",
}
Axis = str | tuple[str, ...] | None
Rules = tuple[tuple[str, tuple[Axis, ...]], ...]

RULES: Rules = (
  ("batch/*", (("data", "fsdp"),)),  # [b ...]: FSDP is data parallel too
  # rollout.pipeline.PipelineState: latents [s b k h w c], the past's [s b slots h w c]
  ("pipeline/context", ("level", None, None, "sequence")),
  ("pipeline/*latents", ("level", None, None, "sequence")),
  ("pipeline/past/*", ("level",)),
  ("activations/examples", (("data", "fsdp"),)),  # [b ...]: text, levels, what goes in and out
  # [b f t dim], between layers. `ring` before `sequence`: so the tokens of a part of the ring are
  # neighbours, and only devices along `sequence` exchange them for heads
  ("activations/tokens", (("data", "fsdp"), None, ("ring", "sequence"))),
  # [b f t dim] of all heads one after the other, between projections and attention
  ("activations/features", (("data", "fsdp"), None, ("ring", "sequence"), "tensor")),
  # [b f t a d], in attention; [b a n d] in a kernel that is mapped by hand
  ("activations/heads", (("data", "fsdp"), None, "ring", ("tensor", "sequence"))),
  ("attention/heads", (("data", "fsdp"), ("tensor", "sequence"))),
  ("attention/tokens", (("data", "fsdp"), None, ("tensor", "sequence"))),  # [b n a d], in another
  # on a ring: [b f t a d] that ask, [b g l a d] of a text
  ("attention/queries", (("data", "fsdp"), None, ("ring", "sequence"), "tensor")),
  ("attention/words", (("data", "fsdp"), None, None, "tensor")),
  ("decoder/video", (None, None, None, "width")),  # latents or pixels [b f h w c]
)


def leaf_sharding(
  path: str,
  mesh: Mesh | AbstractMesh,
  rules: Rules = (),
  *,
  shape: tuple[int, ...] | None = None,
  min_shard: int | None = None,
) -> NamedSharding:
  """Returns the sharding of one array by the first rule that matches its path.

  rules: those of the network, which come before RULES. shape: axes that do not divide a dimension
  are dropped; None: all of the rule's are kept. min_shard: an array of at least so many elements is
  also split over `fsdp`, along the largest free dimension that it divides; None: by rules alone.
  Raises ValueError for a rule with an unknown axis, or with more axes than the array has.
  """
  axes = ()
  for pattern, found in (*rules, *RULES):
    if fnmatch.fnmatchcase(f"/{path}", f"*/{pattern}"):
      axes = found
      break
  if shape is not None and len(axes) > len(shape):
    raise ValueError(f"{path}: a rule gives {len(axes)} axes to an array of shape {shape}")
  spec: list[Axis] = [None] * max(len(axes), len(shape or ()))
  for i, entry in enumerate(axes):
    names = (entry,) if isinstance(entry, str) else entry or ()
    if unknown := set(names) - AXES.keys():
      raise ValueError(f"{path}: unknown axis {min(unknown)}; expected one of {', '.join(AXES)}")
    names = tuple(name for name in names if name in mesh.shape)
    if names and (shape is None or shape[i] % math.prod(mesh.shape[name] for name in names) == 0):
      spec[i] = names if len(names) > 1 else names[0]
  size = mesh.shape.get("fsdp", 1)
  if min_shard is not None and size > 1 and math.prod(shape) >= min_shard:
    free = [i for i, n in enumerate(shape) if spec[i] is None and n % size == 0]
    if free and not any("fsdp" in (entry or ()) for entry in spec):
      spec[max(free, key=lambda i: shape[i])] = "fsdp"  # of equal dimensions the first
  while spec and spec[-1] is None:
    spec.pop()
  return NamedSharding(mesh, jax.P(*spec))


def constrained(x: jax.Array, path: str) -> jax.Array:
  """Returns x pinned to the sharding that RULES give its path on the training mesh in use.

  Without it XLA infers an activation's sharding from weights and gradients, and may gather the
  examples of all devices to split the width of a layer instead. Where no mesh is in use, or one
  without `data` and `fsdp`, x is left alone.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1 or not {"data", "fsdp"} & set(mesh.shape):
    return x
  return jax.lax.with_sharding_constraint(x, leaf_sharding(path, mesh, shape=x.shape))


def tree_shardings(
  tree: PyTree,
  mesh: Mesh | AbstractMesh,
  rules: Rules = (),
  *,
  root: str = "state",
  min_shard: int | None = None,
) -> PyTree:
  """Returns a sharding for every leaf of a tree of arrays or shapes; `root` starts their paths."""

  def place(path, leaf):
    path = f"{root}/{jax.tree_util.keystr(path, simple=True, separator='/')}"
    return leaf_sharding(path, mesh, rules, shape=leaf.shape, min_shard=min_shard)

  return jax.tree_util.tree_map_with_path(place, tree)


def sharded_shapes(shapes: PyTree, shardings: PyTree) -> PyTree:
  """Returns the abstract arrays that a checkpoint is restored into, each with its sharding."""
  return jax.tree.map(
    lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes, shardings
  )
