"""The layout of a pipeline over devices, a mesh of three axes.

level      noise levels, each with its cache, its latents in flight and its contexts
tensor     heads and the hidden units of the MLP (weights, caches)
sequence   rows of the frame, in layers that work token by token; attention splits its heads
           over tensor x sequence instead, so that a cache never moves
"""

import dataclasses
import math

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
import numpy as np

from hiar_jax.errors import UserError, at_least
from hiar_jax.method import Method
from hiar_jax.models.dit import KV, DiTConfig
from hiar_jax.rollout.past.ring import Ring
from hiar_jax.rollout.pipeline import PipelineState
from hiar_jax.types import Params, PyTree

AXES = ("level", "tensor", "sequence")
HEADS = ("tensor", "sequence")

# Parameter of a module -> its axis that is split over `tensor`, not counting the leading axis of
# layers (they are scanned). As in Megatron-LM (arXiv:1909.08053, section 3): the projections into
# attention and MLP by their outputs (columns), those out of them by their inputs (rows), so that a
# layer needs one all-reduce after each. A row-split module's bias is added once, hence not split.
COLUMNS = {"kernel": 1, "bias": 0, "scale": 0}
ROWS = {"kernel": 0}
SPLIT = {
  "q": COLUMNS,
  "k": COLUMNS,
  "v": COLUMNS,
  "norm_q": COLUMNS,
  "norm_k": COLUMNS,
  "mlp_in": COLUMNS,
  "o": ROWS,
  "mlp_out": ROWS,
}


@dataclasses.dataclass(frozen=True)
class Layout:
  """Numbers of devices along each axis."""

  level: int = 1
  tensor: int = 1
  sequence: int = 1

  def __post_init__(self):
    at_least(1, level=self.level, tensor=self.tensor, sequence=self.sequence)

  @property
  def devices(self) -> int:
    return self.level * self.tensor * self.sequence

  def check(self, levels: int, config: DiTConfig, height: int) -> None:
    """Raises UserError where an axis does not divide what it splits. height: of the latents."""
    heads = config.num_heads
    rows = height // config.patch[1]  # of tokens in a frame
    split = self.tensor * self.sequence
    _check_divides("level", self.level, levels, f"the {levels} noise levels")
    _check_divides(
      "tensor",
      self.tensor,
      math.gcd(heads, config.ffn_dim),
      f"{heads} heads and {config.ffn_dim} hidden units",
    )
    _check_divides(
      "sequence", self.sequence, math.gcd(heads, rows), f"{heads} heads and {rows} rows of tokens"
    )
    if heads % split:
      raise UserError(
        f"tensor x sequence = {split} does not divide the {heads} heads; their product can be "
        f"{_divisors(heads)}"
      )

  def mesh(self, devices=None) -> Mesh:
    """Returns the mesh [level tensor sequence] of the first of `devices` (default: all).

    Raises UserError where there are too few.
    """
    devices = list(jax.devices() if devices is None else devices)
    if self.devices > len(devices):
      raise UserError(
        f"level = {self.level} x tensor = {self.tensor} x sequence = {self.sequence} takes "
        f"{self.devices} devices; here are {len(devices)}"
      )
    # `sequence` varies fastest, `level` slowest: neighbours exchange most, as levels pass on one
    # block's latents a tick, and the other two axes activations in every layer
    grid = np.asarray(devices[: self.devices]).reshape(self.level, self.tensor, self.sequence)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


def widest(count: int, levels: int, config: DiTConfig, height: int) -> Layout:
  """Returns a layout of as many of `count` devices as can be used: levels first, since they
  communicate least, then tensor, then sequence.
  """
  level = max(n for n in range(1, count + 1) if levels % n == 0)
  tensor = max(
    n for n in range(1, count // level + 1) if config.num_heads % n == 0 and config.ffn_dim % n == 0
  )
  rows = height // config.patch[1]
  left = count // (level * tensor)
  sequence = max(
    n for n in range(1, left + 1) if rows % n == 0 and config.num_heads % (tensor * n) == 0
  )
  return Layout(level, tensor, sequence)


def _check_divides(name: str, size: int, whole: int, what: str) -> None:
  if whole % size:
    raise UserError(f"{name} = {size} does not divide {what}; {name} can be {_divisors(whole)}")


def _divisors(n: int) -> str:
  found = [str(d) for d in range(1, n + 1) if n % d == 0]
  return found[0] if len(found) == 1 else f"{', '.join(found[:-1])} or {found[-1]}"


# ---------------------------------------------------------------------------------------- shardings


def state_sharding(method: Method, mesh: Mesh) -> PipelineState:
  """Returns a sharding for every array of the state of a method's pipeline."""

  def place(*axes: str | None) -> NamedSharding:
    return NamedSharding(mesh, jax.P(*axes))

  latents = place("level", None, None, "sequence")  # [s b k h w c], the past's [s b slots h w c]
  keys = place("level", None, None, None, None, HEADS)  # [s layers b slots t a d]
  return PipelineState(
    latents=latents,
    context=None if method.context.free else latents,
    past=Ring(KV(keys, keys), place("level"), latents, method),
    texts=place(),
    recache=place(),
    block=place(),
    first=place(),
    key=place(),
    seed=place(),
  )


def params_sharding(params: Params, mesh: Mesh) -> PyTree:
  """Returns a sharding for every weight: layers split over `tensor`, everything else replicated."""

  def place(path, leaf):
    names = [entry.key for entry in path]
    axis = SPLIT.get(names[-2], {}).get(names[-1]) if names[0] == "layers" else None
    if axis is None:
      return NamedSharding(mesh, jax.P())
    return NamedSharding(mesh, jax.P(*(None,) * (1 + axis), "tensor"))  # 1 +: the axis of layers

  return jax.tree_util.tree_map_with_path(place, params)
