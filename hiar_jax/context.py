"""Context: how a block shows itself to the blocks after it.

Generation fills a grid of blocks x noise levels. While a block takes the step from `sigma` to
`sigma_next`, its predecessors are context to it: their K/V come from a latent of theirs at a noise
level, and that choice is what the methods of the family differ in (hiar_jax.method). A new one is a
class like those below with a name in LEVELS; no loop knows any of them by name.
"""

from collections.abc import Callable
import dataclasses
from typing import Protocol

from hiar_jax.errors import UserError
from hiar_jax.types import Block


class ContextLevel(Protocol):
  """How a block shows itself.

  free: its K/V are those of the forward that denoised it, so showing it takes no forward of its
  own.
  of_x0: its latent is made of x0 alone, so a finished block can show itself (block_first).
  """

  free: bool
  of_x0: bool

  def sigma(self, sigma, sigma_next):
    """Returns the noise level of the context, for a step from `sigma` to `sigma_next`."""

  def latent(self, x: Block, x_next: Block, x0: Block, noised: Callable[[Block], Block]) -> Block:
    """Returns the latent of the context: from x at `sigma`, x_next at `sigma_next`, and the
    prediction x0. noised(x0) is a clean latent at the context's noise level, with noise that is
    drawn for nothing else.
    """


@dataclasses.dataclass(frozen=True)
class Output:
  """The block after its step: HiAR, section 3.1, the noisiest context that keeps SNR(context) >=
  SNR(own output).
  """

  free = False
  of_x0 = False

  def sigma(self, sigma, sigma_next):
    return sigma_next

  def latent(self, x, x_next, x0, noised):
    return x_next


@dataclasses.dataclass(frozen=True)
class Clean:
  """The block's clean prediction, at sigma 0 (Self-Forcing)."""

  free = False
  of_x0 = True

  def sigma(self, sigma, sigma_next):
    return 0.0 * sigma_next  # a 0 with the type and shape of the other two

  def latent(self, x, x_next, x0, noised):
    return x0


@dataclasses.dataclass(frozen=True)
class Input:
  """The block as it entered the step (Self-Aligned Forcing)."""

  free = True
  of_x0 = False

  def sigma(self, sigma, sigma_next):
    return sigma

  def latent(self, x, x_next, x0, noised):
    return x


@dataclasses.dataclass(frozen=True)
class Fixed:
  """The clean prediction with noise of its own, at one level whatever the step (Diffusion Forcing's
  sampling with a little noise on the history, arXiv 2407.01392).
  """

  level: float
  free = False
  of_x0 = True

  def __post_init__(self):
    if not 0 < self.level < 1:
      raise UserError(f"a fixed context level lies between 0 and 1, got {self.level}")

  def sigma(self, sigma, sigma_next):
    return 0.0 * sigma_next + self.level

  def latent(self, x, x_next, x0, noised):
    return noised(x0)


# name in a config, `history.level`, -> class; a number behind a colon is its argument
LEVELS: dict[str, Callable[..., ContextLevel]] = {
  "output": Output,
  "clean": Clean,
  "input": Input,
  "fixed": Fixed,
}


def of_name(name: str) -> ContextLevel:
  """Returns the context level of a config's name: `output`, `clean`, `input`, `fixed:0.1`.

  Raises UserError for a name that is not in LEVELS, or an argument that does not fit.
  """
  kind, *numbers = str(name).split(":")
  try:
    return LEVELS[kind](*map(float, numbers))
  except (KeyError, TypeError, ValueError):
    known = ", ".join(sorted(LEVELS))
    raise UserError(
      f"history.level = {name!r}: expected one of {known}; `fixed` takes a number, as fixed:0.1"
    ) from None
