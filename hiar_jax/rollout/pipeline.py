"""The pipeline of rollout.tick: its method, and its state between two ticks."""

from collections.abc import Callable
import dataclasses

import flax.struct
import jax

from hiar_jax.errors import UserError
from hiar_jax.method import Method
from hiar_jax.rollout.blocks import Forward
from hiar_jax.rollout.past import relative_sink
from hiar_jax.rollout.past.ring import Cache
from hiar_jax.types import Key, Text, Texts

Network = Callable[[Text | Texts], Forward]  # models.dit.bind without its text


@flax.struct.dataclass
class PipelineState:
  """A generation in progress at s levels, with a ring of r = s + 1 texts.

  latents: [s b k h w c], the inputs of the next tick. Level 0 takes noise instead; its entry holds
    the block that left in the last tick.
  context: [s b k h w c], latents that each level has just denoised and whose K/V are not in its
    cache yet; None at the input level.
  cache: each leaf [s ...]; contexts: [s b slots h w c], the latents that its K/V were computed
    from, for `recache`.
  texts: [r b l d], block n's at n % r. A tick uses those of blocks `block - s` (the context at the
    last level) to `block`.
  recache: [r], for block n at n % r: whether the history is recached under its text before it.
  block: int32 scalar, the next block to enter; first: int32 scalar, the first block not given.
  key, seed [b]: of the noise.
  """

  latents: jax.Array
  context: jax.Array | None
  cache: Cache
  contexts: jax.Array
  texts: jax.Array
  recache: jax.Array
  block: jax.Array
  first: jax.Array
  key: Key
  seed: jax.Array

  @property
  def levels(self) -> int:
    return self.latents.shape[0]


@dataclasses.dataclass(frozen=True)
class PipelineMethod:
  """The method of a pipeline, its levels [s + 1], and how sink positions count.

  sink_positions: `absolute`, or `relative` to the window (rollout.past.relative_sink). Raises
  UserError for a method that is not step-first, or a window too short for a relative sink.
  """

  method: Method
  sigmas: tuple[float, ...]
  sink_positions: str = "absolute"

  def __post_init__(self):
    if self.method.order != "step_first":
      raise UserError(
        f"history.order = {self.method.order!r} cannot be streamed level by level: a block "
        "starts only when the one before it is done, "
        "so there is never more than one to work on; generate whole videos with it (python -m "
        "hiar_jax.generate), or use a step_first model"
      )
    if self.sink_positions not in relative_sink.POSITIONS:
      raise UserError(
        f"sink_positions = {self.sink_positions!r}: expected one of "
        f"{', '.join(relative_sink.POSITIONS)}"
      )
    if self.carries:
      relative_sink.check(self.method)

  @property
  def carries(self) -> bool:
    """True where the sink moves along with the window."""
    return self.sink_positions == "relative" and self.method.sink > 0 and self.method.window > 0

  @property
  def levels(self) -> int:
    return len(self.sigmas) - 1

  @property
  def fused(self) -> bool:
    """True where a forward holds a context block beside the noisy one.

    At the input level the forward that denoises a block computes its context as well.
    """
    return self.method.level != "input"
