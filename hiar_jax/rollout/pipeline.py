"""The pipeline of rollout.tick between two ticks: its state, and the block that enters it."""

import flax.struct
import jax

from hiar_jax.errors import UserError
from hiar_jax.method import Method
from hiar_jax.rollout.past.ring import Ring
from hiar_jax.types import Key, Text


@flax.struct.dataclass
class Entering:
  """The block that enters: its text [b l d], and whether the past of each level is encoded again
  under it before the level works on it.
  """

  text: Text
  recache: jax.Array | bool


@flax.struct.dataclass
class PipelineState:
  """A generation in progress at s levels, with a ring of r = s + 1 texts.

  latents: [s b k h w c], the inputs of the next tick. Level 0 takes noise instead; its entry holds
    the block that left in the last tick.
  context: [s b k h w c], latents that each level has just denoised and whose K/V are not in its
    past yet; None where a context is free.
  past: of each level, with latents; each leaf [s ...].
  texts: [r b l d], block n's at n % r. A tick uses those of blocks `block - s` (the context at the
    last level) to `block`.
  recache: [r], Entering's, for block n at n % r.
  block: int32 scalar, the next block to enter; first: int32 scalar, the first block not given.
  key, seed [b]: of the noise.
  """

  latents: jax.Array
  context: jax.Array | None
  past: Ring
  texts: jax.Array
  recache: jax.Array
  block: jax.Array
  first: jax.Array
  key: Key
  seed: jax.Array

  @property
  def levels(self) -> int:
    return self.latents.shape[0]

  def text_of(self, n) -> Text:
    """Returns the text of block n."""
    return self.texts[n % self.texts.shape[0]]

  def entered(self, entering: Entering) -> "PipelineState":
    """Returns the state that knows the text of the block `block`."""
    slot = self.block % self.texts.shape[0]
    return self.replace(
      texts=self.texts.at[slot].set(entering.text),
      recache=self.recache.at[slot].set(entering.recache),
    )


def check_method(method: Method) -> None:
  """Raises UserError for a method that is not step-first: its levels cannot work at once."""
  if method.order != "step_first":
    raise UserError(
      f"history.order = {method.order!r} cannot be streamed level by level: a block "
      "starts only when the one before it is done, "
      "so there is never more than one to work on; generate whole videos with it (python -m "
      "hiar_jax.generate), or use a step_first model"
    )
