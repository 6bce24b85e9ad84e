"""Context: how a block shows itself to its successors.

A level is asked at each denoising step of a block from `sigma` to `sigma_next`. Adding one is a
class of ten lines; the loops know none by name.
"""

from collections.abc import Callable
import dataclasses
from typing import Protocol

from hiar_jax import flow
from hiar_jax.types import Block


class ContextLevel(Protocol):
  """free: successors read the K/V of the denoising forward itself, so showing costs no forward."""

  free: bool

  def sigma(self, sigma, sigma_next):
    """Returns the noise level of the context."""

  def latent(self, x: Block, x_next: Block, x0: Block, eps: Callable[[], Block]) -> Block:
    """Returns the latent of the context.

    x at sigma, x_next at sigma_next, x0 predicted; eps() draws noise that nothing else draws.
    """


@dataclasses.dataclass(frozen=True)
class Output:
  """The block after its step (HiAR, section 3.1)."""

  free = False

  def sigma(self, sigma, sigma_next):
    return sigma_next

  def latent(self, x, x_next, x0, eps):
    return x_next


@dataclasses.dataclass(frozen=True)
class Clean:
  """The clean prediction (Self-Forcing)."""

  free = False

  def sigma(self, sigma, sigma_next):
    return 0.0 * sigma_next  # a 0 of its type and shape

  def latent(self, x, x_next, x0, eps):
    return x0


@dataclasses.dataclass(frozen=True)
class Input:
  """The block as it entered its step (Self-Aligned Forcing)."""

  free = True

  def sigma(self, sigma, sigma_next):
    return sigma

  def latent(self, x, x_next, x0, eps):
    return x


@dataclasses.dataclass(frozen=True)
class Fixed:
  """The clean prediction with noise of its own at one level (Diffusion Forcing)."""

  level: float
  free = False

  def sigma(self, sigma, sigma_next):
    return 0.0 * sigma_next + self.level

  def latent(self, x, x_next, x0, eps):
    return flow.add_noise(x0, eps(), self.level)
