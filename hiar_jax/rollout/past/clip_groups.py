"""The blocks of a whole clip as groups of one forward: what each sees is known before it runs."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from hiar_jax.method import MethodConfig
from hiar_jax.models.frames import Frames, Read
from hiar_jax.rollout.past.kinds import kind
from hiar_jax.rollout.past.visibility import block_positions
from hiar_jax.types import Video


def clip_reads(method: MethodConfig, n: int, sources: dict[int, Read]) -> tuple[Read, ...]:
  """Returns what block n of a clip reads. sources: block -> where its K/V are, in their order."""
  reads = []
  for m, source in sources.items():
    frames = m * method.block + np.arange(method.block)
    row = kind(method).visible(method, n * method.block, frames)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], row, [False]])))  # of runs of True
    reads += [
      dataclasses.replace(source, frames=(int(first), int(end)))
      for first, end in zip(edges[::2], edges[1::2], strict=True)
    ]
  return tuple(reads)


def block_groups(
  x: Video, sigma, method: MethodConfig, shown: list[dict[int, Read]], context=None
) -> tuple[Frames, ...]:
  """Returns the blocks of a clip as groups. shown: of each, what it may see: block -> where.

  context: (latents, sigma) that blocks show, of the clip's first frames; by default x at sigma.
  """
  context = context or (x, sigma)
  sigma = jnp.asarray(sigma, jnp.float32)
  k = method.block
  return tuple(
    Frames(
      x[:, n * k : n * k + k],
      sigma[:, n * k : n * k + k] if sigma.ndim == 2 else sigma,
      block_positions(n, method),
      clip_reads(method, n, sources),
      packed=kind(method).packed(method, n, *context),
    )
    for n, sources in enumerate(shown)
  )


def causal_groups(x: Video, sigma, method: MethodConfig) -> tuple[Frames, ...]:
  """Returns the blocks of a clip as groups that see those before them, as they are here."""
  blocks = x.shape[1] // method.block
  return block_groups(x, sigma, method, [{m: Read(group=m) for m in range(blocks)}] * blocks)
