"""The teacher's sampler: a solver with classifier-free guidance on all frames at once."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from hiar_jax import flow
from hiar_jax.models.frames import Frames, Network, Out, bind, whole_clip
from hiar_jax.rollout.noise import example_keys, example_normal
from hiar_jax.rollout.solvers import solve
from hiar_jax.types import Key, Points, Text, Video

Forward = Callable[[tuple[Frames, ...]], Out]


def make_sampler(
  network: Network,
  negative: Text,
  sigmas: jax.Array,
  keep: tuple[int, ...],
  *,
  guidance: float,
  key: Key,
  clip: tuple[int, int, int, int],
  solver: str = "euler",
) -> Callable[..., Points]:
  """Returns sample(params, text, index [b], start [b] = None) -> points [b len(keep) f h w c].

  Traced; the caller jits. An example's trajectory does not depend on the rest of the batch.

  text: [b l d]. negative: text [1 l d] of the negative prompt.
  sigmas: the levels of the trajectory, falling. keep: indices into them of the returned points.
  clip: shape [f h w c]. index: of each example, for its noise. start: of each clip, in frames of
  its video. solver: rollout.solvers.
  """

  def sample(params, text, index, start=None):
    eps = example_normal(example_keys(key, index), clip)
    bound = bind(network, params, text, start)
    unconditional = bind(network, params, jnp.broadcast_to(negative, text.shape), start)
    return sample_trajectory(bound, unconditional, eps, sigmas, keep, guidance, solver=solver)

  return sample


def sample_trajectory(
  bound: Forward,
  negative: Forward,
  eps: Video,
  sigmas: jax.Array,
  keep: tuple[int, ...],
  guidance: float,
  *,
  groups: Callable[[Video, jax.Array], tuple[Frames, ...]] = whole_clip,
  solver: str = "euler",
) -> jax.Array:
  """Integrates from eps at sigmas[0] to sigmas[-1]; returns points [b len(keep) f h w c].

  v = v_text + guidance (v_text - v_negative); `negative` is unused where guidance is 0.
  bound, negative: as models.frames.Bound. keep: indices into `sigmas`. groups(x, sigma): those of a
  forward, x itself the last one. solver: rollout.solvers.
  """

  def velocity(x, j):
    v = bound(groups(x, sigmas[j])).velocity[-1]
    if guidance:  # static: at 0 the second forward is not in the program
      w = negative(groups(x, sigmas[j])).velocity[-1]
      v = flow.classifier_free_guidance(v, w, guidance)
    return v

  return jnp.moveaxis(solve(velocity, eps, sigmas, solver, keep), 0, 1)
