"""Glossary of axes, and the array aliases that signatures use.

    b  batch                    l  text tokens
    f  latent frames            d  width of a vector (model width, text width)
    h  latent height            n  blocks of a video (one block = k latent frames)
    w  latent width             s  noise levels of the student
    c  channels                 p  frames held in a KV cache (past frames)
    k  latent frames a block    t  tokens of one latent frame after patching
    H  pixel height             a  attention heads
    W  pixel width              g  groups of frames that have a text each
    F  pixel frames             q  frames that attend (queries)

Arrays are channels-last. `sigma` lies in [0, 1], 1 is pure noise, 0 is data; the network is fed
`timestep = 1000 * sigma`. A latent frame's `position` is its index from the start of the video; it
never wraps. In lists of noise levels, [s + 1] are s levels and the 0 that the last step reaches.

`@typed` checks shapes and dtypes at call (also while tracing), so a wrong axis fails where it
enters.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

from beartype import beartype
import jax
from jaxtyping import Float, Int, jaxtyped
import numpy as np

typed = jaxtyped(typechecker=beartype)

DTYPES = ("float32", "bfloat16")  # of weights, products and texts

Array = jax.Array | np.ndarray
PyTree = Any
Params = PyTree  # nested dict of arrays: one network's weights
Key = jax.Array  # a typed random key, jax.random.key

Video = Float[Array, "b f h w c"]  # latents of a clip
Points = Float[Array, "b points f h w c"]  # a trajectory: latents of a clip at several levels
Block = Float[Array, "b k h w c"]  # latents of one block
Pixels = Float[Array, "b f H W 3"]  # a clip in [-1, 1]; f counts pixel frames here
Sigma = Float[Array, "b f"]  # one noise level per frame
Text = Float[Array, "b l d"]  # encoded prompt
Texts = Float[Array, "b g l d"]  # one for each of g equal groups of a clip's frames
Tokens = Int[Array, "b l"]  # token ids of a prompt
Positions = Int[Array, "f"]  # frame indices

Batch = dict[str, Any]
Mean = Callable[[PyTree], PyTree]  # averages over devices (identity unless mapped by pmap)


@dataclasses.dataclass(frozen=True)
class LatentShape:
  """Sizes of a clip's latents, [f h w c] without the batch."""

  frames: int
  height: int
  width: int
  channels: int

  @property
  def clip(self) -> tuple[int, int, int, int]:
    """[f h w c] of a whole clip."""
    return (self.frames, self.height, self.width, self.channels)

  def block(self, frames: int) -> tuple[int, int, int, int]:
    """[k h w c] of a block of `frames` latent frames."""
    return (frames, self.height, self.width, self.channels)
