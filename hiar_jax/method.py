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

import jax.numpy as jnp

from hiar_jax.errors import UserError
from hiar_jax.types import FrameMask, Positions

ORDERS = ("step_first", "block_first")
LEVELS = ("output", "clean", "input")
GRADIENTS = ("detached", "attached")
RENOISES = ("fresh", "euler")
SINK_LEVELS = ("history", "clean")


@dataclasses.dataclass(frozen=True)
class History:
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


def block_end(positions: Positions, block: int) -> Positions:
  """Last frame of the block that each frame belongs to."""
  return (positions // block + 1) * block - 1


def in_window(query: Positions, key: Positions, history: History) -> FrameMask:
  """The rule of the module's docstring, without causality: rows are queries, columns keys."""
  if not history.window:
    return jnp.ones((query.size, key.size), bool)
  oldest = block_end(query, history.block) - (history.window - history.sink)
  return (key[None, :] < history.sink) | (key[None, :] > oldest[:, None])


def block_causal_mask(positions: Positions, history: History) -> FrameMask:
  """Every frame sees its own block and the blocks before it."""
  causal = positions[None, :] <= block_end(positions, history.block)[:, None]
  return causal & in_window(positions, positions, history)


def past_mask(query: Positions, past: Positions, history: History) -> FrameMask:
  """Frames of the present see frames of earlier blocks; `past` entries of -1 are empty slots."""
  earlier = past[None, :] < (query // history.block * history.block)[:, None]
  return earlier & (past >= 0)[None, :] & in_window(query, past, history)


def own_block_mask(query: Positions, key: Positions, history: History) -> FrameMask:
  """Frames see their own block alone."""
  return (query // history.block)[:, None] == (key // history.block)[None, :]


def teacher_forcing_mask(positions: Positions, history: History) -> FrameMask:
  """For [context | noisy], both halves at `positions`: context is block-causal, noisy block n sees
  context < n and itself.
  """
  n = positions.size
  top = jnp.concatenate([block_causal_mask(positions, history), jnp.zeros((n, n), bool)], axis=1)
  bottom = jnp.concatenate(
    [past_mask(positions, positions, history), own_block_mask(positions, positions, history)],
    axis=1,
  )
  return jnp.concatenate([top, bottom], axis=0)
