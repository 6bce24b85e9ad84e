"""The teacher's sampler: guided Euler steps on all frames at once."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from hiar_jax import flow
from hiar_jax.models import dit
from hiar_jax.models.dit import DiTConfig
from hiar_jax.rollout.blocks import Forward
from hiar_jax.rollout.noise import example_keys, example_normal
from hiar_jax.types import Key, Points, Text, Video


def make_sampler(
  config: DiTConfig,
  embed: Callable[[jax.Array], Text],
  negative: Callable[[Text], Text],
  sigmas: jax.Array,
  keep: tuple[int, ...],
  *,
  guidance: float,
  key: Key,
  clip: tuple[int, int, int, int],
) -> Callable[..., Points]:
  """Returns sample(params, tokens, index [b], start [b] = None) -> guided trajectories at the kept
  levels [b len(keep) f h w c].

  Traced; the caller jits. An example's trajectory does not depend on those beside it.

  embed: tokens [b ...] -> text [b l d]; negative: a text -> the one that guidance leads away from.
  clip: shape [f h w c] of a clip. index: of each example, for its noise. start: of each clip in its
  video.
  """

  def sample(params, tokens, index, start=None):
    text = embed(tokens)
    eps = example_normal(example_keys(key, index), clip)
    forwards = (dit.bind(config, params, of, start) for of in (text, negative(text)))
    return sample_trajectory(*forwards, eps, sigmas, keep, guidance)

  return sample


def sample_trajectory(
  forward: Forward,
  negative: Forward,
  eps: Video,
  sigmas: jax.Array,
  keep: tuple[int, ...],
  guidance: float,
) -> jax.Array:
  """From eps at sigmas[0] down to sigmas[-1]; the points at the kept indices into `sigmas`: [b
  len(keep) f h w c].

  v = v_text + guidance (v_text - v_negative); `negative` is unused where guidance is 0.
  """
  positions = jnp.arange(eps.shape[1], dtype=jnp.int32)

  def one(x, j):
    v, _ = forward(x, sigmas[j], positions)
    if guidance:
      v = flow.classifier_free_guidance(v, negative(x, sigmas[j], positions)[0], guidance)
    x = flow.euler(x, v, sigmas[j], sigmas[j + 1])
    return x, x

  _, points = jax.lax.scan(one, eps, jnp.arange(sigmas.size - 1))
  points = jnp.concatenate([eps[None], points])
  return jnp.moveaxis(points[jnp.asarray(keep)], 0, 1)
