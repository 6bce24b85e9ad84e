"""Where a pipe lies: `level` devices share the noise levels, and inside a level `tensor` and
`sequence` split the network and the frame.

    level      levels, each with its cache, its latents in flight and what it has shown
    tensor     heads and the hidden units of the MLP (weights, caches)
    sequence   rows of the frame for what is done token by token; attention splits its heads over
               both, so a cache never moves
"""

import dataclasses
import math

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
import numpy as np

from hiar_jax.errors import UserError, at_least
from hiar_jax.models.dit import KV, DiTConfig
from hiar_jax.rollout.past.ring import Cache
from hiar_jax.rollout.tick import PipelineState
from hiar_jax.types import Params, PyTree

AXES = ("level", "tensor", "sequence")
HEADS = ("tensor", "sequence")

# How a layer's parameters are split: (module, its parameter) -> axis over `tensor`, counted behind
# the axis of layers.
COLUMNS, ROWS = {"kernel": 1, "bias": 0, "scale": 0}, {"kernel": 0}
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
  """Devices along each axis."""

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
    heads, rows, split = config.num_heads, height // config.patch[1], self.tensor * self.sequence
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
    """Over the first devices. Raises UserError where there are too few."""
    devices = list(jax.devices() if devices is None else devices)
    if self.devices > len(devices):
      raise UserError(
        f"level = {self.level} x tensor = {self.tensor} x sequence = {self.sequence} takes "
        f"{self.devices} devices; here are {len(devices)}"
      )
    return Mesh(
      np.asarray(devices[: self.devices]).reshape(self.level, self.tensor, self.sequence),
      AXES,
      axis_types=(AxisType.Auto,) * 3,
    )


def widest(count: int, levels: int, config: DiTConfig, height: int) -> Layout:
  """As many of `count` devices as can be used: levels first, since they talk least, then tensor,
  then sequence.
  """
  level = max(n for n in range(1, count + 1) if levels % n == 0)
  tensor = max(
    n for n in range(1, count // level + 1) if config.num_heads % n == 0 and config.ffn_dim % n == 0
  )
  rows, left = height // config.patch[1], count // (level * tensor)
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


def replicated_sharding(mesh: Mesh) -> NamedSharding:
  """On every device."""
  return NamedSharding(mesh, jax.P())


def state_sharding(fused: bool, mesh: Mesh) -> PipelineState:
  """A sharding for every array of a pipe; fused: as its plan."""
  place = lambda *spec: NamedSharding(mesh, jax.P(*spec))
  latents, keys = (
    place("level", None, None, "sequence"),
    place("level", None, None, None, None, HEADS),
  )
  return PipelineState(
    latents=latents,
    context=latents if fused else None,
    cache=Cache(KV(keys, keys), place("level")),
    contexts=latents,
    texts=place(),
    recache=place(),
    block=place(),
    first=place(),
    key=place(),
    seed=place(),
  )


def params_sharding(params: Params, mesh: Mesh) -> PyTree:
  """A sharding for every weight: layers split over `tensor`, everything else whole on each
  device.
  """

  def place(path, leaf):
    names = [entry.key for entry in path]
    axis = SPLIT.get(names[-2], {}).get(names[-1]) if names[0] == "layers" else None
    return NamedSharding(mesh, jax.P() if axis is None else jax.P(*(None,) * (1 + axis), "tensor"))

  return jax.tree_util.tree_map_with_path(place, params)
