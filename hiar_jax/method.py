"""What a block may see of the blocks before it: the axes along which the methods differ, as data.

HiAR, Self-Forcing and Self-Aligned Forcing (SAF) are one family. Generation is a grid of blocks x
noise levels; a method says in which order the grid is walked and at which noise level a block shows
itself to its successors:

    | axis             | HiAR (2603.08703) | Self-Forcing | SAF        |
    | order            | step_first        | block_first  | step_first |
    | level            | output (t_{j+1})  | clean (0)    | input (t_j)|
    | gradient         | detached          | detached     | attached   |
    | sink             | 0                 | 0            | 3, clean   |
    | window           | 21                | 21           | 12         |

`level` for the step t_j -> t_{j+1} of a block: its predecessors are seen as they are after that
step (output, section 3.1: the noisiest context that keeps SNR(context) >= SNR(own output)), as
clean predictions (clean), or as they entered the step (input).

The masks below are the same facts at the granularity of frames. One rule holds everywhere: with a
window of w frames, counting the block's own, and a sink of s frames, a block that ends at frame e
sees the frames p < s and the frames p > e - (w - s).
"""

import dataclasses

from hiar_jax.errors import UserError

ORDERS = ("step_first", "block_first")
LEVELS = ("output", "clean", "input")
GRADIENTS = ("detached", "attached")
RENOISES = ("fresh", "euler")
SINK_LEVELS = ("history", "clean")


@dataclasses.dataclass(frozen=True)
class Method:
  """One row of the table above.

  block:      latent frames generated at once (k).
  window:     latent frames that a block sees, its own included; 0 = all.
  sink:       first frames that never leave the window (counted in it).
  sink_level: `history` as any other frame, or `clean`: the sink's blocks are generated first and
              shown at sigma 0 (SAF).
  renoise:    how a latent moves to the next level: x0 and `fresh` noise (published code) or an
              `euler` step (the paper's Eq. 3).
  """

  block: int = 3
  order: str = "step_first"
  level: str = "output"
  gradient: str = "detached"
  window: int = 21
  sink: int = 0
  sink_level: str = "history"
  renoise: str = "fresh"

  def __post_init__(self):
    for name, allowed in (
      ("order", ORDERS),
      ("level", LEVELS),
      ("gradient", GRADIENTS),
      ("renoise", RENOISES),
      ("sink_level", SINK_LEVELS),
    ):
      if getattr(self, name) not in allowed:
        raise UserError(
          f"history.{name} = {getattr(self, name)!r}: expected one of {', '.join(allowed)}"
        )
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
    if self.order == "block_first" and self.level != "clean":
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
  def clean_sink(self) -> int:
    """Frames that are generated first and then shown clean; 0 where the sink is like any other
    frame.
    """
    return self.sink if self.sink_level == "clean" and self.order == "step_first" else 0

  def cache_frames(self, frames: int) -> int:
    """Past frames that a cache must hold for a video of `frames`."""
    return min(self.window or frames, frames) - self.block if frames > self.block else 0

  def context_sigma(self, sigma, sigma_next):
    """The noise level at which a block is shown to its successors while it moves from `sigma` to
    `sigma_next`.
    """
    return {"output": sigma_next, "clean": 0.0 * sigma_next, "input": sigma}[self.level]
