"""The noise of an example, drawn from keys of its own.

So it depends neither on the rest of the batch, nor on the devices, nor on gradient accumulation.
"""

from collections.abc import Callable

import jax

from hiar_jax.types import Key


def seed_key(seed: int) -> Key:
  """Returns the key of a seed, of one generator whatever JAX_DEFAULT_PRNG_IMPL says: under others
  (rbg, unsafe_rbg) the draws of an example depend on its neighbours, and fold_in may repeat keys.
  """
  return jax.random.key(seed, impl="threefry2x32")


def example_keys(key: Key, index: jax.Array) -> Key:
  """Returns one key per example [b] from its index in the global batch [b]."""
  return jax.vmap(lambda i: jax.random.fold_in(key, i))(index)


def example_normal(keys: Key, shape: tuple[int, ...]) -> jax.Array:
  """Returns a standard normal [b, *shape], each example from its own key."""
  return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def block_noise(
  key: Key, index: jax.Array, block: tuple[int, int, int, int]
) -> Callable[[jax.Array, jax.Array], jax.Array]:
  """Returns noise(level, n) -> [b k h w c]: what an example draws for block n at a level.

  index: [b], of each example. block: the shape [k h w c].
  """
  keys = example_keys(key, index)

  def noise(level, n):
    # a key per (example, level, block): every order of the loops draws the same numbers
    return example_normal(
      jax.vmap(lambda k: jax.random.fold_in(jax.random.fold_in(k, level), n))(keys), block
    )

  return noise
