"""The pipeline of rollout.tick between two ticks: its state."""

import flax.struct
import jax

from hiar_jax.rollout.past.ring import Ring
from hiar_jax.types import Key, Text


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
  recache: [r], whether the past of each level is encoded again under block n's text before the
    level works on it; block n's at n % r.
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
