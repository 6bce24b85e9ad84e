"""The layout of a pipeline over devices: a mesh of `level`, `tensor` and `sequence`
(parallel.rules says what each axis splits).
"""

from collections.abc import Iterator
import dataclasses
import math

import jax
from jax.sharding import AxisType, Mesh
import numpy as np

from hiar_jax.errors import UserError, at_least
from hiar_jax.models.frames import Network

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

  def check(self, levels: int, network: Network, height: int) -> None:
    """Raises UserError where an axis does not divide what it splits. height: of the latents."""
    for name, size, whole, what in self.misfits(levels, network, height):
      *others, last = [str(d) for d in range(1, whole + 1) if whole % d == 0]
      possible = f"{', '.join(others)} or {last}" if others else last
      raise UserError(f"{name} = {size} does not divide {what}; {name} can be {possible}")

  def misfits(self, levels: int, network: Network, height: int) -> Iterator[tuple]:
    """Yields (axes, their size, the number that it should divide, the number's name)."""
    splits = network.splits(height)
    named = {axis for axes in splits for axis in axes}
    unsplit = {
      (axis,): (1, f"anything of {network.kind!r}") for axis in AXES[1:] if axis not in named
    }
    for axes, (whole, what) in {
      ("level",): (levels, f"the {levels} noise levels"),
      **unsplit,
      **splits,
    }.items():
      size = math.prod(getattr(self, axis, 1) for axis in axes)  # a stream has no ring
      if whole % size:
        yield " x ".join(axes), size, whole, what

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


def widest(count: int, levels: int, network: Network, height: int) -> Layout:
  """Returns a layout of as many of `count` devices as can be used: levels first, since they
  communicate least, then tensor, then sequence.
  """
  layout = Layout()
  for axis in AXES:
    sizes = range(1, count // layout.devices + 1)
    wider = [dataclasses.replace(layout, **{axis: n}) for n in sizes]
    layout = [one for one in wider if not any(one.misfits(levels, network, height))][-1]
  return layout
