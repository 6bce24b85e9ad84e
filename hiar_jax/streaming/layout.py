"""The layout of a pipeline over devices: a mesh of `level`, `tensor` and `sequence`
(parallel.rules says what each axis splits).
"""

import dataclasses
import math

import jax
from jax.sharding import AxisType, Mesh
import numpy as np

from hiar_jax.errors import UserError, at_least
from hiar_jax.models.dit import DiTConfig

AXES = ("level", "tensor", "sequence")


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
    units = math.gcd(heads, config.ffn_dim)
    for name, size, whole, what in (
      ("level", self.level, levels, f"the {levels} noise levels"),
      ("tensor", self.tensor, units, f"{heads} heads and {config.ffn_dim} hidden units"),
      (
        "sequence",
        self.sequence,
        math.gcd(heads, rows),
        f"{heads} heads and {rows} rows of tokens",
      ),
      ("tensor x sequence", self.tensor * self.sequence, heads, f"the {heads} heads"),
    ):
      if whole % size:
        *others, last = [str(d) for d in range(1, whole + 1) if whole % d == 0]
        possible = f"{', '.join(others)} or {last}" if others else last
        raise UserError(f"{name} = {size} does not divide {what}; {name} can be {possible}")

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
