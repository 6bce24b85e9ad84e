"""The methods as data: which earlier frames a block sees, and at which noise level.

HiAR (arXiv 2603.08703), Self-Forcing (arXiv 2506.08009) and Self-Aligned Forcing (SAF) are one
family. Generation fills a grid of blocks x noise levels; a method sets the order in which the grid
is filled and the noise level at which a block is context for the blocks after it:

    | method       | order       | level            | gradient | sink     | window |
    | HiAR         | step_first  | output (t_{j+1}) | detached | 0        | 21     |
    | Self-Forcing | block_first | clean (0)        | detached | 0        | 21     |
    | SAF          | step_first  | input (t_j)      | attached | 3, clean | 12     |

`level`, for the step t_j -> t_{j+1} of a block: its predecessors are context as they are after that
step (output), as clean predictions (clean), or as they entered the step (input): hiar_jax.context.

Window rule: with a window of w frames, the block's own included, and a sink of s frames, a block
that ends at frame e sees the frames p < s and the frames p > e - (w - s): rollout.past.visibility.
"""

import dataclasses

import numpy as np

from hiar_jax import context
from hiar_jax.errors import UserError, one_of

ORDERS = ("step_first", "block_first")
GRADIENTS = ("detached", "attached")
RENOISES = ("fresh", "euler")
SINK_LEVELS = ("history", "clean")
SINK_POSITIONS = ("absolute", "relative")


@dataclasses.dataclass(frozen=True)
class MethodConfig:
  """One row of the table above, as a config's group `history` holds it.

  block:      latent frames generated at once (k).
  order:      `step_first`: all blocks take a denoising step before any takes the next;
              `block_first`: a block takes all its steps before the next block starts.
  level:      how a block shows itself to its successors (hiar_jax.context).
  gradient:   of the exit step in training: whether it passes through the context's K/V.
  window:     latent frames that a block sees, its own included; 0 = all.
  sink:       first frames that never leave the window (counted in it).
  sink_level: `history` as any other frame, or `clean`: the sink's blocks are generated first and
              are context at sigma 0 (SAF).
  renoise:    from a level to the next: x0 and `fresh` noise (published code) or an `euler` step
              (the paper's Eq. 3).
  past:       what is kept of earlier blocks, by name (rollout.past.kinds).
  packing:    of the past `packed`: how frames that have left the window are packed, as FramePack's
              schedules are written (packing.schedule); tc_f16k4f2k2f6k1_g3 for blocks of 3 and a
              window of 9, of which 6 frames are past.
  """

  block: int = 3
  order: str = "step_first"
  level: str = "output"
  gradient: str = "detached"
  window: int = 21
  sink: int = 0
  sink_level: str = "history"
  renoise: str = "fresh"
  past: str = dataclasses.field(default="ring", metadata={"since": "2026-11"})
  packing: str = dataclasses.field(default="", metadata={"since": "2026-11"})

  def __post_init__(self):
    self.context  # noqa: B018  # raises for an unknown level
    one_of(ORDERS, **{"history.order": self.order})
    one_of(GRADIENTS, **{"history.gradient": self.gradient})
    one_of(RENOISES, **{"history.renoise": self.renoise})
    one_of(SINK_LEVELS, **{"history.sink_level": self.sink_level})
    if self.block < 1 or self.sink < 0 or self.window < 0:
      raise UserError(
        f"history.block = {self.block}, sink = {self.sink}, window = {self.window}: expected "
        "block >= 1, sink >= 0, window >= 0"
      )
    if self.window and self.window < self.block + self.sink:
      raise UserError(
        f"history.window = {self.window} cannot hold a block ({self.block}) and the sink "
        f"({self.sink})"
      )
    # finished blocks have lost their intermediate levels
    if self.order == "block_first" and not self.context.of_x0:
      raise UserError(
        f"history.level = {self.level!r}: block_first finishes each block first, so its history "
        "is 'clean'"
      )
    if self.sink_level == "clean" and self.sink % self.block:
      raise UserError(
        f"a clean sink is whole blocks: history.sink = {self.sink} is not a multiple of block = "
        f"{self.block}"
      )

  @property
  def context(self) -> context.ContextLevel:
    """How a block shows itself to its successors."""
    return context.of_name(self.level)

  @property
  def clean_sink(self) -> int:
    """Frames generated first and then seen at sigma 0; 0 where the sink is like any other frame."""
    return self.sink if self.sink_level == "clean" and self.order == "step_first" else 0

  def past_frames(self, frames: int) -> int:
    """Returns how many past frames a video of `frames` latent frames must keep."""
    return min(self.window or frames, frames) - self.block if frames > self.block else 0

  def at(self, sigmas, sink_positions: str = "absolute") -> "Method":
    """Returns the method at the student's levels [s + 1], falling to 0."""
    levels = tuple(float(sigma) for sigma in sigmas)
    row = {field.name: getattr(self, field.name) for field in dataclasses.fields(MethodConfig)}
    return Method(**row, sigmas=levels, sink_positions=sink_positions)


@dataclasses.dataclass(frozen=True)
class Method(MethodConfig):
  """A row of the table bound to its levels: all that a rollout must know.

  sigmas: the student's levels [s + 1], float32's values, 0 last.
  sink_positions: `absolute`, as published, or `relative` to the window. At absolute positions the
    distance from a block to the sink grows without end; LongLive and Rolling Forcing move the
    sink's rotary positions along instead, so that it stays what it was when the window began to
    roll. A place embedding (dit.DiTConfig), added before the layers, keeps the true position.

  Raises UserError for a window in which blocks would see a relative sink before it is in the cache.
  """

  sigmas: tuple[float, ...] = ()
  sink_positions: str = "absolute"

  def __post_init__(self):
    super().__post_init__()
    one_of(SINK_POSITIONS, sink_positions=self.sink_positions)
    least = (-(-self.sink // self.block) + 1) * self.block  # the sink's blocks and one more
    if self.moves_sink and self.window < least:
      raise UserError(
        f"window = {self.window} is too short to carry a sink of {self.sink} along: with "
        f"blocks of {self.block} frames it takes at least {least}"
      )

  @property
  def levels(self) -> int:
    """The noise levels at which the network works."""
    return len(self.sigmas) - 1

  @property
  def moves_sink(self) -> bool:
    """True where the sink moves along with the window."""
    return self.sink_positions == "relative" and self.sink > 0 and self.window > 0

  @property
  def sigma_table(self) -> np.ndarray:
    """The levels [s + 1], float32."""
    return np.asarray(self.sigmas, np.float32)
