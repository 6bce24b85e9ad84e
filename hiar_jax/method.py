"""The methods as data: which earlier frames a block sees, and at which noise level.

HiAR (arXiv 2603.08703), Self-Forcing (arXiv 2506.08009) and Self-Aligned Forcing (SAF) are one
family. Generation fills a grid of blocks x noise levels; a method sets the order in which the grid
is filled and the noise level at which a block is context for the blocks after it:

    | method       | order       | level            | gradient | sink     | window |
    | HiAR         | step_first  | output (t_{j+1}) | detached | 0        | 21     |
    | Self-Forcing | block_first | clean (0)        | detached | 0        | 21     |
    | SAF          | step_first  | input (t_j)      | attached | 3, clean | 12     |

`level`, for the step t_j -> t_{j+1} of a block: its predecessors are context as they are after that
step (output; HiAR, section 3.1: the noisiest context that keeps SNR(context) >= SNR(own output)),
as clean predictions (clean), or as they entered the step (input).

Window rule: with a window of w frames, the block's own included, and a sink of s frames, a block
that ends at frame e sees the frames p < s and the frames p > e - (w - s). rollout.past.visibility
turns it into masks.
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
  order:      `step_first`: all blocks take a denoising step before any takes the next;
              `block_first`: a block takes all its steps before the next block starts.
  level:      noise level of the context, see above.
  gradient:   of the exit step in training: whether it passes through the context's K/V.
  window:     latent frames that a block sees, its own included; 0 = all.
  sink:       first frames that never leave the window (counted in it).
  sink_level: `history` as any other frame, or `clean`: the sink's blocks are generated first and
              are context at sigma 0 (SAF).
  renoise:    from a level to the next: x0 and `fresh` noise (published code) or an `euler` step
              (the paper's Eq. 3).
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
    # finished blocks have lost their intermediate levels
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
    """Frames generated first and then seen at sigma 0; 0 where the sink is like any other frame."""
    return self.sink if self.sink_level == "clean" and self.order == "step_first" else 0

  def cache_frames(self, frames: int) -> int:
    """Returns how many past frames a cache must hold for a video of `frames` latent frames."""
    return min(self.window or frames, frames) - self.block if frames > self.block else 0

  def context_sigma(self, sigma, sigma_next):
    """Returns the noise level of a block as context, for its step from `sigma` to `sigma_next`."""
    # 0 * sigma_next: a 0 with the type and shape of the other two
    return {"output": sigma_next, "clean": 0.0 * sigma_next, "input": sigma}[self.level]
